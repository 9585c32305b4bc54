"""Which small part of a shared network does the work of a task? See README.md.

Names are imported when they are first used, so that `import heads` and the command line stay quick.
"""

import sys
import warnings
from typing import TYPE_CHECKING

from heads.names import lazily

# tqdm remarks, when it is first imported, that a notebook without ipywidgets gets plain bars: that is what we want,
# and the remark shows a path of the machine.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

if TYPE_CHECKING:  # one row for every public name: read here by `lazily`, and by editors
    from heads import metrics, plot, tasks
    from heads.course import papers
    from heads.course.kept import kept
    from heads.course.study import Study
    from heads.lab import circuits, policies
    from heads.lab import training as train
    from heads.lab.ablation import ablate
    from heads.lab.answers import answer_loss, examples, score_answers, token_losses
    from heads.lab.attribution import attribution_patching, direct_attribution, logit_lens
    from heads.lab.caches import HeadCache
    from heads.lab.chunks import ChunkCache, Reader
    from heads.lab.circuits import copying_score, effective_embedding, ov, ov_logits, qk, successor_score
    from heads.lab.decoding import Conditions, decode_batch, decode_rows
    from heads.lab.documents import score_documents
    from heads.lab.embedding import embed, upper_stack
    from heads.lab.masked import MaskedPrefix
    from heads.lab.packing import candidate_scores, packed_loss
    from heads.lab.paths import path_scores
    from heads.lab.pruning import prune
    from heads.lab.ranking import ranking
    from heads.lab.readings import attention_to, head_activations, head_means
    from heads.lab.repeats import by_kv_head, echo_and_induction
    from heads.lab.retrieval import retrieval_scores, rouge1_recall
    from heads.lab.steering import Steering
    from heads.lab.sweeps import ablation_scores
    from heads.lab.training import fit
    from heads.lab.tries import Trie
    from heads.lab.tuning import HeadWeights as head_weights
    from heads.lab.tuning import all_weights, lora, prompt_tuning
    from heads.metrics import evaluate
    from heads.model import anatomy, checks
    from heads.model import zoo as models
    from heads.model.load import load
    from heads.model.prefix import Prefix, prefill
    from heads.model.weights import head_outputs, output_projection
    from heads.scores import Effects, HeadScores, random_heads

sys.modules[__name__].__class__ = lazily(__name__, __file__)
__all__ = sorted(sys.modules[__name__].HOMES)
