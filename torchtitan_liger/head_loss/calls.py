"""What every implementation does with the arguments of a call.

A mistake that only a GPU can see makes `Call.scale` NaN, and with it the loss and all
gradients: nobody has to wait for the GPU to find it.

`T` tokens, `N` of them that count, `K` candidates of each, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import torch

from torchtitan_liger.head_loss.checks import (
    check_integers,
    check_label_range,
    check_tensor,
    check_tensors,
    is_whole,
    kind_of,
)
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.vocab_parallel import VocabShard, check_shard


class Call(NamedTuple):
    """A call's tensors, checked and flat."""

    hidden_TD: torch.Tensor
    labels_T: torch.Tensor  # int64, each in [0, V) or the ignored index
    valid_T: torch.Tensor  # which of them are in [0, V)
    vocab_size: int  # V, of all ranks
    # [] 1 / normalizer, in the dtype of everything between logits and loss; NaN if a
    # label was neither
    scale: torch.Tensor
    products_dtype: torch.dtype  # of hidden @ weight.T

    def nan_if(self, wrong: torch.Tensor) -> Call:
        """The same, with a scale of NaN if `wrong`, a tensor [] of bool."""
        return self._replace(scale=self.scale.masked_fill(wrong, torch.nan))


def prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    normalizer: torch.Tensor | float,
    ignore_index: int,
    check_labels: bool,
    shard: VocabShard | None = None,
) -> Call:
    """Check the arguments of `HeadLoss.__call__`.

    Raises:
        ValueError: where shapes, dtypes, devices, the normalizer, the shard or, with
            `check_labels`, the labels do not fit; the message holds what was got.
    """
    check_tensors(hidden, weight, labels)
    vocab_size = weight.shape[0]
    if shard is not None:
        check_shard(shard, vocab_size)
        vocab_size = shard.vocab_size
    if vocab_size == 0:
        raise ValueError(f"there is no vocabulary: weight is {tuple(weight.shape)}")
    if check_labels and not torch.compiler.is_compiling():
        check_label_range(labels, vocab_size, ignore_index)
    dtype = products_dtype(hidden, weight)
    math_dtype = torch.promote_types(dtype, torch.float32)
    labels_T = labels.reshape(-1).long()
    counted_T = labels_T != ignore_index
    valid_T = counted_T & (labels_T >= 0) & (labels_T < vocab_size)
    is_wrong = (counted_T ^ valid_T).any()
    scale = _inverse(normalizer, math_dtype, hidden.device)
    return Call(
        hidden_TD=hidden.reshape(labels.numel(), hidden.shape[-1]),
        labels_T=torch.where(valid_T, labels_T, ignore_index),
        valid_T=valid_T,
        vocab_size=vocab_size,
        scale=scale.masked_fill(is_wrong, torch.nan),
        products_dtype=dtype,
    )


