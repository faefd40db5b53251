"""Settings and numbers of a compiled call that change from call to call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import relative_error
from tests.unit.head_loss.compiling import (
    Batch,
    batch,
    compiled,
    errors,
)
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    ZLoss,
    linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_settings_may_change_between_calls():
    def loss_of(b: Batch, z_loss: float) -> torch.Tensor:
        return linear_cross_entropy(b.hidden, b.weight, b.labels, z_loss=z_loss)

    one_graph = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for z_loss in (0.0, 0.1, 0.2, 0.3):
        error = errors(
            lambda b, z=z_loss: one_graph(b, z),
            lambda b, z=z_loss: loss_of(b, z),
            batch(),
        )
        assert error < 1e-12


@pytest.mark.parametrize("name", ["z_loss", "label_smoothing"])
def test_numbers_of_numpy_may_change_between_calls(name):
    """Dynamo takes them for tensors, of which a graph would keep the first."""

    def loss_of(b: Batch, value: float) -> torch.Tensor:
        return linear_cross_entropy(b.hidden, b.weight, b.labels, **{name: value})

    compiled_once = torch.compile(loss_of, backend="aot_eager")
    for value in np.linspace(0.0, 0.3, 4):
        error = errors(
            lambda b, v=value: compiled_once(b, v),
            lambda b, v=value: loss_of(b, float(v)),
            batch(),
        )
        assert error < 1e-12


def test_heads_that_compute_the_same_share_a_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def loss_of(head: HeadLoss, b: Batch) -> torch.Tensor:
        return head(b.hidden, b.weight, b.labels).loss

    one_graph = torch.compile(loss_of, backend=backend, fullgraph=True)
    b = batch()
    for weight in (0.1, 0.1, 0.2, 0.2):
        head = HeadLoss([CrossEntropy(), ZLoss(weight)])
        torch.testing.assert_close(one_graph(head, b), loss_of(head, b))
    assert len(graphs) == 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("name", "values"),
    [("ignore_index", [0, 1, 2, -100, 2**60]), ("z_loss", [0, 1, 2, 0.5])],
)
def test_integers_among_the_settings_may_change(name, values, dynamic):
    def loss_of(b: Batch, value: float) -> torch.Tensor:
        return linear_cross_entropy(b.hidden, b.weight, b.labels, **{name: value})

    one = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    b = batch()
    b.labels = b.labels.clamp(min=0)
    for value in values:
        assert relative_error(one(b, value), loss_of(b, value)) < 1e-12


@pytest.mark.parametrize("normalizers", [(13, 17, 19), (0.5, 2.0, 3.0)], ids=str)
def test_the_normalizer_may_change(normalizers):
    head = HeadLoss([CrossEntropy()])

    def loss_of(b: Batch, normalizer: float) -> torch.Tensor:
        return head(b.hidden, b.weight, b.labels, normalizer=normalizer).loss

    one = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    b = batch()
    for normalizer in normalizers:
        error = relative_error(one(b, normalizer), loss_of(b, normalizer))
        assert error < 1e-12


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.0, "must be a positive int or float, got 0.0"),
        (True, "must be a positive int or float, got True"),
    ],
)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_settings_out_of_range_are_told_as_without_a_graph(
    fullgraph, temperature, message
):
    """But for the type, where torch refuses any exception."""

    def loss_of(b: Batch) -> torch.Tensor:
        return linear_cross_entropy(
            b.hidden, b.weight, b.labels, temperature=temperature
        )

    error = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(error, match=f"temperature {message}"):
        compiled(loss_of, fullgraph=fullgraph)(batch())


def test_a_number_as_the_normalizer_may_change_between_calls():
    """Where it is made a constant, so many numbers are more graphs than torch allows."""
    head, inputs = HeadLoss(), batch()

    def loss_of(b: Batch, number: float) -> torch.Tensor:
        return head(b.hidden, b.weight, b.labels, normalizer=number).loss

    compiled_once = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for number in range(12):
        got = compiled_once(inputs, 3.0 + number)
        torch.testing.assert_close(got, loss_of(inputs, 3.0 + number))
