"""The implementations on a GPU, against full logits in float64."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import Problem, full_logits, plain_head, waiting_is_an_error
from torchtitan_liger.head_loss import HeadLoss, HeadLossOptions
from torchtitan_liger.head_loss.products import whole_waves
from torchtitan_liger.liger_api import LigerHeadLoss

pytestmark = pytest.mark.gpu

SETTINGS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}, {"logit_softcap": 5.0}]


@pytest.mark.parametrize("head_loss", [HeadLoss, LigerHeadLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("budget_mib", [1, 0])
def test_error_is_at_most_twice_that_of_full_logits(
    head_loss, dtype, settings, budget_mib
):
    problem = Problem(T=1031, D=256, V=4999).rounded(dtype)
    truth = problem.run(full_logits(**settings))
    stock = problem.run(full_logits(**settings), dtype, "cuda").errors(truth)
    head = plain_head(head_loss, **settings, logits_memory_mib=budget_mib)
    ours = problem.run(lambda *a: head(*a).loss, dtype, "cuda").errors(truth)
    floor = 4 * torch.finfo(torch.float32).eps
    for name, error in ours.items():
        assert error <= max(2 * stock[name], floor), (name, ours, stock)


@pytest.mark.parametrize("ignored", [0.0, 0.02])
def test_product_in_pieces(ignored):
    """So many rows that the gradient of the hidden states is computed piece by piece."""
    T, D, V = 9000, 1024, 999
    problem = Problem(T=T, D=D, V=V, ignored=ignored).rounded(torch.bfloat16)
    num_rows = int((problem.labels >= 0).sum())
    device = torch.cuda.get_device_properties("cuda")
    assert len(whole_waves(num_rows, D, device.multi_processor_count)) > 1
    truth = problem.run(full_logits(), torch.float64, "cuda")
    stock = problem.run(full_logits(), torch.bfloat16, "cuda")
    head = HeadLoss(options=HeadLossOptions(logits_memory_mib=1024))
    assert head.plan(T, D, V, torch.bfloat16, "cuda").num_chunks == 1
    ours = problem.run(lambda *a: head(*a).loss, torch.bfloat16, "cuda")
    for name, error in ours.errors(truth).items():
        assert error <= max(2 * stock.errors(truth)[name], 1e-6), name


@pytest.mark.parametrize("head_loss", [HeadLoss, LigerHeadLoss])
def test_autocast_with_float32_parameters(head_loss):
    problem = Problem(T=513, D=128, V=2003).rounded(torch.bfloat16)
    truth = problem.run(full_logits())

    def autocast(loss_of):
        def run(*args):
            with torch.autocast("cuda", torch.bfloat16):
                return loss_of(*args)

        return run

    stock = problem.run(autocast(full_logits()), torch.float32, "cuda")
    head = head_loss()
    ours = problem.run(autocast(lambda *a: head(*a).loss), torch.float32, "cuda")
    for name, error in ours.errors(truth).items():
        assert error <= max(2 * stock.errors(truth)[name], 1e-6), name


def test_chunked_does_not_wait_for_the_gpu():
    problem = Problem(T=300, D=64, V=1000)
    hidden = problem.hidden.to("cuda", torch.bfloat16).requires_grad_()
    weight = problem.weight.to("cuda", torch.bfloat16).requires_grad_()
    labels, normalizer = problem.labels.cuda(), torch.tensor(100, device="cuda")
    head = plain_head(label_smoothing=0.1, z_loss=1e-3, logits_memory_mib=1)

    def step():
        out = head(hidden, weight, labels, normalizer=normalizer, check_labels=False)
        out.loss.backward()

    step()  # warm up
    with waiting_is_an_error():
        step()


@pytest.mark.parametrize("head_loss", [HeadLoss, LigerHeadLoss])
@pytest.mark.parametrize("budget_mib", [64, 256, 1024])
def test_logits_stay_within_the_budget(head_loss, budget_mib):
    """Peak memory above inputs and gradients is the plan's."""
    T, D, V = 16384, 1024, 65536
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V, (T,), device="cuda")
    head = head_loss(options=HeadLossOptions(logits_memory_mib=budget_mib))
    head(hidden[:128], weight, labels[:128], check_labels=False)  # warm up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(hidden, weight, labels, check_labels=False)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 2 * T * D + (4 + 2) * V * D  # d_weight in float32, and its copy
    plan = head.plan(T, D, V, torch.bfloat16, "cuda")
    assert plan.logits_bytes <= budget_mib * 2**20
    assert peak <= plan.logits_bytes + gradients + 2**26, (peak, plan)


def test_more_than_2_to_the_31_logits():
    T, V = 32768, 65664
    assert T * V > 2**31
    problem = Problem(T=T, D=16, V=V, ignored=0).rounded(torch.bfloat16)
    truth = problem.run(full_logits(), torch.float64, "cuda")
    head = HeadLoss(options=HeadLossOptions(logits_memory_mib=16384))
    assert head.plan(T, 16, V, torch.bfloat16, "cuda").tokens_per_chunk == T
    ours = problem.run(lambda *a: head(*a).loss, torch.bfloat16, "cuda").errors(truth)
    assert max(ours.values()) < 1e-2
