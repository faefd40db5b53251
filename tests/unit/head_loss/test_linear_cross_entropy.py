"""The engine against full logits in float64."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.helpers import Problem, full_logits, run_on_shards
from torchtitan_liger.device import peak_resident_bytes, reset_peak_resident_bytes
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Teacher,
    Term,
    ZLoss,
    engine,
    linear_cross_entropy,
    passes,
    vocab_parallel,
)

SETTINGS = [
    {"label_smoothing": smoothing, "z_loss": z_loss, "logit_softcap": softcap}
    for smoothing, z_loss, softcap in itertools.product(
        (0.0, 0.1), (0.0, 1e-2), (0.0, 2.0)
    )
]
SIZES = [(257, 48, 517), (64, 16, 128), (3, 5, 1), (1, 8, 2), (130, 7, 1001)]


@pytest.fixture(params=[1, 17, 64, 10**6], ids="{}_tokens_per_chunk".format)
def tokens_per_chunk(request, monkeypatch):
    """Chunk sizes that divide nothing, and one that holds everything."""

    force_chunks(monkeypatch, request.param)
    return request.param


def force_chunks(monkeypatch, tokens_per_chunk):
    plan = engine.ChunkPlan(tokens_per_chunk, 0, 0, 0)
    monkeypatch.setattr(engine, "plan_chunks", lambda *_, **__: plan)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_full_logits_in_float64(size, settings, tokens_per_chunk):
    problem = Problem(*size)
    truth = problem.run(full_logits(**settings))
    ours = problem.run(partial(linear_cross_entropy, reduction="sum", **settings))
    assert max(ours.errors(truth).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_error_is_at_most_twice_that_of_full_logits(settings, dtype):
    problem = Problem(T=300, D=64, V=1000).rounded(dtype)
    loss_of = full_logits(**settings)
    truth = problem.run(loss_of)
    stock = problem.run(loss_of, dtype).errors(truth)
    ours = problem.run(
        partial(linear_cross_entropy, reduction="sum", **settings), dtype
    ).errors(truth)
    floor = 2 * torch.finfo(torch.float32).eps
    for name, error in ours.items():
        assert error <= max(2 * stock[name], floor), (name, ours, stock)


def test_the_reference_is_torchs_cross_entropy():
    problem = Problem()
    truth = problem.run(
        lambda h, w, y: F.cross_entropy(h @ w.T, y, label_smoothing=0.1)
    )
    ours = problem.run(
        partial(linear_cross_entropy, label_smoothing=0.1, impl="reference")
    )
    assert max(ours.errors(truth).values()) < 1e-14


def test_loss_scaling_keeps_small_gradients_in_float16():
    problem = Problem(T=64, D=32, V=101).rounded(torch.float16)
    head, normalizer, loss_scale = HeadLoss(), 2**20, 2.0**15
    truth = problem.run(
        lambda *a: head(*a, normalizer=normalizer).loss, upstream=loss_scale
    )
    ours = problem.run(
        lambda *a: head(*a, normalizer=normalizer).loss,
        torch.float16,
        upstream=loss_scale,
    )
    assert ours.errors(truth)["d_hidden"] < 2e-3
    assert ours.errors(truth)["d_weight"] < 2e-3


WIDE = torch.logspace(-3, 3, 64)[torch.randperm(64, generator=torch.manual_seed(0))]
IN_RANGE = {  # a term, its inputs, the normalizer, the loss's scale
    "small weights": (CrossEntropy(weight=2.0**-24), {}, 2.0**-18, 1.0),
    "large weights": (CrossEntropy(weight=1e6), {}, 1e8, 2.0**10),
    "small tokens": (CrossEntropy(), {"token_weights": 1e-6 * WIDE}, 1e-4, 1.0),
    "large tokens": (CrossEntropy(), {"token_weights": 1e5 * WIDE}, 1e6, 1.0),
    "no weights": (CrossEntropy(), {"token_weights": 0 * WIDE}, 1.0, 2.0**10),
    "small slopes": (
        PolicyGradient("reinforce"),
        {"advantages": 1e-6 * WIDE},
        1.0,
        2.0**16,
    ),
    "large slopes": (
        PolicyGradient("reinforce", weight=1e-3),
        {"advantages": 1e5 * WIDE},
        1e4,
        1.0,
    ),
    "both": (
        PolicyGradient("reinforce", weight=1e4),
        {"advantages": 1e-6 * WIDE},
        1.0,
        1.0,
    ),
}


@pytest.mark.parametrize("case", IN_RANGE)
def test_float16_has_only_to_hold_what_plain_torch_has_it_hold(case):
    """Weights, inputs, a normalizer and a loss scale whose product float16 can hold."""
    term, inputs, normalizer, loss_scale = IN_RANGE[case]
    problem = Problem(T=64, D=16, V=1024).rounded(torch.float16)
    head, (by_token,) = HeadLoss([term]), inputs.values() or [torch.ones(64)]

    def loss_of(*args):
        return head(*args, normalizer=normalizer, **inputs).loss

    def plain_loss_of(hidden, weight, labels):
        logits = hidden @ weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, reduction="none")
        return term.weight * (by_token * losses).sum() / normalizer

    truth = problem.run(plain_loss_of, upstream=loss_scale)
    plain = problem.run(plain_loss_of, torch.float16, upstream=loss_scale).errors(truth)
    ours = problem.run(loss_of, torch.float16, upstream=loss_scale).errors(truth)
    assert math.isfinite(max(plain.values()))
    for name, error in plain.items():
        assert ours[name] <= max(2 * error, 2e-7), (ours, plain)


def test_float16_reads_again_what_it_has_read():
    problem = Problem(T=9, D=4, V=11, ignored=0).rounded(torch.float16)
    hidden = problem.hidden.half().requires_grad_()
    weight = problem.weight.half()
    weights = torch.ones(9)
    loss = linear_cross_entropy(hidden, weight, problem.labels, token_weights=weights)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, 2 * first)
    weights.zero_()  # has been read already
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, 3 * first)
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_are_of_the_terms_of_the_forward_pass(reduction, dtype):
    class Scheduled(Term):
        name = "scheduled"

        def __init__(self, schedule):
            self.schedule = schedule

        @property
        def weight(self):
            return self.schedule["weight"]

        @property
        def needs(self):
            return frozenset({"jsd", "entropy"} if self.weight else {"jsd"})

        @property
        def jsd_beta(self):
            return self.schedule["beta"]

        def loss(self, stats, rows):
            loss = stats.jsd - stats.logp * self.schedule["factor"]
            return loss - stats.entropy if self.weight else loss

    problem = Problem(T=9, D=4, V=11, ignored=0)
    teacher = Teacher(logits=torch.randn(9, 11, generator=torch.Generator()))
    gradients = []
    for then in ({}, {"weight": 0.0, "factor": 10.0, "beta": 0.1}):
        hidden = problem.hidden.to(dtype).requires_grad_()
        schedule = {"weight": 1.0, "factor": 1.0, "beta": 0.5}
        head = HeadLoss([Scheduled(schedule)])
        args = hidden, problem.weight.to(dtype), problem.labels
        loss = head(*args, teacher=teacher, reduction=reduction).loss.sum()
        schedule.update(then)
        loss.backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_within_the_plan(softcap, dtype):
    T, D, V = 2048, 64, 32768
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (T,))
    head = HeadLoss(
        options=HeadLossOptions(logits_memory_mib=64, logit_softcap=softcap)
    )
    plan = head.plan(T, D, V, dtype, "cpu")
    assert plan.num_chunks > 3
    head(hidden[:8], weight, labels[:8]).loss.backward()  # warm up
    reset_peak_resident_bytes()
    before = peak_resident_bytes()
    head(hidden, weight, labels).loss.backward()
    gradients = 2 * 4 * (V * D + T * D)
    assert peak_resident_bytes() - before < plan.logits_bytes + gradients + 16 * 2**20


@pytest.mark.parametrize("tokens_in_budget", [160, 192, 257])
def test_a_sharded_heads_buffers_are_the_plans(monkeypatch, tokens_in_budget):
    """Two of each with several chunks, as a chunk's sums travel beside the next product;
    one of each where all tokens fit into one chunk."""
    problem = Problem(V=512)
    sizes = []

    def matrix(size, like):
        sizes.append(size[0] * size[1] * like.itemsize)
        return like.new_empty(size)

    monkeypatch.setattr(passes, "matrix", matrix)
    row_bytes = 256 * 8
    monkeypatch.setattr(engine, "budget_bytes", lambda *_: tokens_in_budget * row_bytes)
    head = HeadLoss()
    run_on_shards(monkeypatch, head, problem, [256, 256], num_labeled=None)
    num_tokens = int((problem.labels != problem.ignore_index).sum())
    plan = head.plan(num_tokens, problem.D, 256, torch.float64, "cpu", sharded=True)
    assert num_tokens == 176
    assert (plan.num_chunks > 1) == (tokens_in_budget < num_tokens)
    assert plan.logits_bytes <= tokens_in_budget * row_bytes
    assert sum(sizes) / 2 == plan.logits_bytes


def test_the_plan_counts_the_teachers_logits():
    """As often as the student's, and the chunks are as large as without a teacher."""
    for sharded in (False, True):
        plain, taught = (
            head.plan(2**20, 64, 32768, torch.bfloat16, "cuda", sharded=sharded)
            for head in (HeadLoss(), HeadLoss([CrossEntropy(), Distillation()]))
        )
        assert taught.tokens_per_chunk == plain.tokens_per_chunk
        assert taught.logits_bytes == 2 * plain.logits_bytes


