"""Training curves, per tag and step: read from TensorBoard and from torchtitan's log."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

LOSS = "loss_metrics/global_avg_loss"
GRAD_NORM = "grad_norm"
TOKENS_PER_SECOND = "throughput(tps)"
PEAK_MEMORY_GIB = "memory/max_reserved(GiB)"
VALIDATION_LOSS = "validation_metrics/loss"
TERM_PREFIX = "loss_metrics/"

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
    validated: bool = False
    finished: bool = False
    error: str = ""
    """The exception that ended the run, in one line."""

    @property
    def expected_calls(self) -> int | None:
        """Steps x micro-batches of the process that wrote the end of the log."""
        if None in (self.first_step, self.last_step, self.accumulation_steps):
            return None
        assert self.first_step is not None
        assert self.last_step is not None
        assert self.accumulation_steps is not None
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
    only file `*.log`. Steps that are in the log alone (a killed process loses the
    events of its last two minutes) are taken from there.

    Raises:
        FileNotFoundError: when there is nothing at `path`, or nothing to read.
        ValueError: when a log has no line of torchtitan's with a step.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no run at {path}")
    if path.is_file() and "tfevents" not in path.name:
        return _read_log_file(path, name or path.name)
    logs = [path / LOG_NAME] if (path / LOG_NAME).exists() else [*path.glob("*.log")]
    files = [path] if path.is_file() else find_event_files(path)
    if len(logs) != 1:
        if not files:
            raise FileNotFoundError(
                f"{path} has no TensorBoard events and {len(logs)} logs: name a folder "
                "with events (--metrics.enable_tensorboard), or a log"
            )
        curves, restarts = _merge([_read_events(file) for file in files])
        return Run(name or path.name, curves, restarts=restarts)
    log = parse_log(logs[0].read_text(errors="replace"), name or path.name)
    if not files:
        _require_steps(log, logs[0])
        return log
    curves, restarts = _merge([_read_events(file) for file in files])
    resolution = {}
    for tag, curve in log.curves.items():
        ours = curves.get(tag, {})
        if missing := {s: v for s, v in curve.items() if s not in ours}:
            # Names that only the console has are no tags of TensorBoard's.
            curves[tag] = dict(sorted({**ours, **missing}.items()))
            resolution[tag] = log.resolution[tag]
    restarts = tuple(sorted({*restarts, *log.restarts}))
    return Run(log.name, curves, resolution, log.log, restarts, log.crash)


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
    return _merge([_read_events(file) for file in files])[0]


def find_event_files(folder: str | Path) -> list[Path]:
    """The event files under `folder`, of any depth."""
    return sorted(Path(folder).rglob("events.out.tfevents.*"))


def parse_log(text: str, name: str = "") -> Run:
    """A run from what torchtitan prints: any prefix, with or without ANSI colours.

    Where several ranks speak, the first one that prints a step is listened to.
    """
    parser = _LogParser()
    for line in text.splitlines():
        parser.feed(_ANSI.sub("", line))
    return parser.run(name)


# --- TensorBoard ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Segment:
    """The curves of one process, and when it began."""

    start: float
    curves: Curves


def _read_events(file: Path) -> _Segment:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    curves: Curves = {}
    start = math.inf
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        curves[tag] = {event.step: event.value for event in scalars}
        start = min(start, scalars[0].wall_time)
    return _Segment(start, curves)


def _merge(segments: Iterable[_Segment]) -> tuple[Curves, tuple[int, ...]]:
    """One run out of several processes; the steps at which it was taken up again."""
    merged: Curves = {}
    restarts = []
    for segment in sorted(segments, key=lambda s: s.start):
        steps = segment.curves.get(LOSS, {})
        if steps and merged.get(LOSS):
            restarts.append(min(steps))
        for tag, curve in segment.curves.items():
            merged[tag] = _continue_at(merged.get(tag, {}), min(curve)) | curve
    return merged, tuple(restarts)


def _continue_at(curve: dict[int, float], step: int) -> dict[int, float]:
    return {s: value for s, value in curve.items() if s < step}


# --- The log -------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NUMBER = r"[-+]?(?:nan|inf|[\d,]*\.?\d+(?:[eE][-+]?\d+)?)"
_STEP = re.compile(r"(?:^|\W)(validate )?step:\s*(\d+)\s+(\S.*)")
_PAIR = re.compile(rf"([A-Za-z]\w*):\s*({_NUMBER})")
_RANK = re.compile(r"\[rank(\d+)\]:")
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
                self.facts = replace(self.facts, error=match[1])
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
            last = max(self.curves.get(LOSS, {}), default=0)
            self.facts = replace(self.facts, last_step=last)
        elif "Training completed" in line:
            self.facts = replace(self.facts, finished=True)

    def _step(self, validation: bool, step: int, values: str) -> None:
        if validation:
            self.facts = replace(self.facts, validated=True)
        elif step <= max(self.curves.get(LOSS, {}), default=step - 1):
            self.restarts.append(step)
            for tag, curve in self.curves.items():
                self.curves[tag] = _continue_at(curve, step)
        for key, text in _PAIR.findall(values):
            if validation:
                tag = _VALIDATION_TAGS.get(key, f"validation_metrics/{key}")
            else:
                tag = _TAGS.get(key, TERM_PREFIX + key)
            self.curves.setdefault(tag, {})[step] = float(text.replace(",", ""))
            self.resolution[tag] = max(_last_digit(text), self.resolution.get(tag, 0.0))

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


def _read_log_file(path: Path, name: str) -> Run:
    run = parse_log(path.read_text(errors="replace"), name)
    _require_steps(run, path)
    return run


def _require_steps(run: Run, path: Path) -> None:
    if LOSS not in run.curves and not run.crash:
        raise ValueError(
            f"{path} has no line such as 'step:  1  loss: 10.20000  grad_norm: 0.9', "
            "which torchtitan prints on the rank that LOG_RANK names"
        )


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbered where none do."""
    parts = [Path(path).absolute().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    names: list[str] = []
    for part in parts:
        name = "/".join(part[-length:])
        again = sum(1 for other in parts[: len(names)] if other == part)
        names.append(f"{name} ({again + 1})" if again else name)
    return names
