#!/usr/bin/env python3
"""Time, memory and errors of every implementation of an LM head's loss, in one table.

    python scripts/bench_head_loss.py --output benchmarks/head_loss.md
    python scripts/bench_head_loss.py --mixtures --output benchmarks/mixtures.md
    python scripts/bench_head_loss.py --preferences 2048 --ignored 0 0.5
    python scripts/bench_head_loss.py --ignored 0 0.5 0.9 --impl floor stock chunked
    python scripts/bench_head_loss.py --grow tokens --output benchmarks/growth.md
    torchrun --nproc_per_node 2 scripts/bench_head_loss.py --tp --output benchmarks/tp.md

Each row is one forward and backward pass, from hidden states to the gradients of hidden
states and weight, on the same random inputs. The Markdown table has a CSV with all
figures beside it, and with --grow a picture. What is measured: head_loss_cases.py, of
which losses: head_loss_mixtures.py, and with --tp: head_loss_tp.py.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import statistics
import sys
from dataclasses import replace

import environment  # noqa: F401
import head_loss_tp
import torch
from head_loss_cases import (
    FAMILIES,
    TEACHER_PRODUCT,
    Case,
    Unavailable,
    mixture_cases,
    preference_cases,
    unfused,
)
from head_loss_measure import (
    drop_gradients,
    peak_memory,
    relative_error,
    release,
    time_once,
)
from head_loss_mixtures import CROSS_ENTROPY, Inputs, Problem, true_gradients
from head_loss_tables import COLUMNS, QUANTITIES, Row, markdown, write
from provenance import result_file

from torchtitan_liger.head_loss import Term

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
# Too much memory; too many lines in one picture.
NOT_GROWN = ("floor", "one-pass", "liger-raw")


def main() -> int:
    args = parse_args()
    if args.tp:
        return head_loss_tp.run(args)
    first = Problem(
        args.tokens,
        args.dim,
        args.vocab,
        args.dtype,
        args.device,
        seed=args.seed,
        sequence=args.preferences,
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
    add(
        "--preferences",
        type=int,
        default=0,
        metavar="TOKENS",
        help="losses over pairs of sequences of so many tokens instead",
    )
    add("--rows", default="", help="only those whose name has this regular expression")
    add("--tp", action="store_true", help="mixtures, the vocabulary over the processes")
    add("--uneven", action="store_true", help="with --tp: rank r has r + 1 parts of it")
    add("--append", action="store_true", help="with --tp: keep the rows of --output")
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
    add("--output", type=result_file, help="Markdown file; CSV and picture beside it")
    args = parser.parse_args()
    own_rows = args.mixtures, args.preferences, args.tp
    if sum(map(bool, (*own_rows, args.impl))) > 1:
        parser.error(
            "--mixtures, --preferences and --tp have their own rows: give one, without "
            "--impl"
        )
    if args.rows and args.tp:
        parser.error("--tp has all its rows: leave out --rows")
    try:
        re.compile(args.rows)
    except re.error as error:
        parser.error(f"--rows {args.rows!r} is no regular expression: {error}")
    if args.tp and args.grow:
        parser.error("--tp has one size: leave out --grow")
    if (args.uneven or args.append) and not args.tp:
        parser.error("--uneven and --append belong to --tp")
    if args.append and not args.output:
        parser.error("--append needs the --output to which it adds rows")
    if args.append and args.output.exists() != args.output.with_suffix(".csv").exists():
        parser.error(f"--append: of {args.output} and its CSV only one is there")
    if any(own_rows) and args.budgets:
        parser.error("--budgets are for rows of chunked: give them without other rows")
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
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    args.dtype = DTYPES.get(args.dtype)
    args.acc_dtypes = [DTYPES[name] for name in args.acc_dtypes]
    for name, value in zip(SIZES, DEFAULTS[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sizes = args.sizes or GROWTH.get(args.grow)
    for name in ("budgets", "tokens", "dim", "vocab", "repeats", "sizes", "warmup"):
        low = 0 if name == "warmup" else 1
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and min(numbers, default=low) < low:
            parser.error(f"--{name} must be at least {low}, got {value}")
    sizes = args.sizes if args.grow == "tokens" else [args.tokens]
    if args.preferences < 0 or (
        args.preferences and any(size % (2 * args.preferences) for size in sizes)
    ):
        parser.error(
            f"--preferences {args.preferences}: {sizes} tokens are no pairs of such "
            "sequences"
        )
    skipped = NOT_GROWN if args.grow else ()
    args.impl = args.impl or [name for name in FAMILIES if name not in skipped]
    return args


def cases_of(args: argparse.Namespace) -> list[Case]:
    if args.mixtures:
        cases = list(mixture_cases())
    elif args.preferences:
        cases = list(preference_cases())
    else:
        names = [name for name in FAMILIES if name in args.impl]
        cases = [case for name in names for case in FAMILIES[name](args)]
    chosen = [case for case in cases if re.search(args.rows, case.name)]
    if not chosen:
        names = [case.name for case in cases]
        raise SystemExit(f"--rows {args.rows!r} is in none of: {', '.join(names)}")
    return chosen


def measure(problem: Problem, cases: list[Case], args: argparse.Namespace) -> list[Row]:
    """A row for each case, whatever happens to it."""
    torch.compiler.reset()  # for this shape alone, as in training
    with_teacher = any(case.mixture.has_teacher for case in cases)
    inputs = problem.inputs(with_teacher=with_teacher)
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
    add_overheads(table)
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


def add_overheads(table: list[tuple[Case, Row]]) -> None:
    """What a teacher costs beyond its product, as a share of cross entropy in one call."""
    product_ms = next((row["ms"] for case, row in table if case is TEACHER_PRODUCT), 0)
    one_call_ms: dict[tuple[Term, ...], float | None] = {
        case.mixture.terms: row["ms"]
        for case, row in table
        if case.name.endswith(": one call")
    }
    first_ms = one_call_ms.get(CROSS_ENTROPY.terms)
    for case, row in table:
        others_ms = one_call_ms.get(case.mixture.undistilled)
        if case.mixture.has_teacher and all(
            (row["ms"], first_ms, product_ms, others_ms)
        ):
            row["overhead"] = (row["ms"] - others_ms - product_ms) / first_ms


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


if __name__ == "__main__":
    sys.exit(main())
