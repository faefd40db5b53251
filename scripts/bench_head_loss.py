#!/usr/bin/env python3
"""Time, memory and errors of every implementation of an LM head's loss, in one table.

    python scripts/bench_head_loss.py --output benchmarks/head_loss.md
    python scripts/bench_head_loss.py --mixtures --output benchmarks/mixtures.md
    python scripts/bench_head_loss.py --ignored 0 0.5 0.9 --impl floor stock chunked
    python scripts/bench_head_loss.py --grow tokens --output benchmarks/growth.md

Each row is one forward and backward pass, from hidden states to the gradients of hidden
states and weight, on the same random inputs. The Markdown table has a CSV with all
figures beside it, and with --grow a picture. What is measured: head_loss_cases.py.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from head_loss_cases import (
    FAMILIES,
    Case,
    Inputs,
    Problem,
    Step,
    Unavailable,
    mixture_cases,
    true_gradients,
    unfused,
)
from provenance import heading, installed
from torch.profiler import ProfilerActivity, profile

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
SIZES = ("tokens", "dim", "vocab", "dtype", "repeats", "warmup")
DEFAULTS = {
    "cuda": (16384, 4096, 128256, torch.bfloat16, 20, 3),
    "cpu": (4096, 512, 32768, torch.float32, 5, 1),
}
GROWTH = {
    "tokens": [2**n for n in range(11, 18)],
    "vocab": [2**n for n in range(14, 19)],
}
NOT_GROWN = ("floor", "liger-raw")  # too much memory; too many lines in one picture
QUANTITIES = ("loss", "d_hidden", "d_weight")
COLUMNS = (
    *("tokens", "dim", "vocab", "dtype", "device", "ignored", "implementation"),
    *("ms", "ms_min", "ms_max", "us_per_token", "ratio", "extra_bytes"),
    *(f"{q}_error" for q in QUANTITIES),
    *(f"{q}_error_ratio" for q in QUANTITIES),
    "result",
)
EXPLANATION = """
Time is the median of {repeats} passes, forward and backward, after {warmup} that do not count;
the implementations take turns, in a new order each round. The ratio is to the first row for the
same sizes and labels. Extra memory is the peak above the inputs, both gradients included, as told by
{memory}. Errors are relative, in the Frobenius norm, against full logits in float64; in
parentheses, divided by the error of full logits in plain torch in the inputs' dtype. A loss
is one number, whose error can be small by chance.
"""
MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "torch's profiler: what torch's allocator has given out",
}
Row = dict[str, Any]


def main() -> int:
    args = parse_args()
    first = Problem(
        args.tokens, args.dim, args.vocab, args.dtype, args.device, seed=args.seed
    )
    sizes = [{args.grow: size} for size in args.sizes] if args.grow else [{}]
    rows: list[Row] = []
    for size, ignored in itertools.product(sizes, args.ignored):
        problem = replace(first, ignored=ignored, **size)
        print(f"{problem} ...", flush=True)
        cases = list(cases_of(args))
        rows += measure(problem, cases, args)
        write(rows, cases[0].name, args)  # now: a later size may be the last one
    print(markdown(rows, cases[0].name))
    return int(all(row["result"] != "ok" for row in rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--impl", choices=FAMILIES, nargs="+", help="default: all")
    add("--mixtures", action="store_true", help="mixtures of losses instead")
    add("--ignored", type=float, nargs="+", default=[0.0], help="shares of the labels")
    add("--grow", choices=GROWTH, help="one size after the other, without errors")
    add("--sizes", type=int, nargs="+", help="for --grow")
    add("--device", choices=DEFAULTS, help="default: cuda where there is one")
    add("--tokens", type=int)
    add("--dim", type=int)
    add("--vocab", type=int)
    add("--dtype", choices=DTYPES)
    add("--budgets", type=int, nargs="+", default=[], help="MiB: more rows of chunked")
    sums = ("float32", "bfloat16")
    add("--acc-dtypes", choices=sums, nargs="+", default=sums[:1], help="of chunked")
    add("--liger-consts", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    add("--repeats", type=int)
    add("--warmup", type=int, help="passes before those that count")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="Markdown file; CSV and picture beside it")
    args = parser.parse_args()
    if args.mixtures and args.impl:
        parser.error("--mixtures has its own rows: leave out --impl")
    if args.sizes and not args.grow:
        parser.error("--sizes needs --grow tokens or --grow vocab")
    if not all(0 <= share < 1 for share in args.ignored):
        parser.error(f"--ignored must be in [0, 1), got {args.ignored}")
    if args.grow and len(args.ignored) > 1:
        parser.error("--grow changes one thing: give --ignored one share")
    if args.grow and args.output:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            parser.error("--grow draws a picture: pip install matplotlib")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = DTYPES.get(args.dtype)
    args.acc_dtypes = [DTYPES[name] for name in args.acc_dtypes]
    for name, value in zip(SIZES, DEFAULTS[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sizes = args.sizes or GROWTH.get(args.grow)
    skipped = NOT_GROWN if args.grow else ()
    args.impl = args.impl or [name for name in FAMILIES if name not in skipped]
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    if args.mixtures:
        return list(mixture_cases())
    names = [name for name in FAMILIES if name in args.impl]
    return [case for name in names for case in FAMILIES[name](args)]


def measure(problem: Problem, cases: list[Case], args: argparse.Namespace) -> list[Row]:
    """A row for each case, whatever happens to it."""
    torch.compiler.reset()  # for this shape alone, as in training
    inputs = problem.inputs()
    shape = {
        "tokens": problem.tokens,
        "dim": problem.dim,
        "vocab": problem.vocab,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": problem.device,
        "ignored": problem.ignored,
    }
    rows = [
        dict.fromkeys(COLUMNS) | shape | {"implementation": case.name} for case in cases
    ]
    table = list(zip(cases, rows, strict=True))
    for mixture in dict.fromkeys(case.mixture for case in cases):
        truth = None if args.grow else true_gradients(mixture, inputs)
        plain = {} if args.grow else try_once(unfused(mixture), inputs, truth)
        for case, row in table:
            if case.mixture is mixture:
                row |= try_once(case, inputs, truth)
                add_error_ratios(row, plain)
                print("   ", case.name, row["result"], sep="  ", flush=True)
        del truth
    take_times(table, inputs, args)
    for row in rows:
        if row["ms"] and rows[0]["ms"]:
            row["ratio"] = row["ms"] / rows[0]["ms"]
    return rows


def try_once(case: Case, inputs: Inputs, truth: dict[str, torch.Tensor] | None) -> Row:
    """The memory that a case takes and its errors; or why it does not run."""
    release(inputs)
    try:
        step = case.prepare(inputs)
        step()  # compiles, tunes, and keeps workspaces that are nobody's logits
        if not case.has_gradients:
            return {"result": "ok"}
        drop_gradients(inputs)
        extra_bytes, loss = peak_memory(step, inputs.hidden_TD.device)
        assert loss is not None
        row: Row = {"result": "ok", "extra_bytes": extra_bytes}
        if truth is not None:
            got = (loss, inputs.hidden_TD.grad, inputs.weight_VD.grad)
            for name, value in zip(QUANTITIES, got, strict=True):
                row[f"{name}_error"] = relative_error(value, truth[name])
        return row
    except Exception as error:  # an implementation may raise anything
        return {"result": reason(error)}


def release(inputs: Inputs) -> None:
    """Forget what the case before has left."""
    drop_gradients(inputs)
    if inputs.hidden_TD.is_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def drop_gradients(inputs: Inputs) -> None:
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None


def peak_memory(step: Step, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """Bytes that a step takes above those that are taken before it, and its loss."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = step()
        return torch.cuda.max_memory_allocated() - before, loss
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two lines for each profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    taken = itertools.accumulate(event["args"]["Bytes"] for event in changes)
    return max(taken, default=0), loss