def test_logits_of_a_wider_teacher_fit_into_the_budget(monkeypatch):
    sizes = []

    def matrix(size, like):
        sizes.append(size[0] * size[1] * like.dtype.itemsize)
        return like.new_empty(size)

    monkeypatch.setattr(passes, "matrix", matrix)
    # Four bytes a logit of the student's, since a CPU widens its gradient.
    hidden, weight = torch.randn(300, 4).bfloat16(), torch.randn(2048, 4).bfloat16()
    teacher = Teacher(hidden=torch.randn(300, 4), weight=torch.randn(2048, 4))
    head = HeadLoss([Distillation()], HeadLossOptions(logits_memory_mib=1))
    labels = torch.zeros(300, dtype=torch.long)
    head(hidden.requires_grad_(), weight, labels, teacher=teacher)
    assert sum(sizes) < 2**20
    plan = head.plan(300, 4, 2048, torch.bfloat16, "cpu", teacher_dtype=torch.float32)
    of_student, of_teacher = sizes
    assert of_teacher == 2 * of_student == plan.tokens_per_chunk * 2048 * 4
    assert plan.logits_bytes == sum(sizes) + 2 * of_student <= 2**20


def test_narrow_labels_with_a_far_ignored_index():
    """In 32 bits, it would be token id 0."""
    problem = Problem(ignored=0.0)
    problem.labels[::2] = 0
    inputs = problem.hidden, problem.weight
    for ignore_index in (2**40, torch.iinfo(torch.int64).min):
        wide, narrow = (
            linear_cross_entropy(*inputs, labels, ignore_index=ignore_index)
            for labels in (problem.labels, problem.labels.int())
        )
        assert torch.equal(narrow, wide)


