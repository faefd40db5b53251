"""Which tokens, and which sequences, a term over sequences sees together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    HeadLoss,
    Preference,
    SequencePolicyGradient,
    SequenceTerm,
    engine,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sequence_ids": torch.full((27,), 3)}, r"in \[0, 3\) .* got 3"),
        ({"sequence_ids": torch.full((27,), -1)}, r"in \[0, 3\) .* got -1"),
        ({"sequence_ids": torch.zeros(27)}, "int64 or int32, got torch.float32"),
        ({"sequence_ids": torch.zeros(27).long(), "num_sequences": 0}, "at least 1"),
        (
            {"sequence_ids": torch.zeros(27).long(), "num_sequences": 2.0},
            "whole number",
        ),
        ({"sequence_ids": None}, "belong together"),
    ],
)
def test_numbers_that_are_no_sequences_are_an_error(call, message):
    problem = Problem(T=27, D=16, V=101)
    args = problem.hidden, problem.weight, problem.labels
    rows = {"old_logp": torch.zeros(27), "advantages": torch.ones(27)}
    call = {"num_sequences": 3, **call}
    with pytest.raises(ValueError, match=message):
        HeadLoss([SequencePolicyGradient()])(*args, **rows, **call)
    with pytest.raises(ValueError, match="no term over sequences"):
        HeadLoss()(*args, **call)


def test_losses_per_token_have_no_sequences():
    problem = Problem(T=72, D=16, V=101)
    head = HeadLoss([SequencePolicyGradient(1.0, 100.0)])
    with pytest.raises(ValueError, match="no gradients for terms over sequences"):
        head(problem.hidden, problem.weight, problem.labels, reduction="none")


def test_sequences_of_any_length_by_their_numbers(monkeypatch):
    """Packed: the tokens of a sequence need not even be neighbours."""
    problem = Problem(T=60, D=16, V=101)
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(5, (60,), generator=g)
    old = -4.0 + torch.randn(60, generator=g, dtype=torch.float64)
    advantages = torch.randn(5, generator=g, dtype=torch.float64)[ids]

    def loss_of(hidden, weight, labels):
        valid = labels != -100
        logp = (hidden @ weight.T).log_softmax(1)
        logp = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        loss = 0.0
        for number in range(5):
            here = valid & (ids == number)
            ratio = (logp - old)[here].mean().exp()
            loss = loss - (ratio * advantages[here]).sum()
        return loss

    truth = problem.run(loss_of)
    head = HeadLoss([SequencePolicyGradient(1.0, 1e9)])
    rows = {"old_logp": old, "advantages": advantages}
    rows |= {"sequence_ids": ids, "num_sequences": 5}
    for size in (7, 1000):
        plan = engine.ChunkPlan(size, -(-60 // size), 0, 0)
        monkeypatch.setattr(engine, "plan_chunks", lambda *_, p=plan, **__: p)
        ours = problem.run(lambda *args: head(*args, **rows).loss)
        assert max(ours.errors(truth).values()) < 1e-10


def test_an_odd_number_of_sequences_has_no_pairs():
    problem = Problem(T=27, D=16, V=101)
    with pytest.raises(ValueError, match="pairs of sequences, got 3"):
        HeadLoss([Preference("simpo")])(
            problem.hidden.view(3, 9, -1), problem.weight, problem.labels.view(3, 9)
        )


def test_an_ignored_token_may_belong_to_no_sequence(monkeypatch):
    problem = Problem(T=60, D=16, V=101)
    ids = torch.arange(60) // 12
    rows = {"old_logp": torch.zeros(60), "advantages": torch.ones(60)}
    head = HeadLoss([SequencePolicyGradient(1.0, 1e9)])

    def run_with(ids):
        return problem.run(
            lambda *args: head(*args, sequence_ids=ids, num_sequences=5, **rows).loss
        )

    truth = run_with(ids)
    # As on a GPU, where nobody has counted the labels.
    monkeypatch.setattr(engine, "kept_rows", lambda call, *_: (None, call.scale, False))
    ours = run_with(ids.masked_fill(problem.labels == -100, -1))
    assert max(ours.errors(truth).values()) < 1e-12


@dataclass(frozen=True)
class Groups(SequenceTerm):
    """Each token's loss depends on `size` neighbouring sequences."""

    size: int
    name: str
    weight: float = 1.0

    @property
    def sequences_per_group(self):
        return self.size

    def sequence_loss(self, stats, rows, sequences):
        of_group = sequences.mean(stats.logp).view(-1, self.size).logsumexp(1)
        return of_group[sequences.ids_C // self.size]


def test_chunks_hold_whole_groups_of_all_terms(monkeypatch):
    problem = Problem(T=24, D=16, V=101, ignored=0)
    head = HeadLoss([Groups(2, "twos"), Groups(3, "threes")])
    runs = []
    for size in (24, 12, 6):  # all in one, 6 of 12 sequences, 3
        plan = engine.ChunkPlan(size, 24 // size, 0, 0)
        monkeypatch.setattr(engine, "plan_chunks", lambda *_, p=plan, **__: p)
        runs.append(
            problem.run(lambda h, w, y: head(h.view(12, 2, -1), w, y.view(12, 2)).loss)
        )
    for run in runs[1:]:
        assert max(run.errors(runs[0]).values()) < 1e-12
