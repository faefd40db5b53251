"""What scripts/bench_head_loss.py writes: a table for people, a CSV, a picture."""

from __future__ import annotations

import csv
import math
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from head_loss_measure import PASSES, SETTLING_SECONDS
from provenance import heading, installed

QUANTITIES = ("loss", "d_hidden", "d_weight")
COLUMNS = (
    *("tokens", "dim", "vocab", "dtype", "device", "ignored", "implementation"),
    *("ms", "ms_min", "ms_max", "us_per_token", "ratio", "overhead"),
    "extra_bytes",
    *(f"{q}_error" for q in QUANTITIES),
    *(f"{q}_error_ratio" for q in QUANTITIES),
    "result",
)
EXPLANATION = """
Time is the median of {repeats} passes, forward and backward, after {warmup} that do not count;
the implementations take turns, in a new order each round. On a GPU a pass is the mean of
{passes}, right after {settling} seconds of the same implementation: the host is ahead, and the clock
has settled, as far as one at its power limit does.
The ratio is to the first row for the same sizes and labels. Extra memory is the peak above the inputs, both gradients included, as told by
{memory}. Errors are relative, in the Frobenius norm, against full logits in float64; in
parentheses, divided by the error of full logits in plain torch in the inputs' dtype. A loss
is one number, whose error can be small by chance.
"""
OF_TEACHERS = """
The overhead of a distillation is its time without that of one call with the other losses
and without that of the teacher's product alone, as a share of cross entropy alone (the
row of one call); only where all these rows are there.
"""
MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "torch's profiler: what torch's allocator has given out",
}
Row = dict[str, Any]


def write(rows: list[Row], base: str, args: Namespace) -> None:
    if not args.output:
        return
    shape = ", ".join(
        f"{name} {' '.join(str(value) for value in dict.fromkeys(r[name] for r in rows))}"
        for name in ("tokens", "dim", "vocab", "ignored", "dtype", "device")
    )
    shape += f"; cut-cross-entropy {installed('cut-cross-entropy')}.\n"
    note = explanation(EXPLANATION + OF_TEACHERS * args.mixtures, args)
    text = f"{heading()}\n{shape}\n{note}\n\n{markdown(rows, base)}"
    if args.grow:
        picture = args.output.with_suffix(".png")
        draw(rows, args.grow, picture)
        text += f"\n![Growth with {args.grow}]({picture.name})\n"
    args.output.write_text(text)
    write_csv(rows, COLUMNS, args.output)


def explanation(template: str, args: Namespace) -> str:
    text = template.format(
        repeats=args.repeats,
        warmup=args.warmup,
        memory=MEMORY[args.device],
        settling=SETTLING_SECONDS,
        passes=PASSES,
    )
    return textwrap.fill(" ".join(text.split()), width=92)


def write_csv(rows: list[Row], columns: Sequence[str], output: Path) -> None:
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
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
    columns["overhead"] = [figure(row["overhead"], "{:.1%}") for row in rows]
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
    return table_of(columns)


def table_of(columns: Mapping[str, list[str]]) -> str:
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
        panel.set(xscale="log", xlabel=grow, title=title)
        panel.set_xticks(ticks, [f"{size:,}" for size in ticks], fontsize="small")
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05 * panels[0].get_ylim()[1])
    panels[1].set_yscale("log", base=2)
    panels[1].yaxis.set_major_formatter("{x:g}")
    legend = panels[1].get_legend_handles_labels()
    picture.legend(*legend, loc="outside right center", fontsize="small")
    picture.savefig(path, dpi=120)
