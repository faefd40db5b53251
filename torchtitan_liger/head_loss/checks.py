"""Whether the tensors of a call are what they should be. The messages hold what was got.

`K` candidates of each token, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch.distributed.tensor import DTensor


def check_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> None:
    """
    Raises:
        ValueError: where kinds, dtypes, shapes or devices do not fit; the message holds
            what was got.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_tensor(name, tensor)
    check_floats("hidden", hidden.dtype)
    check_floats("weight", weight.dtype)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [V, D], got {tuple(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [..., D] with the D of weight [V, D], got hidden "
            f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "labels must have the shape of hidden without its last dim, got labels "
            f"{tuple(labels.shape)} and hidden {tuple(hidden.shape)}"
        )
    check_integers("labels", labels)
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            "hidden, weight and labels must be on one device, got "
            f"{hidden.device}, {weight.device} and {labels.device}"
        )


def check_tensor(name: str, tensor: object) -> None:
    """
    Raises:
        ValueError: for what is no tensor, and for a DTensor.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {kind_of(tensor)}")
    if isinstance(tensor, DTensor):
        raise ValueError(
            f"{name} is a DTensor, {tensor.placements}: give its full_tensor(), or, where "
            "ranks share the vocabulary, to_local() with `tp_group` (of a HeadLoss: "
            "`shard`)"
        )


def check_integers(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: for a dtype that holds no token ids and no positions.
    """
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")


def check_floats(name: str, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: for a dtype that has no products, or no gradients.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} must be float64, float32, float16 or bfloat16, got {dtype}"
        )


def check_label_range(labels: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """
    Raises:
        ValueError: for a label that is neither in [0, vocab_size) nor `ignore_index`;
            the message holds the first one's value and position.
    """
    labels = labels.long()  # where any `ignore_index` is a number
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if bad.any():
        raise ValueError(
            f"{_first('labels', labels, bad)}, which is neither a token id, in "
            f"[0, {vocab_size}), nor ignore_index ({ignore_index}); {int(bad.sum())} of "
            f"{labels.numel()} labels are like it"
        )


def check_candidate_range(
    candidates: torch.Tensor, labels: torch.Tensor, vocab_size: int, ignore_index: int
) -> None:
    """
    Args:
        candidates: [..., K] beside `labels` [...]; another shape is not for here.

    Raises:
        ValueError: for a token with a label that has a candidate beyond the vocabulary;
            the message holds the first one's value and position.
    """
    if candidates.shape[:-1] != labels.shape:
        return
    bad = (candidates >= vocab_size) & (labels != ignore_index)[..., None]
    if bad.any():
        raise ValueError(
            f"{_first('candidates', candidates, bad)}, which is no token id below "
            f"{vocab_size}, the size of the vocabulary; a negative one stands for none"
        )


def _first(name: str, tensor: torch.Tensor, bad: torch.Tensor) -> str:
    """Position and value of the first bad number."""
    position = tuple(bad.nonzero()[0].tolist())
    return f"{name}[{', '.join(map(str, position))}] is {tensor[position].item()}"


def is_whole(x: object) -> bool:
    """Whether this is a whole number: of Python or numpy, but no bool."""
    return isinstance(x, Integral) and type(x) is not bool


def kind_of(x: object) -> str:
    """For a message."""
    return f"one of {x.dtype}" if isinstance(x, torch.Tensor) else f"{type(x)}"
