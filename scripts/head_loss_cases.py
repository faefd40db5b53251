"""What scripts/bench_head_loss.py measures: inputs, losses and implementations.

A new mixture of losses is a line in `MIXTURES`; a term that is new there also needs its
formula in `PLAIN`. A new implementation is a function in `FAMILIES`.

`T` tokens, `C` tokens of a piece, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import inspect
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torchtitan_liger import device
from torchtitan_liger.head_loss import (
    CrossEntropy,
    EntropyBonus,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Term,
    ZLoss,
)
from torchtitan_liger.liger_api import LigerHeadLoss, liger_status

IGNORE_INDEX = -100


class Unavailable(Exception):
    """The implementation is not there; the message says why."""


class Inputs(NamedTuple):
    """The first three are what every implementation takes."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    labels_T: torch.Tensor
    rows: dict[str, torch.Tensor]  # each [T], what the terms ask for by name
    num_labeled: int


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

    def inputs(self) -> Inputs:
        """Hidden states of variance 1, logits of variance about 1, uniform labels."""
        g = torch.Generator(self.device).manual_seed(self.seed)
        kwargs: dict[str, Any] = {"device": self.device, "generator": g}
        hidden_TD = torch.randn(self.tokens, self.dim, dtype=self.dtype, **kwargs)
        weight_VD = torch.randn(self.vocab, self.dim, dtype=self.dtype, **kwargs)
        weight_VD /= self.dim**0.5
        words_T = torch.randint(self.vocab, (self.tokens,), **kwargs)
        num_ignored = round(self.ignored * self.tokens)
        ignored_T = torch.randperm(self.tokens, **kwargs) < num_ignored
        # The log probability of a word without logits: as the weight is normal, the
        # log-sum-exp over a large vocabulary is log V + |hidden|^2 / 2D.
        lse_T = math.log(self.vocab) + hidden_TD.float().square().mean(1) / 2
        logp_T = (hidden_TD.float() * weight_VD[words_T].float()).sum(1) - lse_T
        noise_T = torch.randn(self.tokens, **kwargs)
        rows = {
            "advantages": torch.randn(self.tokens, **kwargs),
            "old_logp": logp_T + 0.1 * noise_T,  # the policy has moved by a few steps
        }
        return Inputs(
            hidden_TD.requires_grad_(),
            weight_VD.requires_grad_(),
            words_T.masked_fill(ignored_T, IGNORE_INDEX),
            rows,
            self.tokens - num_ignored,
        )


@dataclass(frozen=True, eq=False)
class Mixture:
    """A sum of terms, and what they need."""

    name: str
    terms: tuple[Term, ...]
    rows: tuple[str, ...] = ()
    accuracy: bool = False  # reported too, where that is not for nothing


CROSS_ENTROPY = Mixture("cross entropy", (CrossEntropy(),))
MIXTURES = (
    CROSS_ENTROPY,
    Mixture("cross entropy + z-loss", (CrossEntropy(), ZLoss(1e-4))),
    Mixture(
        "cross entropy + z-loss + entropy + accuracy + GRPO",
        (CrossEntropy(), ZLoss(1e-4), EntropyBonus(0.01), PolicyGradient("ppo")),
        rows=("advantages", "old_logp"),
        accuracy=True,
    ),
)


class FullSoftmax(NamedTuple):
    """What a loss in plain torch is computed from."""

    logits_CV: torch.Tensor
    log_softmax_CV: torch.Tensor
    logp_C: torch.Tensor  # of the labels
    rows: Mapping[str, torch.Tensor]  # each [C]


def clipped_policy_gradient(term: PolicyGradient, full: FullSoftmax) -> torch.Tensor:
    advantages_C = full.rows["advantages"]
    ratio_C = (full.logp_C - full.rows["old_logp"]).exp()
    clipped_C = ratio_C.clamp(1 - term.clip_low, 1 + term.clip_high)
    return -torch.minimum(ratio_C * advantages_C, clipped_C * advantages_C)


# Each term as one writes it with all logits at hand: [C], before its weight.
PLAIN: dict[type, Callable[[Any, FullSoftmax], torch.Tensor]] = {
    CrossEntropy: lambda term, full: -full.logp_C,
    ZLoss: lambda term, full: full.logits_CV.logsumexp(-1).square(),
    EntropyBonus: lambda term, full: (
        full.log_softmax_CV.exp() * full.log_softmax_CV
    ).sum(-1),
    PolicyGradient: clipped_policy_gradient,
}


