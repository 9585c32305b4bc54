"""What a head may forget: policies for `heads.HeadCache` and `heads.MaskedPrefix`.

A policy is a function of what a layer has seen (`heads.lab.caches.Seen`) that answers what each key-value head keeps. Those
here spend what the cache's share leaves, sinks, windows and stand-ins counted; one that needs more raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import avg_pool1d, softmax

from heads.lab.caches import Keep, Policy, Seen, StandIn
from heads.names import known, whole, wholes


def everything(seen: Seen) -> Keep:
    """Nothing is forgotten."""
    return Keep([None] * seen.keys.shape[1])


def recent(sinks: int = 4) -> Policy:
    """Every head keeps the first tokens and the last (StreamingLLM, arXiv 2309.17453)."""
    sinks = whole("sinks", sinks, 0)

    def policy(seen: Seen) -> Keep:
        if seen.budget <= sinks:
            raise ValueError(f"{seen.budget} tokens are left for each head, and {sinks} of them are sinks: a larger share")
        return Keep([_ends(seen, sinks, seen.budget - sinks)] * seen.keys.shape[1])

    return policy


def observed(window: int = 32, pool: int = 7, shared: bool = False, floor: float = 0.2) -> Policy:
    """What the last tokens attended to, and these (SnapKV, arXiv 2404.14469).

    Args:
        window: the last tokens whose attention is watched, and which are kept.
        pool: width of the average over neighbours, odd.
        shared: the heads of a layer share one budget, given to the largest scores (AdaKV, arXiv 2407.11550), but each head
            keeps `floor` of what it would have had. For one prompt at a time: the heads of another would keep other numbers.
        floor: share of an equal budget that no head loses.
    """
    window, pool = whole("window", window, 1), _odd(pool)

    def policy(seen: Seen) -> Keep:
        kv_heads, n = seen.keys.shape[1], seen.keys.shape[2]
        if n <= seen.budget:
            return everything(seen)
        if seen.budget < window:
            raise ValueError(f"{seen.budget} tokens are left for each head, fewer than the window of {window}: a larger share")
        weights = attended(seen, window).unflatten(1, (kv_heads, -1)).mean(2)[..., : n - window]
        scores, free = avg_pool1d(weights, pool, 1, pool // 2), seen.budget - window
        last = seen.positions[n - window :]
        if not shared:
            top = scores.topk(free, -1).indices.sort(-1).values
            return Keep([torch.cat([top[:, h], last.expand(len(top), -1)], 1) for h in range(kv_heads)])
        alone(seen)
        scores = scores[0]
        safe = scores.topk(int(floor * free), -1).indices
        chosen = scores.scatter(1, safe, math.inf).flatten().topk(free * kv_heads).indices
        return Keep([torch.cat([(chosen[chosen // (n - window) == h] % (n - window)).sort().values, last]) for h in range(kv_heads)])

    return policy


def razor(full: Iterable[tuple[int, int]], stand_in: str | None = "count", sinks: int = 4, tail: int | None = None) -> Policy:
    """Some key-value heads keep everything, the others their first and last tokens and one in place of the rest
    (RazorAttention, arXiv 2407.15891, Algorithm 1).

    Args:
        full: (layer, key-value head) of those that keep everything.
        stand_in: the mean key and value of what is dropped, weighed as the number of tokens dropped ("count", as in the
            paper) or as "one" (as in a port of it); None: without.
        sinks: first tokens that every head keeps.
        tail: last tokens that every other head keeps. None: as many as the share leaves.
    """
    full, sinks = {wholes("a head in full", head, 0) for head in full}, whole("sinks", sinks, 0)
    known("stand_in", stand_in, (None, "one", "count"))

    def policy(seen: Seen) -> Keep:
        kv_heads, n = seen.keys.shape[1], seen.keys.shape[2]
        if wrong := [head for head in full if head[1] >= kv_heads]:
            raise ValueError(f"head {min(wrong)} of full: this model has {kv_heads} key-value heads in a layer")
        if wrong := [head for head in full if head[0] not in seen.free]:
            raise ValueError(f"head {min(wrong)} of full: only layers {', '.join(map(str, seen.free))} see everything, and a layer with "
                             "a sliding window keeps that by itself")  # fmt: skip
        others = seen.layers * kv_heads - len(full)
        left = (seen.budget * seen.layers * kv_heads - len(full) * n) // max(others, 1) - sinks - (stand_in is not None)
        if (left if tail is None else tail) < 1:
            raise ValueError(f"{len(full)} heads that keep all of {n} tokens and {sinks} sinks leave the other {others} heads "
                             f"{max(left, 0)} last tokens: a larger share, or fewer heads in full")  # fmt: skip
        row = _ends(seen, sinks, left if tail is None else whole("tail", tail, 1))
        heads = [(seen.layer, h) in full for h in range(kv_heads)]
        return Keep([None if f else row for f in heads], [None if f else merged(seen, h, row, stand_in) for h, f in enumerate(heads)])

    return policy


def semantic(beta: float = 0.3, last: int = 1, sinks: int = 16, tail: int = 48, window: int = 32, pool: int = 7, top: int = 256,
             middle: str | None = "selected", order: Callable[[torch.Tensor, Seen], torch.Tensor] | None = None,
             nearest: bool = True, by_query: bool = False) -> Policy:  # fmt: skip
    """Heads that read other things than the rest of their layer keep everything; the others their first and last tokens and
    those between that they attend to most (Task-KV, arXiv 2501.15113). For one prompt at a time.

    Args:
        beta, last: heads of the first layer that keep everything, as a share, and of the last, as a number; in a line between.
        sinks, tail: first and last tokens that the others keep.
        window, pool: the last tokens whose attention is watched, and the width of the average over neighbours.
        top: tokens of which a head's semantic vector is made.
        middle: the others keep tokens of the middle ("selected"), the mean of all they drop as one more token ("merged"), or none.
        order: heads of a layer, those first that keep everything, from their distances `[head]`; None: the farthest first.
        nearest: the last of them is the head nearest to the centre, so that the common view is kept as well.
        by_query: a set for every query head instead of every key-value head; for a MaskedPrefix only.
    """
    known("middle", middle, (None, "selected", "merged"))
    pool = _odd(pool)

    def policy(seen: Seen) -> Keep:
        alone(seen)
        n, weights = seen.keys.shape[2], attended(seen, window)[0]
        distances, smooth = semantic_distances(seen, window, pool, top, by_query), avg_pool1d(weights, pool, 1, pool // 2)
        count = len(distances)
        smooth, budget = smooth.unflatten(0, (count, -1)).mean(1), seen.budget * count
        line = count * beta + (last - count * beta) * seen.index / max(seen.layers - 1, 1)
        whole_heads, ends, extra = min(count, max(0, round(line))), sinks + tail, middle == "merged"
        while whole_heads and budget - n * whole_heads < (count - whole_heads) * (ends + extra):
            whole_heads -= 1
        spare = (budget - n * whole_heads) // max(count - whole_heads, 1) - sinks - extra
        if spare < 1:
            raise ValueError(f"{seen.budget} tokens are left for each head, and {sinks} of them are sinks: a larger share")
        row = _ends(seen, sinks, min(tail, spare))
        ranked = (distances.argsort(descending=True) if order is None else order(distances, seen)).tolist()
        if nearest and whole_heads:
            common = int(distances.argmin())
            ranked = [h for h in ranked if h != common]
            ranked.insert(whole_heads - 1, common)
        free, tokens = min(max(spare - tail, 0), n - len(row)) if middle == "selected" else 0, []
        for scores in smooth:
            found = scores.index_fill(0, row, -math.inf).topk(free).indices
            tokens.append(torch.cat([row, found]).sort().values)
        full = set(ranked[:whole_heads])
        stand = [merged(seen, h * seen.keys.shape[1] // count, row, "count") if extra and h not in full else None for h in range(count)]
        return Keep([None if h in full else tokens[h] for h in range(count)], stand)

    return policy


def semantic_distances(seen: Seen, window: int = 32, pool: int = 7, top: int = 256, by_query: bool = False) -> torch.Tensor:
    """How far what each head of a layer reads lies from what the layer reads on average, `[head]` (Task-KV, section 3)."""
    vectors = semantic_vectors(seen, window, pool, top)
    vectors = vectors if by_query else vectors.unflatten(0, (seen.keys.shape[1], -1)).mean(1)
    return (vectors - vectors.mean(0)).norm(dim=-1)


def semantic_vectors(seen: Seen, window: int = 32, pool: int = 7, top: int = 256) -> torch.Tensor:
    """What each query head reads: the values of the tokens that the last ones attend to most, weighed by that attention,
    `[head, d_head]`."""
    alone(seen)
    return seen.once(("vectors", window, pool, top), lambda: _vectors(seen, window, _odd(pool), top))


def _vectors(seen: Seen, window: int, pool: int, top: int) -> torch.Tensor:
    weights = avg_pool1d(attended(seen, window), pool, 1, pool // 2)[0]
    best = weights.topk(min(top, weights.shape[1]), -1)
    values = seen.values[0].repeat_interleave(len(weights) // seen.values.shape[1], 0)
    return (best.values[..., None] * values.gather(1, best.indices[..., None].expand(-1, -1, values.shape[-1]))).sum(1)


def attended(seen: Seen, window: int) -> torch.Tensor:
    """Mean attention of the last tokens to every token, `[prompt, head, position]`: softmax(q k) of the window's rows."""
    window = min(whole("window", window, 1), seen.keys.shape[2])
    return seen.once(("attended", window), lambda: _attended(seen, window))


