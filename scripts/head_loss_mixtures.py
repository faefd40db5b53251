"""The problems of scripts/bench_head_loss.py: random inputs, losses, and their truth.

A new mixture of losses is a line in `MIXTURES`; a term that is new there also needs its
formula in `PLAIN`.

`T` tokens, `C` tokens of a piece, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    EntropyBonus,
    PolicyGradient,
    Preference,
    Teacher,
    Term,
    ZLoss,
)

IGNORE_INDEX = -100


class Inputs(NamedTuple):
    """The first three are what every implementation takes."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    labels_T: torch.Tensor
    rows: dict[str, torch.Tensor]  # each [T], what the terms ask for by name
    num_labeled: int
    teacher: Teacher | None = None
    sequence: int = 0  # tokens of each, for losses over sequences
    labeled_of_each: list[int] | None = None


@dataclass(frozen=True)
class Problem:
    """A shape, and the random numbers that fill it."""

    tokens: int
    dim: int
    vocab: int
    dtype: torch.dtype
    device: str
    ignored: float = 0.0  # share of the labels
    seed: int = 0
    sequence: int = 0  # tokens of each, for losses over sequences

    def inputs(self, *, with_teacher: bool = False) -> Inputs:
        """Hidden states of variance 1, logits of variance about 1, uniform labels.

        A teacher has hidden states and a weight of the same sizes, but others.
        """
        g = torch.Generator(self.device).manual_seed(self.seed)
        kwargs: dict[str, Any] = {"device": self.device, "generator": g}

        def head() -> tuple[torch.Tensor, torch.Tensor]:
            hidden_TD = torch.randn(self.tokens, self.dim, dtype=self.dtype, **kwargs)
            weight_VD = torch.randn(self.vocab, self.dim, dtype=self.dtype, **kwargs)
            return hidden_TD, weight_VD.div_(self.dim**0.5)

        hidden_TD, weight_VD = head()
        token_ids_T = torch.randint(self.vocab, (self.tokens,), **kwargs)
        num_ignored = round(self.ignored * self.tokens)
        ignored_T = torch.randperm(self.tokens, **kwargs) < num_ignored
        # The log probability of a token id without logits: as the weight is normal, the
        # log-sum-exp over a large vocabulary is log V + |hidden|^2 / 2D.
        lse_T = math.log(self.vocab) + hidden_TD.float().square().mean(1) / 2
        logp_T = (hidden_TD.float() * weight_VD[token_ids_T].float()).sum(1) - lse_T
        noise_T = torch.randn(self.tokens, **kwargs)
        rows = {
            "advantages": torch.randn(self.tokens, **kwargs),
            "old_logp": logp_T + 0.1 * noise_T,  # the policy has moved by a few steps
            # As Liger-Kernel without a reference model.
            "ref_logp": torch.zeros_like(noise_T),
        }
        teacher = None
        if with_teacher:
            teacher_TD, teacher_VD = head()
            teacher = Teacher(hidden=teacher_TD, weight=teacher_VD)
        labeled_of_each = None
        if self.sequence:
            labeled_T = ignored_T.logical_not()
            labeled_of_each = labeled_T.view(-1, self.sequence).sum(dim=1).tolist()
        return Inputs(
            hidden_TD.requires_grad_(),
            weight_VD.requires_grad_(),
            token_ids_T.masked_fill(ignored_T, IGNORE_INDEX),
            rows,
            self.tokens - num_ignored,
            teacher,
            self.sequence,
            labeled_of_each,
        )


@dataclass(frozen=True, eq=False)
class Mixture:
    """A sum of terms, and what they need."""

    name: str
    terms: tuple[Term, ...]
    accuracy: bool = False  # reported too, where that is not for nothing

    @property
    def has_teacher(self) -> bool:
        return self.undistilled != self.terms

    @property
    def undistilled(self) -> tuple[Term, ...]:
        return tuple(t for t in self.terms if not isinstance(t, Distillation))


CROSS_ENTROPY = Mixture("cross entropy", (CrossEntropy(),))
POLICY = Mixture(
    "cross entropy + z-loss + entropy + accuracy + GRPO",
    (CrossEntropy(), ZLoss(1e-4), EntropyBonus(0.01), PolicyGradient("ppo")),
    accuracy=True,
)
DISTILLATIONS = {
    "forward KL": Distillation(),
    "reverse KL": Distillation("reverse_kl"),
    "JSD": Distillation("jsd"),
    "soft cross entropy": Distillation("soft_cross_entropy"),
}


def distilled(mixture: Mixture) -> list[Mixture]:
    """The mixture with each kind of distillation."""
    return [
        replace(
            mixture,
            name=f"{mixture.name} + distillation ({kind})",
            terms=(*mixture.terms, term),
        )
        for kind, term in DISTILLATIONS.items()
    ]


MIXTURES = (
    CROSS_ENTROPY,
    Mixture("cross entropy + z-loss", (CrossEntropy(), ZLoss(1e-4))),
    POLICY,
    *distilled(CROSS_ENTROPY),
)
MORE_MIXTURES = distilled(POLICY)  # of which a sharded vocabulary tells nothing new
DPO = Mixture("DPO", (Preference("dpo", beta=0.1),))


