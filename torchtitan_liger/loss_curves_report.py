"""A comparison for its reader: a table, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    PEAK_MEMORY_GIB,
    TERM_PREFIX,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    Curves,
    Run,
    Runs,
    align,
)
from torchtitan_liger.loss_curves_judge import NAMES, Bounds, Verdict
from torchtitan_liger.loss_curves_words import notes, rule_text

PICTURE = "curves.png"


@dataclass(frozen=True)
class Report:
    """A comparison, and how it came about."""

    title: str
    runs: Runs
    verdict: Verdict
    bounds: Bounds
    missing_proof: Sequence[str] | None = ()
    """What is missing to know that off was off and on was on; None: nobody asked."""
    notes: Sequence[str] = ()
    """What is to be said beyond what the runs themselves show."""
    details: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name of a run -> what else there is to say about it, such as its command."""


@dataclass(frozen=True)
class Row:
    """One curve in numbers; the last four over all common steps."""

    name: str
    tag: str
    off: float
    on: float
    largest: float  # |on - off|
    largest_step: int
    mean: float  # |on - off|
    noise: float  # NaN where there is none


def table(runs: Runs) -> list[Row]:
    """A row for each curve that off and on have, as far as both are finite.

    `off` and `on` are the values at the last common step, but for tokens per second the
    median after the first tenth of the steps, and for memory the peak.
    """
    both = runs.off.curves.keys() & runs.on.curves.keys()
    names = {
        LOSS: "loss",
        # Where both have the head's own losses, and maybe others than cross entropy.
        **{t: t for t in sorted(both) if t.startswith(TERM_PREFIX)},
        GRAD_NORM: "gradient norm",
        VALIDATION_LOSS: "validation loss (not judged)",
        TOKENS_PER_SECOND: "tokens/s per device (median)",
        PEAK_MEMORY_GIB: "memory, GiB (peak)",
    }
    rows = []
    for tag, name in names.items():
        aligned = align(tag, runs)
        columns = (aligned.steps, aligned.off, aligned.on)
        finite = [p for p in zip(*columns, strict=True) if all(map(math.isfinite, p))]
        if not finite:
            continue
        steps, off, on = zip(*finite, strict=True)
        sizes = [abs(b - a) for a, b in zip(off, on, strict=True)]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        rows.append(
            Row(
                name,
                tag,
                off=_summary(tag, off),
                on=_summary(tag, on),
                largest=sizes[largest],
                largest_step=steps[largest],
                mean=statistics.fmean(sizes),
                noise=max(filter(math.isfinite, aligned.noise), default=math.nan),
            )
        )
    return rows


