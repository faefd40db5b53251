"""What scripts/bench_head_loss.py --tp measures: a vocabulary over several processes.

Each process of torchrun draws the same inputs and keeps its rows of the weight. The
gradient of the hidden states is added up over the processes in the backward pass, as
`linear_cross_entropy(tp_group=)` does it. One process runs the engine without shards.
"""

from __future__ import annotations

import csv
import math
import os
import random
import statistics
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from head_loss_cases import Case, autograd_case, engine_loss
from head_loss_measure import (
    drop_gradients,
    peak_memory,
    relative_error,
    release,
    time_once,
)
from head_loss_mixtures import MIXTURES, Inputs, Mixture, Problem, true_gradients
from head_loss_tables import (
    QUANTITIES,
    Row,
    explanation,
    figure,
    table_of,
    write_csv,
)
from provenance import heading

from torchtitan_liger.device import let_gloo_finish
from torchtitan_liger.head_loss import HeadLoss, Teacher, VocabShard
from torchtitan_liger.head_loss.vocab_parallel import replicated, shard_of

PROBLEM = ("tokens", "dim", "vocab", "dtype", "device", "ignored")
KEY = (*PROBLEM, "mixture", "shards", "tp")
COLUMNS = (
    *KEY,
    *("ms", "ms_min", "ms_max", "ratio", "extra_bytes", "extra_bytes_min"),
    *("tokens_per_chunk", "chunks", "collectives", "collectives_per_chunk"),
    "collectives_backward",
    *(f"{q}_error" for q in QUANTITIES),
    *(f"{q}_error_ratio" for q in QUANTITIES),
)
EXPLANATION = """
A rank's time is the median of {repeats} passes, forward and backward, after {warmup} that do
not count; all ranks begin a pass together, and the losses take turns, in a new order each
round. On a GPU a pass is the mean of {passes}, right after {settling} seconds of the same loss. The
table has the
median over the ranks, and in brackets the least and the most. Extra memory is the most that a
rank takes above its inputs, its gradients included, as told by {memory}.
Collectives are those of the forward pass, by chunk of tokens; the backward pass adds up the
gradient of the hidden states. Errors are relative, in the Frobenius norm, against full
logits in float64: those of the worst rank, but for the gradient of the weight, whose rows on
all ranks are one matrix. In parentheses: divided by the figure with TP 1, in the time's case
as well. Ranks that share a GPU, which NCCL refuses and gloo does not, have no times.
"""


def run(args: Namespace) -> int:
    with process_group(args.device) as group:
        rows: list[Row] = []
        for ignored in args.ignored:
            problem = Problem(
                *(args.tokens, args.dim, args.vocab, args.dtype, args.device),
                ignored=ignored,
                seed=args.seed,
            )
            rows += measure(problem, args, group)
        if group is None or dist.get_rank(group) == 0:
            write(rows, args)
    return 0


@contextmanager
def process_group(device: str) -> Iterator[dist.ProcessGroup | None]:
    """All processes that torchrun has started; None for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    backend, device_id = "gloo", None
    if device == "cuda":
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        if not shares_a_gpu(device):
            backend, device_id = "nccl", torch.device("cuda", rank)
    patience = timedelta(minutes=5)
    dist.init_process_group(backend, device_id=device_id, timeout=patience)
    yield dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()  # not after an error: others may wait for this rank
    let_gloo_finish()


def shares_a_gpu(device: str) -> bool:
    """Whether torchrun has started more processes here than there are GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return device == "cuda" and processes > torch.cuda.device_count()


