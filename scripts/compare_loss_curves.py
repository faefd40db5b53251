#!/usr/bin/env python3
"""Is it still the same training with the fused loss on? Trains off and on, and answers.

    ./scripts/compare_loss_curves.py run train_configs/debug_model.toml
    ./scripts/compare_loss_curves.py run my_job.toml --steps 200 -- --training.seq_len 512
    ./scripts/compare_loss_curves.py read outputs/off outputs/on outputs/off_again

The exit code is the answer: 0 same, 1 different, 2 cannot tell. The folder --output gets
report.md, report.json and curves.png; report.md has the rule behind the answer.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from curve_runs import OVERLAYS, Progress, Trainer, forget_report
from environment import exit_on_signals

from torchtitan_liger.cli import FLAG_OFF, FLAG_ON, arguments_of, read_toml
from torchtitan_liger.loss_curves import (
    LOG_NAME,
    LogFacts,
    Run,
    Runs,
    read_run,
    write_tensorboard,
)
from torchtitan_liger.loss_curves_judge import (
    MIN_STEPS,
    Bounds,
    judge,
    missing_proof,
    unlike_start,
)
from torchtitan_liger.loss_curves_report import (
    PICTURE,
    Report,
    draw,
    markdown,
    overlays,
    table_text,
    to_json,
)
from torchtitan_liger.loss_curves_words import notes

RUN_HELP = """\
Trains CONFIG through run_train.sh (NGPU and its other variables count here too):

  off        without the fused loss
  on         with it
  off_again  without it, each step's sequences split into more micro-batches: the same
             tokens in the same order, but other shapes of matrix products and another
             order of the sums. That must not matter, so what it changes is the noise
             floor. (Mere repetition changed not one bit on a CPU and on a GPU, nor did
             another number of threads on a CPU.) A micro-batch of one sequence cannot
             be split; then other kernels are asked for, by ATEN_CPU_CAPABILITY and
             TORCH_BLAS_PREFER_CUBLASLT.
  on_again   on, split like that: only when the answer would be "different", because
             without it a run that spikes by chance is taken for a faulty one.

