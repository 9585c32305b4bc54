"""Which small part of a shared network does the work of a task? See README.md.

Names are imported when they are first used, so that `import heads` and the command line stay quick.
"""

import importlib
import warnings

# tqdm remarks, when it is first imported, that a notebook without ipywidgets gets plain bars: that is what we want,
# and the remark shows a path of the machine.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

_HOME = {
    "load": "models",
    "Study": "study",
    "HeadScores": "scores",
    "random_heads": "scores",
    "ablate": "ablation",
    "head_means": "ablation",
    "ablation_scores": "sweep",
    "patching_scores": "sweep",
    "path_scores": "paths",
    "path_effect": "paths",
    "Effects": "effects",
    "evaluate": "metrics",
    "Conditions": "decode",
    "decode_batch": "decode",
    "decode_rows": "decode",
    "prefill": "decode",
    "head_outputs": "anatomy",
    "output_projection": "anatomy",
    "head_activations": "ablation",
    "Steering": "steer",
    "steered": "steer",
    "score_documents": "documents",
    "losses_under": "documents",
    "token_losses": "documents",
    "fit_probes": "probe",
    "fit": "train",
    "examples": "train",
    "answer_loss": "train",
    "head_weights": "tune",
    "lora": "tune",
    "prompt_tuning": "tune",
    "direct_attribution": "attribute",
    "attribution_patching": "attribute",
    "integrated_gradients": "attribute",
    "logit_lens": "attribute",
    "attention_to": "attend",
    "force_attention": "attend",
    "ov": "circuits",
    "qk": "circuits",
    "ov_logits": "circuits",
    "effective_embedding": "circuits",
    "successor_score": "circuits",
    "copying_score": "circuits",
    "relabelled": "circuits",
    "retrieval_scores": "retrieval",
    "rouge1_recall": "retrieval",
    "token_f1": "tasks.facts",
}
_MODULES = ("anatomy", "checks", "metrics", "models", "papers", "plot", "tasks", "train")

__all__ = [*sorted(_HOME), *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"heads.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"heads.{name}")
    raise AttributeError(f"module 'heads' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
