"""Is it still the same training? Two runs are aligned, compared with the noise, judged.

The noise floor comes from runs that differ in nothing that matters: the same job with its
sums in another order. Two such runs drift apart, slowly at first, then faster, and a
spike comes a step sooner in one of them. How far apart they have come tells what a
difference between "off" and "on" means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    TERM_PREFIX,
    Aligned,
    LogFacts,
    Run,
    Runs,
    align,
    spread,
)

NAMES = {LOSS: "loss", GRAD_NORM: "gradient norm"}
"""The curves that are judged. Adam hides a gradient of the wrong size from the loss."""

MIN_STEPS = 5
ENOUGH_STEPS = 20
"""Steps with little noise after which a loss that agrees has been tried enough."""
MAX_NOISE = {LOSS: 0.1, GRAD_NORM: 0.5}
"""A step where the noise alone would allow more than this share tells nothing."""
MOST_NOISE_OF_ON = 10.0
"""How many times further apart than two runs of "off" two runs of "on" may be."""
FUSED_IMPLS = ("liger", "chunked")
ON_ALONE = {TERM_PREFIX + name for name in ("cross_entropy", "accuracy")}
"""Curves that there are with the fused loss only."""


@dataclass(frozen=True)
class Bounds:
    """How far apart two runs may be."""

    loss_bound: float = 1e-4
    """Relative difference of the loss that is always allowed."""
    grad_norm_bound: float = 1e-3
    """Relative difference of the gradient norm that is always allowed."""
    noise_factor: float = 5.0
    """Multiple of the noise floor that is allowed."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{option.name} is {value}; it must be a number greater than 0"
                )

    def bound(self, tag: str) -> float:
        return {LOSS: self.loss_bound, GRAD_NORM: self.grad_norm_bound}[tag]


@dataclass(frozen=True)
class Judged:
    """A curve, with what is allowed at each step."""

    aligned: Aligned
    allowed: tuple[float, ...]
    """NaN at a step that is not judged."""
    telling: tuple[bool, ...]
    """Whether there is so little noise that to agree means something."""
    first_excess: int | None
    """The first step with a larger difference."""
    lasting: str = ""
    """How large the differences are on average, where that alone is too much."""


@dataclass(frozen=True)
class Verdict:
    """The answer, and what led to it."""

    answer: Literal["same", "different", "cannot tell"]
    step: int | None
    """The first step that differs."""
    reasons: tuple[str, ...]
    curves: dict[str, Judged] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return {"same": 0, "different": 1, "cannot tell": 2}[self.answer]

    def __str__(self) -> str:
        at = f" at step {self.step}" if self.step is not None else ""
        return self.answer + at


def judge_curve(aligned: Aligned, runs: Runs, bounds: Bounds, end: float) -> Judged:
    """Compare each difference with what is allowed, at the steps before `end`."""
    tag = aligned.tag
    both = (runs.off, runs.on)
    # Two roundings, half a digit each; a hair more for the subtraction itself.
    rounding = max(run.resolution.get(tag, 0.0) for run in both) * (1 + 1e-6)
    allowed, telling, first_excess = [], [], None
    differences = aligned.differences
    for i, step in enumerate(aligned.steps):
        off, noise = abs(aligned.off[i]), aligned.noise[i]
        within_noise = bounds.noise_factor * noise if runs.pairs else 0.0
        telling.append(step < end and within_noise <= MAX_NOISE[tag] * off)
        limit = max(bounds.bound(tag) * off, within_noise)
        # Where two runs have drifted apart, their gradients spike at different steps.
        if not telling[-1] and (tag == GRAD_NORM or not within_noise < math.inf):
            limit = math.nan
        if step >= end:
            limit = math.nan
        allowed.append(limit + rounding)
        size = abs(differences[i])
        if not math.isfinite(size):  # off is finite, so on is not
            excess = step < end and not (runs.pairs and not math.isfinite(noise))
        else:
            excess = size > allowed[-1]
        if excess and first_excess is None:
            first_excess = step
    lasting = ""
    if first_excess is None:
        first_excess, lasting = _lasting(aligned, allowed, bounds, rounding)
    return Judged(aligned, tuple(allowed), tuple(telling), first_excess, lasting)


