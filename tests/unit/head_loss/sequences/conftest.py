"""What terms over sequences are tried on."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import Problem
from tests.unit.head_loss.sequences.cases import B, L
from torchtitan_liger.head_loss import engine


@pytest.fixture(
    params=[3 * L + 1, 5, 10**6], ids=["aligned", "two phases", "one chunk"]
)
def chunks(request, monkeypatch):
    """Chunks that hold a pair, chunks that hold no whole sequence, all in one."""

    def plan(num_tokens, *_, **__):
        rows = request.param
        return engine.ChunkPlan(rows, -(-num_tokens // rows), 0, 0)

    monkeypatch.setattr(engine, "plan_chunks", plan)


@pytest.fixture(params=[True, False], ids=["dropped", "not dropped"])
def ignored_tokens(request, nothing_dropped):
    if not request.param:
        nothing_dropped()


@pytest.fixture(params=[0.3, 0.0], ids="{}_ignored".format)
def problem(request):
    problem = Problem(T=B * L, D=16, V=101, ignored=request.param)
    g = torch.Generator().manual_seed(1)
    logp = (problem.hidden @ problem.weight.T).log_softmax(1)
    logp = logp.gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
    noise = 0.3 * torch.randn(2, problem.T, generator=g, dtype=torch.float64)
    problem.rows = {
        "old_logp": logp + noise[0],
        "ref_logp": logp + noise[1],
        "advantages": torch.randn(B, generator=g).double().repeat_interleave(L),
        "reference_point": torch.full((problem.T,), 0.3, dtype=torch.float64),
    }
    for values in problem.rows.values():
        values[problem.labels == -100] = torch.nan
    problem.rows["desirable"] = (torch.arange(B) % 3 > 0).repeat_interleave(L)
    return problem
