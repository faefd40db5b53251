"""Terms over sequences: a policy gradient, and what all of them have in common."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

from tests.helpers import Problem, full_logits, read_by, relative_error
from tests.unit.head_loss.sequences.cases import (
    KINDS,
    B,
    L,
    expected_means,
    lengths,
    logp_of,
    masked,
    reported,
    run,
)
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


def gspo(problem, clip):
    def loss_of(hidden, weight, labels):
        old = masked(problem.rows["old_logp"], labels)
        log_ratio = (logp_of(hidden, weight, labels) - old).sum(1) / lengths(labels)
        ratio = log_ratio.exp()
        a = masked(problem.rows["advantages"], labels).sum(1) / lengths(labels)
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        return (loss * (labels != -100).view(B, L).sum(1)).sum()

    return loss_of


@pytest.mark.usefixtures("ignored_tokens")
@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_gspo(problem, clip, chunks):
    truth = problem.run(gspo(problem, clip))
    ours = run(problem, HeadLoss([SequencePolicyGradient(clip, clip)]))
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
