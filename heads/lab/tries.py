"""Answers from a closed list, token by token: what may come next, so that only whole labels are written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch


class Trie:
    """Token sequences of labels as a tree: after a prefix, which tokens lead to a label?

        trie = heads.Trie({"red": [5], "red wine": [5, 9]}, end=2)
        trie.allowed([5])                    # [2, 9]: the label ends here, or goes on
        model.generate(ids, prefix_allowed_tokens_fn=trie.constraint(ids.shape[1]))

    A label that is another's beginning is no trouble: it ends with `end`.

    Args:
        labels: text -> token ids, as they follow the prompt.
        end: the token after a label (the end of the text, a separator).

    Raises:
        ValueError: no labels, a label without tokens or with `end` among them, two labels of the same tokens.
    """

    def __init__(self, labels: Mapping[str, Sequence[int]], end: int):
        if not labels:
            raise ValueError("a trie needs labels: there are none")
        self.end, self.labels, self._below = int(end), {}, {}
        for label, ids in labels.items():
            key = tuple(map(int, ids))
            if not key:
                raise ValueError(f"label {label!r} has no tokens")
            if self.end in key:
                raise ValueError(f"label {label!r} holds token {self.end}, which ends a label")
            if key in self.labels:
                raise ValueError(f"labels {self.labels[key]!r} and {label!r} are the same tokens: {list(key)}")
            self.labels[key] = label
            for i, token in enumerate((*key, self.end)):
                self._below.setdefault(key[:i], {}).setdefault(token, set()).add(label)

    def allowed(self, prefix: Iterable[int] = (), used: Collection[str] = ()) -> list[int]:
        """Tokens after which a label that is not `used` can still be completed, in order of their ids; none if there is no such."""
        gone = {used} if isinstance(used, str) else set(used)
        return sorted(token for token, labels in self._below.get(tuple(map(int, prefix)), {}).items() if labels - gone)

    def read(self, ids: Iterable[int]) -> str | None:
        """The label that some tokens write, up to `end`; None if they write none."""
        ids = list(map(int, ids))
        return self.labels.get(tuple(ids[: ids.index(self.end)] if self.end in ids else ids))

    def split(self, ids: Iterable[int]) -> tuple[list[str], list[int]]:
        """The labels that tokens have written, each with its `end`, and the tokens of one that is begun."""
        done, open_ = [], []
        for token in map(int, ids):
            if token == self.end and open_:
                done.append(self.labels.get(tuple(open_), ""))
                open_ = []
            elif token != self.end:
                open_.append(token)
        return done, open_

    def constraint(self, start: int, most: int = 1, stop: int | None = None) -> Callable[[int, torch.Tensor], list[int]]:
        """transformers' `prefix_allowed_tokens_fn`: after `start` tokens of prompt up to `most` labels, none of them twice.

        Args:
            stop: the token that ends the answer, allowed after every whole label; `end` if None.
        """
        stop = self.end if stop is None else stop

        def allowed(batch: int, ids: torch.Tensor) -> list[int]:
            done, open_ = self.split(ids[start:].tolist())
            if not open_ and (len(done) >= most or done and int(ids[-1]) == stop):
                return [stop]
            return (self.allowed(open_, done) or [stop]) + ([stop] if done and not open_ else [])

        return allowed