def _lasting(
    aligned: Aligned, allowed: Sequence[float], bounds: Bounds, rounding: float
) -> tuple[int | None, str]:
    """From which step on off and on are too far apart on average; and how far, in words.

    The noise floor never falls: after one spike of the noise, it would allow a small
    difference for ever.
    """
    rows = [
        (step, abs(off), abs(size), apart)
        for step, off, size, apart, limit in zip(
            aligned.steps,
            aligned.off,
            aligned.differences,
            aligned.apart,
            allowed,
            strict=True,
        )
        if not (math.isnan(limit) or math.isnan(apart))
    ]
    if not rows:
        return None, ""
    steps, *columns = zip(*rows, strict=True)
    mean_off, mean, noise = (sum(column) / len(steps) for column in columns)
    limit = max(bounds.bound(aligned.tag) * mean_off, bounds.noise_factor * noise)
    limit += rounding
    larger = [step for step, _, size, _ in rows if size > limit]
    if not (larger and limit < mean < math.inf):
        return None, ""
    text = (
        f"{NAMES[aligned.tag]} on average {mean:.2g} apart ({_percent(mean, mean_off)})"
    )
    text += f", {limit:.2g} allowed ({_percent(limit, mean_off)})"
    return larger[0], text


def judge(
    runs: Runs, bounds: Bounds, *, proof: bool = True, same_start: bool = False
) -> Verdict:
    """The verdict on `runs`.

    Args:
        proof: whether "off" and "on" have to be proven by the counts in their logs.
        same_start: whether runs that differ in nothing that matters have to begin with
            the same loss.
    """
    not_finite = _not_finite(runs.off)
    end = min(not_finite, default=math.inf)
    curves = {
        tag: judge_curve(align(tag, runs), runs, bounds, end)
        for tag in NAMES
        if tag in runs.off.curves and tag in runs.on.curves
    }
    unlike = []
    if same_start:
        unlike = [text for pair in runs.pairs if (text := unlike_start(*pair, bounds))]
    found = [c for c in curves.values() if c.first_excess is not None]
    found = [c for c in found if not c.lasting] or found
    excesses = [c.first_excess for c in found if c.first_excess is not None]
    unsound = unlike + unrepeatable(runs, bounds)
    if excesses and not unsound and not (proof and not_off(runs)):
        step = min(excesses)
        reasons = [
            _describe_excess(curve, step)
            for curve in found
            if curve.first_excess == step
        ]
        return Verdict("different", step, tuple(reasons), curves)

    problems = unsound + [
        f"{run.name} crashed: {run.crash}" for run in runs.all if run.crash
    ]
    if proof:
        problems += missing_proof(runs)
    for run in runs.all:
        if bad := _not_finite(run):
            problems.append(f"{run.name}: {bad[min(bad)]} at step {min(bad)}")
    problems += [
        f"{run.name} has no {name}"
        for tag, name in NAMES.items()
        for run in (runs.off, runs.on)
        if not run.curves.get(tag)
    ]
    for curve in curves.values():
        problems += _too_little(curve)
    if problems:
        return Verdict("cannot tell", None, tuple(problems), curves)
    reasons = [
        _describe_agreement(curve, bool(runs.pairs)) for curve in curves.values()
    ]
    return Verdict("same", None, tuple(reasons), curves)


def missing_proof(runs: Runs) -> list[str]:
    """What is missing to know that "off" was off and "on" was on."""
    problems = not_off(runs)
    if not problems:
        # A repetition without a log has no curves of a fused loss; `not_off` has looked.
        offs = [runs.off, *(again for again in runs.off_again if again.log)]
        problems += [
            _unproven(run)
            for run in offs
            if (run.log or LogFacts()).fused_calls is None
        ]
    for run in (runs.on, *runs.on_again):
        log = run.log or LogFacts()
        if log.fused_calls is None:
            problems.append(_unproven(run))
            continue
        expected = log.expected_calls
        # Those of validation are not counted.
        as_due = log.fused_calls == expected
        if log.fused_calls == 0 or log.impl not in FUSED_IMPLS or not as_due:
            wanted = "" if expected is None else f", where {expected} were due"
            problems.append(f"{run.name} was not on: {_describe_calls(run)}{wanted}")
    return problems


def not_off(runs: Runs) -> list[str]:
    """Runs that stand for "off", and had the fused loss on."""
    problems = []
    for run in (runs.off, *runs.off_again):
        if run.log and run.log.fused_calls:
            problems.append(f"{run.name} was not off: {_describe_calls(run)}")
        elif ON_ALONE & run.curves.keys():
            problems.append(f"{run.name} was not off: it has curves {TERM_PREFIX}...")
    return problems


def _unproven(run: Run) -> str:
    where = "its log does not" if run.log else "there is no log to"
    return f"{run.name}: {where} say how often the LM head computed a fused loss"


