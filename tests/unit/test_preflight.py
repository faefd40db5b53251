"""What needs no mesh; the rest is in `tests/distributed`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.preflight import PreflightError, _check_output


def test_a_decoder_that_wants_more_than_tokens_is_told_the_way_out():
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False))

    def decode(*, scale):
        return head(torch.ones(1, 2, 4)) * scale

    with pytest.raises(PreflightError, match="argument: 'scale'.*no-preflight"):
        _check_output(decode, head, torch.device("cpu"))
    with pytest.raises(TypeError, match="unsupported operand"):
        _check_output(
            lambda: head(torch.ones(1, 2, 4)) + None, head, torch.device("cpu")
        )
