"""From statistics to losses, metrics, and the partial derivatives of the loss.

`C` tokens of a chunk, or of all chunks; `S` terms, the summands; `M` metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from torchtitan_liger.head_loss.calls import masked
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import (
    WITHOUT_GRADIENT,
    Partials,
    Statistics,
)
from torchtitan_liger.head_loss.terms import (
    Rows,
    SequenceTerm,
    Term,
    needs_of,
    slopes_of,
)


class TermInputs(NamedTuple):
    """What terms read of some tokens, beside their statistics."""

    rows: Rows
    valid: torch.Tensor  # [C] whether the token has a label
    sequences: Sequences | None

    def part(self, tokens: slice) -> TermInputs:
        """Those of a chunk."""
        return TermInputs(
            {name: x[tokens] for name, x in self.rows.items()},
            self.valid[tokens],
            None if self.sequences is None else self.sequences.part(tokens),
        )


class Metrics:
    """What is reported beside the terms."""

    def __init__(self, terms: Sequence[Term]) -> None:
        names = ["nll", "accuracy", "max_prob"]
        if "entropy" in needs_of(terms):
            names.append("entropy")
        names += [f"{t.name}/{name}" for t in terms for name in t.metric_names]
        self.names = tuple(sorted(names, key=is_extreme))  # stable: sums first
        self._num_sums = sum(not is_extreme(name) for name in self.names)

    def of_rows(
        self,
        terms: Sequence[Term],
        stats: Statistics,
        inputs: TermInputs,
        is_correct_C: torch.Tensor,
    ) -> torch.Tensor:
        """[M] sums, then maxima, over the tokens with a label. A "/min" is the maximum of the
        negatives.

        Args:
            is_correct_C: whether no logit is larger than the label's.
        """
        values = {
            "nll": -stats.logp,
            "accuracy": is_correct_C,
            "max_prob": stats.max_logp.exp(),
        }
        if stats.entropy is not None:
            values["entropy"] = stats.entropy
        for term in terms:
            of_term = _metrics(term, stats, inputs)
            for name, x in zip(term.metric_names, of_term, strict=True):
                values[f"{term.name}/{name}"] = x
        numbers = [values[name].to(stats.logp.dtype) for name in self.names]
        values_MC = torch.stack(
            [signed(name, x) for name, x in zip(self.names, numbers, strict=True)]
        )
        sums = torch.where(inputs.valid, values_MC[: self._num_sums], 0.0).sum(dim=1)
        extremes_MC = values_MC[self._num_sums :]
        if not len(extremes_MC):
            return sums
        masked_MC = torch.where(inputs.valid, extremes_MC, -torch.inf)
        nothing_M1 = masked_MC.new_full((len(masked_MC), 1), -torch.inf)
        extremes = torch.cat([masked_MC, nothing_M1], dim=1).amax(dim=1)
        return torch.cat([sums, extremes])

    def named(
        self, packed: torch.Tensor, scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """By name; sums are scaled, extremes are not."""
        sums = (packed[: self._num_sums] * scale).unbind()
        extremes = [
            signed(name, x)
            for name, x in zip(
                self.names[self._num_sums :], packed[self._num_sums :], strict=True
            )
        ]
        return dict(zip(self.names, [*sums, *extremes], strict=True))


def is_extreme(name: str) -> bool:
    """Whether chunks, batches and ranks are put together by an extreme, not by a sum."""
    return name.endswith(("/max", "/min"))


Number = TypeVar("Number", torch.Tensor, float)


def signed(name: str, x: Number) -> Number:
    """A minimum is the maximum of the negatives: there, and back."""
    return -x if name.endswith("/min") else x


class TermValues(NamedTuple):
    """What the terms give, without gradient."""

    by_token: torch.Tensor  # [C] the weighted sum over terms
    by_term: torch.Tensor  # [S] weighted sums over rows, before the terms' weights


def values_of(
    terms: Sequence[Term],
    stats: Statistics,
    inputs: TermInputs,
    token_weight_C: torch.Tensor,
) -> TermValues:
    """Rows that are not valid count as zero, whatever they hold."""
    with torch.enable_grad():  # by which a term's own parameters show
        losses = [_loss(term, stats, inputs) for term in terms]
    for term, loss_C in zip(terms, losses, strict=True):
        if loss_C.requires_grad:
            raise ValueError(
                f"the term {term.name} reads a tensor that requires a gradient, and would "
                "leave it without one: detach it. Weights of tokens can be learned as "
                "token_weights"
            )
    with torch.no_grad():
        by_token_C = torch.zeros_like(token_weight_C)
        for term, loss_C in zip(terms, losses, strict=True):
            if term.weight:
                # By Python numbers: a tensor would have to be copied to the GPU.
                by_token_C = by_token_C + term.weight * loss_C
        weighted_SC = torch.stack(losses) * token_weight_C
        return TermValues(
            torch.where(inputs.valid, by_token_C, 0.0),
            torch.where(inputs.valid, weighted_SC, 0.0).sum(dim=1),
        )


def partials_of(
    terms: Sequence[Term],
    stats: Statistics | None,
    inputs: TermInputs,
    token_weight_C: torch.Tensor,
) -> Partials:
    """The partials of `sum(token_weight * loss)` by statistic, each [C] or [C, K].

    A statistic that no term of a weight other than zero reads has None.

    Args:
        stats: may be None if all terms have slopes.
    """
    weight_C = torch.where(inputs.valid, token_weight_C, 0.0)
    partials: dict[str, Any] = {}

    def add(name: str, grad: torch.Tensor) -> None:
        partials[name] = partials[name] + grad if name in partials else grad

    others = []
    for term in terms:
        slopes = slopes_of(term)
        if not term.weight:
            continue
        if slopes is None:
            others.append(term)
            continue
        for name, slope in slopes.items():
            add(name, weight_C * (slope * term.weight))
    if others:
        assert stats is not None
        for name, grad in _by_autograd(others, stats, inputs, weight_C).items():
            add(name, grad)
    if "logp" not in partials:
        partials["logp"] = torch.zeros_like(weight_C)
    return Partials(**partials)


def _by_autograd(
    terms: Sequence[Term], stats: Statistics, inputs: TermInputs, weight_C: torch.Tensor
) -> dict[str, torch.Tensor]:
    with torch.enable_grad(), _callers_hooks_left_out():
        leaves: dict[str, Any] = {
            name: value.detach().requires_grad_(name not in WITHOUT_GRADIENT)
            for name, value in stats._asdict().items()
            if isinstance(value, torch.Tensor)
        }
        wanted = [name for name in leaves if name not in WITHOUT_GRADIENT]
        stats = stats._replace(**leaves)
        loss_C = torch.zeros_like(weight_C)
        for term in terms:
            term_C = _loss(term, stats, inputs)
            if not term_C.requires_grad:
                raise ValueError(
                    f"the term {term.name} has a weight of {term.weight}, but no statistic "
                    f"with a gradient in it ({', '.join(sorted(WITHOUT_GRADIENT))} have "
                    "none): with a weight of 0 it is reported alone"
                )
            loss_C = loss_C + term.weight * term_C
        loss = (torch.where(inputs.valid, loss_C, 0.0) * weight_C).sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted], allow_unused=True)
    # Where a masked row holds an infinite number, autograd gives 0 * inf.
    return {
        name: masked(grad, inputs.valid)
        for name, grad in zip(wanted, grads, strict=True)
        if grad is not None
    }


def _callers_hooks_left_out() -> AbstractContextManager[None]:
    """Who saves tensors elsewhere, or computes them again, as activation checkpointing does,
    means those of the backward pass. What is saved here is read at once."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()  # there are none

    # Under hooks, autograd leaves its check to them.
    def pack(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, x._version

    def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        x, version = packed
        if x._version != version:
            raise RuntimeError(
                "a term has changed in place what its gradient needs: it has to work on a "
                "copy"
            )
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _loss(term: Term, stats: Statistics, inputs: TermInputs) -> torch.Tensor:
    rows, _, sequences = inputs
    with _watched(term, stats, rows):
        if isinstance(term, SequenceTerm):
            assert sequences is not None
            loss_C = term.sequence_loss(stats, rows, sequences)
        else:
            loss_C = term.loss(stats, rows)
    if not isinstance(loss_C, torch.Tensor) or loss_C.shape != stats.logp.shape:
        got = list(loss_C.shape) if isinstance(loss_C, torch.Tensor) else loss_C
        raise ValueError(
            f"the term {term.name} must give one loss for each token, a tensor "
            f"{list(stats.logp.shape)}, got {got}"
            + (
                "; an optional statistic is None unless it is in the term's `needs`"
                if loss_C is None
                else ": a mean over tokens is for a SequenceTerm"
            )
        )
    return loss_C.to(stats.logp.dtype)  # whatever dtype its own numbers have


def _metrics(
    term: Term, stats: Statistics, inputs: TermInputs
) -> Sequence[torch.Tensor]:
    rows, _, sequences = inputs
    with _watched(term, stats, rows):
        if isinstance(term, SequenceTerm):
            assert sequences is not None
            metrics = list(term.sequence_metrics(stats, rows, sequences))
        else:
            metrics = list(term.metrics(stats, rows))
    shapes = [list(getattr(x, "shape", ())) for x in metrics]
    if shapes != [list(stats.logp.shape)] * len(term.metric_names):
        raise ValueError(
            f"the term {term.name} must give each of its {len(term.metric_names)} "
            f"metrics for each token, {list(stats.logp.shape)}, got {shapes}"
        )
    return metrics


@contextmanager
def _watched(term: Term, stats: Statistics, rows: Rows) -> Iterator[None]:
    """Says what a term may read when it fails as one does that reads what is not there;
    refuses one that changes what others read as well."""
    read = {
        name: (x, x._version)
        for name, x in {**stats._asdict(), **rows}.items()
        if isinstance(x, torch.Tensor) and not x.is_inference()
    }
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        needs, inputs = (", ".join(sorted(x)) for x in (term.needs, term.inputs))
        raise ValueError(
            f"the term {term.name} failed with {error!r}. A statistic that is not always "
            f"there has to be in its `needs` ({needs or 'none'}), and what it reads of "
            f"`rows` in its `inputs` ({inputs or 'none'})"
        ) from error
    if changed := [name for name, (x, version) in read.items() if x._version > version]:
        raise ValueError(
            f"the term {term.name} changes {', '.join(changed)} in place: it has to work on "
            "a copy"
        )
