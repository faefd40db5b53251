"""Preferences between answers, against plain torch and Liger-Kernel's own losses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

from tests.helpers import Problem
from tests.unit.head_loss.sequences.cases import (
    KINDS,
    B,
    L,
    expected_means,
    lengths,
    logp_of,
    masked,
    reported,
    rows_of,
    run,
)
from torchtitan_liger.head_loss import HeadLoss, Preference, UnpairedPreference

NUM_PAIRS = B // 2
SUMMED = ["dpo", "cpo"]  # over a sequence's tokens; the others take their mean


def preference(problem, kind, layout):
    def loss_of(hidden, weight, labels):
        logp = logp_of(hidden, weight, labels)
        if kind in ("dpo", "ipo"):
            logp = logp - masked(problem.rows["ref_logp"], labels)
        score = logp.sum(1)
        if kind not in SUMMED:
            score = score / lengths(labels)
        if kind == "orpo":
            score = score - (1 - score.exp()).log()
        halves = (score[0::2], score[1::2])
        if layout == "halves":
            halves = (score[: B // 2], score[B // 2 :])
        margin = halves[0] - halves[1]
        loss = {
            "dpo": -F.logsigmoid(0.4 * margin),
            "cpo": -F.logsigmoid(0.4 * margin),
            "ipo": (margin - 1 / 0.8) ** 2,
            "simpo": -F.logsigmoid(0.4 * margin - 0.5),
            "orpo": -0.4 * F.logsigmoid(margin),
        }[kind]
        return loss.sum() / NUM_PAIRS

    return loss_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_labels_counts_zero(problem, kind):
    problem.labels.view(B, L)[1] = -100
    labels = problem.labels.view(B, L)
    head = HeadLoss([Preference(kind, beta=0.4)])
    rows = {name: x[:2] for name, x in rows_of(problem, head).items()}
    args = problem.hidden.view(B, L, -1)[:2], problem.weight, labels[:2]
    margin = (
        head(*args, **rows).metrics["preference/margin"] / (labels[0] != -100).sum()
    )
    logp = logp_of(problem.hidden, problem.weight, problem.labels)
    if kind in ("dpo", "ipo"):
        logp = logp - masked(problem.rows["ref_logp"], problem.labels)
    score = logp[0].sum()
    if kind not in SUMMED:
        score = score / lengths(labels)[0]
    if kind == "orpo":
        score = score - (1 - score.exp()).log()
    torch.testing.assert_close(margin, score, rtol=1e-10, atol=0)


@pytest.mark.usefixtures("ignored_tokens")
@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("kind", KINDS)
def test_preferences(problem, kind, layout, chunks):
    truth = problem.run(preference(problem, kind, layout))
    term = Preference(kind, beta=0.4, layout=layout)
    ours = run(problem, HeadLoss([term]), normalizer=NUM_PAIRS)
    assert max(ours.errors(truth).values()) < 1e-10


def log_ratios(problem, hidden, weight, labels):
    """Of each sequence's tokens with a label, the sum; [B, 1]."""
    ref = masked(problem.rows["ref_logp"], labels)
    return (logp_of(hidden, weight, labels) - ref).sum(1, keepdim=True)


@pytest.mark.usefixtures("ignored_tokens")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
def test_kto(problem, weights, chunks):
    is_desirable = problem.rows["desirable"].view(B, L)[:, :1]

    def loss_of(hidden, weight, labels):
        gain = log_ratios(problem, hidden, weight, labels) - 0.3
        good, bad = 1 - torch.sigmoid(0.4 * gain), 1 - torch.sigmoid(-0.4 * gain)
        return torch.where(is_desirable, weights[0] * good, weights[1] * bad).sum() / B

    truth = problem.run(loss_of)
    term = UnpairedPreference(0.4, *weights)
    ours = run(problem, HeadLoss([term]), normalizer=B)
    assert max(ours.errors(truth).values()) < 1e-10


@pytest.mark.usefixtures("ignored_tokens")
def test_what_kto_reports_is_of_whole_sequences(problem, chunks):
    gain = log_ratios(problem, problem.hidden, problem.weight, problem.labels)
    is_desirable = problem.rows["desirable"].view(B, L)[:, :1]
    is_right = (gain > 0.3) == is_desirable
    assert is_right.any()
    assert not is_right.all()
    assert reported(problem, UnpairedPreference()) == expected_means(
        problem,
        {
            "accuracy": is_right,
            "desirable": is_desirable,
            "chosen": torch.where(is_desirable, gain, 0.0),
            "rejected": torch.where(is_desirable, 0.0, gain),
        },
    )


