"""The engine over the two shards of a vocabulary, without a model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from tests.distributed import matrix
from tests.helpers import Problem, full_logits, plain_head, relative_error

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from torchtitan_liger.head_loss import (  # isort: skip
    Collision,
    CrossEntropy,
    Distillation,
    EntropyBonus,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Teacher,
    Unlikelihood,
    VocabShard,
    ZLoss,
    linear_cross_entropy,
    vocab_parallel,
)


def sharded_vocabulary() -> dict[str, float]:
    """Largest errors of a head sharded over the ranks, by how and in which setting."""
    rank, size = dist.get_rank(), dist.get_world_size()
    errors = {}
    problem = Problem(T=37, D=8, V=101)
    problem.labels[:4] = torch.tensor([0, 60, 61, 100])  # edges of shards
    for cuts in ([0, 61, 101], [0, 101, 101], [0, 0, 101], [0, 1, 101]):
        columns = slice(cuts[rank], cuts[rank + 1])
        widest = max(cuts[1], 101 - cuts[1])
        shard = VocabShard(cuts[rank], 101, widest, dist.group.WORLD)
        for settings in (
            {},
            {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 2.0},
        ):
            truth = problem.run(full_logits(**settings))
            with matrix.chunked_in(3):
                head = plain_head(**settings)
                weight = problem.weight[columns].clone().requires_grad_()
                hidden = problem.hidden.clone().requires_grad_()
                loss = head(hidden, weight, problem.labels, shard=shard).loss
                loss.backward()
            d_hidden = hidden.grad.clone()
            dist.all_reduce(d_hidden)
            mine = torch.tensor(
                [
                    relative_error(loss.detach(), truth.loss),
                    relative_error(d_hidden, truth.d_hidden),
                    relative_error(weight.grad, truth.d_weight[columns]),
                ]
            )
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            errors[f"{cuts} {sorted(settings)}"] = mine.max().item()
    assert size == 2
    return errors


def sharded_terms() -> float:
    """Largest error of a mixture of terms that needs every statistic."""
    rank = dist.get_rank()
    problem = Problem(T=37, D=8, V=101)
    terms = [
        CrossEntropy(0.1),
        ZLoss(0.1),
        EntropyBonus(0.3),
        PolicyGradient("reinforce"),
    ]
    options = HeadLossOptions(logit_softcap=3.0, temperature=0.8)
    rows = {"advantages": torch.linspace(-1, 1, 37).double()}
    whole = problem.run(lambda *args: HeadLoss(terms, options)(*args, **rows).loss)
    errors = []
    for cuts in ([0, 61, 101], [0, 101, 101], [0, 0, 101]):
        columns = slice(cuts[rank], cuts[rank + 1])
        widest = max(cuts[1], 101 - cuts[1])
        shard = VocabShard(cuts[rank], 101, widest, dist.group.WORLD)
        weight = problem.weight[columns].clone().requires_grad_()
        hidden = problem.hidden.clone().requires_grad_()
        with matrix.chunked_in(3):
            out = HeadLoss(terms, options)(
                hidden, weight, problem.labels, shard=shard, **rows
            )
            out.loss.backward()
        dist.all_reduce(hidden.grad)
        errors += [
            relative_error(out.loss.detach(), whole.loss),
            relative_error(hidden.grad, whole.d_hidden),
            relative_error(weight.grad, whole.d_weight[columns]),
        ]
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def resized_weight() -> str:
    """What is said of a weight that has another size than at its first call."""
    group, problem = dist.group.WORLD, Problem(T=4, D=8, V=22)
    weight = problem.weight[:11].clone()
    args = problem.hidden, weight, problem.labels
    linear_cross_entropy(*args, tp_group=group)
    weight.data = problem.weight[:7].clone()
    try:
        linear_cross_entropy(*args, tp_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def function_over_a_group() -> dict[str, float]:
    """Largest errors of `linear_cross_entropy` over a group, by shards and settings."""
    rank, group = dist.get_rank(), dist.group.WORLD
    problem = Problem(T=37, D=8, V=101)
    upstream = torch.linspace(-1, 1, 37).double()
    weights = torch.linspace(0.1, 2, 37).double()
    errors = {}
    # Rank 0 has 61 columns twice, and rank 1 different ones.
    for cuts in ([0, 61, 101], [0, 61, 88], [0, 0, 101]):
        columns = slice(cuts[rank], cuts[rank + 1])
        problem = Problem(T=37, D=8, V=cuts[-1])
        weight = problem.weight[columns].clone().requires_grad_()
        # By which all ranks cut the same chunks.
        widest = vocab_parallel.shard_of(weight, group).widest
        assert widest == max(b - a for a, b in itertools.pairwise(cuts))
        for settings in (
            {},
            {"label_smoothing": 0.1, "z_loss": 0.1, "token_weights": weights},
            {"reduction": "none", "logit_softcap": 2.0},
            {"compiled": True, "reduction": "sum"},
        ):
            kwargs = dict(settings)
            loss_of = linear_cross_entropy
            if kwargs.pop("compiled", False):
                loss_of = torch.compile(loss_of, backend="aot_eager")

            def total(*args: Any, function: Any, **kwargs: Any) -> torch.Tensor:
                loss = function(*args, **kwargs)
                return (loss * upstream).sum() if loss.ndim else loss

            truth = problem.run(
                functools.partial(total, function=linear_cross_entropy, **kwargs)
            )
            hidden = problem.hidden.clone().requires_grad_()
            weight.grad = None
            with matrix.chunked_in(3):
                loss = total(
                    *(hidden, weight, problem.labels),
                    function=loss_of,
                    tp_group=group,
                    **kwargs,
                )
                loss.backward()
            worst = torch.tensor(
                [
                    relative_error(loss.detach(), truth.loss),
                    relative_error(hidden.grad, truth.d_hidden),
                    relative_error(weight.grad, truth.d_weight[columns]),
                ]
            )
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            errors[f"{cuts} {sorted(settings)}"] = worst.max().item()
    return errors


def collectives_of_a_call() -> dict[str, dict[str, int]]:
    """Forward collectives of a call in four chunks, by its terms and by kind."""
    rank = dist.get_rank()
    problem = Problem(T=37, D=8, V=101, ignored=0)
    columns = [slice(0, 61), slice(61, 101)][rank]
    weight = problem.weight[columns].clone().requires_grad_()
    hidden = problem.hidden.clone().requires_grad_()
    shard = VocabShard(columns.start, 101, 61, dist.group.WORLD)
    rows = {
        "advantages": torch.linspace(-1, 1, 37).double(),
        "old_logp": torch.linspace(-6, -4, 37).double(),
        "candidates": torch.arange(74).view(37, 2),
    }
    teacher = Teacher(logits=torch.randn(37, 101).double()[:, columns])
    mixture = [
        CrossEntropy(0.1),
        ZLoss(0.1),
        EntropyBonus(0.3),
        PolicyGradient(),
        Collision(0.1),
        Unlikelihood(0.1),
    ]
    calls: dict[str, Callable[[], Any]] = {
        "cross entropy": lambda: HeadLoss()(
            hidden, weight, problem.labels, shard=shard
        ),
        "mixture": lambda: HeadLoss(mixture)(
            hidden, weight, problem.labels, shard=shard, **rows
        ),
        "mixture, reverse KL": lambda: HeadLoss([*mixture, Distillation("reverse_kl")])(
            hidden, weight, problem.labels, shard=shard, teacher=teacher, **rows
        ),
        "mixture, JSD": lambda: HeadLoss([*mixture, Distillation("jsd")])(
            hidden, weight, problem.labels, shard=shard, teacher=teacher, **rows
        ),
        "function": lambda: linear_cross_entropy(
            hidden, weight, problem.labels, tp_group=dist.group.WORLD
        ),
        "losses of tokens": lambda: linear_cross_entropy(
            hidden,
            weight,
            problem.labels,
            reduction="none",
            tp_group=dist.group.WORLD,
        ),
    }
    linear_cross_entropy(hidden, weight, problem.labels, tp_group=dist.group.WORLD)
    counts = {}
    for name, call in calls.items():
        with matrix.chunked_in(4), matrix.Collectives() as seen:
            call()
        counts[name] = dict(seen.counts)
    return counts


def uneven_shards_in_many_chunks() -> float:
    """Largest error where one rank alone would choose other chunks than the other."""
    rank = dist.get_rank()
    problem = Problem(T=3000, D=8, V=1000)
    columns = [slice(0, 600), slice(600, 1000)][rank]
    shard = VocabShard(columns.start, 1000, 600, dist.group.WORLD)
    head = HeadLoss(options=HeadLossOptions(logits_memory_mib=1))
    weight = problem.weight[columns].clone().requires_grad_()
    head(problem.hidden, weight, problem.labels, shard=shard).loss.backward()
    truth = problem.run(full_logits())
    return relative_error(weight.grad, truth.d_weight[columns])


def bad_labels() -> str:
    """A label that is no token id, under tensor parallelism."""
    problem = Problem(T=37, D=8, V=101)
    problem.labels[5] = 101
    rank = dist.get_rank()
    shard = VocabShard([0, 51][rank], 101, 51, dist.group.WORLD)
    weight = problem.weight[[slice(0, 51), slice(51, 101)][rank]]
    try:
        HeadLoss()(problem.hidden, weight, problem.labels, shard=shard)
    except ValueError as error:
        return str(error)
    return "no error"
