"""The implementations that scripts/bench_head_loss.py measures: its rows.

A new one is a function in `FAMILIES`. The losses are in head_loss_mixtures.py.

`T` tokens, `C` tokens of a piece, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from head_loss_mixtures import (
    CROSS_ENTROPY,
    DPO,
    IGNORE_INDEX,
    MIXTURES,
    MORE_MIXTURES,
    Inputs,
    Mixture,
    plain_loss,
)

from torchtitan_liger import device
from torchtitan_liger.head_loss import (
    Distillation,
    HeadLoss,
    HeadLossOptions,
    SequenceTerm,
    Term,
)
from torchtitan_liger.liger_api import LigerHeadLoss, liger_status


class Unavailable(Exception):
    """The implementation is not there; the message says why."""


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


def prepare_floor(inputs: Inputs, *, with_pass: bool = False) -> Step:
    """The three products alone, on all rows, into memory that is there already; or with a
    pass over the logits, in place."""
    hidden_TD, weight_VD = inputs.hidden_TD.detach(), inputs.weight_VD.detach()
    d_logits_TV = logits_gradient(inputs)
    logits_TV = torch.empty_like(d_logits_TV)
    d_hidden_TD, d_weight_VD = map(torch.empty_like, (hidden_TD, weight_VD))

    def step() -> None:
        torch.mm(hidden_TD, weight_VD.T, out=logits_TV)
        if with_pass:
            logits_TV.mul_(0.5)
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
ONE_PASS = Case(
    "the three products and one pass",
    partial(prepare_floor, with_pass=True),
    has_gradients=False,
)
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
    head_loss: HeadLoss | LigerHeadLoss,
    inputs: Inputs,
    **hints: Any,
) -> torch.Tensor:
    """As the trainer calls it: the labels are looked at, and counted, on the host."""
    read = frozenset().union(*(term.inputs for term in head_loss.terms))
    hidden, weight, labels = inputs[:3]
    hints |= {name: inputs.rows[name] for name in read}
    num_labeled: int | list[int] | None = inputs.num_labeled
    if any(isinstance(term, SequenceTerm) for term in head_loss.terms):
        shape = -1, inputs.sequence
        hidden, labels = hidden.unflatten(0, shape), labels.view(shape)
        hints |= {name: inputs.rows[name].view(shape) for name in read}
        num_labeled = inputs.labeled_of_each
    return head_loss(
        hidden,
        weight,
        labels,
        normalizer=inputs.num_labeled,
        check_labels=False,
        num_labeled=num_labeled,
        **hints,
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
    "one-pass": lambda args: [ONE_PASS],
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
        teacher, teacher_TV = inputs.teacher, None
        if mixture.has_teacher:
            teacher_TV = F.linear(teacher.hidden, teacher.weight).float()
        labels_T, rows = inputs.labels_T, inputs.rows
        loss = plain_loss(
            mixture, logits_TV, labels_T, rows, teacher_TV, inputs.sequence
        )
        return loss / inputs.num_labeled

    return autograd_case("full logits", loss_of, mixture)


def calls_loss(
    mixture: Mixture, calls: Sequence[Sequence[Term]], inputs: Inputs
) -> torch.Tensor:
    """The sum of several head losses, each with terms of its own."""
    losses = []
    for terms in calls:
        learns = any(isinstance(term, Distillation) for term in terms)
        teacher = inputs.teacher if learns else None
        losses += [engine_loss(HeadLoss(terms), inputs, teacher=teacher)]
    return reduce(torch.add, losses)


def prepare_teacher_product(inputs: Inputs) -> Step:
    """What a distillation cannot do without, into memory that is there already."""
    teacher_ND = inputs.teacher.hidden[: inputs.num_labeled]
    teacher_VD = inputs.teacher.weight
    logits_NV = teacher_ND.new_empty(inputs.num_labeled, len(teacher_VD))

    def step() -> None:
        torch.mm(teacher_ND, teacher_VD.T, out=logits_NV)

    return step


TEACHER_PRODUCT = Case(
    "teacher's product alone", prepare_teacher_product, has_gradients=False
)


def mixture_cases() -> Iterator[Case]:
    for mixture in (*MIXTURES, *MORE_MIXTURES):
        yield from cases_of_mixture(mixture)
    yield TEACHER_PRODUCT


def cases_of_mixture(mixture: Mixture) -> Iterator[Case]:
    """In one call, as a call per term, and from full logits."""
    name, terms = mixture.name, mixture.terms
    one_call = partial(calls_loss, mixture, [terms])
    yield autograd_case(f"{name}: one call", one_call, mixture)
    if len(terms) > 1:
        calls = partial(calls_loss, mixture, [[term] for term in terms])
        yield autograd_case(f"{name}: {len(terms)} calls", calls, mixture)
    yield replace(unfused(mixture), name=f"{name}: full logits")


def liger_dpo_loss(inputs: Inputs) -> torch.Tensor:
    """Liger-Kernel has the sequences to prefer in the first half: one copy, and back."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: {error}") from None

    def by_halves(x_T: torch.Tensor) -> torch.Tensor:
        pairs = x_T.unflatten(0, (-1, 2, inputs.sequence))
        return pairs.transpose(0, 1).flatten(0, 1)

    hidden_TD, weight_VD, labels_T = inputs[:3]
    compiled = hidden_TD.is_cuda
    (term,) = DPO.terms
    loss_of = LigerFusedLinearDPOLoss(
        IGNORE_INDEX, beta=term.beta, compiled=compiled, use_ref_model=False
    )
    loss, *_ = loss_of(weight_VD, by_halves(hidden_TD), by_halves(labels_T))
    num_pairs = len(labels_T) // (2 * inputs.sequence)
    return loss * num_pairs / inputs.num_labeled


def preference_cases() -> Iterator[Case]:
    """Preferences among sequences, beside the cross entropy of the same tokens."""
    for mixture in (CROSS_ENTROPY, DPO):
        yield from cases_of_mixture(mixture)
    yield autograd_case("DPO: Liger", liger_dpo_loss, DPO)
