"""Checks on two processes that are no rows of the matrix.

    torchrun --nproc_per_node 2 -m tests.distributed.checks --output results.json

Each is a function that returns what a test then looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from tests.distributed import matrix, preflight_checks, vocabulary_checks
from tests.distributed.layouts import LAYOUTS, RL, TP, Case
from tests.distributed.matrix import DEVICE
from tests.helpers import Problem, full_logits, relative_error

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch.distributed.fsdp import FSDPModule  # isort: skip
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # isort: skip
from torchtitan.distributed.context_parallel import (  # isort: skip
    prepare_context_parallel_input,
)
from torchtitan_liger import device, lm_head  # isort: skip
from torchtitan_liger.trainer import shard_rows  # isort: skip
from torchtitan_liger.head_loss import (  # isort: skip
    CrossEntropy,
    HeadLoss,
    PolicyGradient,
    Preference,
    ReferenceKL,
    SequencePolicyGradient,
    UnpairedPreference,
)


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


def terms_of_the_batch() -> dict[str, float]:
    """Largest error of a logged term against one process, by layout."""
    g = torch.Generator().manual_seed(3)
    shape = matrix.NUM_SEQUENCES, matrix.LENGTH
    rows = {
        "advantages": torch.randn(shape, generator=g),
        "old_logp": -7 + torch.randn(shape, generator=g),
        "ref_logp": -7 + torch.randn(shape, generator=g),
        "token_weights": torch.rand(shape, generator=g),
        "desirable": (torch.arange(shape[0]) % 2 > 0)[:, None].expand(shape),
        "reference_point": torch.zeros(shape),
    }
    terms = [
        CrossEntropy(),
        PolicyGradient(weight=0.5),
        ReferenceKL(0.1),
        SequencePolicyGradient(weight=0.2),
        Preference(weight=0.3),
        UnpairedPreference(weight=0.4),
    ]
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
        expected = truth.terms | truth.metrics
        expected["perplexity"] = expected.pop("nll").exp()
        errors[name] = max(
            relative_error(torch.tensor(logged[f"head_loss/{n}"]), value)
            for n, value in expected.items()
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
        rows = {"x": labels_BL, "xs": row_BLK}
        rows = shard_rows(rows, labels_BL.shape, kwargs["positions"])
        assert labels.shape == (3, 8)
        alike.append(torch.equal(rows["x"], labels))
        alike.append(torch.equal(rows["xs"], torch.stack([inputs, -inputs], dim=-1)))
    return all(alike)


def head_of_dtensors() -> dict[str, float]:
    """Largest errors of `LMHead` under tensor parallelism, by layout of its input."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    problem = Problem(T=36, D=8, V=101, ignored=0.3)
    truth = problem.run(full_logits())
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


def two_batches_and_one_backward_pass() -> float:
    """Largest error of a gradient against a backward pass after each batch."""
    trainer = matrix.build_trainer(LAYOUTS["FSDP2"], fused=True)
    (model,) = trainer.model_parts
    g = torch.Generator().manual_seed(dist.get_rank())
    batches = torch.randint(matrix.VOCABULARY, (2, 2, 1, 16), generator=g).to(DEVICE)

    def losses() -> Iterator[torch.Tensor]:
        for inputs, labels in batches:
            hidden = model(inputs, return_hidden_states=True)
            yield model.output(hidden, labels, normalizer=32).loss

    def gradients() -> dict[str, torch.Tensor]:
        found = matrix.gradients(model, LAYOUTS["FSDP2"])
        model.zero_grad()
        return found

    for loss in losses():
        loss.backward()
    expected = gradients()
    sum(losses()).backward()  # type: ignore[union-attr]
    found = gradients()
    trainer.close()
    return max(relative_error(found[name], expected[name]) for name in expected)


