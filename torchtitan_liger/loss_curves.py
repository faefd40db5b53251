"""Training curves: read from TensorBoard and from torchtitan's log, and aligned."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

LOSS = "loss_metrics/global_avg_loss"
GRAD_NORM = "grad_norm"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY_GIB = "memory/max_reserved(GiB)"
VALIDATION_LOSS = "validation_metrics/loss"
TERM_PREFIX = "head_loss/"

Curves = dict[str, dict[int, float]]
"""Tag -> step -> value."""

LOG_NAME = "run.log"


@dataclass(frozen=True)
class LogFacts:
    """What a log says about its run beyond the curves; None where it does not say."""

    first_step: int | None = None
    last_step: int | None = None
    """The step that the run was to end with, or did when its data ran out."""
    local_batch_size: int | None = None
    global_batch_size: int | None = None
    accumulation_steps: int | None = None
    """Micro-batches per step and rank."""
    fused_calls: int | None = None
    """Losses that the LM head computed without logits."""
    impl: str = ""
    finished: bool = False
    error: str = ""
    """The exception that ended the run, in one line."""

    @property
    def expected_calls(self) -> int | None:
        """Steps x micro-batches of the process that wrote the end of the log."""
        if not (self.first_step and self.last_step and self.accumulation_steps):
            return None
        return (self.last_step - self.first_step + 1) * self.accumulation_steps


@dataclass(frozen=True)
class Run:
    """A training run, as far as its records tell."""

    name: str
    curves: Curves
    resolution: dict[str, float] = field(default_factory=dict)
    """Tag -> the last printed digit, for curves that come from a log."""
    log: LogFacts | None = None
    restarts: tuple[int, ...] = ()
    """The steps at which training was taken up again."""
    crash: str = ""
    """Why the run did not end as it should; empty if it did."""


def read_run(path: str | Path, name: str = "") -> Run:
    """A run from its folder, its log or its event file.

    A folder gives its TensorBoard events, at any depth, and its log: `run.log`, or the
    only file `*.log`. Steps that are in the log alone (a process that is killed loses
    the events of its last two minutes) are taken from there.

    Raises:
        FileNotFoundError: when there is nothing at `path`, or nothing to read.
        ValueError: when a log has no line of torchtitan's with a step.
    """
    path = Path(path)
    name = name or path.name
    files, logs = find_event_files(path), [path / LOG_NAME]
    if path.is_file():
        logs = [] if files else [path]
    elif not logs[0].exists():
        logs = [*path.glob("*.log")]
    if not files and len(logs) != 1:
        raise FileNotFoundError(
            f"{path} is no log and has neither TensorBoard events "
            "(--metrics.enable_tensorboard) nor a single file *.log"
        )
    curves, restarts = _merge(files)
    if len(logs) != 1:
        return Run(name, curves, restarts=tuple(restarts))
    log = parse_log(logs[0].read_text(errors="replace"), name)
    if not files and LOSS not in log.curves and not log.crash:
        raise ValueError(
            f"{path} has no line such as 'step:  1  loss: 10.20000  grad_norm: 0.9', "
            "which torchtitan prints on the rank that LOG_RANK names"
        )
    resolution = {}
    for tag, curve in log.curves.items():
        ours = curves.setdefault(tag, {})
        if missing := {s: v for s, v in curve.items() if s not in ours}:
            curves[tag] = dict(sorted({**ours, **missing}.items()))
            resolution[tag] = log.resolution[tag]
    return replace(
        log,
        curves=curves,
        resolution=resolution,
        restarts=tuple(sorted({*restarts, *log.restarts})),
    )


def read_tensorboard(folder: str | Path) -> Curves:
    """All scalars under `folder`, of any depth.

    Where several event files hold a step (a restart), the last one written counts, and
    what came after that step in the earlier ones does not.

    Raises:
        FileNotFoundError: when there is no event file.
    """
    files = find_event_files(folder)
    if not files:
        raise FileNotFoundError(
            f"no TensorBoard events under {folder}; was the run started with "
            "--metrics.enable_tensorboard?"
        )
    return _merge(files)[0]


def find_event_files(path: str | Path) -> list[Path]:
    """The event files at or under `path`, of any depth; of several ranks, those of one.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no run at {path}")
    files = [path] if path.is_file() else path.rglob("*")
    found = sorted(f for f in files if f.name.startswith("events.out.tfevents."))
    # metrics.save_for_all_ranks
    return [f for f in found if not _OTHER_RANK.search(f.as_posix())] or found


