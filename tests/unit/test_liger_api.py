"""Liger's real kernel, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.helpers import Problem, full_logits, plain_head, relative_error
from torchtitan_liger import liger_api
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    VocabShard,
    ZLoss,
)
from torchtitan_liger.head_loss.chunking import MIB
from torchtitan_liger.liger_api import (
    LigerHeadLoss,
    chunk_mem_const,
    liger_rows,
    liger_status,
)

DEVICE = "cuda" if HAS_GPU else "cpu"
LIGER_OPS = "liger_kernel.ops.fused_linear_cross_entropy"
# Liger's softcap calls libdevice, which Triton's interpreter does not have.
SOFTCAPS = (0.0, 2.0) if HAS_GPU else (0.0,)
SETTINGS = [
    {"label_smoothing": smoothing, "z_loss": z_loss, "logit_softcap": softcap}
    for smoothing, z_loss, softcap in itertools.product(
        (0.0, 0.1), (0.0, 1e-2), SOFTCAPS
    )
]


def liger_loss(settings=None, **kwargs):
    head_loss = plain_head(LigerHeadLoss, **settings or {})
    return lambda *inputs: head_loss(*inputs, **kwargs).loss


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_liger_is_as_exact_as_full_logits(settings, dtype, reduction):
    problem = Problem(T=37, D=16, V=101).rounded(dtype)
    count = (problem.labels != -100).sum()
    normalizer = count if reduction == "mean" else 1

    def stock_loss(*inputs):
        return full_logits(**settings)(*inputs) / normalizer

    ours_loss = liger_loss(settings, normalizer=normalizer)
    truth = problem.run(stock_loss)
    stock = problem.run(stock_loss, dtype, DEVICE).errors(truth)
    ours = problem.run(ours_loss, dtype, DEVICE).errors(truth)
    floor = 4 * torch.finfo(torch.float32).eps
    for name, error in ours.items():
        assert error <= max(2 * stock[name], floor), (name, ours, stock)


def test_the_weights_gradient_is_summed_in_the_dtype_that_was_asked_for():
    problem = Problem(T=512, D=4, V=8192, ignored=0.0).rounded(torch.bfloat16)
    truth = problem.run(full_logits())

    def error(acc_dtype):
        options = HeadLossOptions(acc_dtype=acc_dtype, logits_memory_mib=1)
        head_loss = LigerHeadLoss(options=options)
        assert head_loss.plan(512, 4, 8192, torch.bfloat16, DEVICE).num_chunks == 8
        run = problem.run(lambda *xs: head_loss(*xs).loss, torch.bfloat16, DEVICE)
        return run.errors(truth)["d_weight"]

    assert 1.05 * error(torch.float32) < error(torch.bfloat16)


@pytest.mark.parametrize("more", [(), (None,), (None, None)])
def test_each_setting_reaches_liger(monkeypatch, more):
    """Also of versions whose results have grown in the middle."""
    given = {}

    def forward(**arguments):
        given.update(arguments)
        grads = torch.zeros(5, 4), torch.zeros(7, 4)
        return torch.tensor(3.0), torch.tensor(1.0), *more, *grads, None

    liger = importlib.import_module(LIGER_OPS)
    monkeypatch.setattr(liger, "fused_linear_cross_entropy_forward", forward)
    options = HeadLossOptions(
        ignore_index=6, logit_softcap=20.0, acc_dtype=torch.bfloat16
    )
    terms = [CrossEntropy(0.125), ZLoss(0.5)]
    hidden = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.bfloat16, requires_grad=True)
    out = LigerHeadLoss(terms, options)(hidden, weight, torch.arange(5))
    assert (out.loss.item(), out.terms["z_loss"].item()) == (3.0, 2.0)
    wanted = {
        "ignore_index": 6,
        "lse_square_scale": 0.5,
        "label_smoothing": 0.125,
        "softcap": 20.0,
        "return_z_loss": True,
        "accum_dtype": torch.bfloat16,
        "compute_gradients": True,
        "weight_requires_grad": True,
        "reduction": "sum",
    }
    assert {name: given[name] for name in wanted} == wanted


def test_float16_is_refused():
    problem = Problem(T=5, D=16, V=11)
    with pytest.raises(ValueError, match='float16 before .* use impl="chunked"'):
        problem.run(liger_loss(), torch.float16, DEVICE)
    autocast = torch.autocast(DEVICE, torch.float16)
    with autocast, pytest.raises(ValueError, match='use impl="chunked"'):
        problem.run(liger_loss(), torch.float32, DEVICE)


def test_normalizer_and_incoming_gradient_scale_loss_and_gradients():
    problem = Problem(T=37, D=16, V=101).rounded(torch.float32)
    once = problem.run(liger_loss(), torch.float32, DEVICE)
    scaled = problem.run(
        liger_loss(normalizer=torch.tensor(8.0)),
        torch.float32,
        DEVICE,
        upstream=0.25,
    )
    assert relative_error(scaled.loss, once.loss / 8) < 1e-6
    assert relative_error(scaled.d_hidden, once.d_hidden / 32) < 1e-6
    assert relative_error(scaled.d_weight, once.d_weight / 32) < 1e-6


def test_terms_are_those_of_the_engine():
    problem = Problem(T=37, D=16, V=101)
    out = LigerHeadLoss([CrossEntropy(), ZLoss(0.01)])(
        problem.hidden.float().to(DEVICE),
        problem.weight.float().to(DEVICE),
        problem.labels.to(DEVICE),
    )
    valid = problem.labels != -100
    lse = (problem.hidden @ problem.weight.T).logsumexp(dim=1)[valid]
    assert out.terms["z_loss"].item() == pytest.approx(lse.square().sum().item(), 1e-5)
    total = out.terms["cross_entropy"] + 0.01 * out.terms["z_loss"]
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("T", [0, 5])
def test_a_batch_without_labels_has_loss_0_and_gradients_0(T):
    problem = Problem(T=T, D=16, V=101, ignored=1.1)
    loss_of = liger_loss(normalizer=0)
    ours = problem.run(loss_of, torch.float32, DEVICE)
    assert ours.loss == 0
    assert not ours.d_hidden.any()
    assert not ours.d_weight.any()


def test_a_frozen_decoder_leaves_the_weight_its_gradient():
    problem = Problem(T=37, D=16, V=101)
    truth = problem.run(full_logits())
    weight = problem.weight.float().to(DEVICE).requires_grad_()
    hidden = problem.hidden.float().to(DEVICE)
    LigerHeadLoss()(hidden, weight, problem.labels.to(DEVICE)).loss.backward()
    assert relative_error(weight.grad.double().cpu(), truth.d_weight) < 1e-6
    assert not hidden.requires_grad


def test_a_graph_may_be_traversed_twice():
    """Liger itself scales its gradients in place, and scales them again the next time."""
    problem = Problem(T=37, D=16, V=101)
    truth = problem.run(full_logits())
    hidden = problem.hidden.float().to(DEVICE).requires_grad_()
    weight = problem.weight.float().to(DEVICE).requires_grad_()
    loss = LigerHeadLoss()(
        hidden, weight, problem.labels.to(DEVICE), normalizer=64
    ).loss
    (probe,) = torch.autograd.grad(loss, weight, retain_graph=True)
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    for grad, expected in (
        (probe, truth.d_weight / 64),
        (weight.grad, 3 * truth.d_weight / 64),
        (hidden.grad, 3 * truth.d_hidden / 64),
    ):
        assert relative_error(grad.double().cpu(), expected) < 1e-6


def test_garbage_in_ignored_rows_does_not_reach_the_gradients():
    problem = Problem(T=37, D=16, V=101)
    loss_of = liger_loss()
    clean = problem.run(loss_of, torch.float32, DEVICE)
    problem.hidden[problem.labels == -100] = torch.nan
    dirty = problem.run(loss_of, torch.float32, DEVICE)
    assert torch.equal(dirty.d_weight, clean.d_weight)
    assert torch.equal(dirty.d_hidden, clean.d_hidden)


def test_an_unchecked_label_that_is_no_word_makes_the_loss_nan():
    for label in (101, -5):
        problem = Problem(T=37, D=16, V=101)
        problem.labels[7] = label
        loss_of = liger_loss(check_labels=False)
        assert problem.run(loss_of, torch.float32, DEVICE).loss.isnan()


def test_a_bad_label_is_an_error_with_value_and_position():
    problem = Problem(T=37, D=16, V=101)
    problem.labels[7] = 101
    with pytest.raises(ValueError, match=r"labels\[7\] is 101"):
        problem.run(liger_loss(), torch.float32, DEVICE)


def test_a_sharded_vocabulary_is_refused():
    problem = Problem(T=3)
    shard = VocabShard(start=0, vocab_size=1034, widest=517, group=None)
    with pytest.raises(ValueError, match='use impl="chunked"'):
        LigerHeadLoss()(problem.hidden, problem.weight, problem.labels, shard=shard)


SHAPES = [(16384, 4096, 128256), (65536, 2048, 128256), (2048, 256, 16384), (1, 8, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget_mib", [1, 64, 256, 1024, 10**6])
def test_chunk_mem_const_is_the_largest_within_the_budget(shape, budget_mib):
    const = chunk_mem_const(*shape, 2, budget_mib * MIB)
    row_bytes = 2 * shape[2]
    if const > 1:
        assert liger_rows(*shape, const) * row_bytes <= budget_mib * MIB
    if liger_rows(*shape, const) < shape[0]:
        assert liger_rows(*shape, const + 1) * row_bytes > budget_mib * MIB


def test_liger_rows_are_ligers_own(monkeypatch):
    """Our formula for Liger's chunks, against the calls that Liger makes."""
    ops = importlib.import_module(LIGER_OPS)
    kernel, rows = ops.liger_cross_entropy_kernel, []

    class Spy:
        def __getitem__(self, grid):
            rows.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(ops, "liger_cross_entropy_kernel", Spy())
    problem = Problem(T=50, D=8, V=101, ignored=0)
    head_loss = LigerHeadLoss()
    for const in (1, 2, 5, 13):
        rows.clear()
        monkeypatch.setattr(liger_api, "chunk_mem_const", lambda *_, c=const: c)
        problem.run(lambda *a: head_loss(*a).loss, torch.float32, DEVICE)
        assert rows[0] == liger_rows(50, 8, 101, const)