@pytest.mark.usefixtures("ignored_tokens")
@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_what_a_preference_reports_is_of_whole_pairs(problem, kind, layout, chunks):
    score = logp_of(problem.hidden, problem.weight, problem.labels)
    if kind == "dpo":
        score = (score - masked(problem.rows["ref_logp"], problem.labels)).sum(1)
    else:
        score = score.sum(1) / lengths(problem.labels)
    first, second = torch.arange(B).view(-1, 2).T
    pair = torch.arange(B) // 2
    if layout == "halves":
        first, second = torch.arange(B).view(2, -1)
        pair = torch.arange(B) % (B // 2)
    chosen, rejected = score[first][pair, None], score[second][pair, None]
    assert (chosen > rejected).any()
    assert (chosen < rejected).any()
    assert reported(problem, Preference(kind, layout=layout)) == expected_means(
        problem,
        {
            "accuracy": chosen > rejected,
            "margin": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
        },
    )


def test_an_answer_without_a_chance_leaves_the_others_metrics_alone():
    problem = Problem(T=B * L, D=16, V=101, ignored=0)
    problem.rows = {
        "ref_logp": torch.zeros(B * L),
        "desirable": (torch.arange(B) < 4).repeat_interleave(L),
        "reference_point": torch.zeros(B * L),
    }
    problem.rows["ref_logp"][0] = -torch.inf  # as of a reference that keeps the top k
    metrics = reported(problem, UnpairedPreference())
    assert metrics["chosen"] == torch.inf
    assert -1e3 < metrics["rejected"] < 0


def test_kto_learns_from_a_model_that_is_its_reference():
    """There the two sides of its sigmoid meet."""
    problem = Problem(T=B * L, D=16, V=101, ignored=0)
    logp = logp_of(problem.hidden, problem.weight, problem.labels)
    is_desirable = torch.arange(B) % 2 > 0

    def loss_of(hidden, weight, labels):
        gain = (logp_of(hidden, weight, labels) - logp).sum(1)
        return torch.sigmoid(0.1 * torch.where(is_desirable, -gain, gain)).sum()

    truth = problem.run(loss_of)
    assert truth.d_weight.any()
    problem.rows = {
        "ref_logp": logp.flatten(),
        "desirable": is_desirable.repeat_interleave(L),
        "reference_point": torch.zeros(B * L),
    }
    ours = run(problem, HeadLoss([UnpairedPreference()]))
    assert max(ours.errors(truth).values()) < 1e-10


LIGERS = {
    "dpo": partial(LigerFusedLinearDPOLoss, beta=0.4),
    "cpo": partial(LigerFusedLinearCPOLoss, beta=0.4),
    "simpo": partial(LigerFusedLinearSimPOLoss, beta=0.4, gamma=0.5),
    "orpo": partial(LigerFusedLinearORPOLoss, beta=0.4),
}


@pytest.mark.parametrize("kind", LIGERS)
def test_the_same_as_ligers_chunked_losses(problem, kind):
    ref_weight = problem.weight + 0.1
    labels = problem.labels.view(B, L)
    liger = LIGERS[kind](compute_nll_loss=False, compiled=False)

    def liger_loss(hidden, weight, _):
        args = {}
        if kind == "dpo":
            args = {"ref_input": hidden.view(B, L, -1), "ref_weight": ref_weight}
        return liger(weight, hidden.view(B, L, -1), labels, **args)[0]

    theirs = problem.run(liger_loss)
    ref_logp = logp_of(problem.hidden, ref_weight, problem.labels)
    problem.rows["ref_logp"] = ref_logp.flatten()
    head = HeadLoss([Preference(kind, beta=0.4, layout="halves")])
    ours = run(problem, head, normalizer=NUM_PAIRS)
    assert max(ours.errors(theirs).values()) < 1e-6


def test_kto_is_ligers(problem):
    ref_weight = problem.weight + 0.1
    labels = problem.labels.view(B, L)
    liger = LigerFusedLinearKTOLoss(beta=0.4, compiled=False, use_ref_model=True)
    is_desirable = problem.rows["desirable"].view(B, L)[:, 0]

    def liger_loss(hidden, weight, _):
        hidden_BLD = hidden.view(B, L, -1)
        return liger(
            hidden_BLD,
            weight,
            labels,
            preference_labels=is_desirable,
            ref_input=hidden_BLD.detach(),
            ref_weight=ref_weight,
            kl=torch.tensor(0.3),
        )[0]

    theirs = problem.run(liger_loss)
    ref_logp = logp_of(problem.hidden, ref_weight, problem.labels)
    problem.rows["ref_logp"] = ref_logp.flatten()
    ours = run(problem, HeadLoss([UnpairedPreference(0.4)]), normalizer=B)
    assert max(ours.errors(theirs).values()) < 1e-6


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_orpo_of_a_sequence_that_is_sure_is_finite(layout):
    hidden = torch.ones(2, 3, 2)
    hidden[0] = torch.tensor([200.0, 0.0])
    hidden.requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.long)
    out = HeadLoss([Preference("orpo", layout=layout)])(hidden, torch.eye(2), labels)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isfinite()
    assert out.metrics["preference/margin"].isfinite()
    assert grad.isfinite().all()


def test_of_a_pair_of_equals_none_is_preferred():
    hidden, labels = torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.long)
    out = HeadLoss([Preference("simpo")])(hidden, torch.eye(2), labels)
    assert out.metrics["preference/accuracy"] == 0


def test_a_pair_of_one_token_is_as_sure_as_its_reference():
    labels = torch.full((2, 2), -100)
    labels[0, 0] = 0
    rows = {"ref_logp": torch.full((2, 2), -math.log(5))}
    head = HeadLoss([Preference("dpo")])
    loss = head(torch.zeros(2, 2, 3), torch.ones(5, 3), labels, **rows).loss
    assert loss.item() == pytest.approx(math.log(2))


def test_orpo_of_a_sequence_that_is_nearly_sure_has_its_own_odds():
    """Log odds of two token ids are the difference of their logits."""
    hidden = torch.tensor([[[10.0, 0.0]], [[0.0, 0.0]]]).double().requires_grad_()
    labels = torch.zeros(2, 1, dtype=torch.long)
    head = HeadLoss([Preference("orpo")])
    out = head(hidden, torch.eye(2).double(), labels, normalizer=2)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.metrics["preference/margin"].item() == pytest.approx(10.0)
    assert grad[0].any()


def test_a_model_that_is_its_reference_is_right_about_no_answer():
    hidden, labels = torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.long)
    rows = {
        "ref_logp": torch.full((2, 3), -math.log(2)),
        "desirable": torch.tensor([[True], [False]]).expand(2, 3),
        "reference_point": torch.zeros(2, 3),
    }
    out = HeadLoss([UnpairedPreference()])(hidden, torch.zeros(2, 2), labels, **rows)
    assert out.metrics["kto/accuracy"] == 0
