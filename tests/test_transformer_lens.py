"""The same numbers as TransformerLens, on the default model's own weights.

It comes with the extra `bench` and is skipped without it. figures/benchmarks/sweep-end.json and sweep-all.json hold the
same comparison on more heads and prompts; the last test reads them, so that it always runs.
"""

import json

import numpy as np
import pytest
import torch

import heads
from heads import metrics
from heads.course import papers

CHOSEN = [(0, 0), (7, 5), (18, 6), (23, 3), (29, 1)]


@pytest.fixture(scope="module")
def lens():
    pytest.importorskip("transformer_lens", reason="the extra `bench` is not installed")
    from benchmarks.sweeps import transformer_lens

    return transformer_lens()


@pytest.fixture(scope="module")
def prompts(default):
    return heads.tasks.ioi(default, 8, seed=0)


def test_a_zero_ablation_sweep(default, lens, prompts):
    from benchmarks.sweeps import lens_loop

    for positions in ("END", "all"):
        ours = heads.ablation_scores(default, prompts, "zero", positions, progress=False) if positions == "END" else None
        theirs = lens_loop(lens, prompts, CHOSEN, positions)
        if ours is None:  # the whole sweep takes long; the same edit, head by head
            base = heads.evaluate(default, prompts)
            mine = [(heads.evaluate(heads.ablate(default, [head]), prompts) - base).mean().item() for head in CHOSEN]
        else:
            mine = [ours[head] for head in CHOSEN]
        np.testing.assert_allclose(mine, theirs, atol=1e-3)
    assert np.abs(theirs).max() > 0.1


def test_patterns(default, lens, prompts):
    with torch.no_grad():
        _, cache = lens.run_with_cache(prompts.ids, names_filter=lambda name: name.endswith("hook_pattern"))
        with default.trace(input_ids=prompts.ids):
            found = default.layers[18].attn.pattern.save()
    torch.testing.assert_close(found, cache["blocks.18.attn.hook_pattern"], atol=1e-3, rtol=0)


def test_direct_logit_attribution(default, lens, prompts):
    """What each head writes, through TransformerLens's own z, output weights and final norm, on the answer's direction."""
    ours = heads.direct_attribution(default, prompts)
    with torch.no_grad():
        _, cache = lens.run_with_cache(prompts.ids)
        unembed = lens.unembed.W_U.T if lens.unembed.W_U.shape[0] == default.anatomy.d_model else lens.unembed.W_U
        u = (unembed[prompts.answers] - unembed[prompts.foils[:, 0]]) * lens.ln_final.weight
        last = cache["blocks.29.hook_resid_post"][:, -1]
        scale = (last.pow(2).mean(-1, keepdim=True) + default.config.rms_norm_eps).sqrt()
        for layer, head in CHOSEN:
            written = cache[f"blocks.{layer}.attn.hook_z"][:, -1, head] @ lens.blocks[layer].attn.W_O[head]
            np.testing.assert_allclose(ours.samples[:, layer, head], (written / scale * u).sum(-1), atol=1e-3)


@pytest.mark.parametrize("name", ["sweep-end", "sweep-all"])
def test_the_committed_comparison_agrees(name):
    record = json.loads((papers.root() / "figures" / "benchmarks" / f"{name}.json").read_text())
    assert record["equal_to"]["max_abs_difference"] < 1e-3 and metrics.logit_difference.name in record["equal_to"]["what"]
