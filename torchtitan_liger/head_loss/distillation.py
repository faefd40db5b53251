"""Learning from a second model's distribution over the same vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from torchtitan_liger.head_loss.checks import check_floats, check_tensor
from torchtitan_liger.head_loss.options import check_number, check_transform
from torchtitan_liger.head_loss.statistics import Statistics
from torchtitan_liger.head_loss.terms import Rows, Term, check_choice

DistillationKind = Literal["forward_kl", "reverse_kl", "jsd", "soft_cross_entropy"]


@dataclass(frozen=True)
class Teacher:
    """The other model: its logits, or its hidden states and the weight of its head.

    On the labels' device, in float64, float32, float16 or bfloat16, which may be another
    dtype than the student's. It gets no gradient. Its logits are those of its head, then
    the softcap, then divided by the temperature.
    """

    logits: torch.Tensor | None = None
    """[..., V]; under vocabulary sharding this rank's [..., v]."""
    hidden: torch.Tensor | None = None
    """[..., E]; its logits are computed a chunk at a time."""
    weight: torch.Tensor | None = None
    """[V, E]; under vocabulary sharding this rank's [v, E]."""
    temperature: float = 1.0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        both = self.hidden is not None and self.weight is not None
        neither = self.hidden is None and self.weight is None
        if not (both if self.logits is None else neither):
            raise ValueError("a teacher has either logits, or hidden and weight")
        for name in ("logits", "hidden", "weight"):
            if (given := getattr(self, name)) is not None:
                check_tensor(f"the teacher's {name}", given)
        check_transform("the teacher's ", self.logit_softcap, self.temperature)

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        of_logits = self.weight if self.logits is None else self.logits
        assert of_logits is not None
        return of_logits.dtype

    def flat(self, labels: torch.Tensor, num_columns: int) -> Teacher:
        """The same teacher with tokens in one dim.

        Raises:
            ValueError: where its dtypes, shapes or devices do not fit to the labels and a
                head with `num_columns`.
        """
        check_floats("the teacher", self.dtype)
        leading = labels.shape
        for tensor in (self.logits, self.hidden, self.weight):
            if tensor is not None and tensor.device != labels.device:
                raise ValueError(
                    f"the teacher is on {tensor.device}, and the labels on {labels.device}"
                )
        if self.logits is not None:
            expected, got = (*leading, num_columns), tuple(self.logits.shape)
            if got != expected:
                raise ValueError(f"the teacher's logits must be {expected}, got {got}")
            logits = self.logits.detach().reshape(leading.numel(), num_columns)
            return replace(self, logits=logits)
        assert self.hidden is not None
        assert self.weight is not None
        dim = self.weight.shape[-1]
        if self.weight.shape != (num_columns, dim) or self.hidden.shape != (
            *leading,
            dim,
        ):
            raise ValueError(
                f"the teacher's weight must be [{num_columns}, E] and its hidden states "
                f"{(*leading, 'E')}, got {tuple(self.weight.shape)} and "
                f"{tuple(self.hidden.shape)}"
            )
        if self.weight.dtype != self.hidden.dtype:
            raise ValueError(
                f"the teacher's hidden states are {self.hidden.dtype} and its weight is "
                f"{self.weight.dtype}: cast one of them"
            )
        hidden = self.hidden.detach().reshape(leading.numel(), dim)
        return replace(self, hidden=hidden, weight=self.weight.detach())


@dataclass(frozen=True)
class Distillation(Term):
    """Make the student's `p` like the teacher's `q`.

        "forward_kl"          KL(q | p)                       (arXiv:1503.02531)
        "reverse_kl"          KL(p | q)                       (arXiv:2306.08543)
        "jsd"                 beta KL(q | m) + (1 - beta) KL(p | m),
                              m = beta q + (1 - beta) p       (arXiv:2306.13649)
        "soft_cross_entropy"  -sum_j q_j log p_j

    With `beta` 0 and 1, "jsd" is forward and reverse KL, as in TRL and Liger-Kernel (the
    formula's own limits are 0). There is no factor for the temperature: Hinton's is
    `weight = temperature ** 2`. The call gets `teacher=Teacher(...)`.
    """

    kind: DistillationKind = "forward_kl"
    beta: float = 0.5
    weight: float = 1.0
    name: str = "distillation"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, DistillationKind)
        check_number("beta", self.beta, "in [0, 1]", lambda x: 0 <= x <= 1)

    @property
    def needs(self) -> frozenset[str]:
        if self.kind == "soft_cross_entropy":
            return frozenset({"kl_fwd", "teacher_entropy"})
        if self.kind == "jsd" and 0 < self.beta < 1:
            return frozenset({"jsd"})
        forward = self.kind == "forward_kl" or (self.kind == "jsd" and self.beta == 0)
        return frozenset({"kl_fwd" if forward else "kl_rev"})

    @property
    def slopes(self) -> Mapping[str, float]:
        (name,) = self.needs - {"teacher_entropy"}  # a constant
        return {name: 1.0}

    @property
    def jsd_beta(self) -> float:  # type: ignore[override]
        return self.beta

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        parts = [getattr(stats, name) for name in sorted(self.needs)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
