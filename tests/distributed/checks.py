"""Checks on two processes that are no rows of the matrix.

    torchrun --nproc_per_node 2 -m tests.distributed.checks --output results.json

Each is a function that returns what a test then looks at.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.distributed import matrix
from tests.distributed.matrix import DEVICE, FSDP, REPLICATE, TP, Case
from tests.helpers import Problem, full_logits, relative_error

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # isort: skip
from torchtitan.distributed.context_parallel import (  # isort: skip
    prepare_context_parallel_input,
)
from torchtitan_liger import device, lm_head, preflight  # isort: skip
from torchtitan_liger.trainer import shard_rows  # isort: skip
from torchtitan_liger.head_loss import (  # isort: skip
    Collision,
    CrossEntropy,
    Distillation,
    EntropyBonus,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    ReferenceKL,
    Teacher,
    Unlikelihood,
    VocabShard,
    ZLoss,
    chunked,
    linear_cross_entropy,
    vocab_parallel,
)

RL = "head_loss.policy_gradient.weight=0.5 head_loss.reference_kl.weight=0.1"
LAYOUTS = {
    "FSDP2": Case("FSDP2", 2),
    "FSDP2, bf16": Case("FSDP2, bf16", 2, dtype="bfloat16"),
    "TP": Case("TP", 2, f"{TP}=2"),
    "DDP": Case("DDP", 2, f"{REPLICATE}=2 {FSDP}=1"),
    "TP, terms of the batch": Case("TP, terms of the batch", 2, f"{TP}=2 {RL}"),
}


def communication() -> dict[str, dict[str, dict[str, int]]]:
    """Collectives of one step, by layout and number of chunks in a micro-batch."""
    return {
        name: {
            str(chunks): matrix.run_step(
                LAYOUTS[name], fused=True, chunks=chunks, count=True
            ).collectives
            for chunks in (1, 4)
        }
        for name in ("FSDP2", "TP")
    }


def preflight_passes() -> dict[str, Any]:
    """The line of each layout, and whether it left a trace."""
    lines = {}
    for name, case in LAYOUTS.items():
        trainer = matrix.build_trainer(case, fused=True)
        (model,) = trainer.model_parts
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        state = torch.get_rng_state()
        lines[name] = str(run_preflight(trainer))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
        assert trainer.lm_head.num_fused_calls == 0
        assert model.training
        trainer.close()
    return lines


def run_preflight(trainer: Any) -> preflight.PreflightReport:
    return preflight.check_head(
        trainer.model_parts[0],
        trainer.parallel_dims,
        trainer.post_dataloading_process,
        trainer.train_context,
        trainer.maybe_enable_amp,
        trainer.job_config.training.seq_len,
        trainer.device,
    )


@contextmanager
def weight_read_from_outside() -> Iterator[None]:
    """FSDP's hooks do not run: each rank keeps its own gradient."""

    def call(
        self: lm_head.LMHead, hidden: Any, labels: Any, head_loss: Any, **kwargs: Any
    ) -> Any:
        weight = self.weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        return head_loss(hidden, weight, labels, **kwargs)

    with mock.patch.object(lm_head.LMHead, "__call__", call):
        yield


@contextmanager
def shard_dropped() -> Iterator[None]:
    """The softmax runs over this rank's columns only."""
    real = vocab_parallel.combine

    def mine(names: Any, gathered_RkC: torch.Tensor) -> Any:
        rank = dist.get_rank()
        return real(names, gathered_RkC[rank : rank + 1])

    with mock.patch.object(vocab_parallel, "combine", mine):
        yield


@contextmanager
def hidden_gradient_not_summed() -> Iterator[None]:
    """Each rank takes its columns' share for the whole gradient of the hidden states."""

    def replicate(hidden: Any, *args: Any) -> Any:
        inputs = real(hidden, *args)
        local = hidden.redistribute(placements=[Replicate()]).to_local(
            grad_placements=[Replicate()]
        )
        return local, *inputs[1:]

    real = lm_head._local_inputs
    with mock.patch.object(lm_head, "_local_inputs", replicate):
        yield


@contextmanager
def gradient_scaled() -> Iterator[None]:
    """One percent too much."""
    real = chunked.scale_gradient
    with mock.patch.object(chunked, "scale_gradient", lambda *args: real(*args) * 1.01):
        yield


