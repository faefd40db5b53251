"""The matrix products of a chunk: where their results go, and in which pieces.

`C` tokens of the chunk, `D` width, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch

# What one multiprocessor computes at a time of a product of 16-bit matrices: cuBLAS on
# Hopper. It takes all of them to the end of a wave, however few tiles are left for it.
TILE = 128 * 256
# Of more rows at once, cuBLAS chooses slower kernels for many widths.
MOST_ROWS = 10560
# A last piece that fills more of its wave costs more than the part of one that it saves.
MOST_OF_A_WAVE = 0.75


def matrix(size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Memory for a matrix whose rows begin where a GPU's matrix products like it."""
    num_rows, num_columns = size
    if like.is_cuda:
        return like.new_empty(num_rows, -(-num_columns // 64) * 64)[:, :num_columns]
    return like.new_empty(size)


def hidden_gradient(
    d_logits_Cv: torch.Tensor, weight_vD: torch.Tensor, out_CD: torch.Tensor
) -> None:
    """`out_CD = d_logits_Cv @ weight_vD`."""
    pieces: tuple[int, ...] = (len(out_CD),)
    if out_CD.is_cuda and out_CD.dtype.itemsize == 2:
        device = torch.cuda.get_device_properties(out_CD.device)
        pieces = whole_waves(*out_CD.shape, device.multi_processor_count)
    for out, d_logits in zip(
        out_CD.split(pieces), d_logits_Cv.split(pieces), strict=True
    ):
        torch.mm(d_logits, weight_vD, out=out)


@lru_cache
def whole_waves(num_rows: int, width: int, num_sms: int) -> tuple[int, ...]:
    """How many rows at a time of a product [num_rows, width] keep all multiprocessors busy.

    For `d_hidden`, each of whose tiles runs over the whole vocabulary: a wave that is half
    empty costs as much as a thousand tokens. The rows of a last, small piece are few enough
    for kernels that divide the vocabulary among multiprocessors instead. On an H200, with
    a vocabulary of 128,256 in bfloat16, this takes 16,384 rows of a width of 4,096 from 658
    to 698 TFLOP/s, and 32,768 rows of a width of 2,048 from 675 to 694.
    """
    wave = num_sms * TILE
    unit = wave // gcd(wave, width)  # the fewest rows that end with a wave
    most = MOST_ROWS - MOST_ROWS % unit
    if most == 0:
        return (num_rows,)
    full, rest = divmod(num_rows, most)
    last = rest % unit
    if last * width > MOST_OF_A_WAVE * wave:
        last = 0
    pieces = (*[most] * full, rest - last, last)
    return tuple(rows for rows in pieces if rows) or (0,)


def weight_sum_dtype(
    products_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    acc_dtype: torch.dtype,
    *,
    single_chunk: bool,
) -> torch.dtype:
    """The dtype in which the weight's gradient is summed; never below the products'."""
    if single_chunk and weight_dtype == products_dtype:
        return products_dtype  # no sum to lose precision in
    return torch.promote_types(acc_dtype, products_dtype)


class WeightGradient:
    """The sum over chunks of `d_logits.T @ hidden`."""

    def __init__(self, weight_vD: torch.Tensor, sum_dtype: torch.dtype) -> None:
        self._sum_vD = torch.empty_like(
            weight_vD, dtype=sum_dtype, memory_format=torch.contiguous_format
        )
        self._empty = True  # there is at least one chunk

    def add(self, d_logits_Cv: torch.Tensor, hidden_CD: torch.Tensor) -> None:
        total = self._sum_vD
        beta = 0.0 if self._empty else 1.0  # the first chunk overwrites
        self._empty = False
        d_logits_vC, mixed = d_logits_Cv.t(), dict[str, Any]()
        if d_logits_Cv.dtype != total.dtype:
            if d_logits_Cv.is_cuda:
                mixed = {"out_dtype": total.dtype}
            else:  # no mixed-precision product on CPUs
                d_logits_vC = d_logits_vC.to(total.dtype)
                hidden_CD = hidden_CD.to(total.dtype)
        torch.addmm(total, d_logits_vC, hidden_CD, beta=beta, out=total, **mixed)

    def total(self) -> torch.Tensor:
        return self._sum_vD
