"""The settings of a head loss: what is computed, in which precision and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

ACC_DTYPES = (torch.float32, torch.bfloat16)


def check_number(
    name: str, value: Any, wanted: str, holds: Callable[[float], bool]
) -> None:
    """ValueError for what is no int or float of which this holds: of Python's, as a tensor
    would be no constant of a kernel."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and holds(value)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_transform(whose: str, logit_softcap: Any, temperature: Any) -> None:
    """ValueError for what logits cannot go through."""
    wanted = "0 (off) or a positive int or float"
    check_number(f"{whose}logit_softcap", logit_softcap, wanted, lambda x: 0 <= x < inf)
    wanted = "a positive int or float"
    check_number(f"{whose}temperature", temperature, wanted, lambda x: 0 < x < inf)


@dataclass(frozen=True, kw_only=True)
class HeadLossOptions:
    """Settings of a head loss that all its terms share.

    For one token, with `u = weight @ hidden`, the terms see the logits
    `logit_softcap * tanh(u / logit_softcap) / temperature` (without a cap `u / temperature`).

    Raises:
        ValueError: for a value out of range; the message holds the field and the value.
    """

    ignore_index: int = -100
    """Tokens with this label have neither loss nor gradient."""

    logit_softcap: float = 0.0
    """Bound of the logits (Gemma 2, arXiv:2408.00118, uses 30). 0: off."""

    temperature: float = 1.0
    """Divides the logits, after the softcap."""

    acc_dtype: torch.dtype = torch.float32
    """dtype in which the weight's gradient is summed over the chunks."""

    logits_memory_mib: int = 0
    """Most MiB for the logits that exist at one time. 0: chosen for speed."""

    def __post_init__(self) -> None:
        check_transform("", self.logit_softcap, self.temperature)
        if (
            type(self.ignore_index) is not int
            or not -(2**63) <= self.ignore_index < 2**63
        ):
            raise ValueError(
                f"ignore_index must be an int of at most 64 bits, got {self.ignore_index!r}"
            )
        if self.acc_dtype not in ACC_DTYPES:
            raise ValueError(
                f"acc_dtype must be one of {ACC_DTYPES}, got {self.acc_dtype!r}"
            )
        if type(self.logits_memory_mib) is not int or self.logits_memory_mib < 0:
            raise ValueError(
                "logits_memory_mib must be 0 (chosen for speed) or a number of MiB, "
                f"got {self.logits_memory_mib!r}"
            )
