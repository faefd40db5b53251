"""The engine: losses of an LM head without its logits. Needs torch alone."""

from torchtitan_liger.head_loss.engine import (
    HeadLoss,
    HeadLossOutput,
    linear_cross_entropy,
)
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

__all__ = [
    "HeadLoss",
    "HeadLossOptions",
    "HeadLossOutput",
    "VocabShard",
    "linear_cross_entropy",
]