def plain_loss(
    mixture: Mixture,
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    rows: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The sum over tokens of a mixture, from logits, in their dtype, by autograd."""
    valid_C = labels_C != IGNORE_INDEX
    log_softmax_CV = logits_CV.log_softmax(-1)
    index_C1 = labels_C.clamp(min=0)[:, None]
    logp_C = log_softmax_CV.gather(1, index_C1).squeeze(1)
    full = FullSoftmax(logits_CV, log_softmax_CV, logp_C, rows)
    losses_C = sum(
        term.weight * PLAIN[type(term)](term, full) for term in mixture.terms
    )
    return torch.where(valid_C, losses_C, 0.0).sum()


def true_gradients(mixture: Mixture, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Loss and gradients in float64 from full logits, a piece of the rows at a time."""
    hidden_TD = inputs.hidden_TD.detach().double().requires_grad_()
    weight_VD = inputs.weight_VD.detach().double().requires_grad_()
    loss = hidden_TD.new_zeros(())
    piece = max(1, 2**29 // (8 * len(weight_VD)))
    for start in range(0, len(hidden_TD), piece):
        rows = slice(start, start + piece)
        logits_CV = hidden_TD[rows] @ weight_VD.T
        columns = {name: x_T[rows].double() for name, x_T in inputs.rows.items()}
        part = plain_loss(mixture, logits_CV, inputs.labels_T[rows], columns)
        part = part / inputs.num_labeled
        part.backward()
        loss += part.detach()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is not None
    return {"loss": loss, "d_hidden": hidden_TD.grad, "d_weight": weight_VD.grad}


Step = Callable[[], torch.Tensor | None]
"""What is timed: fills the inputs' gradients and gives the loss."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    prepare: Callable[[Inputs], Step]
    """Everything that comes before the clock starts. Raises whatever stands in the way."""
    mixture: Mixture = CROSS_ENTROPY
    has_gradients: bool = True


def autograd_case(
    name: str,
    loss_of: Callable[[Inputs], torch.Tensor],
    mixture: Mixture = CROSS_ENTROPY,
) -> Case:
    """A loss by `loss_of`, forward and backward."""

    def prepare(inputs: Inputs) -> Step:
        def step() -> torch.Tensor:
            loss = loss_of(inputs)
            loss.backward()
            return loss.detach()

        return step

    return Case(name, prepare, mixture)


def prepare_floor(inputs: Inputs) -> Step:
    """The three products alone, on all rows, into memory that is there already."""
    hidden_TD, weight_VD = inputs.hidden_TD.detach(), inputs.weight_VD.detach()
    d_logits_TV = logits_gradient(inputs)
    logits_TV = torch.empty_like(d_logits_TV)
    d_hidden_TD, d_weight_VD = map(torch.empty_like, (hidden_TD, weight_VD))

    def step() -> None:
        torch.mm(hidden_TD, weight_VD.T, out=logits_TV)
        torch.mm(d_logits_TV, weight_VD, out=d_hidden_TD)
        torch.mm(d_logits_TV.T, hidden_TD, out=d_weight_VD)

    return step


@torch.no_grad()
def logits_gradient(inputs: Inputs) -> torch.Tensor:
    """The cross entropy's gradient by the logits, [T, V], rounded to the inputs' dtype.

    A GPU's clock depends on the numbers that it multiplies: these must be the real ones.
    """
    grad_TV = inputs.hidden_TD @ inputs.weight_VD.T
    piece = max(1, 2**28 // grad_TV.shape[1])
    labels = inputs.labels_T[:, None].split(piece)
    for grad_CV, labels_C1 in zip(grad_TV.split(piece), labels, strict=True):
        softmax_CV = grad_CV.float().softmax(-1)
        one_C1 = torch.ones_like(softmax_CV[:, :1])
        softmax_CV.scatter_add_(1, labels_C1.clamp(min=0), -one_C1)
        softmax_CV *= labels_C1 != IGNORE_INDEX
        grad_CV.copy_(softmax_CV / inputs.num_labeled)
    return grad_TV


def stock_loss(inputs: Inputs, compiled: bool) -> torch.Tensor:
    logits_TV = F.linear(inputs.hidden_TD, inputs.weight_VD)
    loss_of = torchtitan_loss(compiled)
    return loss_of(logits_TV[None], inputs.labels_T[None]) / inputs.num_labeled


@cache
def torchtitan_loss(compiled: bool) -> Callable[..., torch.Tensor]:
    """torchtitan's loss; compiled as torchtitan does it, without the head."""
    device.prepare()
    from torchtitan.components.loss import cross_entropy_loss

    return torch.compile(cross_entropy_loss) if compiled else cross_entropy_loss


FLOOR = Case("floor: the three products", prepare_floor, has_gradients=False)
STOCK = autograd_case("stock eager", partial(stock_loss, compiled=False))
COMPILED = autograd_case("stock compiled", partial(stock_loss, compiled=True))


def torch_own(args: Namespace) -> Iterator[Case]:
    def loss_of(inputs: Inputs, **options: Any) -> torch.Tensor:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has none")
        return F.linear_cross_entropy(*inputs[:3], ignore_index=IGNORE_INDEX, **options)

    name = "torch F.linear_cross_entropy"
    yield autograd_case(name, loss_of)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        yield autograd_case(f"{name}, chunked", partial(loss_of, options=options))


def engine_loss(
    head_loss: HeadLoss | LigerHeadLoss, inputs: Inputs, rows: tuple[str, ...] = ()
) -> torch.Tensor:
    """As the trainer calls it: the labels are looked at, and counted, on the host."""
    hints: dict[str, Any] = {name: inputs.rows[name] for name in rows}
    if "num_labeled" in inspect.signature(head_loss.__call__).parameters:
        hints["num_labeled"] = inputs.num_labeled
    return head_loss(
        *inputs[:3], normalizer=inputs.num_labeled, check_labels=False, **hints
    ).loss


def chunked(args: Namespace) -> Iterator[Case]:
    # A sum is never narrower than what is summed.
    wide = [torch.promote_types(acc_dtype, args.dtype) for acc_dtype in args.acc_dtypes]
    for acc_dtype in dict.fromkeys(wide):
        for mib in dict.fromkeys((0, 256, *args.budgets)):
            options = HeadLossOptions(logits_memory_mib=mib, acc_dtype=acc_dtype)
            name = f"chunked, {f'{mib} MiB' if mib else 'default'}"
            if acc_dtype != torch.float32:
                name += f", sums in {str(acc_dtype).removeprefix('torch.')}"
            yield autograd_case(name, partial(engine_loss, HeadLoss(options=options)))


def liger_loss(inputs: Inputs) -> torch.Tensor:
    check_liger(inputs)
    return engine_loss(LigerHeadLoss(), inputs)


def liger_raw(args: Namespace) -> Iterator[Case]:
    """Liger-Kernel as its own users call it: a mean, at several sizes of its chunks."""

    def loss_of(inputs: Inputs, **kwargs: Any) -> torch.Tensor:
        check_liger(inputs)
        from liger_kernel.transformers.functional import (
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(
            *inputs[:3], ignore_index=IGNORE_INDEX, **kwargs
        )

    for const in (None, *args.liger_consts):
        name = "default" if const is None else f"chunk_mem_const {const}"
        kwargs = {} if const is None else {"chunk_mem_const": const}
        yield autograd_case(f"Liger, {name}", partial(loss_of, **kwargs))
        if args.dtype.itemsize < 4:  # its default sums in the dtype of the weight
            kwargs = kwargs | {"accum_dtype": torch.float32}
            name += ", sums in float32"
            yield autograd_case(f"Liger, {name}", partial(loss_of, **kwargs))


def check_liger(inputs: Inputs) -> None:
    status = liger_status(inputs.hidden_TD.device.type)
    if not status.usable:
        raise Unavailable(status.reason)


def cut_cross_entropy_loss(inputs: Inputs) -> torch.Tensor:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: {error}") from None
    return linear_cross_entropy(*inputs[:3], ignore_index=IGNORE_INDEX)


# In the order of the table.
FAMILIES: dict[str, Callable[[Namespace], Iterable[Case]]] = {
    "floor": lambda args: [FLOOR],
    "stock": lambda args: [STOCK],
    "compiled": lambda args: [COMPILED],
    "torch": torch_own,
    "chunked": chunked,
    "liger": lambda args: [autograd_case("liger (ours), default", liger_loss)],
    "liger-raw": liger_raw,
    "cut-cross-entropy": lambda args: [
        autograd_case("cut-cross-entropy", cut_cross_entropy_loss)
    ],
}


def unfused(mixture: Mixture) -> Case:
    """Full logits in plain torch: what the errors of the others are compared with."""
    if mixture is CROSS_ENTROPY:
        return STOCK

    def loss_of(inputs: Inputs) -> torch.Tensor:
        logits_TV = F.linear(inputs.hidden_TD, inputs.weight_VD).float()
        if mixture.accuracy:
            (logits_TV.detach().argmax(-1) == inputs.labels_T).sum()
        loss = plain_loss(mixture, logits_TV, inputs.labels_T, inputs.rows)
        return loss / inputs.num_labeled

    return autograd_case("full logits", loss_of, mixture)


def calls_loss(
    mixture: Mixture, calls: Sequence[Sequence[Term]], inputs: Inputs
) -> torch.Tensor:
    """The sum of several head losses, each with terms of its own."""
    head_losses = (HeadLoss(terms) for terms in calls)
    losses = (engine_loss(head, inputs, mixture.rows) for head in head_losses)
    return reduce(torch.add, losses)


def mixture_cases() -> Iterator[Case]:
    """Each mixture in one call, as a call per term, and from full logits."""
    for mixture in MIXTURES:
        name, terms = mixture.name, mixture.terms
        one_call = partial(calls_loss, mixture, [terms])
        yield autograd_case(f"{name}: one call", one_call, mixture)
        if len(terms) > 1:
            calls = partial(calls_loss, mixture, [[term] for term in terms])
            yield autograd_case(f"{name}: {len(terms)} calls", calls, mixture)
        yield replace(unfused(mixture), name=f"{mixture.name}: full logits")
