"""The numbers per token that every loss is made of, and the gradient of logits by them.

A pass over a token's logits `z` leaves a few sums (`Sums`); with the sums of all ranks
they become statistics (`Statistics`), which the terms read; the terms' partial derivatives
by those become the coefficients (`Coefficients`) of one formula for the gradient.

`C` tokens of a chunk, `K` candidate token ids of each token, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch


class Statistics(NamedTuple):
    """What a term may ask for, one number per token, each [C] in float32 (or float64).

    With logits `z`, label `y`, `p = softmax(z)`, and a teacher's `q = softmax(v)`:

        logp             log p_y
        lse              log sum_j exp z_j
        max_logp         max_j log p_j; without gradient
        vocab_size       the number of columns of all ranks
        uniform_ce       -mean_j log p_j
        entropy          -sum_j p_j log p_j
        p2               sum_j p_j ** 2
        logp_k           [C, K] log p of the row input `candidates`
        kl_fwd           sum_j q_j (log q_j - log p_j)
        kl_rev           sum_j p_j (log p_j - log q_j)
        jsd              b KL(q|m) + (1-b) KL(p|m), m = b q + (1-b) p
        teacher_entropy  of q; without gradient
    """

    logp: torch.Tensor
    lse: torch.Tensor
    max_logp: torch.Tensor
    vocab_size: int
    uniform_ce: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    p2: torch.Tensor | None = None
    logp_k: torch.Tensor | None = None
    kl_fwd: torch.Tensor | None = None
    kl_rev: torch.Tensor | None = None
    jsd: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None


OPTIONAL = frozenset(Statistics._field_defaults)
OF_TEACHER = frozenset({"kl_fwd", "kl_rev", "jsd", "teacher_entropy"})
WITHOUT_GRADIENT = frozenset({"max_logp", "teacher_entropy"})
# Of a loss that is linear in these, a row's gradient needs nothing but the row.
IN_ONE_TRIP = frozenset(
    {"logp", "lse", "uniform_ce", "kl_fwd", "kl_rev", "teacher_entropy"}
)


Sums = dict[str, torch.Tensor]
"""What a pass over columns leaves, each [C] (`candidate_logits` [K, C]), by its name in
`SUMS` or `MIXTURE_SUMS`.

