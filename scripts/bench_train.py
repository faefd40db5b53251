#!/usr/bin/env python3
"""Whole training runs, fused loss off and on, in one table.

    python scripts/bench_train.py train_configs/llama3_1.2b.toml \\
        --impl stock liger chunked --output result.md
    NGPU=4 python scripts/bench_train.py train_configs/llama3_8b.toml --label "TP 2" \\
        --output result.md -- --parallelism.tensor_parallel_degree 2

Every run is one of run_train.sh, and arguments after `--` go to it. Speed and MFU are
medians of what torchtitan logs after the first `--warmup` steps; memory is the peak of
the whole run, on the rank that needs most. The preflight is in neither.

    python scripts/bench_train.py train_configs/llama3_1.2b.toml --largest seq \\
        --impl stock liger --start 65536 98304 --output result.md

finds the longest sequence (at batch 1), or with `--largest batch` the largest local batch,
that trains `--steps` steps: the size is doubled until memory runs out, then bisected. Every
trial is a row. Any failure but lack of memory ends the search, and is a row as well.

The table and a CSV beside it are written after every row. A table that exists is added to,
and the search repeats no trial that it has, so a command that was cut short can be given
again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from environment import ROOT, exit_on_signals
from provenance import result_file
from train_table import COLUMNS, Row, Table

from torchtitan_liger.cli import FLAG_OFF, FLAG_ON, option_of, read_toml, value_of
from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    TOKENS_PER_SECOND,
    parse_log,
)

MFU = "mfu(%)"
IMPLS = ("stock", "liger", "chunked", "reference")
SEARCH_COLUMN = {"seq": "seq len", "batch": "batch"}
GRID = {"seq": 2048, "batch": 1}
START = {"seq": 8192, "batch": 1}
MOST = {"seq": 2**20, "batch": 256}

OK = "ok"
OUT_OF_MEMORY = "out of memory"
# PyTorch's allocators, CUDA and NCCL, cuBLAS, the CPU.
NO_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory",
    re.IGNORECASE,
)
SIZES = re.compile(r"local batch size (\d+),.* sequence length (\d+),")
# Of any rank.
PEAK_MEMORY = re.compile(r"step: *\d+ .*memory: *([\d.]+)GiB")


class TrialError(Exception):
    """A trial failed for another reason than lack of memory."""


def main() -> int:
    args = parse_args()
    exit_on_signals()
    table = Table(args.output)
    for config in args.configs:
        for impl, start in zip(args.impl, args.start, strict=True):
            if args.largest:
                search(config, impl, start, args, table)
            else:
                table.add(measure(config, impl, args))
    print(table.markdown())
    expected = (OK, OUT_OF_MEMORY) if args.largest else (OK,)
    return any(row["result"] not in expected for row in table.rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("configs", type=Path, nargs="+")
    add("--impl", choices=IMPLS, nargs="+", default=["stock", "liger"])
    add("--steps", type=int, help="default: 30; 3 with --largest")
    add("--warmup", type=int, help="steps left out; default: 10; 1 with --largest")
    ngpu = os.environ.get("NGPU", "1")  # by argparse, as on the command line
    add("--gpus", type=int, default=ngpu, help="processes (default: NGPU, or 1)")
    add(
        "--label",
        default="",
        help="what the arguments after -- are called in the table",
    )
    add("--limit", type=float, default=900, help="seconds for one run (%(default)s)")
    add("--output", type=result_file, help="Markdown file; a CSV beside it")
    add("--logs", type=Path, help="folder for the runs' logs")
    add("--largest", choices=("seq", "batch"), help="find the largest that trains")
    add("--start", type=int, nargs="+", help="first size: one, or one for each --impl")
    add("--grid", type=int, help="sizes are multiples of it (seq: 2048, batch: 1)")
    add("--most", type=int, help="largest size to try (seq: 1048576, batch: 256)")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.overrides = argv[split + 1 :]
    for config in args.configs:
        if not config.is_file():
            parser.error(f"there is no config {config}")
    names = [config.stem for config in args.configs]
    if len(set(names)) < len(names):
        parser.error(f"the table needs configs of different names, got {names}")
    for section, key, way in (
        ("training", "steps", "--steps"),
        ("job", "config_file", "as the config"),
    ):
        if option_of(args.overrides, section, key) is not None:
            parser.error(
                f"--{section}.{key} is not for the arguments after --: give {way}"
            )
    for name in ("steps", "grid", "most", "limit", "gpus"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, got {value}")
    searching = args.largest is not None
    if not searching and (args.start or args.grid or args.most):
        parser.error("--start, --grid and --most belong to --largest")
    if args.steps is None:
        args.steps = 3 if searching else 30
    if args.warmup is None:
        args.warmup = 1 if searching else 10
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of {args.steps} steps")
    for config in args.configs:
        toml = read_toml([f"--job.config_file={config}"])[1]
        key = "metrics", "log_freq"
        given = option_of(args.overrides, *key) or value_of(toml, *key) or 10
        if not str(given).isdecimal() or not (every := int(given)):
            parser.error(
                f"metrics.log_freq must be a whole number above 0, got {given}"
            )
        last = max(
            1, args.steps - args.steps % every
        )  # torchtitan logs the first one too
        if not searching and last <= args.warmup:
            parser.error(
                f"no step between --warmup {args.warmup} and --steps {args.steps} is "
                f"logged: metrics.log_freq is {every}; -- --metrics.log_freq 1 logs each"
            )
    args.grid = args.grid or GRID.get(args.largest)
    args.most = args.most or MOST.get(args.largest)
    args.start = args.start or [START.get(args.largest, 0)]
    if len(args.start) == 1:
        args.start *= len(args.impl)
    if len(args.start) != len(args.impl):
        parser.error(
            f"--start has {len(args.start)} sizes for {len(args.impl)} of --impl"
        )
    return args


# --- The largest that trains ---------------------------------------------------------


def largest(fits: Callable[[int], bool], start: int, grid: int, most: int) -> int:
    """The largest multiple of `grid` up to `most` that fits; 0 if none does.

    Whatever is smaller than a size that fits is taken to fit. From `start` the size is
    doubled until one does not fit, then the gap is bisected; no size is tried twice.
    """
    fitting, failing = 0, most // grid + 1  # in multiples of grid
    size = max(1, min(start, most) // grid)
    doubling = True
    while fitting + 1 < failing:
        if fits(size * grid):
            fitting = size
        else:
            failing, doubling = size, False
        between = (fitting + failing) // 2
        size = min(2 * size, failing - 1) if doubling else between
    return fitting * grid


def search(
    config: Path, impl: str, start: int, args: argparse.Namespace, table: Table
) -> None:
    """Add a row for each trial, and a note of what they found."""
    kind, column = args.largest, SEARCH_COLUMN[args.largest]
    same = known_facts(config, impl, args)

    def sizes(result: str) -> list[int]:
        """The sizes of this search that are known to have had this result."""
        return [
            int(row[column])
            for row in table.all_rows
            if row["result"] == result and same.items() <= row.items()
        ]

    def fits(size: int) -> bool:
        if size <= max(sizes(OK), default=0):
            return True
        if size >= min(sizes(OUT_OF_MEMORY), default=size + 1):
            return False
        row = measure(config, impl, args, size)
        table.add(row)
        if row["result"] not in (OK, OUT_OF_MEMORY):
            raise TrialError(f"at {size:,}: {row['result']}")
        return row["result"] == OK

    subject = f"Largest {kind}, {config.stem} {same['layout']}".strip() + f", {impl}"
    try:
        found = largest(fits, start, args.grid, args.most)
    except TrialError as error:
        found = max(sizes(OK), default=0)
        table.note(f"{subject}: not known, at least {found:,}; stopped {error}")
        return
    if too_large := min(sizes(OUT_OF_MEMORY), default=0):
        end = f"{too_large:,} is out of memory"
    else:
        end = f"no more than {args.most:,} was tried"
    table.note(f"{subject}: {found:,} ({end})")


# --- One run -------------------------------------------------------------------------


def known_facts(config: Path, impl: str, args: argparse.Namespace) -> Row:
    """What a row says before its run."""
    arguments = shlex.join(args.overrides)
    return {
        "config": config.stem,
        "layout": args.label or arguments,
        "impl": impl,
        "gpus": str(args.gpus),
        "arguments": arguments,
        "search": args.largest or "",
    }


def measure(config: Path, impl: str, args: argparse.Namespace, size: int = 0) -> Row:
    """Run one job, a trial of this `size` in a search; read speed, memory and loss."""
    row = known_facts(config, impl, args) | {"steps": str(args.steps)}
    if impl == "stock":
        changes = [FLAG_OFF]  # whatever the TOML says
    else:
        changes = [
            FLAG_ON,
            f"--liger_kernel.impl={impl}",
            "--liger_kernel.fallback=error",
        ]
    if args.largest:
        # Every step is logged: after the first one come the optimizer's states.
        changes += ["--metrics.log_freq=1", "--training.global_batch_size=-1"]
        batch = 1
        if args.largest == "seq":
            row["seq len"] = str(size)
            changes.append(f"--training.seq_len={size}")
        else:
            batch = size
        row["batch"] = str(batch)
        changes.append(f"--training.local_batch_size={batch}")
    facts = (row[key] for key in ("config", "layout", "impl"))
    name = " ".join(filter(None, [*facts, args.largest, size and str(size)]))
    print(f"{name} ...", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(ROOT / "run_train.sh"),
            f"--job.dump_folder={folder}",
            f"--training.steps={args.steps}",
            "--metrics.disable_color_printing",
            "--debug.seed=1",
            *args.overrides,
            *changes,
        ]
        variables = {
            "CONFIG_FILE": str(config),
            "NGPU": str(args.gpus),
            # Memory may run out on any rank.
            "LOG_RANK": ",".join(map(str, range(args.gpus))),
        }
        path = (args.logs or Path(folder)) / (re.sub(r"[^\w.]+", "-", name) + ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        code = run(command, variables, path, args.limit)
        log = path.read_text(errors="replace")
    print(f"    {time.monotonic() - start:.0f} s", flush=True)
    row |= read_log(log, args.warmup)
    row["result"] = verdict(code, log, args.limit)
    if row["result"] == OK and not (args.largest or row["tokens/s per device"]):
        row["result"] = "no step logged after --warmup: see metrics.log_freq"
    return row


def run(
    command: Sequence[str], variables: Mapping[str, str], log: Path, limit: float
) -> int | None:
    """The exit code of `command`; None if it was stopped after `limit` seconds."""
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    shown = shlex.join([*(f"{k}={v}" for k, v in variables.items()), *command])
    with open(log, "w") as out:
        out.write(f"$ {shown}\n")
        out.flush()
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # torchrun ends its workers when it is asked to end, within 30 s.
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def verdict(code: int | None, log: str, limit: float) -> str:
    """How a run ended, in a few words."""
    if code == 0:
        return OK
    said = log.partition("\n")[2] if log.startswith("$ ") else log  # not the command
    if NO_MEMORY.search(said):
        return OUT_OF_MEMORY
    if code is None:
        return f"no end within {limit:.0f} s"
    facts = parse_log(log).log
    error = facts.error if facts else ""
    return (error or f"exit code {code}").replace("|", "/")[:300]


def read_log(log: str, warmup: int) -> Row:
    """The columns that torchtitan's log fills, as far as the run came."""
    row = dict.fromkeys(COLUMNS[COLUMNS.index("tokens/s per device") : -1], "")
    if match := SIZES.search(log):
        row["batch"], row["seq len"] = match.groups()
    curves = parse_log(log).curves
    if loss := curves.get(LOSS):
        row["first loss"] = f"{loss[min(loss)]:.5f}"
        row["last loss"] = f"{loss[max(loss)]:.5f}"
        row["first grad norm"] = f"{curves[GRAD_NORM][min(loss)]:.4f}"
        row["peak GiB"] = f"{max(map(float, PEAK_MEMORY.findall(log))):.2f}"
        if measured := [step for step in loss if step > warmup]:
            speed = statistics.median(curves[TOKENS_PER_SECOND][s] for s in measured)
            mfu = statistics.median(curves[MFU][s] for s in measured)
            row |= {"tokens/s per device": f"{speed:.0f}", "MFU %": f"{mfu:.1f}"}
    return row


if __name__ == "__main__":
    sys.exit(main())
