"""What the preflight finds on one process; on several, see tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.preflight import PreflightError, _check_output


def test_logits_that_change_after_the_head_are_found():
    linear = nn.Linear(4, 7, bias=False, dtype=torch.bfloat16)
    head = LMHead.from_linear(linear).requires_grad_(False)
    hidden = 9 * torch.randn(1, 3, 4, dtype=torch.bfloat16)
    _check_output(lambda: head(hidden), head)
    _check_output(lambda: head(hidden).float(), head)
    _check_output(lambda: head(hidden * torch.nan), head)  # found by what comes next
    for change in (
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.mul_(2),
        lambda logits: logits[..., :1],
    ):
        with pytest.raises(PreflightError, match="changes the logits"):
            _check_output(lambda change=change: change(head(hidden)), head)
    assert not head._forward_hooks
