"""Loss and gradients from full logits: what the preflight compares the fused head with.

For any term over tokens, sharded weights, and in float64; `head_loss/reference.py` is for a
few terms, in the dtype of a job.

`n` tokens at a time of `N` on all ranks, `D` width, `V` vocabulary, `b` columns of it at a
time, `v` those whose gradient this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from torchtitan_liger.head_loss import HeadLoss, Statistics
from torchtitan_liger.liger_api import LigerHeadLoss

BLOCK = 16384  # columns of the weight at a time in float64


class Sample(NamedTuple):
    """The tokens with a label of all ranks, and which of them are this rank's."""

    hidden_ND: torch.Tensor  # as the head saw them
    labels_N: torch.Tensor
    mine: slice
    dtype: torch.dtype  # of the head's products


class Gradients(NamedTuple):
    loss: torch.Tensor  # [] over all ranks
    d_hidden: torch.Tensor  # [n, D] this rank's tokens with a label
    d_weight: torch.Tensor  # [v, D] this rank's shard of the sum over all ranks


def full_logits_gradients(
    sample: Sample,
    weight_VD: torch.Tensor,
    columns: slice,
    head_loss: HeadLoss | LigerHeadLoss,
    dtype: torch.dtype,
) -> Gradients:
    """Loss and gradients from full logits, with products in `dtype`.

    In float64 this is the truth; in the job's own dtype it is what stock training does.
    """
    wide = torch.promote_types(dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=weight_VD.device)
    d_hidden, total = [], max(1, len(sample.labels_N))
    d_weight = torch.zeros_like(weight_VD[columns], dtype=wide)

    def blocks() -> Iterator[torch.Tensor]:
        for block_bD in weight_VD.split(BLOCK):
            yield block_bD.to(sample.dtype).to(dtype)

    with torch.autocast(weight_VD.device.type, enabled=False):
        for start in range(0, len(sample.labels_N), 64):
            hidden_nD = sample.hidden_ND[start : start + 64].to(sample.dtype).to(dtype)
            labels_n = sample.labels_N[start : start + 64]
            logits_nV = torch.cat([hidden_nD @ b.T for b in blocks()], dim=1)
            logits_nV.requires_grad_()
            part = _loss(logits_nV.to(wide), labels_n, head_loss) / total
            (d_logits_nV,) = torch.autograd.grad(part, logits_nV)
            loss += part.detach()
            d_parts = d_logits_nV.split(BLOCK, dim=1)
            d_hidden.append(
                sum((d @ b).to(wide) for d, b in zip(d_parts, blocks(), strict=True))
            )
            d_weight += (d_logits_nV[:, columns].T @ hidden_nD).to(wide)
    d_hidden_ND = torch.cat([*d_hidden, weight_VD.new_empty(0, weight_VD.shape[1])])
    return Gradients(loss, d_hidden_ND[sample.mine].to(dtype), d_weight.to(dtype))


def _loss(
    logits_nV: torch.Tensor,
    labels_n: torch.Tensor,
    head_loss: HeadLoss | LigerHeadLoss,
) -> torch.Tensor:
    options = head_loss.options
    if options.logit_softcap:
        logits_nV = options.logit_softcap * torch.tanh(
            logits_nV / options.logit_softcap
        )
    logits_nV = logits_nV / options.temperature
    logp_nV = logits_nV.log_softmax(dim=1)
    stats = Statistics(
        logp=logp_nV.gather(1, labels_n[:, None])[:, 0],
        lse=logits_nV.logsumexp(dim=1),
        max_logp=logp_nV.detach().amax(dim=1),
        vocab_size=logp_nV.shape[1],
        uniform_ce=-logp_nV.mean(dim=1),
        entropy=-(logp_nV.exp() * logp_nV).sum(dim=1),
        p2=logp_nV.exp().square().sum(dim=1),
    )
    losses = [term.weight * term.loss(stats, {}) for term in head_loss.terms]
    return torch.stack(losses).sum()
