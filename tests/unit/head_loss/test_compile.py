"""Under `torch.compile`: one graph where a graph can hold the call, and right anywhere."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers import Problem, read_by, relative_error, run_on_shards
from tests.unit.head_loss.compiling import (
    B,
    Batch,
    D,
    L,
    V,
    batch,
    compiled,
    errors,
)
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    EntropyBonus,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    SequencePolicyGradient,
    Teacher,
    Unlikelihood,
    ZLoss,
    custom_op,
    engine,
    linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(params=[11, 10**6], ids="{}_tokens_per_chunk".format)
def chunks(request, monkeypatch):
    rows = request.param

    def plan(num_tokens, *_, **__):
        return engine.ChunkPlan(rows, -(-num_tokens // rows), 0, 0)

    monkeypatch.setattr(engine, "plan_chunks", plan)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "logit_softcap": 3.0},
    {"z_loss": 0.1, "temperature": 0.7, "ignore_index": 3},
    {"impl": "reference", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy_is_one_graph(settings, weighted, chunks):
    def loss_of(b: Batch) -> torch.Tensor:
        weights = b.token_weights if weighted else None
        labels = b.labels
        if "ignore_index" in settings:
            labels = labels.masked_fill(labels == -100, 3)
        return linear_cross_entropy(
            b.hidden, b.weight, labels, token_weights=weights, **settings
        )

    assert errors(compiled(loss_of), loss_of, batch()) < 1e-12


MIXTURES = {
    "slopes": [CrossEntropy(0.1), EntropyBonus(0.2)],
    "z-loss": [CrossEntropy(), ZLoss(0.1)],
    "policy": [PolicyGradient(weight=0.5), ZLoss(0.1)],
    "candidates": [CrossEntropy(), Unlikelihood(0.3), PolicyGradient("reinforce")],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_terms_is_one_graph(name, chunks):
    head = HeadLoss(MIXTURES[name], HeadLossOptions(logit_softcap=3.0))

    def output_of(b: Batch) -> Any:
        return head(
            b.hidden,
            b.weight,
            b.labels,
            normalizer=(b.labels != -100).sum(),
            token_weights=b.token_weights,
            **read_by(head, b.rows),
        )

    one_graph = torch.compile(output_of, backend="aot_eager", fullgraph=True)
    b = batch()
    assert errors(lambda b: one_graph(b).loss, lambda b: output_of(b).loss, b) < 1e-12
    ours, eager = one_graph(b), output_of(b)
    for found, truth in ((ours.terms, eager.terms), (ours.metrics, eager.metrics)):
        assert found.keys() == truth.keys()
        for key, value in truth.items():
            assert not found[key].requires_grad
            assert relative_error(found[key], value) < 1e-12, key


@pytest.mark.parametrize("num_labeled", [None, B * L])
def test_what_is_known_of_the_labels_may_be_given(num_labeled):
    b = batch()
    b.labels = b.labels.clamp(min=0)

    def loss_of(b: Batch) -> torch.Tensor:
        return HEAD(b.hidden, b.weight, b.labels, num_labeled=num_labeled).loss

    assert errors(compiled(loss_of), loss_of, b) < 1e-12


def test_tokens_without_a_label_are_dropped_where_their_number_is_given():
    b = batch()
    num_labeled = int((b.labels != -100).sum())

    def loss_of(b: Batch, num: int = num_labeled) -> torch.Tensor:
        return HEAD(b.hidden, b.weight, b.labels, num_labeled=num).loss

    assert errors(compiled(loss_of), loss_of, b) < 1e-12
    wrong = compiled(lambda b: loss_of(b, num_labeled + 1))
    assert wrong(b).isnan()


HEAD = HeadLoss([CrossEntropy(0.1), ZLoss(0.1)])


@pytest.mark.parametrize("chunk_mib", [0, 1])
def test_the_number_of_tokens_may_change_without_a_new_graph(chunk_mib, monkeypatch):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example_inputs)

    head = HeadLoss(HEAD.terms, HeadLossOptions(logits_memory_mib=chunk_mib))

    def loss_of(hidden, weight, labels):
        return head(hidden, weight, labels, normalizer=7).loss

    one_graph = torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=True)
    for length in (1200, 1201, 640, 2000):
        b = batch(length)
        error = errors(
            lambda b: one_graph(b.hidden, b.weight, b.labels),
            lambda b: loss_of(b.hidden, b.weight, b.labels),
            b,
        )
        assert error < 1e-12
    assert len(graphs) <= 2, [g.graph for g in graphs]


def test_no_grad_and_frozen_inputs():
    def loss_of(b: Batch) -> torch.Tensor:
        return linear_cross_entropy(
            b.hidden, b.weight, b.labels, token_weights=b.token_weights, z_loss=0.1
        )

    b = batch()
    with torch.no_grad():
        loss = compiled(loss_of)(b)
        assert relative_error(loss, loss_of(b)) < 1e-12
    assert not loss.requires_grad
    for names in (("hidden",), ("weight",), ("hidden", "weight"), ("token_weights",)):
        b = batch()
        for name in names:
            setattr(b, name, getattr(b, name).detach())
        torch.compiler.reset()
        assert errors(compiled(loss_of), loss_of, b) < 1e-12


def test_between_other_operations_and_called_twice():
    """The hidden states are no leaf, both calls share the weight, and no call before had
    these settings."""

    def loss_of(b: Batch) -> torch.Tensor:
        hidden = torch.tanh(b.hidden)
        first = linear_cross_entropy(hidden, b.weight, b.labels, z_loss=0.0123)
        second = linear_cross_entropy(hidden * 2, b.weight, b.labels, z_loss=0.0321)
        return first.square() + second * hidden.mean()

    assert errors(compiled(loss_of), loss_of, batch()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_numbers_and_autocast(dtype, autocast, chunks):
    def loss_of(b: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(b.hidden, b.weight, b.labels)

    b = batch()
    b.hidden = b.hidden.detach().to(dtype).requires_grad_()
    b.weight = b.weight.detach().to(dtype).requires_grad_()
    # Rounded once, to the bits of the eager path but for the order of two factors.
    assert errors(compiled(loss_of), loss_of, b) < torch.finfo(dtype).eps


@pytest.mark.slow
def test_inductor():
    head = HeadLoss([CrossEntropy(), PolicyGradient(weight=0.5), ZLoss(0.1)])

    def loss_of(b: Batch) -> torch.Tensor:
        hidden = torch.tanh(b.hidden)
        rows = read_by(head, b.rows)
        mixture = head(hidden, b.weight, b.labels, normalizer=7, **rows).loss
        plain = linear_cross_entropy(
            hidden, b.weight, b.labels, token_weights=b.token_weights
        )
        return mixture + plain

    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except Exception as error:  # whatever its compiler says
        pytest.skip(f"inductor does not work here: {error}")
    assert errors(compiled(loss_of, "inductor"), loss_of, batch()) < 1e-12


def losses_of_tokens(b: Batch) -> torch.Tensor:
    losses = linear_cross_entropy(b.hidden, b.weight, b.labels, reduction="none")
    return (losses * torch.linspace(-1, 1, L, dtype=losses.dtype)).sum()


def sequence_loss(b: Batch) -> torch.Tensor:
    rows = read_by(SEQUENCES, b.rows)
    return SEQUENCES(b.hidden, b.weight, b.labels, **rows).loss


def distilled(b: Batch) -> torch.Tensor:
    teacher = Teacher(logits=b.hidden.detach() @ b.weight.detach().T * 0.5)
    return STUDENT(b.hidden, b.weight, b.labels, teacher=teacher).loss


SEQUENCES = HeadLoss([SequencePolicyGradient(0.2, 0.2), ZLoss(0.1)])
STUDENT = HeadLoss([CrossEntropy(), Distillation("reverse_kl")])


# torch 2.13 looks, itself, for the gradient of what enters the second graph
SECOND_GRAPH = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)


@SECOND_GRAPH
def test_nan_from_above_an_ignored_token_goes_nowhere():
    b = batch()
    leaves = b.hidden, b.weight
    upstream = torch.ones_like(b.labels, dtype=b.hidden.dtype)
    upstream[b.labels == -100] = torch.nan
    assert upstream.isnan().any()
    loss_of = partial(linear_cross_entropy, reduction="none")
    grads = [
        torch.autograd.grad(run(*leaves, b.labels), leaves, upstream)
        for run in (torch.compile(loss_of, backend="aot_eager"), loss_of)
    ]
    for ours, truth in zip(*grads, strict=True):
        assert relative_error(ours, truth) < 1e-12


@SECOND_GRAPH
@pytest.mark.parametrize("loss_of", [losses_of_tokens, sequence_loss, distilled])
def test_what_breaks_the_graph_is_still_right(loss_of, chunks):
    def around(b: Batch) -> torch.Tensor:
        return 2 * loss_of(b).square()

    assert errors(compiled(around, fullgraph=False), around, batch()) < 1e-12
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no graph can hold"):
        compiled(around)(batch())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_vocabulary_shard_breaks_the_graph_and_is_still_right(monkeypatch):
    problem = Problem(T=37, D=D, V=V)
    truth = problem.run(lambda *args: HEAD(*args, normalizer=7).loss)

    def one_graph_each(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return torch.compile(HEAD.__call__, backend="aot_eager")(*args, **kwargs)

    lock = threading.Lock()
    ours = run_on_shards(monkeypatch, one_graph_each, problem, [101], normalizer=7)
    assert max(ours.errors(truth).values()) < 1e-12


# torch 2.15 looks at a copy that its check has made itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_operation_keeps_the_rules_of_operations(chunks):
    b = batch()
    head = HeadLoss([CrossEntropy(), PolicyGradient(), ZLoss(0.1)])
    calls = []
    real = custom_op._head_loss

    def record(*args):
        calls.append(args)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_op, "_head_loss", record)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for num_labeled in (None, int((b.labels != -100).sum())):
            head(
                b.hidden,
                b.weight,
                b.labels,
                token_weights=b.token_weights,
                num_labeled=num_labeled,
                **read_by(head, b.rows),
            )
    assert len(calls) == 2
    for args in calls:
        leaves = (
            x.detach().clone().requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        )
        torch.library.opcheck(real, tuple(leaves))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
def test_a_forward_mode_derivative_raises_and_is_not_zero():
    b = batch()

    def derivative(weight: torch.Tensor) -> torch.Tensor:
        def loss_of(weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(b.hidden, weight, b.labels)

        return torch.func.jvp(loss_of, (weight,), (weight,))[1]

    with pytest.raises(RuntimeError, match="autograd.Function with functorch"):
        compiled(derivative, backend="aot_eager", fullgraph=False)(b.weight.detach())


def test_a_second_derivative_raises():
    """A backend without gradients of its own leaves them to the operation."""

    def loss_of(b: Batch) -> torch.Tensor:
        return linear_cross_entropy(b.hidden, b.weight, b.labels)

    b = batch()
    loss = compiled(loss_of, backend="eager")(b)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, b.hidden, create_graph=True)


@SECOND_GRAPH
def test_loss_scaling_keeps_small_gradients_in_float16(fresh_compiler):
    problem = Problem(T=64, D=32, V=101).rounded(torch.float16)
    head = HeadLoss()

    def loss_of(*args):
        return head(*args, normalizer=2**20).loss

    truth = problem.run(loss_of, upstream=2.0**15)
    compiled_loss = torch.compile(loss_of, backend="aot_eager")
    ours = problem.run(compiled_loss, torch.float16, upstream=2.0**15)
    assert max(ours.errors(truth).values()) < 2e-3
