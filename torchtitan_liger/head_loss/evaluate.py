"""From statistics to losses, metrics, and the partial derivatives of the loss.

`C` tokens of a chunk, or of all chunks; `N` terms, `M` metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchtitan_liger.head_loss.statistics import WITHOUT_GRADIENT, Statistics
from torchtitan_liger.head_loss.terms import Rows, Sequences, SequenceTerm, Term


class Metrics:
    """The names of what is reported beside the terms, and how chunks are put together."""

    def __init__(self, terms: Sequence[Term]) -> None:
        needs = frozenset[str]().union(*(term.needs for term in terms))
        self._entropy = "entropy" in needs
        own = ["accuracy", "max_prob"] + ["entropy"] * self._entropy
        of_terms = [f"{t.name}/{name}" for t in terms for name in t.metric_names]
        self._order = sorted(own + of_terms, key=is_extreme)  # stable: sums first
        self._position = [(own + of_terms).index(name) for name in self._order]
        self.names = tuple(self._order)
        self._num_sums = sum(not is_extreme(name) for name in self.names)

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """[M], what no token at all gives."""
        zeros = like.new_zeros(len(self.names))
        zeros[self._num_sums :] = -torch.inf
        return zeros

    def of_rows(
        self,
        terms: Sequence[Term],
        stats: Statistics,
        rows: Rows,
        valid_C: torch.Tensor,
    ) -> torch.Tensor:
        """[M] over the tokens with a label. Of "/min" it is the negative's maximum."""
        right_C = stats.logp >= stats.max_logp  # the label's logit is the largest one
        values = [right_C, stats.max_logp.exp()]
        if self._entropy:
            assert stats.entropy is not None
            values.append(stats.entropy)
        for term in terms:
            if term.metric_names:
                values.extend(term.metrics(stats, rows))
        values_MC = torch.stack(
            [
                -values[i] if name.endswith("/min") else values[i].to(stats.logp.dtype)
                for i, name in zip(self._position, self.names, strict=True)
            ]
        )
        sums = torch.where(valid_C, values_MC[: self._num_sums], 0.0).sum(dim=1)
        extremes_MC = values_MC[self._num_sums :]
        if not len(extremes_MC):
            return sums
        masked_MC = torch.where(valid_C, extremes_MC, -torch.inf)
        return torch.cat([sums, masked_MC.amax(dim=1)])

    def add(self, total: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        sums = total[: self._num_sums] + more[: self._num_sums]
        if self._num_sums == len(self.names):
            return sums
        extremes = torch.maximum(total[self._num_sums :], more[self._num_sums :])
        return torch.cat([sums, extremes])

    def named(
        self, packed: torch.Tensor, scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """By name; sums are scaled, extremes are not."""
        sums = (packed[: self._num_sums] * scale).unbind()
        extremes = [
            -x if name.endswith("/min") else x
            for name, x in zip(
                self.names[self._num_sums :], packed[self._num_sums :], strict=True
            )
        ]
        return dict(zip(self.names, [*sums, *extremes], strict=True))


def is_extreme(name: str) -> bool:
    """Whether chunks, batches and ranks are put together by an extreme, not by a sum."""
    return name.endswith(("/max", "/min"))


class TermValues(NamedTuple):
    """What the terms give back."""

    by_row: torch.Tensor  # [C] the weighted sum over terms
    by_term: torch.Tensor  # [N] weighted sums over rows, before the terms' weights
    partials: Statistics | None  # d loss / d statistic


def evaluate(
    terms: Sequence[Term],
    stats: Statistics,
    rows: Rows,
    row_weight_C: torch.Tensor,
    valid_C: torch.Tensor,
    *,
    with_partials: bool,
    sequences: Sequences | None = None,
) -> TermValues:
    """The terms' values and, if wanted, the partials of the loss by statistic.

    Rows that are not valid count as zero, whatever they hold. A statistic that only terms
    of weight zero read has no partials.
    """
    wanted = {"logp", "lse"}.union(*(term.needs for term in terms if term.weight))
    leaves: dict[str, Any] = {}
    with torch.enable_grad():
        if with_partials:
            for name, value in stats._asdict().items():
                if isinstance(value, torch.Tensor):
                    leaf = name in wanted and name not in WITHOUT_GRADIENT
                    leaves[name] = value.detach().requires_grad_(leaf)
            stats = stats._replace(**leaves)
        losses = []
        for term in terms:
            with torch.set_grad_enabled(with_partials and bool(term.weight)):
                if isinstance(term, SequenceTerm):
                    assert sequences is not None
                    losses.append(term.sequence_loss(stats, rows, sequences))
                else:
                    losses.append(term.loss(stats, rows))
        # By Python numbers: a tensor of them would have to be copied to the GPU.
        weighted = [
            loss_C if term.weight == 1 else term.weight * loss_C
            for term, loss_C in zip(terms, losses, strict=True)
            if term.weight
        ]
        by_row_C = torch.zeros_like(row_weight_C)
        if weighted:
            summed_C = weighted[0]
            for loss_C in weighted[1:]:
                summed_C = summed_C + loss_C
            by_row_C = torch.where(valid_C, summed_C, 0.0)
        loss = (by_row_C * row_weight_C).sum()
    losses_NC = torch.stack([loss_C.detach() for loss_C in losses])
    by_term_N = torch.where(valid_C, losses_NC * row_weight_C, 0.0).sum(dim=1)
    partials = None
    if with_partials:
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        grads: Sequence[torch.Tensor]
        if loss.requires_grad:
            grads = torch.autograd.grad(
                loss,
                [leaves[name] for name in names],
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            grads = [torch.zeros_like(leaves[name]) for name in names]
        # Where a masked row holds an infinite number, autograd gives 0 * inf.
        masked: dict[str, Any] = {
            name: torch.where(
                valid_C if grad.ndim == 1 else valid_C[:, None], grad, 0.0
            )
            for name, grad in zip(names, grads, strict=True)
        }
        absent: dict[str, Any] = dict.fromkeys(Statistics._field_defaults)
        partials = stats._replace(**(absent | masked))
    return TermValues(by_row_C.detach(), by_term_N, partials)