def relative_error(value: torch.Tensor | None, truth: torch.Tensor) -> float:
    assert value is not None, "no gradient"
    return ((value.double() - truth).norm() / truth.norm()).item()


def add_error_ratios(row: Row, plain: Row) -> None:
    for name in (f"{q}_error" for q in QUANTITIES):
        if row[name] is not None and plain.get(name):
            row[f"{name}_ratio"] = row[name] / plain[name]


def reason(error: Exception) -> str:
    message = " ".join(str(error).replace("|", "/").split())  # one cell of a table
    if isinstance(error, Unavailable):
        return f"not available: {message}"
    return f"{type(error).__name__}: {message}"[:160]


def take_times(
    table: list[tuple[Case, Row]], inputs: Inputs, args: argparse.Namespace
) -> None:
    """Round after round, so that a clock that drifts does so for all alike."""
    release(inputs)
    running: list[tuple[Case, Row, list[float]]] = [
        (case, row, []) for case, row in table if row["result"] == "ok"
    ]
    order = random.Random(args.seed)
    for number in range(args.warmup + args.repeats):
        for case, row, seconds in order.sample(running, len(running)):
            if row["result"] != "ok":
                continue
            try:
                taken = time_once(case, inputs)
            except Exception as error:
                row["result"] = reason(error)
            else:
                seconds += [taken] * (number >= args.warmup)
    for _, row, seconds in running:
        if row["result"] == "ok":
            row["ms"] = 1e3 * statistics.median(seconds)
            row["ms_min"], row["ms_max"] = 1e3 * min(seconds), 1e3 * max(seconds)
            row["us_per_token"] = 1e3 * row["ms"] / row["tokens"]


