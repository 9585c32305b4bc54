"""Notebook 23: losses under every mask are those of the edited models, document by document."""

import pytest
from cells import run_cells
from conftest import near, tiny

import heads


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_losses_under_masks_are_those_of_edited_models_one_by_one(family):
    lm = tiny(family)
    rows = [list(range(5, 5 + n)) for n in (9, 4, 30, *range(2, 18))]  # more than one part
    masks = {"base": [], "high": [(2, 1), (3, 3)]}
    losses_under = run_cells("attention-influence", "losses", heads=heads, lm=lm)["losses_under"]
    for kind in ("uniform", "zero"):
        found = losses_under(rows, masks, kind)
        for name, edited in (("base", lm), ("high", heads.ablate(lm, masks["high"], kind))):
            for ids, ours in zip(rows, found[name], strict=True):
                near(ours, heads.token_losses(edited, [ids])[0])
