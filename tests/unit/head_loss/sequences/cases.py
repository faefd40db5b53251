"""Tokens in sequences, and what plain torch makes of them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import read_by
from torchtitan_liger.head_loss import HeadLoss

B, L = 8, 9
KINDS = ["dpo", "cpo", "ipo", "simpo", "orpo"]  # of `Preference`


def logp_of(hidden, weight, labels):
    logp = (hidden @ weight.T).log_softmax(1)
    logp = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels == -100, 0.0, logp).view(B, L)


def masked(x, labels):
    return torch.where(labels == -100, 0.0, x).view(B, L)


def lengths(labels):
    return (labels != -100).view(B, L).sum(1).clamp(min=1)


def rows_of(problem, head):
    """What `head` reads, [B, L] each."""
    return {n: x.view(B, L) for n, x in read_by(head, problem.rows).items()}


def run(problem, head, **call):
    def loss_of(hidden, weight, labels):
        rows = rows_of(problem, head)
        return head(
            hidden.view(B, L, -1), weight, labels.view(B, L), **call, **rows
        ).loss

    return problem.run(loss_of)


def reported(problem, term):
    """Each metric of `term`: the sum over tokens, divided by their number."""
    call = (problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L))
    rows = rows_of(problem, HeadLoss([term]))
    tokens = (problem.labels != -100).sum()
    out = HeadLoss([term])(*call, normalizer=tokens, **rows)
    found = {name: x.item() for name, x in out.metrics.items()}
    return {n: found[f"{term.name}/{n}"] for n in term.metric_names}


def expected_means(problem, metrics):
    """Of [B, L] numbers the mean over the tokens with a label, or their extreme."""
    valid = (problem.labels != -100).view(B, L)
    means = {}
    for name, x in metrics.items():
        kept = x.expand(B, L)[valid].double()
        end = name.rpartition("/")[2]
        reduction = {"max": torch.amax, "min": torch.amin}.get(end, torch.mean)
        means[name] = pytest.approx(reduction(kept, 0).item(), rel=1e-12, abs=1e-14)
    return means