With e_j = exp(z_j - max) and, for a teacher, f_j = exp(v_j - teacher_max). Sum and maximum
are kept apart: e_j / sumexp is exact to the last bits where exp(z_j - logsumexp) is not.
"""

SUMS = (
    "max",  # max_j z_j; -inf without columns
    "sumexp",  # sum_j e_j
    "label_logit",  # z_y where these columns have y, else 0
    "logit_sum",  # sum_j z_j
    "shifted_sum",  # sum_j e_j (z_j - max)
    "square_sum",  # sum_j e_j ** 2
    "teacher_max",  # max_j v_j
    "teacher_sumexp",  # sum_j f_j
    "teacher_shifted_sum",  # sum_j f_j (v_j - teacher_max)
    "student_gap",  # sum_j e_j ((z_j - max) - (v_j - teacher_max))
    "teacher_gap",  # sum_j f_j ((v_j - teacher_max) - (z_j - max))
    "candidate_logits",  # [K, C] like label_logit
)
# Of a JSD, with m the mixture: known after the others.
MIXTURE_SUMS = ("student_mixture_kl", "teacher_mixture_kl")  # KL(p | m), KL(q | m)

_ALWAYS = {"max", "sumexp", "label_logit"}
_TEACHER = {"teacher_max", "teacher_sumexp"}
_SUMS_FOR = {
    "uniform_ce": {"logit_sum"},
    "entropy": {"shifted_sum"},
    "p2": {"square_sum"},
    "logp_k": {"candidate_logits"},
    "kl_fwd": {*_TEACHER, "teacher_gap"},
    "kl_rev": {*_TEACHER, "student_gap"},
    "jsd": _TEACHER,
    "teacher_entropy": {*_TEACHER, "teacher_shifted_sum"},
}


def sums_for(needs: Collection[str]) -> tuple[str, ...]:
    """The names of the sums that these statistics are made of, in the order of `SUMS`."""
    wanted = _ALWAYS.union(*(_SUMS_FOR[need] for need in needs))
    return tuple(name for name in SUMS if name in wanted)


def unpack(names: Sequence[str], packed_kC: torch.Tensor) -> Sums:
    """The rows of `packed_kC` by name; the candidates have all that are left."""
    singles = [name for name in names if name != "candidate_logits"]
    sums = dict(zip(singles, packed_kC, strict=False))
    if len(singles) < len(names):
        sums["candidate_logits"] = packed_kC[len(singles) :]
    return sums


def combine(names: Sequence[str], gathered_RkC: torch.Tensor) -> Sums:
    """The sums over all columns from those of each rank's columns, `R` ranks."""
    parts = unpack(names, gathered_RkC.transpose(0, 1))
    if "candidate_logits" in parts:  # [R, K, C] like the others [R, C]
        parts["candidate_logits"] = gathered_RkC[:, len(names) - 1 :]

    total = {"max": parts["max"].amax(dim=0)}
    # Of a rank without columns the maximum is -inf: it has no share.
    shift_RC = parts["max"] - total["max"]
    teacher_shift_RC = shift_RC
    if "teacher_max" in parts:
        total["teacher_max"] = parts["teacher_max"].amax(dim=0)
        teacher_shift_RC = parts["teacher_max"] - total["teacher_max"]
    share_RC, teacher_share_RC = shift_RC.exp(), teacher_shift_RC.exp()

    def moved(name: str, by_RC: torch.Tensor, exps: str) -> torch.Tensor:
        """A sum of w_j (x_j - local origin) as one of w_j (x_j - global origin)."""
        exps_RC = parts[exps]
        return parts[name] + torch.where(exps_RC > 0, by_RC * exps_RC, 0.0)

    def shared(share_RC: torch.Tensor, by_RC: torch.Tensor) -> torch.Tensor:
        """What is too small to count has no share, and were it infinite."""
        return torch.where(share_RC == 0, 0.0, share_RC * by_RC).sum(dim=0)

    for name in names:
        if name in ("label_logit", "logit_sum", "candidate_logits"):
            total[name] = parts[name].sum(dim=0)
        elif name == "sumexp":
            total[name] = (share_RC * parts[name]).sum(dim=0)
        elif name == "square_sum":
            total[name] = (share_RC.square() * parts[name]).sum(dim=0)
        elif name == "shifted_sum":
            total[name] = shared(share_RC, moved(name, shift_RC, "sumexp"))
        elif name == "student_gap":
            by_RC = moved(name, shift_RC - teacher_shift_RC, "sumexp")
            total[name] = shared(share_RC, by_RC)
        elif name == "teacher_sumexp":
            total[name] = (teacher_share_RC * parts[name]).sum(dim=0)
        elif name == "teacher_shifted_sum":
            by_RC = moved(name, teacher_shift_RC, "teacher_sumexp")
            total[name] = shared(teacher_share_RC, by_RC)
        elif name == "teacher_gap":
            by_RC = moved(name, teacher_shift_RC - shift_RC, "teacher_sumexp")
            total[name] = shared(teacher_share_RC, by_RC)
    return total


def statistics_of(
    sums: Sums, needs: Collection[str], vocab_size: int, jsd_beta: float = 0.5
) -> Statistics:
    """What the terms ask for, from sums over all columns."""
    log_sumexp_C = sums["sumexp"].log()
    lse_C = sums["max"] + log_sumexp_C
    values: dict[str, torch.Tensor] = {}
    if "uniform_ce" in needs:
        values["uniform_ce"] = lse_C - sums["logit_sum"] / vocab_size
    if "entropy" in needs:
        values["entropy"] = log_sumexp_C - sums["shifted_sum"] / sums["sumexp"]
    if "p2" in needs:
        values["p2"] = sums["square_sum"] / sums["sumexp"].square()
    if "logp_k" in needs:
        logp_KC = (sums["candidate_logits"] - sums["max"]) - log_sumexp_C
        values["logp_k"] = logp_KC.t().contiguous()
    if OF_TEACHER.intersection(needs):
        teacher_log_C = sums["teacher_sumexp"].log()
    if "teacher_entropy" in needs:
        mean_C = sums["teacher_shifted_sum"] / sums["teacher_sumexp"]
        values["teacher_entropy"] = teacher_log_C - mean_C
    if "kl_fwd" in needs:
        gap_C = sums["teacher_gap"] / sums["teacher_sumexp"]
        values["kl_fwd"] = gap_C - (teacher_log_C - log_sumexp_C)
    if "kl_rev" in needs:
        gap_C = sums["student_gap"] / sums["sumexp"]
        values["kl_rev"] = gap_C - (log_sumexp_C - teacher_log_C)
    if "jsd" in needs and sums.keys() >= set(MIXTURE_SUMS):
        student_kl, teacher_kl = (sums[name] for name in MIXTURE_SUMS)
        values["jsd"] = jsd_beta * teacher_kl + (1 - jsd_beta) * student_kl
    return Statistics(
        logp=(sums["label_logit"] - sums["max"]) - log_sumexp_C,
        lse=lse_C,
        max_logp=-log_sumexp_C,
        vocab_size=vocab_size,
        **values,
    )


