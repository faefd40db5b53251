"""Logits, and what the passes over them leave."""

from __future__ import annotations

import torch

from torchtitan_liger.head_loss.statistics import SUMS, Partials, unpack
from torchtitan_liger.head_loss.sweeps import Logits, Transform

C, V, K = 9, 5003, 3  # more columns than one block of the kernels has
PLAIN = Transform()
NOTHING = torch.full((C,), -1), torch.full((C, K), -1)  # of what is on another rank
PLAIN_SUMS = ("max", "sumexp", "label_logit")


def draw(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(C, V, generator=g)).to(dtype)
    teacher = (3 * torch.randn(C, V, generator=g)).to(dtype)
    label = torch.randint(V, (C,), generator=g)
    label[2] = -1  # on another rank
    candidates = torch.randint(-1, V, (C, K), generator=g)
    return logits, teacher, label, candidates


def sums_of(impl, logits, teacher, label, candidates, transform=PLAIN):
    wide = torch.promote_types(logits.dtype, torch.float32)
    packed = torch.full((len(SUMS) - 1 + K, len(logits)), torch.nan, dtype=wide)
    sums = unpack(SUMS, packed)
    impl.statistics_sweep(
        logits,
        label,
        transform,
        sums,
        candidates_CK=candidates,
        teacher=Logits(teacher, transform),
    )
    return sums


def sums_in_one_trip(impl, logits, label):
    """By `one_trip_sweep`, which leaves a gradient of zero: `logits` are gone."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    sums = unpack(PLAIN_SUMS, torch.empty(len(PLAIN_SUMS), len(logits), dtype=wide))
    zeros = torch.zeros_like(sums["max"])
    impl.one_trip_sweep(logits, label, PLAIN, sums, Partials(logp=zeros))
    return sums
