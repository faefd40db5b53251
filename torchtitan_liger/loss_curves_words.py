"""What the report of a comparison says in words: its rule, and notes on the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOOKAHEAD,
    LOSS,
    Run,
    Runs,
    align,
    spread,
)
from torchtitan_liger.loss_curves_judge import (
    ENOUGH_STEPS,
    MAX_NOISE,
    MIN_STEPS,
    NAMES,
    Bounds,
)


def rule_text(bounds: Bounds, runs: Runs) -> str:
    """The rule that the verdict follows, in words."""
    noise = ", ".join(f"{one.name} and {other.name}" for one, other in runs.pairs)
    return (
        "Loss and gradient norm are compared at every step that off and on have in "
        "common. They may differ by the larger of\n\n"
        f"- {bounds.loss_bound:g} of the loss, {bounds.grad_norm_bound:g} of the gradient "
        "norm,\n"
        f"- {bounds.noise_factor:g} times the noise floor: the largest difference so far, "
        f"and up to {LOOKAHEAD} steps on, between runs that differ in the order of their "
        f"sums alone ({noise or 'there are none here'}),\n\n"
        "and by the last printed digit where a curve comes from a log. A step where the "
        f"noise alone would allow more than {MAX_NOISE[LOSS]:.0%} of the loss tells "
        f"little about it; one where it would allow more than {MAX_NOISE[GRAD_NORM]:.0%} "
        "of the gradient norm does not judge that. The average difference, too, may be no "
        f"more than {bounds.noise_factor:g} times that of those runs, or the share above.\n\n"
        "- `different`: at a step they differ by more, or on alone is NaN or infinite. The "
        "first such step is named.\n"
        f"- `same`: there is no such step; for the loss, {ENOUGH_STEPS} steps or half of "
        f"them told something, and for the gradient norm {MIN_STEPS}; off is proven off, "
        "and on proven on.\n"
        "- `cannot tell`: anything else, such as a crash of any run."
    )


def notes(runs: Runs) -> list[str]:
    """What a reader has to know about the runs, beyond the verdict."""
    found = []
    if not runs.pairs:
        found.append(
            "There is no noise floor: no run repeats another with its sums in another "
            "order. The relative bounds judge alone; a harmless difference may exceed them."
        )
    elif not any(align(LOSS, runs).noise):
        found.append(
            "The noise floor of the loss is 0: the repeated run is the same to the last "
            "digit. The relative bounds judge alone."
        )
    for run in runs.all:
        found += [
            f"{run.name} was restarted at step {step}; what it had logged from there on "
            "does not count."
            for step in run.restarts
        ]
        first = run.log.first_step if run.log else None
        if first and (steps := run.curves.get(LOSS)) and min(steps) < first:
            found.append(
                f"{run.name}: how many fused losses were computed is known of the process "
                f"that began at step {first}, and not of those before it."
            )
        for tag, name in NAMES.items():
            if digit := run.resolution.get(tag):
                found.append(
                    f"{run.name}: its {name} comes from a log, in steps of {digit:.0e}; "
                    "that much more is allowed."
                )
            curve = run.curves.get(tag, {})
            if bad := [s for s in sorted(curve) if not math.isfinite(curve[s])]:
                found.append(f"{run.name}: its {name} is not finite at {_listed(bad)}.")
        found += _step_notes(runs.off, run)
    for tag, name in {"lr": "learning rate", "n_tokens_seen": "token count"}.items():
        sizes = spread(tag, runs.off, runs.on)
        if unequal := [step for step, size in sizes.items() if size]:
            found.append(f"The {name} of off and on differs at {_listed(unequal)}.")
    return found


def _step_notes(off: Run, run: Run) -> list[str]:
    ours, its = off.curves.get(LOSS), run.curves.get(LOSS)
    if not ours or not its:
        return []
    found = []
    for word, end in (("begins", min), ("ends", max)):
        if end(ours) != end(its):
            found.append(
                f"{off.name} {word} at step {end(ours)}, {run.name} at step {end(its)}; "
                "only common steps are compared."
            )
    low, high = max(min(ours), min(its)), min(max(ours), max(its))
    for name, more, fewer in ((run.name, ours, its), (off.name, its, ours)):
        if gaps := [s for s in sorted(more.keys() - fewer.keys()) if low <= s <= high]:
            found.append(f"{name} lacks {_listed(gaps)}.")
    return found


def _listed(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    plural = "s" if len(steps) > 1 else ""
    return f"step{plural} {', '.join(map(str, steps[:5]))}{more}"
