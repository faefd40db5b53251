"""Every term by its kernels on a GPU, against full logits; and what a GPU must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import Problem, relative_error, waiting_is_an_error
from tests.unit.head_loss.term_cases import (
    EVERYTHING,
    MIXTURE,
    OPTIONS,
    SETS,
    TERMS,
    inputs_of,
    row_inputs,
    truth_of,
)
from torchtitan_liger.head_loss import HeadLoss, HeadLossOptions, Preference, passes

pytestmark = pytest.mark.gpu

MIB = 1  # of logits: several chunks
KERNELS = "torchtitan_liger.head_loss.triton_sweeps"


def on_gpu(names, rows):
    """What the call gets, there."""
    given = inputs_of(names, rows)
    teacher = given.pop("teacher", None)
    moved = {name: values.cuda() for name, values in given.items()}
    if teacher is not None:
        moved["teacher"] = replace(teacher, logits=teacher.logits.cuda())
    return moved


def head_of(names, options=HeadLossOptions(), mib=MIB):  # noqa: B008
    terms = [TERMS[name][0] for name in names]
    return HeadLoss(terms, replace(options, logits_memory_mib=mib))


@pytest.mark.parametrize("names", SETS, ids=", ".join)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "both"])
@pytest.mark.parametrize("counted", [False, True])
def test_equals_full_logits_in_float64(names, options, counted):
    """More columns than one block of any kernel, and a last block that is not full."""
    assert passes.sweeps_for("cuda").__name__ == KERNELS
    problem = Problem(T=131, D=32, V=5003)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, options)
    num_labeled = int((problem.labels != -100).sum()) if counted else None
    head, given = head_of(names, options), on_gpu(names, rows)
    assert head.plan(131, 32, 5003, torch.float64, "cuda").num_chunks > 3

    def loss_of(*args):
        hints = {"num_labeled": num_labeled, "check_labels": False}
        return head(*args, normalizer=7, **hints, **given).loss

    ours = problem.run(loss_of, torch.float64, "cuda").errors(truth)
    assert max(ours.values()) < 1e-10, ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("names", SETS, ids=", ".join)
def test_error_is_at_most_twice_that_of_full_logits(names, dtype):
    problem = Problem(T=257, D=128, V=5003).rounded(dtype)
    rows = row_inputs(problem)
    rows["teacher"] = rows["teacher"].to(dtype).double()
    options = HeadLossOptions()
    truth = truth_of(names, problem, rows, options)
    narrow = {
        name: values.float() if values.is_floating_point() else values
        for name, values in rows.items()
    }
    stock = truth_of(names, problem, narrow, options, dtype, "cuda").errors(truth)
    head, given = head_of(names), on_gpu(names, narrow)
    ours = problem.run(
        lambda *args: head(*args, normalizer=7, **given).loss, dtype, "cuda"
    ).errors(truth)
    floor = dict.fromkeys(ours, 8 * torch.finfo(torch.float32).eps)
    # A sum of numbers of both signs is not more exact than they are.
    narrow_problem = problem.hidden.to(dtype), problem.weight.to(dtype)
    hidden, weight, labels = (x.cuda() for x in (*narrow_problem, problem.labels))
    losses = head(hidden, weight, labels, reduction="none", **given).loss
    floor["loss"] *= (losses.abs().sum() / losses.sum().abs()).item()
    for name, error in ours.items():
        assert error <= max(2 * stock[name], floor[name]), (name, ours, stock)


class Step:
    """A forward and a backward pass on tensors that stay where they are."""

    def __init__(self, names, counted, dtype=torch.float32):
        self.problem = Problem(T=300, D=64, V=1001)
        rows = row_inputs(self.problem)
        for values in rows.values():  # other tokens may have labels later
            values.nan_to_num_()
        self.rows = on_gpu(names, rows)
        self.hidden = self.problem.hidden.to("cuda", dtype).requires_grad_()
        self.weight = self.problem.weight.to("cuda", dtype).requires_grad_()
        self.labels = self.problem.labels.cuda()
        self.num_labeled = int((self.problem.labels != -100).sum()) if counted else None
        self.normalizer = torch.tensor(100, device="cuda")
        self.upstream = torch.tensor(0.5, device="cuda")
        self.head = HeadLoss(
            [TERMS[name][0] for name in names],
            HeadLossOptions(logits_memory_mib=MIB),
        )

    def __call__(self):
        out = self.head(
            self.hidden,
            self.weight,
            self.labels,
            normalizer=self.normalizer,
            check_labels=False,
            num_labeled=self.num_labeled,
            **self.rows,
        )
        (out.loss * self.upstream).backward()
        return out

    def forget(self):
        self.hidden.grad = self.weight.grad = None


SOME = [("cross entropy",), ("smoothed", "z-loss"), MIXTURE, EVERYTHING]


@pytest.mark.parametrize("names", SOME, ids=", ".join)
@pytest.mark.parametrize("counted", [False, True])
def test_nothing_waits_for_the_gpu(names, counted):
    step = Step(names, counted, torch.bfloat16)
    step()  # warm up
    with waiting_is_an_error():
        step()


# The leaves were made on another stream than that of the warm-up.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("names", SOME, ids=", ".join)
@pytest.mark.parametrize("counted", [False, True])
def test_a_cuda_graph_replays_with_other_inputs(names, counted):
    step = Step(names, counted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels compile, and libraries make their workspaces
            step.forget()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    step.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    g = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        step.hidden.normal_(generator=g)
        step.weight.normal_(generator=g).mul_(0.1)
        step.labels.copy_(step.labels.roll(7))  # as many of them as before
        for name in step.rows.keys() & {"advantages", "old_logp", "ref_logp"}:
            step.rows[name].normal_(generator=g).sub_(6 * (name != "advantages"))
        step.normalizer.fill_(70)
        step.upstream.fill_(-0.37)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [out.loss, step.hidden.grad, step.weight.grad]
    replayed += list(out.terms.values()) + list(out.metrics.values())
    replayed = [x.detach().clone() for x in replayed]
    step.forget()
    now = step()
    expected = [now.loss, step.hidden.grad, step.weight.grad]
    expected += list(now.terms.values()) + list(now.metrics.values())
    assert step.hidden.grad.any()
    for ours, truth in zip(replayed, expected, strict=True):
        assert relative_error(ours, truth.detach()) < 1e-5


@pytest.mark.parametrize("budget_mib", [0, 64])
@pytest.mark.parametrize("counted", [False, True])
def test_ignored_tokens_take_no_memory_where_the_others_are_counted(
    budget_mib, counted
):
    T, D, V = 16384, 1024, 65536
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V, (T,), device="cuda")
    num_labeled = T // 10
    labels[torch.randperm(T, device="cuda")[num_labeled:]] = -100
    head = HeadLoss(options=HeadLossOptions(logits_memory_mib=budget_mib))
    hint = num_labeled if counted else None

    def step():
        head(
            hidden, weight, labels, check_labels=False, num_labeled=hint
        ).loss.backward()

    step()  # warm up
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    plan = head.plan(num_labeled if counted else T, D, V, torch.bfloat16, "cuda")
    gradients = 2 * T * D + (4 + 2) * V * D  # d_weight in float32, and its copy
    assert peak <= plan.logits_bytes + gradients + 2**26, (peak, plan)
    assert hidden.grad.any(dim=1).sum() == num_labeled


def test_a_compiled_step_is_right():
    step = Step(MIXTURE, counted=False)
    eager = step().loss.detach()
    expected = step.hidden.grad, step.weight.grad
    step.forget()

    def loss_of(hidden, weight, labels, rows):
        out = step.head(hidden, weight, labels, normalizer=100, **rows)
        return out.loss

    one_graph = torch.compile(loss_of, fullgraph=True)
    loss = one_graph(step.hidden, step.weight, step.labels, step.rows)
    (loss * 0.5).backward()
    assert relative_error(loss.detach(), eager) < 1e-5
    assert relative_error(step.hidden.grad, expected[0]) < 1e-5
    assert relative_error(step.weight.grad, expected[1]) < 1e-5


def test_sequences_of_the_tokens_with_a_label_are_cut_without_waiting():
    B, L = 16, 40
    problem = Problem(T=B * L, D=32, V=5003, ignored=0).rounded(torch.bfloat16)
    counts = [(7 * i) % 23 for i in range(B)]
    for row_L, count in zip(problem.labels.view(B, L), counts, strict=True):
        row_L[: L - count] = -100
    truth = problem.run(full_logits_simpo(B), torch.float64, "cuda")
    head = HeadLoss([Preference("simpo")], HeadLossOptions(logits_memory_mib=1))
    assert head.plan(sum(counts), 32, 5003, torch.float32, "cuda").num_chunks > 2

    def loss_of(hidden, weight, labels):
        shaped = hidden.view(B, L, -1), weight, labels.view(B, L)
        return head(*shaped, num_labeled=counts, check_labels=False).loss

    ours = problem.run(loss_of, torch.float32, "cuda")
    assert max(ours.errors(truth).values()) < 1e-5
    weight = problem.weight.float().cuda().requires_grad_()
    hidden, labels = problem.hidden.float().cuda(), problem.labels.cuda()
    with waiting_is_an_error():
        loss_of(hidden, weight, labels).backward()


def full_logits_simpo(num_sequences):
    """The sum over pairs of `-log sigmoid(beta * difference - gamma)` of mean log p."""
    term = Preference("simpo")

    def loss_of(hidden, weight, labels):
        logp = (hidden @ weight.T).log_softmax(1)
        logp = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        valid = labels != -100
        logp = torch.where(valid, logp, 0.0).view(num_sequences, -1).sum(1)
        score = logp / valid.view(num_sequences, -1).sum(1).clamp(min=1)
        margin = term.beta * (score[0::2] - score[1::2]) - term.gamma
        return -F.logsigmoid(margin).sum()

    return loss_of
