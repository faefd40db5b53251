"""LM-head losses without logits, for PyTorch's torchtitan.

The names below need torch alone: importing this package imports neither torchtitan nor
liger-kernel.
"""

from torchtitan_liger.head_loss import (
    HeadLoss,
    HeadLossOptions,
    HeadLossOutput,
    linear_cross_entropy,
)

__all__ = ["HeadLoss", "HeadLossOptions", "HeadLossOutput", "linear_cross_entropy"]
__version__ = "0.1.0"
