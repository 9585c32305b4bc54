"""Time and memory against named peers: `make bench`. Not tests: pytest does not collect them."""