_OTHER_RANK = re.compile(r"/rank_[1-9]\d*/")


def parse_log(text: str, name: str = "") -> Run:
    """A run from what torchtitan prints: any prefix, with or without ANSI colours.

    Where several ranks speak, the first one that prints a step is listened to. What a
    restarted run had printed from the step on at which it was taken up does not count.
    """
    parser = _LogParser()
    whole, _, cut = text.rpartition("\n")
    # Of a line without an end the last number may lack digits.
    lines = [*whole.splitlines(), *([] if _STEP.search(cut) else [cut])]
    for line in lines:
        parser.feed(_ANSI.sub("", line))
    return parser.run(name)


def write_tensorboard(folder: str | Path, curves: Curves) -> None:
    """An event file in `folder` with all of `curves`, as `read_tensorboard` reads it."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, curve in curves.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)


# --- TensorBoard ---------------------------------------------------------------------


def _read_events(file: Path) -> tuple[float, Curves]:
    """When a process began, and its curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    curves: Curves = {}
    start = math.inf
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        curves[tag] = {event.step: event.value for event in scalars}
        start = min(start, scalars[0].wall_time)
    return start, curves


def _merge(files: Iterable[Path]) -> tuple[Curves, list[int]]:
    """One run out of several processes; the steps at which it was taken up again."""
    merged: Curves = {}
    restarts = []
    for _, curves in sorted(map(_read_events, files), key=itemgetter(0)):
        if LOSS in curves and LOSS in merged:
            restarts.append(min(curves[LOSS]))
        for tag, curve in curves.items():
            merged[tag] = _continue_at(merged.get(tag, {}), min(curve)) | curve
    return merged, restarts


def _continue_at(curve: dict[int, float], step: int) -> dict[int, float]:
    return {s: value for s, value in curve.items() if s < step}


# --- The log -------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NUMBER = r"[-+]?(?:nan|inf|[\d,]*\.?\d+(?:[eE][-+]?\d+)?)"
_STEP = re.compile(r"(?:^|\W)(validate )?step:\s*(\d+)\s+(loss:.*)")
_PAIR = re.compile(rf"([A-Za-z]\w*):\s*({_NUMBER})")
_RANK = re.compile(r"^\W*\[([A-Za-z]+\d+)\]:")  # torchrun's: role and rank
_STARTS = re.compile(r"Training starts at step (\d+)")
_SIZES = re.compile(
    r"local batch size (\d+), global batch size (\d+), "
    r"gradient accumulation steps (\d+),.* total steps (\d+)"
)
_COUNT = re.compile(r"The LM head computed (\d+) losses without logits \((\w+)\)")
_ERROR = re.compile(
    r"(?:^|\s)((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Interrupt)(?::\s.*)?"
    r"|Signal \d+ \(\w+\) received by PID \d+)$"
)
# torchrun's own, after the one that caused it.
_CONSEQUENCE = "ChildFailedError"

_TAGS = {
    "loss": LOSS,
    "grad_norm": GRAD_NORM,
    "memory": PEAK_MEMORY_GIB,
    "tps": TOKENS_PER_SECOND,
    "tflops": "tflops",
    "mfu": "mfu(%)",
}
_VALIDATION_TAGS = {
    "loss": VALIDATION_LOSS,
    "memory": "validation_metrics/memory/max_reserved(GiB)",
    "tps": "validation_metrics/throughput(tps)",
}


