"""Which tokens, and which sequences, a term over sequences sees together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    Preference,
    SequencePolicyGradient,
    Sequences,
    SequenceTerm,
    engine,
    passes,
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
        (
            {"sequence_ids": torch.zeros(27).long(), "num_sequences": [3]},
            "must be a whole number",
        ),
        (
            {"sequence_ids": torch.zeros(27).long(), "num_sequences": "3"},
            "whole number, at least 1, got '3'",
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


@pytest.mark.parametrize("number", [5, -1, 2**40])
def test_an_unchecked_number_of_no_sequence_makes_the_loss_nan(number):
    problem = Problem(T=27, D=16, V=101)
    ids = torch.arange(27) % 3
    ignored = int((problem.labels == -100).nonzero()[0])
    labeled = int((problem.labels != -100).nonzero()[0])
    rows = {"old_logp": torch.zeros(27), "advantages": torch.ones(27)}
    for position, is_nan in ((ignored, False), (labeled, True)):
        ids[position] = number
        loss = HeadLoss([SequencePolicyGradient()])(
            problem.hidden,
            problem.weight,
            problem.labels,
            sequence_ids=ids,
            num_sequences=3,
            check_labels=False,
            **rows,
        ).loss
        assert loss.isnan() == is_nan


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


def test_an_ignored_token_may_belong_to_no_sequence(nothing_dropped):
    problem = Problem(T=60, D=16, V=101)
    ids = torch.arange(60) // 12
    rows = {"old_logp": torch.zeros(60), "advantages": torch.ones(60)}
    head = HeadLoss([SequencePolicyGradient(1.0, 1e9)])

    def run_with(ids):
        return problem.run(
            lambda *args: head(*args, sequence_ids=ids, num_sequences=5, **rows).loss
        )

    truth = run_with(ids)
    nothing_dropped()
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


B, L, LONGEST = 12, 9, 20  # sequences, their tokens, and the tokens of a chunk
LABELS_OF_EACH = {
    "all": [9] * B,
    "some": [4, 9, 1, 3, 7, 7, 2, 2, 9, 9, 5, 1],
    "none in some": [0, 0, 0, 9, 9, 0, 0, 9, 9, 9, 0, 0],
    "none at either end": [0, 0, 0, 0, 9, 9, 9, 9, 1, 0, 0, 0],
}


def labeled(counts):
    """A problem of `B` sequences, of which some of the first tokens are ignored."""
    problem = Problem(T=B * L, D=16, V=101, ignored=0)
    for row_L, count in zip(problem.labels.view(B, L), counts, strict=True):
        row_L[: L - count] = -100
    return problem


@pytest.fixture
def products(monkeypatch):
    """The tokens of each product that gives logits, of chunks of `LONGEST` tokens."""
    sizes, logits = [], passes.Passes.logits

    def plan(num_tokens, *_, **__):
        return engine.ChunkPlan(LONGEST, -(-num_tokens // LONGEST), 0, 0)

    def counted(self, tokens):
        chunk = logits(self, tokens)
        sizes.append(len(chunk.hidden_CD))
        return chunk

    monkeypatch.setattr(engine, "plan_chunks", plan)
    monkeypatch.setattr(passes.Passes, "logits", counted)
    return sizes


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("counts", LABELS_OF_EACH.values(), ids=LABELS_OF_EACH)
def test_chunks_of_the_tokens_with_a_label_hold_whole_pairs(counts, known, products):
    """Then no logits are computed twice, whatever is ignored."""
    problem = labeled(counts)
    settings = {"num_labeled": counts, "check_labels": False} if known else {}

    def loss_of(layout):
        head = HeadLoss([Preference("simpo", layout=layout)])

        def call(h, w, y):
            if layout == "halves":  # the same pairs, in another order
                h, y = (
                    x.view(B, L, -1)[[*range(0, B, 2), *range(1, B, 2)]] for x in (h, y)
                )
                return head(h, w, y.squeeze(-1)).loss
            return head(h.view(B, L, -1), w, y.view(B, L), **settings).loss

        return call

    ours = problem.run(loss_of("pairs"))
    assert sum(products) == sum(counts)
    assert max(products) <= LONGEST
    assert min(products) > 0
    products.clear()
    truth = problem.run(loss_of("halves"))  # never cut between sequences
    assert sum(products) == 2 * sum(counts)
    assert max(ours.errors(truth).values()) < 1e-12


def test_a_pair_longer_than_a_chunk_is_cut(products, monkeypatch):
    monkeypatch.setattr(
        engine,
        "plan_chunks",
        lambda n, *_, **__: engine.ChunkPlan(17, -(-n // 17), 0, 0),
    )
    problem = labeled([9, 9] + [4] * 10)
    head = HeadLoss([Preference("simpo")])
    problem.run(lambda h, w, y: head(h.view(B, L, -1), w, y.view(B, L)).loss)
    assert sum(products) == 2 * 58


@pytest.mark.parametrize("wrong", ["other rows", "too many", "too few"])
def test_wrong_numbers_of_labels_are_an_error_or_make_the_loss_nan(wrong, products):
    """Whatever they make of the chunks."""
    right = LABELS_OF_EACH["some"]
    problem = labeled(right)
    args = problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L)
    head = HeadLoss([Preference("simpo")])
    assert head(*args, num_labeled=right).loss.isfinite()
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = [right[i] for i in torch.randperm(B, generator=g)]
        total = sum(right)
        if wrong != "other rows":
            total += 1 if wrong == "too many" else -1
            counts = total
        assert counts != right
        assert head(*args, num_labeled=counts, check_labels=False).loss.isnan()
        with pytest.raises(ValueError, match=r"num_labeled is .*, but .* not ignored"):
            head(*args, num_labeled=counts)
        ours = problem.run(
            lambda h, w, y, n=counts: (
                head(
                    h.view(B, L, -1), w, y.view(B, L), num_labeled=n, check_labels=False
                ).loss
            )
        )
        assert ours.loss.isnan()
        assert ours.d_weight.isnan().any()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([14, 17, 13, 15], "has 4 rows, but there are 12 sequences"),
        ([9] * 7, "has 7 rows, which 108 tokens are not"),
        (
            torch.ones(12),
            r"one for each row of labels \(of a tensor: its tolist\(\)\), got one of torch",
        ),
        (np.ones(12), "a list with one for each row of labels .*, got .*ndarray"),
        (np.array(9), r"a whole number in \[0, 108\], got 9"),
        ([[9] * 12], r"a whole number in \[0, 108\], got \[\["),
        (True, r"a whole number in \[0, 108\], got True"),
        ("9", "a list with one for each row of labels .*, got .*str"),
    ],
)
def test_what_are_no_numbers_of_labels_is_an_error(counts, message):
    problem = labeled(LABELS_OF_EACH["some"])
    args = problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L)
    with pytest.raises(ValueError, match=message):
        HeadLoss([Preference("simpo")])(*args, num_labeled=counts)


def test_a_batch_of_no_rows_has_no_numbers_of_labels():
    hidden, labels = torch.ones(0, 4, 3), torch.ones(0, 4, dtype=torch.long)
    head = HeadLoss([Preference("simpo")])
    assert head(hidden, torch.ones(7, 3), labels, num_labeled=[]).loss == 0


def test_a_term_over_sequences_that_is_only_reported_costs_no_products(products):
    problem = labeled(LABELS_OF_EACH["some"])
    ids, advantages = torch.arange(B * L) % B, torch.ones(B * L)

    def loss_of(terms):
        rows = {"advantages": advantages, "old_logp": -5 * advantages}
        call = {"sequence_ids": ids, "num_sequences": B, **rows} if terms else {}
        head = HeadLoss([CrossEntropy(), *terms])
        return problem.run(lambda *args: head(*args, **call).loss)

    alone = loss_of([])
    once = sum(products)
    products.clear()
    reported = loss_of([SequencePolicyGradient(weight=0.0)])
    assert sum(products) == once
    assert max(reported.errors(alone).values()) < 1e-12
    products.clear()
    loss_of([SequencePolicyGradient()])  # its sequences are everywhere
    assert sum(products) == 2 * once


def test_a_term_that_is_only_reported_cuts_no_chunks(products):
    problem = labeled(LABELS_OF_EACH["some"])
    args = problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L)
    weight = problem.weight.clone().requires_grad_()
    pairs = Preference("simpo")
    reported = Preference("simpo", layout="halves", weight=0.0, name="halves")
    for terms in ([pairs], [pairs, reported]):
        HeadLoss(terms)(args[0], weight, args[2]).loss.backward()
    alone, both = products[: len(products) // 2], products[len(products) // 2 :]
    assert both == alone
    assert sum(alone) == sum(LABELS_OF_EACH["some"])


def test_numbers_of_labels_below_zero_make_the_loss_nan(products):
    right = LABELS_OF_EACH["some"]
    problem = labeled(right)
    args = problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L)
    counts = [right[0] + 30, right[1] - 30, *right[2:]]
    head = HeadLoss([Preference("simpo")])
    assert head(*args, num_labeled=counts, check_labels=False).loss.isnan()


def test_a_group_may_have_all_tokens_of_the_budget():
    """Also where chunks of equal size would have fewer."""
    counts = [50, 50, 20, 20, 24, 24]
    problem = Problem(T=6 * 50, D=4, V=2048, ignored=0)
    for row_L, count in zip(problem.labels.view(6, 50), counts, strict=True):
        row_L[: 50 - count] = -100
    head = HeadLoss([Preference("simpo")], HeadLossOptions(logits_memory_mib=1))
    plan = head.plan(sum(counts), 4, 2048, torch.float32, "cpu")
    assert (plan.tokens_per_chunk, plan.most_tokens) == (96, 128)
    valid_T = problem.labels != -100
    ids_T = torch.arange(6).repeat_interleave(50)
    kept_N = valid_T.nonzero().squeeze(1)
    sequences = Sequences(ids_T, 6, valid_T, tuple(range(0, 301, 50)))
    plan, cut = sequences.kept(kept_N, counts, False).cut(plan, 2)
    assert cut.cuts == ((0, 0), (100, 2), (188, 6))
    assert (plan.tokens_per_chunk, plan.num_chunks) == (100, 2)


def test_gspo_beside_no_pairs_computes_its_logits_once(products):
    problem = labeled(LABELS_OF_EACH["some"])
    rows = {"advantages": torch.ones(B, L), "old_logp": torch.full((B, L), -5.0)}
    head = HeadLoss([SequencePolicyGradient()])
    problem.run(lambda h, w, y: head(h.view(B, L, -1), w, y.view(B, L), **rows).loss)
    assert sum(products) == sum(LABELS_OF_EACH["some"])


def test_on_a_cpu_labels_are_counted_though_nobody_looks_at_them(products):
    problem = labeled(LABELS_OF_EACH["some"])
    head, call = HeadLoss([Preference("simpo")]), {"check_labels": False}
    problem.run(lambda h, w, y: head(h.view(B, L, -1), w, y.view(B, L), **call).loss)
    assert sum(products) == sum(LABELS_OF_EACH["some"])


def test_a_chunk_may_be_full_to_its_last_token():
    starts = 0, 5, 10, 15, 20
    sequences = Sequences(torch.arange(20) // 5, 4, torch.ones(20).bool(), starts)
    for most, cuts in ((10, ((0, 0), (10, 2), (20, 4))), (20, ((0, 0), (20, 4)))):
        assert sequences.cut(engine.ChunkPlan(most, 9, 0, 0), 2)[1].cuts == cuts