def test_z_loss_off_adds_nothing():
    problem = Problem()
    plain = linear_cross_entropy(problem.hidden, problem.weight, problem.labels)
    off = linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels, z_loss=0.0
    )
    assert torch.equal(plain, off)
    assert [term.name for term in HeadLoss().terms] == ["cross_entropy"]


def test_terms_add_up_to_the_loss():
    problem = Problem()
    head_loss = HeadLoss([CrossEntropy(0.2), ZLoss(0.01)])
    out = head_loss(problem.hidden, problem.weight, problem.labels, normalizer=7)
    assert set(out.terms) == {"cross_entropy", "z_loss"}
    total = out.terms["cross_entropy"] + 0.01 * out.terms["z_loss"]
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-14)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_batch_without_labels_has_loss_0_and_gradients_0(impl):
    problem = Problem(ignored=1.1)
    ours = problem.run(partial(linear_cross_entropy, impl=impl, z_loss=0.1))
    assert ours.loss == 0
    assert not ours.d_hidden.any()
    assert not ours.d_weight.any()


def test_no_tokens_at_all():
    ours = Problem(T=0).run(linear_cross_entropy)
    assert ours.loss == 0
    assert ours.d_hidden.shape == (0, 48)
    assert not ours.d_weight.any()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_garbage_in_ignored_rows_does_not_reach_the_gradients(impl):
    problem = Problem()
    loss_of = partial(linear_cross_entropy, impl=impl, z_loss=0.1)
    clean = problem.run(loss_of)
    ignored = problem.labels == -100
    for garbage in (torch.nan, torch.inf, 1e300):
        problem.hidden[ignored] = garbage
        dirty = problem.run(loss_of)
        assert torch.equal(dirty.loss, clean.loss)
        assert torch.equal(dirty.d_weight, clean.d_weight)
        assert torch.equal(dirty.d_hidden, clean.d_hidden)
        assert not dirty.d_hidden[ignored].any()


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_extreme_logits(scale):
    problem = Problem(scale=scale)
    truth = problem.run(full_logits())
    ours = problem.run(partial(linear_cross_entropy, reduction="sum"))
    assert max(ours.errors(truth).values()) < 1e-12


