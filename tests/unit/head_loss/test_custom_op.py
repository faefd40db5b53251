"""The engine under `torch.compile`, as one operation of the graph."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import torch

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    ReferenceKL,
    Term,
    ZLoss,
    custom_op,
)

T, D, V = 12, 8, 31


@pytest.mark.parametrize("num_labeled", [None, 8], ids="num_labeled={}".format)
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_the_same_as_without(num_rows, num_labeled):
    terms = {
        0: [CrossEntropy(), ZLoss(0.1)],
        1: [CrossEntropy(), PolicyGradient("reinforce")],
        3: [PolicyGradient(), ReferenceKL(0.1)],
    }[num_rows]
    head = HeadLoss(terms)
    problem = Problem(T=T, D=D, V=V, ignored=0)
    problem.labels[::3] = -100
    names = ("advantages", "old_logp", "ref_logp")[:num_rows]
    g = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(T, generator=g).double() for name in names}

    def loss_of(hidden, weight, labels, token_weights):
        return head(
            hidden,
            weight,
            labels,
            token_weights=token_weights,
            check_labels=False,
            num_labeled=num_labeled,
            **rows,
        ).loss

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    results, gradients = [], []
    for f in (loss_of, compiled):
        weights = torch.rand(T, generator=torch.Generator().manual_seed(2)).double()
        weights.requires_grad_()
        results.append(problem.run(lambda *args, f=f, w=weights: f(*args, w)))
        gradients.append(weights.grad)
    assert max(results[1].errors(results[0]).values()) < 1e-12
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [5, T])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)
def test_graphs_expect_the_strides_and_dtypes_that_come(dtype, chunk):
    head = HeadLoss()
    hidden = (
        torch.randn(D, T).to(dtype).t().requires_grad_()
    )  # its rows do not lie dense
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    scale = torch.tensor(0.5)
    args = (hidden, weight, None, torch.randint(V, (T,)), scale, None, [], "", dtype)
    args = (*args, chunk, False, head._recipe.name, True, True)
    torch.library.opcheck(
        custom_op._head_loss, args, test_utils=("test_schema", "test_faketensor")
    )


def test_a_pickled_head_finds_its_terms_in_another_process(monkeypatch):
    data = pickle.dumps(HeadLoss([ZLoss(0.5)]))
    monkeypatch.setattr(custom_op, "_recipes", WeakValueDictionary())
    head = pickle.loads(data)
    assert custom_op._recipes[head._recipe.name].terms == (ZLoss(0.5),)


@dataclass
class Changing(Term):
    weight: float
    name: str = "changing"


@dataclass(frozen=True)
class WithTensor(Term):
    factors: torch.Tensor
    weight: float = 1.0
    name: str = "with_tensor"


@dataclass(frozen=True)
class Own(Term):
    weight: float = 1.0
    name: str = "own"


@dataclass(frozen=True)
class Hidden(Term):
    """Equal to any other, and to look at like any other."""

    factor: torch.Tensor = field(compare=False, repr=False)
    weight: float = 1.0
    name: str = "hidden"


@dataclass(frozen=True, slots=True)
class Slotted(Term):
    """Whose numbers are not in its `__dict__`, and not all in its `repr`."""

    factor: float = field(repr=False)
    weight: float = 1.0
    name: str = "slotted"

    def loss(self, stats, rows):
        return -self.factor * stats.logp


@dataclass(frozen=True, repr=False)
class Inherited(Slotted):
    pass


@pytest.mark.parametrize("term", [Slotted, Inherited])
def test_terms_with_slots_are_told_apart(term):
    first, second = HeadLoss([term(1.0)]), HeadLoss([term(3.0)])
    problem = Problem(T=T, D=D, V=V)
    args = problem.hidden, problem.weight, problem.labels
    compiled = torch.compile(
        lambda: second(*args).loss, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(), 3 * first(*args).loss, rtol=1e-12, atol=0)


def test_only_terms_that_stay_equal_share_a_recipe():
    options = HeadLossOptions()
    heads = [HeadLoss([ZLoss(0.25)], options) for _ in range(2)]
    assert heads[0]._recipe is heads[1]._recipe
    heads = [HeadLoss([Own(0.25)], options) for _ in range(2)]
    assert heads[0]._recipe is heads[1]._recipe is copy.deepcopy(heads[0])._recipe
    term = Hidden(torch.ones(()))
    heads = [HeadLoss([term], options) for _ in range(2)]
    assert heads[0]._recipe is heads[1]._recipe
    for make in (
        lambda: Changing(1.0),
        lambda: WithTensor(torch.ones(3)),
        lambda: Hidden(torch.rand(())),
    ):
        heads = [HeadLoss([make()], options) for _ in range(12)]
        assert len({head._recipe.name for head in heads}) == 12


def test_a_graph_whose_head_is_gone_says_so():
    problem = Problem(T=T, D=D, V=V, ignored=0)
    args = problem.hidden, problem.weight, None, problem.labels, torch.ones(()).double()
    args = (*args, None, [], "", torch.float64, T, True, "no such head", False, False)
    with pytest.raises(RuntimeError, match="computes no such head, but the HeadLoss"):
        custom_op._head_loss(*args)


def test_a_class_that_is_defined_again_is_another_term():
    """As by a cell of a notebook that runs once more."""

    def define(factor):
        @dataclass(frozen=True)
        class Again(Term):
            weight: float = 1.0
            name: str = "again"

            def loss(self, stats, rows):
                return -factor * stats.logp

        return Again()

    heads = [HeadLoss([define(factor)]) for factor in (1, 2)]
    assert heads[0]._recipe is not heads[1]._recipe


@pytest.mark.parametrize("name", ["shard", "teacher", "sequences", "products_dtype"])
def test_what_an_operation_cannot_hold_does_not_fit(name):
    call = SimpleNamespace(
        shard=None, teacher=None, sequences=None, products_dtype=torch.float32
    )
    assert custom_op.fits(call)
    setattr(call, name, torch.float16 if name == "products_dtype" else object())
    assert not custom_op.fits(call)
