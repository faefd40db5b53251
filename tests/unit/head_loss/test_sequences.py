"""Terms over sequences, against plain torch and against Liger-Kernel's own losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

from tests.helpers import Problem, full_logits, read_by, relative_error
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    Preference,
    SequencePolicyGradient,
    SequenceTerm,
    UnpairedPreference,
    ZLoss,
    engine,
)

B, L = 8, 9
NUM_PAIRS = B // 2
KINDS = ["dpo", "cpo", "ipo", "simpo", "orpo"]
SUMMED = ["dpo", "cpo"]  # over a sequence's tokens; the others take their mean


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


def logp_of(hidden, weight, labels):
    logp = (hidden @ weight.T).log_softmax(1)
    logp = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels == -100, 0.0, logp).view(B, L)


def masked(x, labels):
    return torch.where(labels == -100, 0.0, x).view(B, L)


def lengths(labels):
    return (labels != -100).view(B, L).sum(1).clamp(min=1)


def gspo(problem, clip):
    def loss_of(hidden, weight, labels):
        old = masked(problem.rows["old_logp"], labels)
        log_ratio = (logp_of(hidden, weight, labels) - old).sum(1) / lengths(labels)
        ratio = log_ratio.exp()
        a = masked(problem.rows["advantages"], labels).sum(1) / lengths(labels)
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        return (loss * (labels != -100).view(B, L).sum(1)).sum()

    return loss_of


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


def run(problem, head, **call):
    def loss_of(hidden, weight, labels):
        read = read_by(head, problem.rows)
        rows = {name: x.view(B, L) for name, x in read.items()}
        return head(
            hidden.view(B, L, -1), weight, labels.view(B, L), **call, **rows
        ).loss

    return problem.run(loss_of)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_labels_counts_zero(problem, kind):
    problem.labels.view(B, L)[1] = -100
    labels = problem.labels.view(B, L)
    head = HeadLoss([Preference(kind, beta=0.4)])
    read = read_by(head, problem.rows)
    rows = {name: x.view(B, L)[:2] for name, x in read.items()}
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
@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_gspo(problem, clip, chunks):
    truth = problem.run(gspo(problem, clip))
    ours = run(problem, HeadLoss([SequencePolicyGradient(clip, clip)]))
    assert max(ours.errors(truth).values()) < 1e-10


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


def test_in_a_mixture_with_terms_over_tokens(problem, chunks):
    parts = [
        run(problem, HeadLoss([term]), normalizer=3)
        for term in (CrossEntropy(), ZLoss(0.1), Preference("dpo", weight=0.5))
    ]
    head = HeadLoss([CrossEntropy(), ZLoss(0.1), Preference("dpo", weight=0.5)])
    whole = run(problem, head, normalizer=3)
    for name in ("loss", "d_hidden", "d_weight"):
        total = sum(getattr(part, name) for part in parts)
        assert relative_error(getattr(whole, name), total) < 1e-12


def reported(problem, term):
    """Each metric of `term`: the sum over tokens, divided by their number."""
    call = (problem.hidden.view(B, L, -1), problem.weight, problem.labels.view(B, L))
    read = read_by(HeadLoss([term]), problem.rows)
    rows = {name: x.view(B, L) for name, x in read.items()}
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


@pytest.mark.usefixtures("ignored_tokens")
def test_what_gspo_reports_is_of_whole_sequences(problem, chunks):
    logp = logp_of(problem.hidden, problem.weight, problem.labels)
    old, a = (
        masked(problem.rows[x], problem.labels) for x in ("old_logp", "advantages")
    )
    ratio = ((logp - old).sum(1) / lengths(problem.labels)).exp()[:, None]
    outside = (ratio < 1 - 0.05) | (ratio > 1 + 0.1)
    assert outside.any()
    assert not outside.all()
    assert reported(problem, SequencePolicyGradient(0.05, 0.1)) == expected_means(
        problem,
        {
            "new_logp": logp,
            "advantage": a,
            "advantage/max": a,
            "advantage/min": a,
            "old_logp": old,
            "ratio": ratio,
            "ratio_squared": ratio**2,
            "kl_new_old": ratio - 1 - ratio.log(),
            "clip_fraction": outside,
        },
    )


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


@pytest.mark.parametrize(
    "term",
    [
        SequencePolicyGradient(0.2, 0.2),
        *map(Preference, KINDS),
        UnpairedPreference(),
    ],
    ids=lambda term: getattr(term, "kind", term.name),
)
def test_long_sequences_are_as_exact_in_float32(term):
    """One by one, thousands of float32 numbers would lose some digits."""
    length = 8192
    problem = Problem(T=2 * length, D=8, V=32, ignored=0, scale=0.1)
    g = torch.Generator().manual_seed(1)
    rows = {"old_logp": -3.5 + 0.1 * torch.randn(2, length, generator=g)}
    rows |= {"ref_logp": rows["old_logp"], "advantages": torch.ones(2, length)}
    rows |= {"reference_point": torch.zeros(2, length)}
    rows |= {"desirable": torch.tensor([[1], [0]]).expand(2, length)}
    head = HeadLoss([term])

    def loss_of(hidden, weight, labels):
        shape = labels.view(2, length)
        return head(
            hidden.view(2, length, 8),
            weight,
            shape,
            normalizer=3,
            **read_by(head, rows),
        ).loss

    truth = problem.run(loss_of)
    plain = problem.run(full_logits(), torch.float32)
    of_plain = plain.errors(problem.run(full_logits()))
    # These have sums of log probabilities, each of about -3.5, and not of small differences.
    is_wide = getattr(term, "kind", term.name) in ("cpo", "kto")
    of_sum = term.beta * length * 3.5 * 2**-24 if is_wide else 0.0
    ours = problem.run(loss_of, torch.float32).errors(truth)
    for name in ("d_hidden", "d_weight"):
        assert ours[name] < 2 * of_plain[name] + of_sum, (name, ours, of_plain)


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


def test_gspo_is_ligers():
    problem = Problem(T=B * L, D=16, V=101, ignored=0)
    g = torch.Generator().manual_seed(2)
    labels = problem.labels.view(B, L)
    old = logp_of(problem.hidden, problem.weight, problem.labels)
    old = old + 0.1 * torch.randn(B, L, generator=g, dtype=torch.float64)
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    liger = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=0.05,
        epsilon_high=0.05,
        loss_type="grpo",
        importance_sampling_level="sequence",
    )
    mask = torch.ones(B, L, dtype=torch.long)

    def liger_loss(hidden, weight, _):
        return liger(
            hidden.view(B, L, -1),
            weight,
            labels,
            mask,
            advantages,
            old_per_token_logps=old,
        )[0]

    theirs = problem.run(liger_loss)
    head = HeadLoss([SequencePolicyGradient(0.05, 0.05)])
    ours = problem.run(
        lambda h, w, _: (
            head(
                h.view(B, L, -1),
                w,
                labels,
                normalizer=B * L,
                old_logp=old,
                advantages=advantages[:, None].expand(B, L),
            ).loss
        )
    )
    assert max(ours.errors(theirs).values()) < 1e-6


def test_a_sequence_term_of_weight_0_leaves_the_gradients_alone(monkeypatch):
    problem = Problem(T=24, D=16, V=101, ignored=0)
    rows = {"old_logp": torch.zeros(24), "advantages": torch.ones(24)}
    alone = problem.run(lambda *args: HeadLoss()(*args).loss)
    plan = engine.ChunkPlan(5, 5, 0, 0)  # no whole sequence in a chunk
    monkeypatch.setattr(engine, "plan_chunks", lambda *_, **__: plan)
    head = HeadLoss([CrossEntropy(), SequencePolicyGradient(weight=0.0)])
    both = problem.run(lambda *args: head(*args, **rows).loss)
    assert max(both.errors(alone).values()) < 1e-12


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


def test_a_term_over_sequences_has_not_its_other_parents_gradient():
    @dataclass(frozen=True)
    class Squared(SequenceTerm, CrossEntropy):
        name: str = "squared"

        def sequence_loss(self, stats, rows, sequences):
            return stats.logp.square()

    def truth_of(hidden, weight, labels):
        return (
            F.cross_entropy(hidden @ weight.T, labels, reduction="none").square().sum()
        )

    problem = Problem(T=36, D=16, V=101, ignored=0)
    head = HeadLoss([Squared()])
    ours = problem.run(lambda h, w, y: head(h.view(4, 9, -1), w, y.view(4, 9)).loss)
    assert max(ours.errors(problem.run(truth_of)).values()) < 1e-12