def _summary(tag: str, values: Sequence[float]) -> float:
    if tag == TOKENS_PER_SECOND:  # the first steps compile and allocate
        return statistics.median(values[min(len(values) - 1, 1 + len(values) // 10) :])
    return max(values) if tag == PEAK_MEMORY_GIB else values[-1]


# --- Text ----------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report, with the picture beside it."""
    runs, verdict = report.runs, report.verdict
    parts = [
        f"# {report.title}",
        f"Verdict: **{verdict}**",
        _bullets(verdict.reasons),
        f"![Loss and gradient norm, off and on, and their differences]({PICTURE})",
        "## In numbers",
        table_text(runs),
        "Off and on are the values of the last common step, or what stands in brackets; "
        "then the largest and the mean |on - off| of all steps. The noise floor is how far "
        "apart runs come that differ in nothing that matters.",
        "## Was it off, was it on?",
        _run_table(runs),
        _proof_text(report.missing_proof),
        "## The rule",
        rule_text(report.bounds, runs),
    ]
    if found := [*report.notes, *notes(runs)]:
        parts += ["## Notes", _bullets(found)]
    for name, details in report.details.items():
        parts += [f"## The run {name}"]
        for key, value in details.items():
            fenced = f"{key}:\n\n```\n{value}\n```"
            parts.append(fenced if " " in value else f"{key}: {value}")
    return "\n\n".join(parts) + "\n"


def _proof_text(missing: Sequence[str] | None) -> str:
    if missing is None:
        return "Nobody asked for proof: the curves alone were compared."
    return _bullets(missing) or (
        "Off computed all its losses from logits, and on its loss of every micro-batch "
        "without logits: as many as were due."
    )


def table_text(runs: Runs) -> str:
    """The table, in Markdown that reads well in a terminal too."""
    cells = [["", "off", "on", "on - off", "largest", "mean", "noise floor"]]
    for row in table(runs):
        change = f" ({100 * (row.on / row.off - 1):+.2g} %)" if row.off else ""
        cells.append(
            [
                row.name,
                f"{row.off:,.7g}",
                f"{row.on:,.7g}",
                f"{row.on - row.off:+.2g}{change}",
                f"{row.largest:.2g} at step {row.largest_step}",
                f"{row.mean:.2g}",
                "none" if math.isnan(row.noise) else f"{row.noise:.2g}",
            ]
        )
    return _table(cells)


def _run_table(runs: Runs) -> str:
    cells = [["run", "is", "steps", "fused losses", "due", "computed by", "end"]]
    for run, role in roles(runs):
        log, steps = run.log, run.curves.get(LOSS)
        calls = log.fused_calls if log else None
        due = log.expected_calls if log and role.startswith("on") else 0
        end = "finished" if log and log.finished else "not known"
        cells.append(
            [
                run.name,
                role,
                f"{min(steps)} to {max(steps)}" if steps else "none",
                "not known" if calls is None else str(calls),
                "not known" if due is None else str(due),
                (log.impl if log else "") or "not known",
                f"crashed: {run.crash}" if run.crash else end,
            ]
        )
    return _table(cells)


def roles(runs: Runs) -> list[tuple[Run, str]]:
    """The runs, and what each stands for."""
    again = [(run, "off again") for run in runs.off_again]
    on_again = [(run, "on again") for run in runs.on_again]
    return [(runs.off, "off"), *again, (runs.on, "on"), *on_again]


def to_json(report: Report) -> str:
    """The report for a program. NaN and infinite values are strings."""
    runs, verdict = report.runs, report.verdict
    content = {
        "title": report.title,
        "verdict": verdict.answer,
        "step": verdict.step,
        "exit_code": verdict.exit_code,
        "reasons": verdict.reasons,
        "missing_proof": report.missing_proof,
        "notes": [*report.notes, *notes(runs)],
        "rule": asdict(report.bounds),
        "table": [asdict(row) for row in table(runs)],
        "runs": [
            {
                "name": run.name,
                "is": role,
                "log": asdict(run.log) if run.log else None,
                "fused_losses_due": run.log.expected_calls if run.log else None,
                "restarts": run.restarts,
                "crash": run.crash,
                **report.details.get(run.name, {}),
            }
            for run, role in roles(runs)
        ],
        "curves": {
            tag: asdict(curve.aligned)
            | {"allowed": curve.allowed, "telling": curve.telling}
            for tag, curve in verdict.curves.items()
        },
    }
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in cells
    ]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- Pictures ------------------------------------------------------------------------

# Light and thick under dark and thin: told apart without colour as well.
_OFF: dict[str, Any] = {"color": "#f2a93b", "linewidth": 4.5}
_ON: dict[str, Any] = {"color": "#12355b", "linewidth": 1.3}
_NOISE = {"facecolor": "#d9d9d9", "edgecolor": "#a6a6a6", "hatch": "////"}


def overlays(report: Report) -> dict[str, Curves]:
    """Name of a TensorBoard run -> its curves: the runs, differences, what is allowed."""
    found = {run.name: run.curves for run in report.runs.all}
    for tag, curve in report.verdict.curves.items():
        aligned = curve.aligned
        for name, values in {
            "difference": tuple(map(abs, aligned.differences)),
            "noise_floor": aligned.noise,
            "allowed": curve.allowed,
        }.items():
            points = zip(aligned.steps, values, strict=True)
            found.setdefault(name, {})[f"difference/{tag}"] = dict(points)
    return found


def draw(report: Report, *paths: Path) -> None:
    """Curves, differences, speed and memory, in the formats that the paths name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.5), layout="constrained")
    figure.suptitle(f"{_headline(report)}\n{report.title}", fontsize=14)
    figure.supxlabel(
        "Noise floor: how far apart runs come that differ only in the order of their sums. "
        f"Allowed: {report.bounds.noise_factor:g} times that,\nor {report.bounds.loss_bound:g} "
        f"of the loss and {report.bounds.grad_norm_bound:g} of the gradient norm where that "
        "is more. Shaded: so noisy that to agree tells little. Memory and speed are not "
        "judged.",
        fontsize="small",
    )
    panels = figure.subplots(3, 2, height_ratios=(3, 2.6, 1))
    for column, (tag, name) in enumerate(NAMES.items()):
        _draw_curves(panels[0, column], report.runs, tag, name)
        _draw_differences(panels[1, column], report, tag, name)
        panels[1, column].sharex(panels[0, column])
        if report.verdict.step is not None:
            for panel in panels[:2, column]:
                panel.axvline(report.verdict.step, color="black", linestyle=":")
    rows = {row.tag: row for row in table(report.runs)}
    for panel, tag in zip(panels[2], (TOKENS_PER_SECOND, PEAK_MEMORY_GIB), strict=True):
        _draw_bars(panel, rows.get(tag))
    for path in paths:
        figure.savefig(path, dpi=150)


def _headline(report: Report) -> str:
    verdict = report.verdict
    if verdict.answer == "different":
        return f"Different training from step {verdict.step} on"
    if verdict.answer == "cannot tell":
        return "Cannot tell whether it is the same training"
    loss = verdict.curves[LOSS]
    weak = [s for s, t in zip(loss.aligned.steps, loss.telling, strict=True) if not t]
    since = f"\n(from step {weak[0]} on, too noisy to tell much)" if weak else ""
    return f"The same training{since}"


def _draw_curves(panel: Any, runs: Runs, tag: str, name: str) -> None:
    for run, label, style in ((runs.off, "off", _OFF), (runs.on, "on", _ON)):
        curve = sorted(run.curves.get(tag, {}).items())
        if run.name != label:
            label = f"{label}: {run.name}"
        panel.plot(*zip(*curve, strict=True), label=label, **style) if curve else None
    panel.set_title(name)
    if panel.lines:
        panel.legend()
    panel.grid(alpha=0.3)


def _draw_differences(panel: Any, report: Report, tag: str, name: str) -> None:
    panel.set_title(f"difference of the {name}, |on - off|")
    panel.set_xlabel("step")
    curve = report.verdict.curves.get(tag)
    if curve is None:
        return
    steps, noise, allowed = curve.aligned.steps, curve.aligned.noise, curve.allowed
    sizes = [abs(difference) for difference in curve.aligned.differences]
    shown = [v for v in (*sizes, *noise, *allowed) if math.isfinite(v) and v > 0]
    if shown:  # logarithmic, with a place for 0
        smallest = 10.0 ** math.floor(math.log10(min(shown)))
        panel.set_yscale("symlog", linthresh=smallest, linscale=0.6)
        panel.set_ylim(0, 300 * max(shown))  # the legend's place is above
    if any(map(math.isfinite, noise)):
        panel.fill_between(steps, noise, label="noise floor", **_NOISE)
    panel.plot(steps, allowed, "--", color="black", label="allowed")
    panel.plot(steps, sizes, marker="o", markersize=2.5, label="on against off", **_ON)
    if not all(curve.telling):
        across = panel.get_xaxis_transform()
        style = {"color": "#f0f0f0", "zorder": 0, "label": "tells little"}
        weak = [not telling for telling in curve.telling]
        panel.fill_between(steps, 0, 1, where=weak, transform=across, **style)
    panel.legend(fontsize="x-small", loc="upper center", ncols=4, columnspacing=1)
    panel.grid(alpha=0.3)


def _draw_bars(panel: Any, row: Row | None) -> None:
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.set_xticks([])
    if row is None:
        panel.set_yticks([])
        return
    panel.set_title(row.name)
    change = f" ({100 * (row.on / row.off - 1):+.1f} %)" if row.off else ""
    colors = [_ON["color"], _OFF["color"]]
    bars = panel.barh([f"on{change}", "off"], [row.on, row.off], color=colors)
    panel.bar_label(bars, fmt="{:,.0f}" if row.off > 999 else "{:.3g}", padding=4)
    panel.set_xlim(0, 1.2 * max(row.off, row.on, 1e-9))