def per_token(name: str, tensor: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same tensor with tokens in one dim.

    Raises:
        ValueError: for one that has another shape than `labels` (but one more dim, for
            "candidates"), or is on another device.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        raise ValueError(
            f"{name} must be a real tensor like labels, got {kind_of(tensor)}"
        )
    check_tensor(name, tensor)
    more = name == "candidates"
    leading = tensor.shape[: labels.ndim] if more else tensor.shape
    fits = leading == labels.shape and tensor.ndim == labels.ndim + more
    if not fits or tensor.device != labels.device:
        expected = (*labels.shape, "K") if more else tuple(labels.shape)
        raise ValueError(
            f"{name} must be like labels, {expected} on {labels.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.reshape(labels.numel(), *tensor.shape[labels.ndim :])


def row_inputs_of(
    given: Mapping[str, torch.Tensor],
    wanted: Collection[str],
    labels: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """What the terms read of each token, flat, in `dtype` if it is no integer.

    Raises:
        ValueError: for an input that is missing, that no term reads, that is not like
            the labels, or that wants a gradient.
    """
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        options = HeadLossOptions.__dataclass_fields__
        problems = [
            *(f"{name} is not given" for name in missing),
            *(
                f"{name} is read by none of the terms"
                + (", but of HeadLossOptions" if name in options else "")
                for name in unknown
            ),
        ]
        raise ValueError(
            f"{', '.join(problems)}; they read {', '.join(wanted) or 'no inputs'}, as "
            "their `inputs` say"
        )
    rows = {name: per_token(name, x, labels) for name, x in given.items()}
    if torch.is_grad_enabled() and (
        learn := [n for n, x in rows.items() if x.requires_grad]
    ):
        raise ValueError(
            f"{', '.join(learn)} would get no gradient from a head loss: detach it. Weights "
            "of tokens can be learned as token_weights"
        )
    return {
        name: x.detach().to(dtype) if x.is_floating_point() else x.detach()
        for name, x in rows.items()
    }


def kept_rows(
    call: Call, check_labels: bool, num_labeled: int | Sequence[int] | None
) -> tuple[torch.Tensor | None, Call, bool]:
    """The positions of the tokens that take part, None for all; the call; and whether all
    that take part are known to have a label.

    Nothing waits for a GPU, unless `check_labels` already has.

    Args:
        num_labeled: how many there are, or in each of as many rows of equal length, where
            the caller knows. Without `check_labels` the call's scale is NaN if that is
            wrong.

    Raises:
        ValueError: for a `num_labeled` that is no such number; with `check_labels`, that is
            wrong.
    """
    valid_T = call.valid_T
    num_tokens = valid_T.numel()
    compiling = torch.compiler.is_compiling()
    if num_labeled is None:
        if compiling or not (valid_T.device.type == "cpu" or check_labels):
            return None, call, False
        count = int(valid_T.sum())
    else:
        count, is_wrong = _counted(valid_T, num_labeled)
        if check_labels and not compiling and is_wrong:
            rows = [len(num_labeled), -1] if isinstance(num_labeled, Sequence) else [-1]
            there_are = valid_T.view(rows).sum(dim=-1).tolist()
            raise ValueError(
                f"num_labeled is {num_labeled}, but {there_are} labels are not ignored"
            )
        call = call.nan_if(is_wrong)
    if count == num_tokens:
        return None, call, True
    # A stable sort keeps the order, and its result has a shape that is known here.
    order_T = torch.argsort(valid_T.to(torch.uint8), descending=True, stable=True)
    return order_T[:count], call, True


def _counted(
    valid_T: torch.Tensor, num_labeled: int | Sequence[int]
) -> tuple[int, torch.Tensor]:
    """How many labels a caller has counted, and whether that is wrong, [] of bool."""
    compiling = torch.compiler.is_compiling()
    is_array = not compiling and getattr(num_labeled, "ndim", 0) > 0
    if isinstance(num_labeled, str | torch.Tensor) or is_array:
        raise ValueError(
            "num_labeled must be a whole number, or a list with one for each row of labels "
            f"(of a tensor: its tolist()), got {kind_of(num_labeled)}"
        )
    num_tokens = valid_T.numel()
    counts = num_labeled if isinstance(num_labeled, Sequence) else [num_labeled]
    if not all(map(is_whole, counts)) or not 0 <= sum(counts) <= num_tokens:
        raise ValueError(
            f"num_labeled must be a whole number in [0, {num_tokens}], got {num_labeled}"
        )
    if isinstance(num_labeled, Sequence):
        return sum(counts), _counts_are_wrong(valid_T, counts)
    return num_labeled, valid_T.sum() != num_labeled


def _counts_are_wrong(valid_T: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    if not counts and not valid_T.numel():  # of a batch without rows
        return valid_T.any()
    if not counts or valid_T.numel() % len(counts):
        raise ValueError(
            f"num_labeled has {len(counts)} rows, which {valid_T.numel()} tokens are not"
        )
    given = torch.tensor(counts, pin_memory=valid_T.is_cuda)
    given = given.to(valid_T.device, non_blocking=True)
    return (valid_T.view(len(counts), -1).sum(dim=1) != given).any()


def check_candidates(
    call: Call, candidates_TK: torch.Tensor, check_labels: bool
) -> Call:
    """The call; its scale is NaN if a token with a label has a candidate beyond the
    vocabulary.

    Raises:
        ValueError: for such a candidate, with `check_labels`; for no integers.
    """
    check_integers("candidates", candidates_TK)
    bad_TK = (candidates_TK >= call.vocab_size) & call.valid_T[:, None]
    rule = f"candidates must be below {call.vocab_size}, the size of the vocabulary"
    return without_bad(call, candidates_TK, bad_TK, rule, check_labels)


def without_bad(
    call: Call, tensor: torch.Tensor, bad: torch.Tensor, rule: str, check_labels: bool
) -> Call:
    """The call; its scale is NaN if anything is bad.

    Raises:
        ValueError: with `check_labels`, instead: the rule, and the first bad number.
    """
    if check_labels and not torch.compiler.is_compiling() and bad.any():
        raise ValueError(f"{rule}, got {tensor[bad][0].item()}")
    return call.nan_if(bad.any())


def masked(x: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    """Numbers [N] or [N, K] with zeros where tokens are not valid; other tensors as is."""
    if not x.is_floating_point():
        return x
    return torch.where(valid_N if x.ndim == 1 else valid_N[:, None], x, 0.0)


def products_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of `hidden @ weight.T`: the inputs' own, or autocast's.

    Raises:
        ValueError: for two dtypes outside autocast.
    """
    device_type = hidden.device.type
    # autocast leaves float64 alone
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (
        hidden.dtype,
        weight.dtype,
    ):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, "
            "or call this under torch.autocast"
        )
    return hidden.dtype


def _inverse(
    normalizer: torch.Tensor | float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`1 / normalizer` as a tensor [] on `device`; for zero, 1.

    NaN for a tensor that holds no such number: to raise, somebody would have to look at it.
    """
    if isinstance(normalizer, torch.Tensor):
        check_tensor("normalizer", normalizer)
        if normalizer.numel() != 1 or normalizer.requires_grad:
            raise ValueError(
                "normalizer must be one number without gradient, got a tensor of shape "
                f"{tuple(normalizer.shape)}, requires_grad={normalizer.requires_grad}"
            )
        value = normalizer.reshape(()).to(device, dtype)
        usable = (value >= 0) & value.isfinite()
        return torch.where(
            value == 0, 1.0, torch.where(usable, value, torch.nan)
        ).reciprocal()
    # A graph forgets that it compared with infinity.
    largest = sys.float_info.max
    if not isinstance(normalizer, Real) or not 0 <= float(normalizer) <= largest:
        raise ValueError(
            f"normalizer must be a finite number, at least 0, got {normalizer!r}"
        )
    # Of a graph an input, where `full` would make it a constant.
    return torch.ones((), dtype=dtype, device=device) / float(normalizer or 1)