def a_backward_pass_that_fails() -> float | None:
    """Largest error of the next pass's gradient; None where FSDP cannot go on at all."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        return None
    case = LAYOUTS["FSDP2"]
    trainer = matrix.build_trainer(case, fused=True)
    (model,) = trainer.model_parts
    inputs, labels = torch.arange(2 * 16, device=DEVICE).view(2, 1, 16)

    def step() -> None:
        hidden = model(inputs, return_hidden_states=True)
        model.output(hidden, labels, normalizer=16).loss.backward()

    def failing(*_: Any, **__: Any) -> torch.Tensor:
        def fail(grad: torch.Tensor) -> None:
            raise InterruptedError

        def watch(_module: Any, _args: Any, output: torch.Tensor) -> None:
            output.register_hook(fail)

        handle = model.layers["0"].register_forward_hook(watch)
        try:
            step()
        finally:
            handle.remove()
        raise AssertionError("it did not fail")

    step()
    expected = matrix.gradients(model, case)
    model.zero_grad()
    trainer.forward_backward_step = failing  # type: ignore[method-assign]
    groups = matrix.data_groups(case)
    data = matrix.sequences(matrix.VOCABULARY, groups, silent_rank=False)
    batches = matrix.micro_batches(data, case.micro_batches, dist.get_rank(), groups)
    with contextlib.suppress(InterruptedError):
        trainer.train_step(trainer.batch_generator(batches))
    model.reset_iter_state()
    model.zero_grad()
    step()
    found = matrix.gradients(model, case)
    trainer.close()
    return max(relative_error(found[name], expected[name]) for name in expected)


def weights_changed_by_a_data_pipeline() -> dict[str, Any]:
    """By which factor the last norm's grew, and whether it was gathered by each batch."""
    case = LAYOUTS["FSDP2"]
    trainer = matrix.build_trainer(case, fused=True)
    (model,) = trainer.model_parts
    before = matrix.full(model.norm.weight)
    groups = matrix.data_groups(case)
    data = matrix.sequences(matrix.VOCABULARY, groups, silent_rank=False)
    gathered = []

    def pipeline() -> Iterator[matrix.Batch]:
        for _ in range(2):
            yield from doubling(
                matrix.micro_batches(data, case.micro_batches, dist.get_rank(), groups)
            )

    def doubling(batches: Iterator[matrix.Batch]) -> Iterator[matrix.Batch]:
        for batch in batches:
            with torch.no_grad():
                model.norm.weight.mul_(2)
            yield batch

    def watched(batches: Iterator[matrix.Batch]) -> Iterator[matrix.Batch]:
        for batch in batches:
            gathered.append(not isinstance(model.norm.weight, DTensor))
            yield batch

    trainer.metrics_processor.log = lambda *_, **__: None  # type: ignore[method-assign]
    batches = watched(trainer.batch_generator(pipeline()))
    for trainer.step in (1, 2):
        trainer.train_step(batches)
    factor = matrix.full(model.norm.weight) / before

    def failing(batches: Iterator[matrix.Batch]) -> Iterator[matrix.Batch]:
        yield from itertools.islice(batches, case.micro_batches - 1)
        next(batches)
        assert not isinstance(model.norm.weight, DTensor)
        raise InterruptedError

    try:
        trainer.train_step(failing(trainer.batch_generator(pipeline())))
    except InterruptedError:
        sharded = isinstance(model.norm.weight, DTensor)
    trainer.close()
    return {
        "factor": [factor.min().item(), factor.max().item()],
        "gathered": gathered,
        "sharded after a failure": sharded,
    }


def validation() -> dict[str, list[float]]:
    """What each layout logs as its validation loss, and what one process has.

    Labels are ignored in other numbers in each batch and on each rank, but for the last
    layout, whose validation is torchtitan's own: its mean over batches is another.
    """
    found = {}
    for name, layout, ignored in (
        ("FSDP2", "", True),
        ("TP", f"{TP}=2", True),
        ("TP, with logits", f"{TP}=2 liger_kernel.no-validation", False),
    ):
        options = (
            f"{layout} validation.enable validation.dataset=stdlib_validation "
            f"validation.steps=9 validation.seq_len={matrix.LENGTH}"
        )
        case = Case(name, 2, options)
        groups = matrix.data_groups(case)
        data = matrix.sequences(matrix.VOCABULARY, groups, groups > 1)
        if not ignored:
            data[:, 1] = data[:, 0]
        logits = matrix.build_model(case)(data[:, 0]).detach()
        truth = F.cross_entropy(logits.flatten(0, 1).double(), data[:, 1].flatten())
        trainer = matrix.build_trainer(case, fused=True)
        rank = dist.get_rank() if groups > 1 else 0
        validator = trainer.validator
        validator.validation_dataloader = list(
            matrix.micro_batches(data, case.micro_batches, rank, groups)
        )
        logged: dict[str, Any] = {}
        validator.metrics_processor.log_validation = logged.update
        for trainer.step in (1, 2):  # and again, after itself
            validator.validate(trainer.model_parts, step=trainer.step)
        found[name] = [float(logged["loss"]), truth.item()]
        trainer.close()
    return found


CHECKS: tuple[Callable[[], Any], ...] = (
    vocabulary_checks.sharded_vocabulary,
    vocabulary_checks.sharded_terms,
    vocabulary_checks.function_over_a_group,
    vocabulary_checks.resized_weight,
    vocabulary_checks.collectives_of_a_call,
    terms_of_the_batch,
    context_parallel_rows,
    head_of_dtensors,
    vocabulary_checks.bad_labels,
    vocabulary_checks.uneven_shards_in_many_chunks,
    head_that_fsdp_did_not_gather,
    communication,
    two_batches_and_one_backward_pass,
    a_backward_pass_that_fails,
    weights_changed_by_a_data_pipeline,
    validation,
    preflight_checks.preflight_passes,
    preflight_checks.preflight_of_frozen_parts,
    preflight_checks.preflight_compiles_nothing,
    preflight_checks.preflight_of_changed_logits,
    preflight_checks.preflight_catches,
    preflight_checks.ranks_of_two_minds,
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