class Partials(NamedTuple):
    """The partials of a loss by statistic, [C] or [C, K]; None where it has none."""

    logp: torch.Tensor
    lse: torch.Tensor | None = None
    uniform_ce: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    p2: torch.Tensor | None = None
    logp_k: torch.Tensor | None = None
    kl_fwd: torch.Tensor | None = None
    kl_rev: torch.Tensor | None = None
    jsd: torch.Tensor | None = None

    @property
    def need_values(self) -> bool:
        """Whether their coefficients depend on the statistics' own values."""
        return not (self.entropy is self.p2 is self.kl_rev is None)

    def part(self, rows: slice) -> Partials:
        parts: list[Any] = [None if x is None else x[rows] for x in self]
        return Partials(*parts)

    def times(self, by_C: torch.Tensor) -> Partials:
        """The partials of a loss whose rows count `by_C` times."""
        scaled: list[Any] = [
            None if x is None else x * (by_C if x.ndim == 1 else by_C[:, None])
            for x in self
        ]
        return Partials(*scaled)


class Coefficients(NamedTuple):
    """The gradient by the logit `z_j`, each coefficient [C] or None where it is zero:

        p_j (softmax + log_softmax log p_j + log_teacher log q_j
             + mixture log(m_j / p_j) + square p_j)
        + teacher q_j + constant + label [j is y]
        + sum_k candidates_k [j is the k-th candidate]

    with p_j = exp(z_j - max) / sumexp, and q_j likewise.
    """

    max: torch.Tensor
    sumexp: torch.Tensor
    softmax: torch.Tensor
    label: torch.Tensor
    log_softmax: torch.Tensor | None = None
    square: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    teacher_max: torch.Tensor | None = None
    teacher_sumexp: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    log_teacher: torch.Tensor | None = None
    mixture: torch.Tensor | None = None
    candidates: torch.Tensor | None = None  # [C, K]

    def part(self, rows: slice) -> Coefficients:
        parts: list[Any] = [None if x is None else x[rows] for x in self]
        return Coefficients(*parts)

    def with_mixture(self, student_kl_C: torch.Tensor) -> Coefficients:
        """With what those of sums without `MIXTURE_SUMS` lack, from KL(p | m)."""
        if self.mixture is None:
            return self
        return self._replace(softmax=self.softmax + self.mixture * student_kl_C)


def coefficients_of(
    partials: Partials,
    values: Statistics | None,
    sums: Sums,
    vocab_size: int,
    jsd_beta: float = 0.5,
) -> Coefficients:
    """The gradient by logits from the partials of the loss by statistic.

    By d logp = [j is y] - p, d lse = p, d uniform_ce = p - 1/V, d kl_fwd = p - q,
    d entropy = -p (log p + entropy), d p2 = 2 p (p - p2),
    d kl_rev = p (log p - log q - kl_rev) and
    d jsd = -(1-b) p (log(m / p) + KL(p|m)).
    """
    softmax_C = -partials.logp
    if partials.lse is not None:
        softmax_C = softmax_C + partials.lse
    rest: dict[str, torch.Tensor] = {}
    if partials.uniform_ce is not None:
        softmax_C = softmax_C + partials.uniform_ce
        rest["constant"] = -partials.uniform_ce / vocab_size
    if partials.entropy is not None:
        assert values is not None
        assert values.entropy is not None
        softmax_C = softmax_C - partials.entropy * values.entropy
        rest["log_softmax"] = -partials.entropy
    if partials.p2 is not None:
        assert values is not None
        assert values.p2 is not None
        rest["square"] = 2 * partials.p2
        softmax_C = softmax_C - rest["square"] * values.p2
    if partials.logp_k is not None:
        softmax_C = softmax_C - partials.logp_k.sum(dim=1)
        rest["candidates"] = partials.logp_k
    if partials.kl_fwd is not None:
        softmax_C = softmax_C + partials.kl_fwd
        rest["teacher"] = -partials.kl_fwd
    if partials.kl_rev is not None:
        assert values is not None
        assert values.kl_rev is not None
        softmax_C = softmax_C - partials.kl_rev * values.kl_rev
        rest["log_softmax"] = partials.kl_rev + rest.get("log_softmax", 0.0)
        rest["log_teacher"] = -partials.kl_rev
    if partials.jsd is not None:
        rest["mixture"] = (jsd_beta - 1) * partials.jsd
    if rest.keys() & {"teacher", "log_teacher", "mixture"}:
        rest["teacher_max"] = sums["teacher_max"]
        rest["teacher_sumexp"] = sums["teacher_sumexp"]
    by = Coefficients(sums["max"], sums["sumexp"], softmax_C, partials.logp, **rest)
    if "student_mixture_kl" in sums:
        by = by.with_mixture(sums["student_mixture_kl"])
    return by
