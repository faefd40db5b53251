"""What several tests share: problems, errors, processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan_liger.head_loss import (
    HeadLoss,
    HeadLossOptions,
    VocabShard,
    vocab_parallel,
)
from torchtitan_liger.head_loss.reference import reference_head_loss
from torchtitan_liger.head_loss.terms import plain_terms

ROOT = Path(__file__).resolve().parent.parent
FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"


@dataclass(frozen=True)
class Result:
    """A loss and its gradients, in float64."""

    loss: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor

    def errors(self, truth: Result) -> dict[str, float]:
        """Relative errors in the Frobenius norm."""
        return {
            name: relative_error(getattr(self, name), getattr(truth, name))
            for name in ("loss", "d_hidden", "d_weight")
        }


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    norm = truth.norm().item()
    error = ((value - truth).norm().item() / norm) if norm else value.norm().item()
    return math.inf if math.isnan(error) else error  # `max` may pass over a NaN


@dataclass
class Problem:
    """Inputs of a head, drawn in float64 from a seed.

    `T` tokens of which about a third are ignored, `D` width, `V` vocabulary.
    """

    T: int = 257
    D: int = 48
    V: int = 517
    seed: int = 0
    ignored: float = 0.3
    scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        f64 = {"dtype": torch.float64, "generator": g}
        self.hidden = torch.randn(self.T, self.D, **f64)
        self.weight = torch.randn(self.V, self.D, **f64) * self.scale / self.D**0.5
        self.labels = torch.randint(self.V, (self.T,), generator=g)
        self.labels[torch.rand(self.T, generator=g) < self.ignored] = self.ignore_index

    def rounded(self, dtype: torch.dtype) -> Problem:
        """The same problem with inputs that `dtype` can hold."""
        problem = Problem(**{f: getattr(self, f) for f in ("T", "D", "V")})
        problem.hidden = self.hidden.to(dtype).double()
        problem.weight = self.weight.to(dtype).double()
        problem.labels = self.labels
        return problem

    def run(
        self,
        loss_of: Callable[..., torch.Tensor],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        upstream: float = 1.0,
    ) -> Result:
        """Loss and gradients of `loss_of(hidden, weight, labels)` in `dtype`."""
        hidden = self.hidden.to(device, dtype, copy=True).requires_grad_()
        weight = self.weight.to(device, dtype, copy=True).requires_grad_()
        loss = loss_of(hidden, weight, self.labels.to(device))
        (loss * upstream).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        tensors = (loss.detach(), hidden.grad, weight.grad)
        return Result(*(t.double().cpu() for t in tensors))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def full_logits(
    label_smoothing: float = 0.0, z_loss: float = 0.0, **options: Any
) -> Callable[..., torch.Tensor]:
    """The loss by full logits and autograd, as stock training computes it."""

    def loss_of(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        terms = reference_head_loss(
            hidden, weight, labels, HeadLossOptions(**options), label_smoothing, z_loss
        )
        loss = terms["cross_entropy"].sum()
        if z_loss:
            loss = loss + z_loss * terms["z_loss"].sum()
        return loss

    return loss_of


def plain_head(
    kind: type = HeadLoss,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> Any:
    """A `HeadLoss`, or another `kind`, with the settings of `full_logits`."""
    return kind(plain_terms(label_smoothing, z_loss), HeadLossOptions(**options))


def read_by(head: HeadLoss, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of these row inputs those that the head's terms read."""
    wanted = frozenset().union(*(term.inputs for term in head.terms))
    return {name: x for name, x in rows.items() if name in wanted}


class ThreadGroup:
    """Ranks that are threads of this process, for code that exchanges tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._slots: list[torch.Tensor | None] = [None] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[rank] = x.clone()
        self._barrier.wait()
        everyone = [slot for slot in self._slots if slot is not None]
        self._barrier.wait()
        return everyone

    def run(self, task: Callable[[int], Any]) -> list[Any]:
        """`task(rank)` on all ranks at once; one that fails ends the waiting of others."""

        def guarded(rank: int) -> Any:
            try:
                return task(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


def run_on_shards(
    monkeypatch: pytest.MonkeyPatch,
    head: HeadLoss,
    problem: Problem,
    columns: list[int],
    **call: Any,
) -> Result:
    """As `problem.run`, with the vocabulary on ranks that have so many columns each."""
    group = ThreadGroup(len(columns))
    ranks = threading.local()

    def all_gather(
        out: list[torch.Tensor], x: torch.Tensor, **_: Any
    ) -> SimpleNamespace:
        for to, part in zip(out, group.exchange(ranks.rank, x), strict=True):
            to.copy_(part)
        return SimpleNamespace(wait=lambda: None)

    def all_reduce(x: torch.Tensor, **_: Any) -> None:
        x.copy_(torch.stack(group.exchange(ranks.rank, x)).sum(dim=0))

    fake = SimpleNamespace(
        all_gather=all_gather,
        all_reduce=all_reduce,
        get_world_size=lambda _: group.size,
    )
    monkeypatch.setattr(vocab_parallel, "dist", fake)
    starts = [sum(columns[:rank]) for rank in range(len(columns))]

    def task(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ranks.rank = rank
        mine = slice(starts[rank], starts[rank] + columns[rank])
        shard = VocabShard(starts[rank], problem.V, max(columns), group)
        hidden = problem.hidden.clone().requires_grad_()
        weight = problem.weight[mine].clone().requires_grad_()
        teacher = call.get("teacher")
        here = dict(call)
        if teacher is not None:
            here["teacher"] = replace(teacher, logits=teacher.logits[..., mine])
        out = head(hidden, weight, problem.labels, shard=shard, **here)
        grads = torch.autograd.grad(out.loss, [hidden, weight])
        return out.loss.detach(), *grads

    losses, d_hidden, d_weight = zip(*group.run(task), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return Result(losses[0], sum(d_hidden), torch.cat(d_weight))


def python_env(**changes: str | None) -> dict[str, str]:
    """This environment for a process that trains: without the test suite's settings."""
    env = dict(os.environ)
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TRITON_INTERPRET="0")
    env["PYTHON"] = sys.executable
    for key, value in changes.items():
        if value is None:
            env.pop(key, None)
        else:
            env[key] = value
    return env


def run_command(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end; standard output and error together, as text."""
    return subprocess.run(
        [str(c) for c in command],
        env=env or python_env(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


def run_training(
    *args: str | Path, ngpu: int, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `run_train.sh` on `ngpu` processes."""
    env = python_env(NGPU=str(ngpu))
    return run_command(ROOT / "run_train.sh", *args, env=env, cwd=cwd)