class _LogParser:
    """Reads a log line by line."""

    def __init__(self) -> None:
        self.curves: Curves = {}
        self.resolution: dict[str, float] = {}
        self.facts = LogFacts()
        self.restarts: list[int] = []
        self.rank: str | None = None

    def feed(self, line: str) -> None:
        match = _RANK.search(line)
        rank = match[1] if match else ""
        if match := _ERROR.search(line):
            if not self.facts.error and _CONSEQUENCE not in line:
                self.facts = replace(self.facts, error=match[1][:500])
        elif self.rank not in (None, rank):
            pass
        elif match := _STEP.search(line):
            self.rank = rank
            self._step(match[1] is not None, int(match[2]), match[3])
        elif match := _SIZES.search(line):
            local, total, accumulation, steps = map(int, match.groups())
            # A new process; what the one before it said about its end is void.
            self.facts = LogFacts(
                last_step=steps,
                local_batch_size=local,
                global_batch_size=total,
                accumulation_steps=accumulation,
            )
        elif match := _STARTS.search(line):
            self.facts = replace(self.facts, first_step=int(match[1]))
        elif match := _COUNT.search(line):
            self.facts = replace(self.facts, fused_calls=int(match[1]), impl=match[2])
        elif "Ran out of data; last step was canceled" in line:
            last = next(reversed(self.curves.get(LOSS, {})), 0)
            self.facts = replace(self.facts, last_step=last)
        elif "Training completed" in line:
            self.facts = replace(self.facts, finished=True)

    def _step(self, validation: bool, step: int, values: str) -> None:
        latest = next(reversed(self.curves.get(LOSS, {})), step - 1)  # they ascend
        if not validation and step <= latest:
            self.restarts.append(step)
            for tag, curve in self.curves.items():
                self.curves[tag] = _continue_at(curve, step)
        tags = _VALIDATION_TAGS if validation else _TAGS
        for key, text in _PAIR.findall(values):
            if key not in tags:
                continue
            tag = tags[key]
            self.curves.setdefault(tag, {})[step] = float(text.replace(",", ""))
            # Of a line that was cut off, it may be any digit.
            if digit := _last_digit(text):
                self.resolution[tag] = min(digit, self.resolution.get(tag, digit))

    def run(self, name: str) -> Run:
        curves = {tag: curve for tag, curve in self.curves.items() if curve}
        crash = "" if self.facts.finished else self.facts.error
        return Run(
            name, curves, self.resolution, self.facts, tuple(self.restarts), crash
        )


def _last_digit(text: str) -> float:
    if not math.isfinite(float(text.replace(",", ""))):
        return 0.0
    mantissa, _, exponent = text.lower().partition("e")
    _, _, decimals = mantissa.partition(".")
    return 10.0 ** (int(exponent or 0) - len(decimals))


# --- Several runs --------------------------------------------------------------------

LOOKAHEAD = 2
"""Steps by which a spike may come sooner in one run than in another."""


@dataclass(frozen=True)
class Runs:
    """The runs of a comparison, by what they stand for."""

    off: Run
    on: Run
    off_again: tuple[Run, ...] = ()
    on_again: tuple[Run, ...] = ()

    @property
    def all(self) -> tuple[Run, ...]:
        return (self.off, *self.off_again, self.on, *self.on_again)

    @property
    def pairs(self) -> tuple[tuple[Run, Run], ...]:
        """Runs that differ in nothing that matters."""
        return (
            *((self.off, again) for again in self.off_again),
            *((self.on, again) for again in self.on_again),
        )


@dataclass(frozen=True)
class Aligned:
    """One curve of two runs, at the steps that both have."""

    tag: str
    steps: tuple[int, ...]
    off: tuple[float, ...]
    on: tuple[float, ...]
    noise: tuple[float, ...]
    """How far runs without a difference are apart up to here; NaN where not known."""
    apart: tuple[float, ...]
    """How far they are apart at this step; NaN where not known."""

    @property
    def differences(self) -> tuple[float, ...]:
        """on - off; 0 where both are the same infinity or NaN."""
        return tuple(
            0.0 if a == b or (a != a and b != b) else b - a
            for a, b in zip(self.off, self.on, strict=True)
        )


def align(tag: str, runs: Runs) -> Aligned:
    """The curve `tag` of off and on, at common steps, with its noise floor.

    The floor at a step is the largest difference within a pair at any step up to
    `LOOKAHEAD` steps later.
    """
    off, on = (run.curves.get(tag, {}) for run in (runs.off, runs.on))
    steps = tuple(sorted(off.keys() & on.keys()))
    spreads = [spread(tag, *pair) for pair in runs.pairs]
    spread_steps = sorted(set().union(*spreads))
    apart = {n: max(s[n] for s in spreads if n in s) for n in spread_steps}
    envelope, noise = [*accumulate(apart.values(), max)], []
    for step in steps:
        seen = bisect_right(spread_steps, step)
        known = seen and step <= spread_steps[-1]
        index = min(seen - 1 + LOOKAHEAD, len(envelope) - 1)
        noise.append(envelope[index] if known else math.nan)
    return Aligned(
        tag,
        steps,
        tuple(off[step] for step in steps),
        tuple(on[step] for step in steps),
        tuple(noise),
        tuple(apart.get(step, math.nan) for step in steps),
    )


def spread(tag: str, one: Run, other: Run) -> dict[int, float]:
    """|other - one| at common steps; infinite where the other alone is not finite."""
    a, b = one.curves.get(tag, {}), other.curves.get(tag, {})
    return {
        step: abs(b[step] - a[step]) if math.isfinite(b[step]) else math.inf
        for step in sorted(a.keys() & b.keys())
        if math.isfinite(a[step])
    }
