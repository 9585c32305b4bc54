"""The instruments, each a verb on heads: read, cut, patch, score, steer, train."""