@contextmanager
def normalizer_of_this_rank() -> Iterator[None]:
    """The mean over this rank's tokens instead of all."""
    real = HeadLoss.__call__

    def call(
        self: HeadLoss, hidden: Any, weight: Any, labels: Any, **kwargs: Any
    ) -> Any:
        kwargs["normalizer"] = (labels != -100).sum()
        return real(self, hidden, weight, labels, **kwargs)

    with mock.patch.object(HeadLoss, "__call__", call):
        yield


PLANTED = (
    ("FSDP2", weight_read_from_outside),
    ("FSDP2", gradient_scaled),
    ("FSDP2, bf16", gradient_scaled),
    ("FSDP2", normalizer_of_this_rank),
    ("DDP", gradient_scaled),
    ("TP", shard_dropped),
    ("TP", hidden_gradient_not_summed),
    ("TP", gradient_scaled),
)


def preflight_catches() -> dict[str, str]:
    """What the preflight says to each planted error."""
    said = {}
    for layout, error in PLANTED:
        trainer = matrix.build_trainer(LAYOUTS[layout], fused=True)
        with error():
            try:
                said[f"{layout}: {error.__name__}"] = str(run_preflight(trainer))
            except preflight.PreflightError as caught:
                said[f"{layout}: {error.__name__}"] = f"caught: {caught}"
        trainer.close()
    return said


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
            options = HeadLossOptions(**settings)
            truth = problem.run(full_logits(options))
            with matrix.chunked_in(3):
                head = HeadLoss(options=options)
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


def terms_of_the_batch() -> dict[str, float]:
    """Largest error of a logged term against one process, by layout."""
    g = torch.Generator().manual_seed(3)
    shape = matrix.NUM_SEQUENCES, matrix.LENGTH
    rows = {
        "advantages": torch.randn(shape, generator=g),
        "old_logp": -7 + torch.randn(shape, generator=g),
        "ref_logp": -7 + torch.randn(shape, generator=g),
        "token_weights": torch.rand(shape, generator=g),
    }
    terms = [CrossEntropy(), PolicyGradient(weight=0.5), ReferenceKL(0.1)]
    errors = {}
    for name, layout in {"FSDP2": "", "TP": f"{TP}=2"}.items():
        case = Case(name, 2, f"{layout} {RL}")
        groups = matrix.data_groups(case)
        data = matrix.sequences(matrix.VOCABULARY, groups, silent_rank=False)
        model = matrix.build_model(case)
        labels = data[:, 1]
        truth = HeadLoss(terms)(
            model(data[:, 0], return_hidden_states=True),
            model.output.weight,
            labels,
            normalizer=(labels != -100).sum(),
            **rows,
        )

        trainer = matrix.build_trainer(case, fused=True)
        logged: dict[str, float] = {}
        metrics = trainer.metrics_processor
        metrics.log = lambda *_, **__: None  # type: ignore[method-assign]
        metrics.logger.log = functools.partial(_update, logged)  # type: ignore[method-assign]
        dims = trainer.parallel_dims
        rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        dealt = {
            n: row.unflatten(0, (case.micro_batches, groups, -1))[:, rank]
            for n, row in rows.items()
        }
        batches = matrix.micro_batches(data, case.micro_batches, rank, groups)
        trainer.step = 1
        trainer.train_step(
            ({**inputs, **{n: row[i] for n, row in dealt.items()}}, labels)
            for i, (inputs, labels) in enumerate(batches)
        )
        trainer.close()
        assert "head_loss/perplexity" not in logged  # tokens have weights
        errors[name] = max(
            relative_error(torch.tensor(logged[f"head_loss/{n}"]), value)
            for n, value in {**truth.terms, **truth.metrics}.items()
        )
    return errors


def _update(logged: dict[str, float], found: dict[str, float], _step: int) -> None:
    logged.update(found)