def columns_of(vocab: int, rank: int, size: int, uneven: bool) -> slice:
    """The columns of the vocabulary that a rank holds."""
    parts = [number + 1 if uneven else 1 for number in range(size)]
    ends = [vocab * sum(parts[:number]) // sum(parts) for number in range(size + 1)]
    return slice(ends[rank], ends[rank + 1])


def measure(
    problem: Problem, args: Namespace, group: dist.ProcessGroup | None
) -> list[Row]:
    """A row for each mixture, the same on all ranks. An error ends the run."""
    rank, size = 0, 1
    if group is not None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank == 0:
        print(f"{problem}, TP {size} ...", flush=True)
    columns = columns_of(problem.vocab, rank, size, args.uneven)
    whole = problem.inputs(with_teacher=True)
    mine = rows_of_weight(whole, columns)
    shard = None
    if group is not None:
        shard = shard_of(mine.weight_VD, group)
    shape = {name: getattr(problem, name) for name in PROBLEM} | {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "shards": "uneven" if args.uneven and size > 1 else "even",
        "tp": size,
    }
    rows, cases = [], []
    for mixture in MIXTURES:
        truth = true_gradients(mixture, whole)
        truth["d_weight"] = truth["d_weight"][columns].clone()
        case = sharded_case(mixture, shard)
        figures = gathered(examine(case, mine, truth, shard), group)
        row = dict.fromkeys(COLUMNS) | shape | {"mixture": mixture.name}
        rows.append(row | together(figures))
        cases.append(case)
        del truth
    if shares_a_gpu(problem.device):
        return rows
    medians = gathered(take_times(cases, mine, args, group), group)
    for row, *ms in zip(rows, *medians, strict=True):
        row |= {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms)}
    return rows


def rows_of_weight(whole: Inputs, columns: slice) -> Inputs:
    """The inputs of the rank that holds these columns of the vocabulary."""
    teacher = whole.teacher
    assert teacher is not None
    assert teacher.weight is not None
    return whole._replace(
        weight_VD=whole.weight_VD.detach()[columns].clone().requires_grad_(),
        teacher=Teacher(hidden=teacher.hidden, weight=teacher.weight[columns].clone()),
    )


def sharded_case(mixture: Mixture, shard: VocabShard | None) -> Case:
    case = autograd_case(mixture.name, partial(sharded_loss, mixture, shard), mixture)

    def prepare(inputs: Inputs) -> Any:
        if shard is not None:
            dist.barrier(group=shard.group)  # a clock must not run while others come
        return case.prepare(inputs)

    return Case(case.name, prepare, mixture)


def sharded_loss(
    mixture: Mixture, shard: VocabShard | None, inputs: Inputs
) -> torch.Tensor:
    if shard is not None:
        hidden_TD = replicated(inputs.hidden_TD, shard.group)
        inputs = inputs._replace(hidden_TD=hidden_TD)
    teacher = inputs.teacher if mixture.has_teacher else None
    return engine_loss(HeadLoss(mixture.terms), inputs, shard=shard, teacher=teacher)


def examine(
    case: Case,
    mine: Inputs,
    truth: dict[str, torch.Tensor],
    shard: VocabShard | None,
) -> Row:
    """What takes no clock, on this rank."""
    hidden_TD, weight_VD = mine.hidden_TD, mine.weight_VD
    release(mine)
    plan = HeadLoss(case.mixture.terms).plan(
        mine.num_labeled,
        hidden_TD.shape[1],
        len(weight_VD) if shard is None else shard.widest,
        hidden_TD.dtype,
        hidden_TD.device.type,
        sharded=shard is not None,
    )
    forward, backward = collectives(case.mixture, shard, mine)  # compiles, tunes
    drop_gradients(mine)
    extra_bytes, loss = peak_memory(case.prepare(mine), hidden_TD.device)
    values = zip(QUANTITIES, (loss, hidden_TD.grad, weight_VD.grad), strict=True)
    return {
        "tokens_per_chunk": plan.tokens_per_chunk,
        "chunks": plan.num_chunks,
        "collectives": forward,
        "collectives_per_chunk": forward / plan.num_chunks,
        "collectives_backward": backward,
        "extra_bytes": extra_bytes,
        "d_weight_norm": truth["d_weight"].norm().item(),
    } | {f"{name}_error": relative_error(x, truth[name]) for name, x in values}


def together(figures: list[Row]) -> Row:
    """What all ranks have found out, in one row."""
    norms = [each.pop("d_weight_norm") for each in figures]
    gaps = [e["d_weight_error"] * n for e, n in zip(figures, norms, strict=True)]
    extra_bytes = [each["extra_bytes"] for each in figures]
    return figures[0] | {
        "loss_error": max(each["loss_error"] for each in figures),
        "d_hidden_error": max(each["d_hidden_error"] for each in figures),
        "d_weight_error": math.hypot(*gaps) / math.hypot(*norms),
        "extra_bytes": max(extra_bytes),
        "extra_bytes_min": min(extra_bytes),
    }