class FullSoftmax(NamedTuple):
    """What a loss in plain torch is computed from."""

    logits_CV: torch.Tensor
    log_softmax_CV: torch.Tensor
    logp_C: torch.Tensor  # of the labels
    rows: Mapping[str, torch.Tensor]  # each [C]
    log_teacher_CV: torch.Tensor | None  # the teacher's log softmax
    valid_C: torch.Tensor
    sequence: int  # tokens of each


def divergence(term: Distillation, full: FullSoftmax) -> torch.Tensor:
    log_p_CV, log_q_CV = full.log_softmax_CV, full.log_teacher_CV
    assert log_q_CV is not None
    q_CV = log_q_CV.exp()
    if term.kind == "forward_kl":
        return (q_CV * (log_q_CV - log_p_CV)).sum(-1)
    if term.kind == "soft_cross_entropy":
        return -(q_CV * log_p_CV).sum(-1)
    if term.kind == "reverse_kl":
        return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)
    assert term.kind == "jsd", f"no formula for {term.kind}"
    log_m_CV = torch.logaddexp(
        log_q_CV + math.log(term.beta), log_p_CV + math.log1p(-term.beta)
    )
    of_q_C = (q_CV * (log_q_CV - log_m_CV)).sum(-1)
    of_p_C = (log_p_CV.exp() * (log_p_CV - log_m_CV)).sum(-1)
    return term.beta * of_q_C + (1 - term.beta) * of_p_C


def clipped_policy_gradient(term: PolicyGradient, full: FullSoftmax) -> torch.Tensor:
    advantages_C = full.rows["advantages"]
    ratio_C = (full.logp_C - full.rows["old_logp"]).exp()
    clipped_C = ratio_C.clamp(1 - term.clip_low, 1 + term.clip_high)
    return -torch.minimum(ratio_C * advantages_C, clipped_C * advantages_C)


def dpo(term: Preference, full: FullSoftmax) -> torch.Tensor:
    """Each pair's loss, shared out among its tokens with a label."""
    assert (term.kind, term.layout) == ("dpo", "pairs"), f"no formula for {term}"
    log_ratio_C = torch.where(full.valid_C, full.logp_C - full.rows["ref_logp"], 0.0)
    pairs = -1, 2, full.sequence
    chosen_P, rejected_P = log_ratio_C.view(pairs).sum(-1).unbind(1)
    loss_P = -F.logsigmoid(term.beta * (chosen_P - rejected_P))
    num_labeled_P = full.valid_C.view(pairs).sum((1, 2)).clamp(min=1)
    return (loss_P / num_labeled_P).repeat_interleave(2 * full.sequence)


# Each term as one writes it with all logits at hand: [C], before its weight.
PLAIN: dict[type, Callable[[Any, FullSoftmax], torch.Tensor]] = {
    CrossEntropy: lambda term, full: -full.logp_C,
    ZLoss: lambda term, full: full.logits_CV.logsumexp(-1).square(),
    EntropyBonus: lambda term, full: (
        full.log_softmax_CV.exp() * full.log_softmax_CV
    ).sum(-1),
    PolicyGradient: clipped_policy_gradient,
    Distillation: divergence,
    Preference: dpo,
}


def plain_loss(
    mixture: Mixture,
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    rows: Mapping[str, torch.Tensor],
    teacher_CV: torch.Tensor | None,
    sequence: int = 0,
) -> torch.Tensor:
    """The sum over tokens of a mixture, from logits, in their dtype, by autograd."""
    valid_C = labels_C != IGNORE_INDEX
    log_softmax_CV = logits_CV.log_softmax(-1)
    index_C1 = labels_C.clamp(min=0)[:, None]
    logp_C = log_softmax_CV.gather(1, index_C1).squeeze(1)
    log_teacher_CV = None if teacher_CV is None else teacher_CV.log_softmax(-1)
    full = FullSoftmax(
        logits_CV, log_softmax_CV, logp_C, rows, log_teacher_CV, valid_C, sequence
    )
    losses_C = sum(
        term.weight * PLAIN[type(term)](term, full) for term in mixture.terms
    )
    return torch.where(valid_C, losses_C, 0.0).sum()


def true_gradients(mixture: Mixture, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Loss and gradients in float64 from full logits, a piece of the rows at a time."""
    hidden_TD = inputs.hidden_TD.detach().double().requires_grad_()
    weight_VD = inputs.weight_VD.detach().double().requires_grad_()
    teacher = inputs.teacher if mixture.has_teacher else None
    teacher_VD = None if teacher is None else teacher.weight.double()
    loss = hidden_TD.new_zeros(())
    piece = max(1, 2**29 // (8 * len(weight_VD)))
    if inputs.sequence:  # whole pairs
        piece = -(-piece // (2 * inputs.sequence)) * 2 * inputs.sequence
    for start in range(0, len(hidden_TD), piece):
        rows = slice(start, start + piece)
        logits_CV = hidden_TD[rows] @ weight_VD.T
        columns = {name: x_T[rows].double() for name, x_T in inputs.rows.items()}
        teacher_CV = None
        if teacher is not None:
            teacher_CV = teacher.hidden[rows].double() @ teacher_VD.T
        labels_C = inputs.labels_T[rows]
        part = plain_loss(
            mixture, logits_CV, labels_C, columns, teacher_CV, inputs.sequence
        )
        part = part / inputs.num_labeled
        part.backward()
        loss += part.detach()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    return {"loss": loss, "d_hidden": hidden_TD.grad, "d_weight": weight_VD.grad}