def test_usable_here():
    assert liger_status(DEVICE).usable


def test_no_gpu_is_a_reason_of_its_own(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = liger_status("cpu")
    assert status.importable
    assert not status.usable
    assert "need a GPU" in status.reason


@pytest.mark.parametrize("error", [RuntimeError, OSError, AttributeError, SystemError])
def test_whatever_the_import_raises_becomes_the_reason(monkeypatch, error):
    def broken(name):
        raise error("no ptxas")

    monkeypatch.setattr(liger_api.importlib, "import_module", broken)
    status = liger_status(DEVICE)
    assert not status.importable
    assert f"import fails with {error.__name__}: no ptxas" in status.reason


def test_a_dependency_of_ligers_that_is_missing_is_not_liger_missing(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(liger_api.importlib, "import_module", broken)
    assert "No module named 'triton'" in liger_status(DEVICE).reason


def test_an_old_version_says_what_to_type(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.5.10")
    status = liger_status(DEVICE)
    assert not status.importable
    assert "0.5.10 is too old, at least 0.8.4" in status.reason
    assert "pip install -U liger-kernel" in status.reason


@pytest.mark.parametrize("normalizer", [1, 64.0])
def test_terms_are_divided_by_the_normalizer(normalizer):
    problem = Problem(T=37, D=16, V=101)
    args = problem.hidden.float(), problem.weight.float(), problem.labels
    on_device = [x.to(DEVICE) for x in args]
    for smoothing in (0.0, 0.1):
        terms = [CrossEntropy(smoothing), ZLoss(0.01)]
        found = LigerHeadLoss(terms)(*on_device, normalizer=normalizer)
        truth = HeadLoss(terms)(*args, normalizer=normalizer)
        for name, value in truth.terms.items():
            assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
        assert ("nll" in found.metrics) == (not smoothing)
        for name, value in found.metrics.items():
            assert value.item() == pytest.approx(truth.metrics[name].item(), rel=1e-5)


@pytest.mark.parametrize("normalizer", [1, 64.0])
def test_ignored_tokens_that_are_not_dropped_have_no_share(normalizer, monkeypatch):
    problem, loss_of = Problem(T=37, D=16, V=101), liger_loss(normalizer=normalizer)
    clean = problem.run(loss_of, torch.float32, DEVICE)
    # As on a GPU, where nobody has counted the labels.
    monkeypatch.setattr(liger_api, "kept_rows", lambda call, *_: (None, call, False))
    problem.hidden[problem.labels == -100] = torch.nan
    dirty = problem.run(loss_of, torch.float32, DEVICE)
    assert max(dirty.errors(clean).values()) < 1e-6


def test_a_mean_over_labels_is_scaled_by_one(monkeypatch):
    problem = Problem(T=41, D=16, V=101, ignored=0)  # 41 * (1 / 41) is not 1 in float32
    real, factors = liger_api.scale_gradient, []

    def scale(grad, factor, dtype):
        factors.append(factor.item())
        return real(grad, factor, dtype)

    monkeypatch.setattr(liger_api, "scale_gradient", scale)
    problem.run(liger_loss(normalizer=torch.tensor(41)), torch.float32, DEVICE)
    assert factors == [1.0, 1.0]
