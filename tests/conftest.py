"""What the tests share: a tiny random model of every family, the default model, and plain transformers.

`Plain` is the second opinion. It never asks heads where anything is: the places of the output projections
are written out here, attention is transformers' own eager one, and edits are torch's own hooks.
"""

import os
from contextlib import contextmanager
from functools import cache, partial
from unittest.mock import patch

import nbformat
import pytest
import torch
import yaml

import heads
import heads.model.tiny

# Matrices this small gain nothing from threads, and wait long for each other on a busy machine: not here, and not in the
# kernels and commands that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ENCODERS = ("bert", "electra", "roberta", "xlm-roberta", "distilbert", "modernbert")
# One of each kind of layout: what every test is run on. The others copy one of these and are held to the table of
# tests/test_anatomy.py, to the readouts' checks, and to tests/families.py.
CORE = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt-neox", "bert", "modernbert")
DECODERS = tuple(family for family in CORE if family not in ENCODERS)
# family -> the blocks; below a block the output projection; the final norm; below a block the norms before attention and MLP
_LLAMA = ("model.layers", "self_attn.o_proj", "model.norm", "input_layernorm", "post_attention_layernorm")
_GEMMA_2 = (*_LLAMA[:4], "pre_feedforward_layernorm")
_PARALLEL = (*_LLAMA[:4], "input_layernorm")
_OLMO_2 = (*_LLAMA[:3], None, None)
_ROBERTA = ("roberta.encoder.layer", "attention.output.dense", "lm_head.layer_norm", None, None)
PLACES = {
    "gpt2": ("transformer.h", "attn.c_proj", "transformer.ln_f", "ln_1", "ln_2"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2-moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3-moe": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA_2,
    "gemma3": _GEMMA_2,
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2,
    "gpt-oss": _LLAMA,
    "granite": _LLAMA,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "stablelm": _LLAMA,
    "phi": ("model.layers", "self_attn.dense", "model.final_layernorm", "input_layernorm", "input_layernorm"),
    "phi3": _LLAMA,
    "opt": (
        "model.decoder.layers", "self_attn.out_proj", "model.decoder.final_layer_norm", "self_attn_layer_norm", "final_layer_norm"
    ),
    "gpt-neox": (
        "gpt_neox.layers", "attention.dense", "gpt_neox.final_layer_norm", "input_layernorm", "post_attention_layernorm"
    ),
    "bert": ("bert.encoder.layer", "attention.output.dense", "cls.predictions.transform", None, None),
    "electra": ("electra.encoder.layer", "attention.output.dense", "generator_predictions", None, None),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin", "vocab_layer_norm", None, None),
    "modernbert": ("model.layers", "attn.Wo", "model.final_norm", "attn_norm", "mlp_norm"),
}  # fmt: skip
POST_NORMED = ("gemma2", "gemma3", "olmo2", "olmo3")  # what attention and MLP write goes through a norm of its own


# Files whose tests wait for kernels and commands: with two processes they begin first, so that neither ends alone.
LONG = ("test_run", "test_cli", "test_faults", "test_notebooks", "test_readme", "test_study", "test_retrieval")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_terminal_summary(terminalreporter):
    """What a test has measured (`record_property`), from every process."""
    told = [pair for reports in terminalreporter.stats.values() for report in reports for pair in getattr(report, "user_properties", ())]
    for name, value in dict(told).items():
        terminalreporter.write_line(f"{name}: {value}")


def fresh(family: str, **options):
    """A tiny model of one's own, with one token a byte: `heads.load` gives it whole words."""
    with patch.object(heads.model.tiny, "build", partial(heads.model.tiny.build, whole=False)):
        return heads.load(f"tiny-{family}", **{"device": "cpu", **options})


@cache
def tiny(family: str):
    """The same, shared by all tests: leave it as it was."""
    return fresh(family)


def ids_of(model, length: int = 12, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[row, position]`, no special tokens among them."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(5, size, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(model, texts, side: str = "left") -> dict:
    """Prompts of different lengths as one batch; positions count the real tokens."""
    found = model.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side)
    mask = found["attention_mask"]
    return {"input_ids": found["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    """Logits of a loaded or ablated model, through a trace."""
    with torch.no_grad(), model.trace(input_ids=ids, **kwargs):
        found = model.logits.save()
    return found


def plain_logits(model, ids, **kwargs) -> torch.Tensor:
    """Logits of the loaded module itself, without nnsight."""
    with torch.no_grad():
        return model._module(input_ids=ids, **kwargs).logits


def near(ours, theirs, scale: float = 1) -> None:
    torch.testing.assert_close(ours, theirs, atol=5e-5 * scale, rtol=1e-4 * scale)


class Plain:
    """The weights of a tiny model in a transformers module that knows nothing of heads."""

    def __init__(self, family: str):
        self.family, self.post_normed = family, family in POST_NORMED
        self.module = heads.model.tiny.build(family, whole=False)[0].requires_grad_(False)
        self.module.set_attn_implementation("eager")
        self.n_layers, self.n_heads = self.module.config.num_hidden_layers, self.module.config.num_attention_heads
        blocks, projection, norm, self._attn_norm, self._mlp_norm = PLACES[family]
        self.blocks, self.norm = self.module.get_submodule(blocks), self.module.get_submodule(norm)
        self.unembed = self.module.get_output_embeddings()
        self.projections = [block.get_submodule(projection) for block in self.blocks]

    def __call__(self, ids, **kwargs):
        with torch.no_grad():
            return self.module(input_ids=ids, **kwargs)

    def norms(self, layer: int) -> tuple:
        """The norms before a layer's attention and before its MLP."""
        return getattr(self.blocks[layer], self._attn_norm), getattr(self.blocks[layer], self._mlp_norm)

    def capped(self, logits, which: str = "final") -> torch.Tensor:
        """What a model that caps its "final" or its "attn" logits makes of them (Gemma 2); other models leave them."""
        cap = getattr(self.module.config, f"{which}_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def streams(self, ids, **kwargs) -> list[torch.Tensor]:
        """The residual stream that enters each layer, `[batch, position, d_model]`."""
        seen = []

        def hook(module, args, kwargs):
            seen.append(args[0] if args else kwargs["hidden_states"])

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in self.blocks]
        try:
            self(ids, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def slices(self, layer: int) -> torch.Tensor:
        """Weight of a projection, `[head, d_head, d_model]` (a view)."""
        module = self.projections[layer]
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
        return weight.view(self.n_heads, -1, weight.shape[-1])

    @contextmanager
    def edited(self, change):
        """`change(layer, z)` sees the heads `[batch, position, head, d_head]` and may return others."""

        def hook(layer):
            def edit(module, args):
                z = args[0].unflatten(-1, (self.n_heads, -1))
                new = change(layer, z.clone())
                return None if new is None else (new.flatten(-2), *args[1:])

            return edit

        handles = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(self.projections)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def z(self, ids, **kwargs) -> list[torch.Tensor]:
        """The heads of every layer, `[batch, position, head, d_head]`."""
        seen = []
        with self.edited(lambda layer, z: seen.append(z)):
            self(ids, **kwargs)
        return seen


plain = cache(Plain)


def plain_of(model) -> Plain:
    return plain(model.record["name"].removeprefix("tiny-"))


@pytest.fixture(params=CORE)
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
def default_eager():
    """The default model in plain transformers, with eager attention."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(heads.models.fetch(), attn_implementation="eager", dtype=torch.float32)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def sample(default):
    """One short needle prompt for the default model."""
    return heads.tasks.needle(default, lengths=[120], depths=[0.5])[0]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository in small: one ready paper with a notebook and presets, one planned paper."""
    for folder in ("data/presets", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    from toys import toy_notebook, toy_paper

    both = [toy_paper("toy-paper", 11, "ready"), toy_paper("far-paper", 12, "planned")]
    (tmp_path / "data" / "papers.yaml").write_text(yaml.safe_dump({"parts": {1: "Toys"}, "papers": both}), encoding="utf-8")
    presets = tmp_path / "data" / "presets" / "toy-paper.yaml"
    presets.write_text("smoke: {size: 1}\npaper: {size: 9, names: [c]}\n", encoding="utf-8")
    nbformat.write(toy_notebook(), tmp_path / "notebooks" / "11_toy_paper.ipynb")
    monkeypatch.setenv("HEADS_ROOT", str(tmp_path))
    for name in ("HEADS_FIGURES", "HEADS_RUNS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