def collectives(
    mixture: Mixture, shard: VocabShard | None, inputs: Inputs
) -> tuple[int, int]:
    """How many one pass asks for, forward and backward."""
    asked: list[str] = []

    def counted(name: str) -> Any:
        collective = getattr(dist, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return collective(*args, **kwargs)

        return patch.object(dist, name, wrapper)  # no Mock: it would keep the group

    with counted("all_gather"), counted("all_reduce"):
        loss = sharded_loss(mixture, shard, inputs)
        forward = len(asked)
        loss.backward()
        return forward, len(asked) - forward


def gathered(figures: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The figures of all ranks."""
    if group is None:
        return [figures]
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, figures, group=group)
    return everywhere


def take_times(
    cases: list[Case], mine: Inputs, args: Namespace, group: dist.ProcessGroup | None
) -> list[float]:
    """This rank's median of each case, in ms; the order is the same on all ranks."""

    def first_ranks(answer: bool) -> bool:
        return gathered(answer, group)[0]

    release(mine)
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    order = random.Random(args.seed)
    for number in range(args.warmup + args.repeats):
        for case in order.sample(cases, len(cases)):
            taken = time_once(case, mine, first_ranks)
            seconds[case] += [taken] * (number >= args.warmup)
    return [1e3 * statistics.median(seconds[case]) for case in cases]


def write(rows: list[Row], args: Namespace) -> None:
    """Also prints the table."""
    earlier = ""
    if args.append and args.output.exists():
        earlier, _, _ = args.output.read_text().partition("Tokens ")
        new = {tuple(row[name] for name in KEY) for row in rows}
        old = read_csv(args.output.with_suffix(".csv"))
        rows += [row for row in old if tuple(row[name] for name in KEY) not in new]
    order = [mixture.name for mixture in MIXTURES]
    rows.sort(
        key=lambda row: (
            *(row[name] for name in PROBLEM),
            order.index(row["mixture"]),
            row["shards"],
            row["tp"],
        )
    )
    add_ratios(rows)
    table = markdown(rows)
    print(table)
    if not args.output:
        return
    shape = ", ".join(
        f"{name} {' '.join(str(value) for value in dict.fromkeys(r[name] for r in rows))}"
        for name in PROBLEM
    )
    note = f"{shape.capitalize()}.\n\n{explanation(EXPLANATION, args)}"
    args.output.write_text(f"{earlier}{heading()}\n{note}\n\n{table}")
    write_csv(rows, COLUMNS, args.output)


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return [
            {name: parsed(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def parsed(text: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def add_ratios(rows: list[Row]) -> None:
    """To the row of one process for the same loss of the same problem."""
    same = (*PROBLEM, "mixture")
    single = {tuple(row[name] for name in same): row for row in rows if row["tp"] == 1}
    pairs = {"ms": "ratio"} | {f"{q}_error": f"{q}_error_ratio" for q in QUANTITIES}
    for row in rows:
        base = single.get(tuple(row[name] for name in same), {})
        for name, ratio in pairs.items():
            known = base.get(name) and row[name] is not None
            row[ratio] = row[name] / base[name] if known else None


def markdown(rows: list[Row]) -> str:
    columns = {"loss": [row["mixture"] for row in rows]}
    for name in ("ignored", "shards"):
        if len({row[name] for row in rows}) > 1:
            columns[name] = [str(row[name]) for row in rows]
    columns["TP"] = [str(row["tp"]) for row in rows]
    columns["ms"] = [time_of(row) for row in rows]
    columns["extra GiB"] = [f"{row['extra_bytes'] / 2**30:.3f}" for row in rows]
    columns["chunks"] = [f"{row['chunks']} x {row['tokens_per_chunk']}" for row in rows]
    columns["collectives per chunk"] = [
        f"{row['collectives_per_chunk']:g}" for row in rows
    ]
    columns["in backward"] = [str(row["collectives_backward"]) for row in rows]
    for name in QUANTITIES:
        columns[f"error of {name}"] = [
            f"{row[f'{name}_error']:.2e}"
            + figure(row[f"{name}_error_ratio"], " ({:.2f})")
            for row in rows
        ]
    return table_of(columns)


def time_of(row: Row) -> str:
    if row["ms"] is None:
        return ""
    spread = f" [{row['ms_min']:.2f}, {row['ms_max']:.2f}]" if row["tp"] > 1 else ""
    return f"{row['ms']:.2f}{spread}" + figure(row["ratio"], " ({:.3f})")