def _describe_calls(run: Run) -> str:
    assert run.log is not None
    return f"its LM head computed {run.log.fused_calls} fused losses ({run.log.impl})"


def _not_finite(run: Run) -> dict[int, str]:
    return {
        step: f"the {name} is {value}"
        for tag, name in NAMES.items()
        for step, value in run.curves.get(tag, {}).items()
        if not math.isfinite(value)
    }


def unlike_start(one: Run, other: Run, bounds: Bounds) -> str:
    """Why two runs do not begin with the same weights and data; empty if they do."""
    for tag, name in NAMES.items():
        for step, size in [*spread(tag, one, other).items()][:1]:
            value = one.curves[tag][step]
            if size > bounds.bound(tag) * abs(value):
                return (
                    f"{one.name} and {other.name}, which differ in nothing that matters, "
                    f"begin with a {name} {_percent(size, value)} apart (step {step})"
                )
    return ""


def unrepeatable(runs: Runs, bounds: Bounds) -> list[str]:
    """Why repetitions of "on" are no measure of harmless noise; empty if they are.

    Where two runs of "off" stay close and two of "on" do not, either chance has put one
    of them on another path or the fused loss depends on the order of its sums.
    """
    found = []
    for again in runs.on_again:
        for tag, name in NAMES.items():
            offs = [spread(tag, runs.off, other) for other in runs.off_again]
            most = max((v for values in offs for v in values.values()), default=0.0)
            for step, size in spread(tag, runs.on, again).items():
                value = abs(runs.on.curves[tag][step])
                if size > max(MOST_NOISE_OF_ON * most, bounds.bound(tag) * value):
                    found.append(
                        f"{runs.on.name} does not repeat itself: the {name} of "
                        f"{again.name} is {size:.2g} away at step {step}, while runs of "
                        f"off are at most {most:.2g} apart"
                    )
                    break
    return found


def _too_little(curve: Judged) -> list[str]:
    name, total, num = NAMES[curve.aligned.tag], len(curve.telling), sum(curve.telling)
    if total < MIN_STEPS:
        return [f"only {total} common steps with a {name}; {MIN_STEPS} are needed"]
    needed = MIN_STEPS
    if curve.aligned.tag == LOSS:
        needed = max(MIN_STEPS, min(ENOUGH_STEPS, -(-total // 2)))
    if num >= needed:
        return []
    first = curve.aligned.steps[curve.telling.index(False)]
    return [
        f"the {name} tells something at {num} of {total} steps only, {needed} are needed: "
        f"from step {first} on, the noise floor is too large or not known. A smaller "
        "learning rate, or a longer warmup, leaves less noise"
    ]


def _describe_excess(curve: Judged, step: int) -> str:
    aligned = curve.aligned
    if curve.lasting:
        return curve.lasting
    i = aligned.steps.index(step)
    name, off, on = NAMES[aligned.tag], aligned.off[i], aligned.on[i]
    text = f"{name} {off:.7g} off, {on:.7g} on"
    if math.isfinite(on):
        size, limit = abs(on - off), curve.allowed[i]
        text += f": {size:.2g} apart ({_percent(size, off)})"
        text += f", {limit:.2g} allowed ({_percent(limit, off)})"
    if i:
        text += f"; no such difference up to step {aligned.steps[i - 1]}"
    return text


def _describe_agreement(curve: Judged, noise_known: bool) -> str:
    aligned = curve.aligned
    sizes = [abs(d) for d in aligned.differences]
    judged = [i for i, limit in enumerate(curve.allowed) if not math.isnan(limit)]
    i = max(judged, key=lambda i: sizes[i])
    total, name = len(sizes), NAMES[aligned.tag]
    text = f"{name}: exactly 0 apart at {len(judged)} steps"
    if sizes[i]:
        share = _percent(sizes[i], aligned.off[i])
        text = (
            f"{name}: at most {sizes[i]:.2g} apart ({share}, at step {aligned.steps[i]}) "
            f"at {len(judged)} steps"
        )
    if noise_known:
        noise = aligned.noise[judged[-1]]
        text += f", where runs without a difference are up to {noise:.2g} apart"
    if num_weak := curve.telling.count(False):
        text += (
            f"; at {num_weak} of {total} steps the noise floor is too large, or not "
            "known, to tell much"
        )
    return text


def _percent(size: float, of: float) -> str:
    return f"{100 * size / abs(of):.2g} %" if of else "of 0"
