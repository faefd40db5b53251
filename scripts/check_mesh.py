#!/usr/bin/env python3
"""The error of one training step on every layout, fused and stock, in one table.

    python scripts/check_mesh.py --ranks 1 2 4 --output benchmarks/result.md

Runs `tests/distributed/matrix.py` for each number of ranks. Fails if a layout fails, or
if the fused step is further from the truth than twice the stock one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT
from provenance import heading, result_file
from torch import cuda

# Sums in float32 in another order; and a model that stock torchtitan cannot train.
FLOOR = {"float32": 2e-6, "bfloat16": 3e-2}
QUANTITIES = ("loss", "grad_norm", "head", "worst parameter")
EXPLANATION = """
One step from the same weights on the same eight sequences, dealt out to ranks and
micro-batches with other numbers of labels on each, some with none. Each cell is the relative
error against one process in float64 (mixtures of experts: in float32): of the loss, of the
gradient's norm, of the gradient of the LM head, and the largest over all parameters. The
bound is twice the error of stock torchtitan on the same layout, at least {float32} (and
{bfloat16} where stock cannot train the layout in bfloat16).
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=result_file, help="Markdown file")
    parser.add_argument("--logs", type=Path, help="folder for the runs' logs")
    args = parser.parse_args()
    lines, failed = [], False
    for ranks in args.ranks:
        rows, code, log = run(ranks)
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            (args.logs / f"mesh_{ranks}.log").write_text(log)
        failed |= code != 0 or not rows
        for row in rows:
            cells, within = cells_of(row)
            failed |= not within
            lines.append(f"| {row['case']} | {ranks} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
        if code:
            lines.append(
                f"| the run on {ranks} ranks ended with code {code} | | | | | |"
            )
            print(f"{lines[-1]}\n{log[-4000:]}", flush=True)
        elif not rows:
            print(f"there is no layout of {ranks} ranks", flush=True)
    columns = ("layout", "ranks", *QUANTITIES, "within the bound")
    table = "\n".join(
        ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]
    )
    note = EXPLANATION.format(**FLOOR)
    if args.output:
        args.output.write_text(f"{heading()}{note}\n{table}\n")
    return int(failed)


def run(ranks: int) -> tuple[list[dict[str, Any]], int, str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        done = subprocess.run(
            [
                sys.executable,
                *("-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
                *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
                *("--local-ranks-filter", "0"),
                *("-m", "tests.distributed.matrix", "--output", str(output)),
            ],
            cwd=ROOT,
            # Without a GPU Liger's kernels run in Triton's interpreter.
            env=os.environ | ({} if cuda.is_available() else {"TRITON_INTERPRET": "1"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        rows = json.loads(output.read_text()) if output.exists() else []
    return rows, done.returncode, done.stdout


def cells_of(row: dict[str, Any]) -> tuple[list[str], bool]:
    """The cells of a layout, and whether all are within their bounds."""
    if "error" in row:
        return [row["error"][:80], "", "", "", "no"], False
    cells, within = [], True
    for name in QUANTITIES:
        error, stock = row["fused"][name], row.get("stock", {}).get(name)
        bound = FLOOR[row["dtype"]] if stock is None else 2 * stock
        bound = max(bound, FLOOR["float32"])
        within &= error <= bound
        beside = "-" if stock is None else f"{stock:.1e}"
        cells.append(f"{error:.1e} (stock {beside}, bound {bound:.1e})")
    return [*cells, "yes" if within else "NO"], within


if __name__ == "__main__":
    sys.exit(main())
