"""The engine: losses of an LM head without its logits. Needs torch alone.

In the order of a call:

    options, *terms, distillation                what is computed
    functional, engine                           the public face
    calls, checks, sequences, chunking           arguments are checked, chunks planned
    chunked (custom_op: under torch.compile)     the order of the passes, both ways
    passes, products, vocab_parallel             one chunk: products, sweeps, a collective
    sweeps (triton_*: on GPUs)                   logits -> sums, coefficients -> gradient
    statistics, evaluate                         sums -> terms -> coefficients
    gradients                                    handed on in the backward pass
    reference                                    full logits, to compare with
"""

from torchtitan_liger.head_loss.distillation import Distillation, Teacher
from torchtitan_liger.head_loss.engine import HeadLoss, HeadLossOutput
from torchtitan_liger.head_loss.functional import linear_cross_entropy
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.policy_terms import (
    PolicyGradient,
    ReferenceKL,
    SequencePolicyGradient,
)
from torchtitan_liger.head_loss.preference_terms import Preference, UnpairedPreference
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import Statistics
from torchtitan_liger.head_loss.terms import (
    Collision,
    CrossEntropy,
    EntropyBonus,
    Focal,
    SelfWeighted,
    SequenceTerm,
    Term,
    Unlikelihood,
    ZLoss,
)
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

__all__ = [
    "Collision",
    "CrossEntropy",
    "Distillation",
    "EntropyBonus",
    "Focal",
    "HeadLoss",
    "HeadLossOptions",
    "HeadLossOutput",
    "PolicyGradient",
    "Preference",
    "ReferenceKL",
    "SelfWeighted",
    "SequencePolicyGradient",
    "SequenceTerm",
    "Sequences",
    "Statistics",
    "Teacher",
    "Term",
    "Unlikelihood",
    "UnpairedPreference",
    "VocabShard",
    "ZLoss",
    "linear_cross_entropy",
]
