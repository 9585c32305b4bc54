"""What the tests share: a tiny random model of every family, the default model, and plain transformers."""

import copy
from functools import cache

import pytest
import torch

import heads
from heads.models import TINY

torch.set_num_threads(min(2, torch.get_num_threads()))

ENCODERS = ("bert", "modernbert")
DECODERS = tuple(family for family in TINY if family not in ENCODERS)


@cache
def tiny(family: str):
    """A tiny model, shared by all tests: leave it as it was."""
    return heads.load(f"tiny-{family}", device="cpu")


def ids_of(model, length: int = 12, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[row, position]`, no special tokens among them."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(5, size, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(model, ids, **kwargs) -> torch.Tensor:
    """Logits of the module itself: no nnsight."""
    with torch.no_grad():
        return model._module(ids, **kwargs).logits


def eager(model):
    """A copy of the module with transformers' own eager attention: nothing of heads is left in it."""
    module = copy.deepcopy(model._module)
    module.set_attn_implementation("eager")
    return module


@pytest.fixture(params=TINY)
def any_model(request):
    return tiny(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(scope="session")
def default():
    """The default model, loaded once; fetched if it is not in the cache."""
    return heads.load(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def sample(default):
    """One short needle prompt for the default model."""
    return heads.tasks.needle(default, lengths=[200], depths=[0.5])[0]