def test_confident_tokens_keep_their_gradient():
    """p - 1 cancels for p = 0.999: rounded early, nothing of the gradient is left."""
    problem = Problem(T=64, D=64, V=300, ignored=0)
    problem.hidden = torch.eye(64, dtype=torch.float64)
    problem.weight *= 0.01
    problem.labels = torch.arange(64)
    problem.weight[:64].diagonal().add_(torch.linspace(8, 14, 64).double())
    problem = problem.rounded(torch.bfloat16)
    loss_of = full_logits()
    truth = problem.run(loss_of)
    stock = problem.run(loss_of, torch.bfloat16).errors(truth)
    ours = problem.run(
        partial(linear_cross_entropy, reduction="sum"), torch.bfloat16
    ).errors(truth)
    assert ours["d_hidden"] <= 2 * stock["d_hidden"]
    assert ours["d_weight"] <= 2 * stock["d_weight"]


def test_many_chunks_in_bfloat16_do_not_wear_out_the_weights_gradient(monkeypatch):
    problem = Problem(T=1024, D=32, V=200, ignored=0).rounded(torch.bfloat16)
    loss_of = full_logits()
    truth = problem.run(loss_of)
    stock = problem.run(loss_of, torch.bfloat16).errors(truth)
    force_chunks(monkeypatch, 4)
    sums = partial(linear_cross_entropy, reduction="sum")
    in_float32 = problem.run(sums, torch.bfloat16).errors(truth)
    in_bfloat16 = problem.run(
        partial(sums, acc_dtype=torch.bfloat16), torch.bfloat16
    ).errors(truth)
    assert in_float32["d_weight"] <= stock["d_weight"] * 1.1
    # The option exists, and this is its price.
    assert in_bfloat16["d_weight"] > 3 * stock["d_weight"]


def test_gradcheck():
    problem = Problem(T=3, D=4, V=7, ignored=0)
    problem.labels[1] = -100
    inputs = (
        problem.hidden.requires_grad_(),
        problem.weight.requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(
            h, w, problem.labels, label_smoothing=0.1, z_loss=0.1, logit_softcap=3.0
        ),
        inputs,
    )


def test_softmax_gradient_of_a_row_sums_to_the_z_losss():
    """sum_j d/dz_j = d/dlse: zero for cross entropy, for any smoothing."""
    problem = Problem(T=20, D=517, V=517)
    problem.weight = torch.eye(517, dtype=torch.float64)  # hidden states are logits
    ours = problem.run(
        partial(linear_cross_entropy, label_smoothing=0.3, reduction="sum")
    )
    assert ours.d_hidden.sum(dim=1).abs().max() < 1e-14
    z_loss = problem.run(partial(linear_cross_entropy, z_loss=0.5, reduction="sum"))
    lse = problem.hidden.logsumexp(dim=1)
    expected = torch.where(problem.labels == -100, 0.0, lse)
    torch.testing.assert_close(z_loss.d_hidden.sum(dim=1), expected)


def test_the_weights_gradient_in_float16_is_large_only_after_the_normalizer():
    """One chunk whose sum float16 cannot hold, where the mean's gradient is small."""
    hidden = torch.full((1000, 8), 200.0, dtype=torch.float16)
    weight = torch.zeros(4, 8, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(1000, dtype=torch.long)).backward()
    expected = torch.tensor([-150.0, 50.0, 50.0, 50.0])[:, None].expand(4, 8)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=0)


def test_each_group_has_a_shard_of_its_own():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight, groups = torch.zeros(5, 3), (dist.group.WORLD, dist.new_group([0]))
        found = [vocab_parallel.shard_of(weight, group).group for group in groups]
        assert found == list(groups)
    finally:
        dist.destroy_process_group()