def context_parallel_rows() -> bool:
    """Whether tensors of the batch are cut as torchtitan cuts the labels."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    labels_BL = torch.arange(3 * 16).view(3, 16)
    row_BLK = torch.stack([labels_BL, -labels_BL], dim=-1)
    alike = []
    for balancer in ("headtail", None):
        inputs, labels, kwargs = prepare_context_parallel_input(
            labels_BL, labels_BL, {}, mesh, torch.device("cpu"), balancer
        )
        rows = shard_rows({"x": labels_BL, "xs": row_BLK}, kwargs["positions"])
        assert labels.shape == (3, 8)
        alike.append(torch.equal(rows["x"], labels))
        alike.append(torch.equal(rows["xs"], torch.stack([inputs, -inputs], dim=-1)))
    return all(alike)


def head_of_dtensors() -> dict[str, float]:
    """Largest errors of `LMHead` under tensor parallelism, by layout of its input."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    problem = Problem(T=36, D=8, V=101, ignored=0.3)
    truth = problem.run(full_logits(HeadLossOptions()))
    labels_BL = problem.labels.view(3, 12)
    errors = {}
    for placement in (Shard(1), Replicate()):
        linear = torch.nn.Linear(8, 101, bias=False, dtype=torch.float64)
        linear.weight.data = problem.weight.clone()
        head = lm_head.LMHead.from_linear(linear)
        head.weight = torch.nn.Parameter(
            torch.distributed.tensor.distribute_tensor(
                linear.weight.data, mesh, [Shard(0)]
            )
        )
        head.head_loss, head.tp_mesh = HeadLoss(), mesh
        hidden = torch.distributed.tensor.distribute_tensor(
            problem.hidden.view(3, 12, 8), mesh, [placement]
        ).requires_grad_()
        loss = head(hidden, labels_BL).loss
        loss.backward()
        assert not isinstance(hidden.grad.placements[0], Partial)
        d_hidden = hidden.grad.full_tensor().view(36, 8)
        errors[str(placement)] = max(
            relative_error(loss.detach(), truth.loss),
            relative_error(d_hidden, truth.d_hidden),
            relative_error(head.weight.grad.full_tensor(), truth.d_weight),
        )
        logits = head(hidden.detach()).full_tensor()
        expected = problem.hidden.view(3, 12, 8) @ problem.weight.T
        errors[f"{placement}, logits"] = relative_error(logits.detach(), expected)
    return errors


def uneven_shards_in_many_chunks() -> float:
    """Largest error where one rank alone would choose other chunks than the other."""
    rank = dist.get_rank()
    problem = Problem(T=3000, D=8, V=1000)
    columns = [slice(0, 600), slice(600, 1000)][rank]
    shard = VocabShard(columns.start, 1000, 600, dist.group.WORLD)
    head = HeadLoss(options=HeadLossOptions(logits_memory_mib=1))
    weight = problem.weight[columns].clone().requires_grad_()
    head(problem.hidden, weight, problem.labels, shard=shard).loss.backward()
    truth = problem.run(full_logits(HeadLossOptions()))
    return relative_error(weight.grad, truth.d_weight[columns])


def head_that_fsdp_did_not_gather() -> str:
    """The head has no FSDP group of its own, and is called outside the model's forward."""
    model = torch.nn.Module()
    model.output = lm_head.LMHead.from_linear(torch.nn.Linear(8, 101, bias=False))
    model.output.head_loss = HeadLoss()
    torch.distributed.fsdp.fully_shard(
        model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,))
    )
    try:
        model.output(torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.long))
    except ValueError as error:
        return str(error)
    return "no error"


def bad_labels() -> str:
    """A label that is no word, under tensor parallelism."""
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


CHECKS: tuple[Callable[[], Any], ...] = (
    sharded_vocabulary,
    sharded_terms,
    function_over_a_group,
    collectives_of_a_call,
    terms_of_the_batch,
    context_parallel_rows,
    head_of_dtensors,
    bad_labels,
    uneven_shards_in_many_chunks,
    head_that_fsdp_did_not_gather,
    communication,
    preflight_passes,
    preflight_catches,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    matrix.register_tiny_models()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    results = {}
    for check in CHECKS:
        if args.only in check.__name__:
            results[check.__name__] = check()
            if os.environ["RANK"] == "0":
                with open(args.output, "w") as file:
                    json.dump(results, file, indent=1)
    dist.destroy_process_group()
    device.let_gloo_finish()


if __name__ == "__main__":
    main()
