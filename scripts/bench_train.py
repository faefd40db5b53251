#!/usr/bin/env python3
"""Whole training runs, fused loss off and on, in one table.

    python scripts/bench_train.py train_configs/debug_model.toml --steps 30 \
        --impl stock liger chunked --output benchmarks/result.md

Speed is the median over the logged steps after the first `--warmup`; memory is the peak
of the whole run. Arguments after `--` go to every run.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    PEAK_MEMORY_GIB,
    TOKENS_PER_SECOND,
    read_tensorboard,
)

FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"
IMPLS = ("stock", "liger", "chunked", "reference")
COLUMNS = (
    "config",
    "impl",
    "gpus",
    "steps",
    "tokens/s per device",
    "MFU %",
    "peak GiB",
    "first loss",
    "last loss",
    "first grad norm",
    "result",
)


def main() -> int:
    args = parse_args()
    rows = []
    for config in args.configs:
        for impl in args.impl:
            print(f"{config.stem} {impl} ...", flush=True)
            row = measure(config, impl, args)
            print("   ", *(f"{k}: {row[k]}" for k in COLUMNS[3:]), sep="  ", flush=True)
            rows.append(row)
    table = markdown(rows)
    print(table)
    if args.output:
        args.output.write_text(heading() + "\n" + table)
        with open(args.output.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return any(row["result"] != "ok" for row in rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--impl", choices=IMPLS, nargs="+", default=["stock", "liger"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10, help="steps left out")
    parser.add_argument("--gpus", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, help="Markdown file; a CSV beside it")
    parser.add_argument("--logs", type=Path, help="folder for the runs' logs")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.overrides = argv[split + 1 :]
    return args


def measure(config: Path, impl: str, args: argparse.Namespace) -> dict[str, object]:
    """Run one job and read its speed, memory and loss."""
    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    row |= {
        "config": " ".join([config.stem, *args.overrides]),
        "impl": impl,
        "gpus": args.gpus,
        "steps": args.steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            *("-m", "torch.distributed.run"),
            f"--nproc_per_node={args.gpus}",
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *("--local-ranks-filter", "0"),
            *("-m", "torchtitan_liger.train"),
            *("--job.config_file", str(config)),
            *("--job.dump_folder", folder),
            *("--training.steps", str(args.steps)),
            "--metrics.enable_tensorboard",
            "--metrics.disable_color_printing",
            *("--debug.seed", "1"),
            *([] if impl == "stock" else [FLAG, "--liger_kernel.impl", impl]),
            *("--liger_kernel.fallback", "error"),
            *args.overrides,
        ]
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            (args.logs / f"{config.stem}_{impl}.log").write_text(
                shlex.join(command) + "\n" + run.stdout
            )
        if run.returncode:
            row["result"] = last_error(run.stdout)
            return row
        curves = read_tensorboard(folder)
    loss = curves[LOSS]
    speed = [v for step, v in curves[TOKENS_PER_SECOND].items() if step > args.warmup]
    mfu = [v for step, v in curves["mfu(%)"].items() if step > args.warmup]
    return row | {
        "tokens/s per device": f"{statistics.median(speed):.0f}",
        "MFU %": f"{statistics.median(mfu):.1f}",
        "peak GiB": f"{max(curves[PEAK_MEMORY_GIB].values()):.2f}",
        "first loss": f"{loss[min(loss)]:.5f}",
        "last loss": f"{loss[max(loss)]:.5f}",
        "first grad norm": f"{curves[GRAD_NORM][min(loss)]:.5f}",
        "result": "ok",
    }


def last_error(log: str) -> str:
    """What a failed run says about itself, in a few words."""
    errors = [line for line in log.splitlines() if "Error" in line and ":" in line]
    memory = [line for line in errors if "OutOfMemory" in line]
    picked = (memory or errors or ["failed without a message"])[0]
    return picked.replace("[rank0]:", "").strip()[:120]


def heading() -> str:
    """When, where and with what the table was measured."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    names = ("torch", "triton", "torchtitan", "liger-kernel")
    versions = ", ".join(f"{name} {installed(name)}" for name in names)
    command = ["python", f"scripts/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in ("--output", "--logs"):  # places on one machine
            next(arguments)
        else:
            command.append(argument)
    return (
        f"{date.today()}, {device}; {versions}; commit {commit()}.\n\n"
        f"    {shlex.join(command)}\n"
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(none)"


def commit() -> str:
    """The commit of this tree; BENCH_COMMIT where the tree came without its history."""
    root = Path(__file__).parent
    git = ("git", "-C", str(root), "describe", "--always", "--dirty")
    try:
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("BENCH_COMMIT", "unknown")


def markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
