"""The engine: losses of an LM head without its logits. Needs torch alone."""

from torchtitan_liger.head_loss.engine import (
    HeadLoss,
    HeadLossOutput,
    linear_cross_entropy,
)
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.terms import (
    CrossEntropy,
    EntropyBonus,
    Focal,
    PolicyGradient,
    ReferenceKL,
    SelfWeighted,
    Statistics,
    Term,
    ZLoss,
)
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

__all__ = [
    "CrossEntropy",
    "EntropyBonus",
    "Focal",
    "HeadLoss",
    "HeadLossOptions",
    "HeadLossOutput",
    "PolicyGradient",
    "ReferenceKL",
    "SelfWeighted",
    "Statistics",
    "Term",
    "VocabShard",
    "ZLoss",
    "linear_cross_entropy",
]