def _attended(seen: Seen, window: int) -> torch.Tensor:
    n = seen.keys.shape[2]
    q = seen.queries[:, :, -window:]
    grouped = q.unflatten(1, (seen.keys.shape[1], -1))
    logits = (grouped @ seen.keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * seen.scaling
    later = torch.ones(q.shape[2], n, dtype=torch.bool, device=q.device).triu(n - q.shape[2] + 1)
    return softmax(logits.masked_fill(later, -math.inf), -1, dtype=torch.float32).mean(2)


def merged(seen: Seen, head: int, row: torch.Tensor, weight: str | None) -> StandIn | None:
    """The mean key and value of what a key-value head drops, where it drops anything; `weight`: "count" or "one"."""
    keys, values = seen.keys[:, head], seen.values[:, head]
    dropped = torch.ones(seen.keys.shape[2], dtype=torch.bool, device=row.device).index_fill(0, row, False)
    if weight is None or not dropped.any():
        return None
    return StandIn(keys[:, dropped].mean(1), values[:, dropped].mean(1), math.log(int(dropped.sum())) if weight == "count" else 0.0)


def alone(seen: Seen) -> None:
    """ValueError unless there is one prompt: heads of different prompts would keep different numbers of tokens."""
    if len(seen.keys) > 1:
        raise ValueError(f"{len(seen.keys)} prompts: this policy gives heads budgets that depend on the prompt, so one at a time")


def _ends(seen: Seen, first: int, last: int) -> torch.Tensor:
    places = seen.positions
    return places if first + last >= len(places) else torch.cat([places[:first], places[len(places) - last :]])


def _odd(pool: int) -> int:
    if whole("pool", pool, 1) % 2 == 0:
        raise ValueError(f"pool={pool}: the width of an average around a token is odd")
    return pool