All have the same seed (1), data and weights, deterministic algorithms where torch has
them, and every step logged. Options after -- go to every run and win over these.
"""
READ_HELP = """\
Compares finished runs of any origin and length. Each RUN is a folder with TensorBoard
events or a log or both, an event file, or a log. The first is taken as off, the second
as on; further ones repeat one of them (on if their log counts fused losses) and give
the noise floor. Without further ones, the relative bounds judge alone.
"""


def main() -> int:
    exit_on_signals()
    try:
        return compare(parse_args(sys.argv[1:]))
    except (OSError, ValueError, ImportError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # whose exit code would say "different"
        traceback.print_exc()
        return 2


def compare(args: argparse.Namespace) -> int:
    """The exit code, when all is written."""
    bounds = Bounds(args.loss_bound, args.grad_norm_bound, args.noise_factor)
    if args.command == "run":
        args.output.mkdir(parents=True, exist_ok=True)  # before hours of training
        report = train_all(args, bounds)
    else:
        report = read_all(args, bounds)
    write(report, args)
    verdict = report.verdict
    print(f"\n{report.title}\n\n{table_text(report.runs)}\n\nVerdict: {verdict}")
    print(*(f"  {reason}" for reason in verdict.reasons), sep="\n")
    for note in notes(report.runs):
        print(f"  Note: {note}")
    print(f"\n{args.output / 'report.md'}", flush=True)
    return verdict.exit_code


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--output", type=Path, help="folder of the report and the runs")
    add("--svg", action="store_true", help="the picture as SVG too")
    add("--tensorboard", action="store_true", help="overlays for TensorBoard too")
    bounds = {
        "--loss-bound": (Bounds.loss_bound, "share of the loss"),
        "--grad-norm-bound": (Bounds.grad_norm_bound, "share of the gradient norm"),
        "--noise-factor": (Bounds.noise_factor, "multiple of the noise floor"),
    }
    for option, (default, what) in bounds.items():
        text = f"{what} by which off and on may differ (default: %(default)g)"
        add(option, type=float, default=default, metavar="X", help=text)

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        parents=[common],
        formatter_class=raw,
        description=RUN_HELP,
        usage="%(prog)s CONFIG [options] [-- --section.option value ...]",
        help="train off and on, then compare",
    )
    run.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    run.add_argument("--steps", type=int, help="training.steps (default: as in CONFIG)")
    read = commands.add_parser(
        "read",
        parents=[common],
        formatter_class=raw,
        description=READ_HELP,
        help="compare finished runs",
    )
    read.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    read.add_argument(
        "--curves-only",
        action="store_true",
        help="compare any two runs: no proof that one was off and the other on",
    )
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.overrides = list(argv[split + 1 :])
    if args.command == "run":
        if not args.config.is_file():
            run.error(f"there is no CONFIG {args.config}")
        if args.steps is not None and args.steps < MIN_STEPS:
            run.error(f"--steps is {args.steps}; {MIN_STEPS} are needed to compare")
        toml = read_toml([f"--job.config_file={args.config}"])[1]
        named = arguments_of(args.overrides, "head_loss")
        if named or toml.get("head_loss"):
            run.error(
                "the run with the fused loss off cannot train on "
                f"{named[0] if named else '[head_loss]'}: leave it out"
            )
        args.output = args.output or Path("outputs", f"compare_{args.config.stem}")
    else:
        if len(args.runs) < 2 or args.overrides:
            read.error(
                "name two runs or more: off, on, and any that repeat one of them"
            )
        args.output = args.output or Path("outputs", "compare")
    return args


# --- read ----------------------------------------------------------------------------


def read_all(args: argparse.Namespace, bounds: Bounds) -> Report:
    """Compare finished runs."""
    names = distinct_names(args.runs)
    pairs = zip(args.runs, names, strict=True)
    runs = group([read_run(path, name) for path, name in pairs])
    proof = not args.curves_only
    verdict = judge(runs, bounds, proof=proof)
    title = "off and on" if args.curves_only else "fused loss off and on"
    if names[:2] != ["off", "on"]:
        title = f"off: {runs.off.name}, on: {runs.on.name}"
    return Report(title, runs, verdict, bounds, missing_proof(runs) if proof else None)


def group(runs: Sequence[Run]) -> Runs:
    """Runs by what they stand for: off, on, then repetitions."""
    off, on, *rest = runs
    on_again = [run for run in rest if run.log and run.log.fused_calls]
    off_again = [run for run in rest if run not in on_again]
    return Runs(off, on, tuple(off_again), tuple(on_again))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbered where none do."""
    parts = [path.absolute().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    names: list[str] = []
    for i, part in enumerate(parts):
        again = parts[:i].count(part)
        names.append("/".join(part[-length:]) + (f" ({again + 1})" if again else ""))
    return names


# --- run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reordering:
    """How a job is changed so that only its sums are taken in another order."""

    label: str
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def reorder(log: LogFacts) -> Reordering:
    """A change to the job that wrote `log` which must not matter."""
    size, total = log.local_batch_size or 1, log.global_batch_size
    if size == 1:
        env = {"ATEN_CPU_CAPABILITY": "default", "TORCH_BLAS_PREFER_CUBLASLT": "1"}
        return Reordering("with other kernels", env=env)
    smaller = next(size // d for d in range(2, size + 1) if size % d == 0)
    sizes = {"local_batch_size": smaller, "global_batch_size": total}
    overrides = tuple(f"--training.{name}={value}" for name, value in sizes.items())
    return Reordering(f"in micro-batches of {smaller} instead of {size}", overrides)


def train_all(args: argparse.Namespace, bounds: Bounds) -> Report:
    """Train off, on and again, and compare.

    Raises:
        ValueError: when off ends before its first step: as others would, of a typo.
    """
    details: dict[str, dict[str, str]] = {}
    notes = [
        "Deterministic algorithms and a line of log for each step cost speed; "
        "scripts/bench_train.py measures it without them."
    ]
    with Progress(num_runs=3) as progress:
        trainer = Trainer(args, progress, details)
        off = trainer.train("off", [FLAG_OFF])
        if off.crash and not off.curves:
            log = args.output / "off" / LOG_NAME
            raise ValueError(f"off ended before its first step: {off.crash} ({log})")
        for again in ("off_again", "on_again"):
            trainer.forget(again)
        on = trainer.train("on", [FLAG_ON])
        runs = Runs(off, on)
        other = reorder(off.log or LogFacts())
        if off.curves:
            again = trainer.train("off_again", [FLAG_OFF, *other.overrides], other.env)
            runs = replace(runs, off_again=(again,))
            notes.append(
                f"off_again is off {other.label}: the same tokens in the same order, the "
                "sums in another."
            )
        verdict = judge(runs, bounds, same_start=True)
        if verdict.answer == "different" and not any(run.crash for run in runs.all):
            progress.add_run()
            notes.append(f"After three runs the verdict was `{verdict}`.")
            again = trainer.train("on_again", [FLAG_ON, *other.overrides], other.env)
            if problem := again.crash or unlike_start(on, again, bounds):
                notes.append(f"on_again does not count: {problem}.")
            else:
                notes.append(f"on_again is on {other.label}.")
                runs = replace(runs, on_again=(again,))
                verdict = judge(runs, bounds, same_start=True)
    title = f"{args.config.stem}, fused loss off and on"
    proof = missing_proof(runs)
    return Report(title, runs, verdict, bounds, proof, notes, details)


# --- The answer ----------------------------------------------------------------------


def write(report: Report, args: argparse.Namespace) -> None:
    """The files of a comparison."""
    folder: Path = args.output
    folder.mkdir(parents=True, exist_ok=True)
    forget_report(folder)
    (folder / "report.md").write_text(markdown(report))
    (folder / "report.json").write_text(to_json(report))
    picture = folder / PICTURE
    pictures = [picture, picture.with_suffix(".svg")] if args.svg else [picture]
    draw(report, *pictures)
    if args.tensorboard:
        for name, curves in overlays(report).items():
            target = folder / OVERLAYS / name
            if target.exists():
                raise FileExistsError(
                    f"{target} is not of an earlier comparison: choose another --output"
                )
            write_tensorboard(target, curves)


if __name__ == "__main__":
    sys.exit(main())
