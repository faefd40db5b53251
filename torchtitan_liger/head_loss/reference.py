"""The same losses with all logits at once, in any dtype: what everything is compared with.

Written from the definitions, with torch's own cross entropy and autograd, and sharing no
code with the engine. `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchtitan_liger.head_loss.options import HeadLossOptions


def reference_head_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    options: HeadLossOptions,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Each term for each token, before its weight; differentiable.

    The logits are computed in the dtype of the inputs (under autocast, in autocast's) and
    the losses in at least float32, as torchtitan's own loss does.
    """
    valid_T = labels_T != options.ignore_index
    # What an ignored row holds, were it NaN, would reach the weight's gradient.
    logits_TV = F.linear(torch.where(valid_T[:, None], hidden_TD, 0.0), weight_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if options.logit_softcap:
        logits_TV = options.logit_softcap * torch.tanh(
            logits_TV / options.logit_softcap
        )
    logits_TV = logits_TV / options.temperature
    terms = {
        "cross_entropy": F.cross_entropy(
            logits_TV,
            labels_T,
            ignore_index=options.ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
    }
    if z_loss:
        lse_T = torch.logsumexp(logits_TV, dim=-1)
        terms["z_loss"] = torch.where(valid_T, lse_T.square(), 0.0)
    return terms