def time_once(case: Case, inputs: Inputs) -> float:
    step = case.prepare(inputs)
    drop_gradients(inputs)
    if not inputs.hidden_TD.is_cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def write(rows: list[Row], base: str, args: argparse.Namespace) -> None:
    if not args.output:
        return
    shape = ", ".join(
        f"{name} {' '.join(str(value) for value in dict.fromkeys(r[name] for r in rows))}"
        for name in ("tokens", "dim", "vocab", "ignored", "dtype", "device")
    )
    shape += f"; cut-cross-entropy {installed('cut-cross-entropy')}.\n"
    note = EXPLANATION.format(
        repeats=args.repeats, warmup=args.warmup, memory=MEMORY[args.device]
    )
    note = textwrap.fill(note.strip(), width=92)
    text = f"{heading()}\n{shape}\n{note}\n\n{markdown(rows, base)}"
    if args.grow:
        picture = args.output.with_suffix(".png")
        draw(rows, args.grow, picture)
        text += f"\n![Growth with {args.grow}]({picture.name})\n"
    args.output.write_text(text)
    with open(args.output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[Row], base: str) -> str:
    """The table for people; columns without a difference or a figure are left out."""
    columns = {
        name: [str(row[name]) for row in rows]
        for name in ("tokens", "vocab", "ignored")
        if len({row[name] for row in rows}) > 1
    }
    columns["implementation"] = [row["implementation"] for row in rows]
    columns["ms"] = [figure(row["ms"], "{:.2f}") for row in rows]
    columns["µs/token"] = [figure(row["us_per_token"], "{:.3f}") for row in rows]
    columns[f"ratio to {base}"] = [figure(row["ratio"], "{:.3f}") for row in rows]
    gib = [row["extra_bytes"] and row["extra_bytes"] / 2**30 for row in rows]
    columns["extra GiB"] = [figure(value, "{:.3f}") for value in gib]
    for name in QUANTITIES:
        columns[f"error of {name}"] = [
            figure(row[f"{name}_error"], "{:.2e}")
            + figure(row[f"{name}_error_ratio"], " ({:.2f})")
            for row in rows
        ]
    columns["result"] = [row["result"] for row in rows]
    if set(columns["result"]) == {"ok"}:
        del columns["result"]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [
        list(columns),
        ["---"] * len(columns),
        *zip(*columns.values(), strict=True),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(value: float | None, template: str) -> str:
    return "" if value is None else template.format(value)


def draw(rows: list[Row], grow: str, path: Path) -> None:
    """Time per token and extra memory of each implementation, as `grow` grows."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 4.5), layout="constrained")
    panels = picture.subplots(1, 2)
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [r for r in rows if r["implementation"] == name and r["result"] == "ok"]
        sizes = [row[grow] for row in mine]
        us = [row["us_per_token"] for row in mine]
        gib = [(row["extra_bytes"] or math.nan) / 2**30 for row in mine]
        panels[0].plot(sizes, us, "o-")
        label = name if mine else f"{name} (does not run)"
        panels[1].plot(sizes, gib, "o-", label=label)
    ticks = list(dict.fromkeys(row[grow] for row in rows))
    for panel, title in zip(panels, ("µs per token", "extra memory, GiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=grow, title=title)
        panel.set_xticks(ticks, [f"{size:,}" for size in ticks], fontsize="small")
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    legend = panels[1].get_legend_handles_labels()
    picture.legend(*legend, loc="outside right center", fontsize="small")
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
