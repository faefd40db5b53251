from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from tests.unit.test_loss_curves import titan_log
from torchtitan_liger.loss_curves import GRAD_NORM, LOSS, LogFacts, Run, Runs, parse_log
from torchtitan_liger.loss_curves_judge import (
    MIN_STEPS,
    Bounds,
    Verdict,
    judge,
    missing_proof,
    unlike_start,
    unrepeatable,
)
from torchtitan_liger.loss_curves_words import notes

STEPS = 20
BOUNDS = Bounds()


def make_run(name, *, loss=5.0, norm=2.0, changes=(), steps=STEPS, fused=False):
    """A run whose curves are constant, but for `changes` (tag, from step, factor)."""
    curves = {
        LOSS: dict.fromkeys(range(1, steps + 1), loss),
        GRAD_NORM: dict.fromkeys(range(1, steps + 1), norm),
    }
    for tag, first, factor in changes:
        for step in range(first, steps + 1):
            curves[tag][step] *= factor
    log = LogFacts(
        first_step=1,
        last_step=steps,
        accumulation_steps=1,
        fused_calls=steps if fused else 0,
        impl="liger" if fused else "stock",
        finished=True,
    )
    return Run(name, curves, log=log)


OFF = make_run("off")
ON = make_run("on", fused=True)
NOISE = 1e-6
AGAIN = make_run("off_again", changes=[(LOSS, 2, 1 + NOISE), (GRAD_NORM, 2, 1 + NOISE)])


def changed(*changes, **options):
    return make_run("on", changes=changes, fused=True, **options)


# --- same ----------------------------------------------------------------------------


def test_identical_runs_are_the_same_and_differ_by_exactly_0():
    verdict = judge(Runs(OFF, ON, (AGAIN,)), BOUNDS)
    assert (str(verdict), verdict.exit_code) == ("same", 0)
    for curve in verdict.curves.values():
        assert curve.aligned.differences == (0.0,) * STEPS


def test_a_difference_within_the_relative_bound_is_the_same():
    on = changed((LOSS, 1, 1 + 9e-5), (GRAD_NORM, 1, 1 - 9e-4))
    assert judge(Runs(OFF, on, (AGAIN,)), BOUNDS).answer == "same"


def test_a_difference_within_the_noise_is_the_same():
    loud = make_run("off_again", changes=[(LOSS, 3, 1.01), (GRAD_NORM, 3, 1.05)])
    on = changed((LOSS, 3, 1 - 0.015), (GRAD_NORM, 3, 1.2))
    assert judge(Runs(OFF, on, (loud,)), BOUNDS).answer == "same"
    assert judge(Runs(OFF, on), BOUNDS).answer == "different"


def test_a_spike_may_come_two_steps_before_that_of_the_noise():
    late = make_run("off_again", changes=[(LOSS, 10, 1.01)])
    for first, answer in ((8, "same"), (7, "different")):
        on = changed((LOSS, first, 1.01))
        assert judge(Runs(OFF, on, (late,)), BOUNDS).answer == answer


def test_printed_digits_are_no_difference():
    off = parse_log(titan_log([5.12345] * 9, [0.0100] * 9), "off")
    on = parse_log(titan_log([5.12346] * 9, [0.0101] * 9, calls=9, impl="liger"), "on")
    bounds = Bounds(loss_bound=1e-9, grad_norm_bound=1e-9)
    assert judge(Runs(off, on), bounds).answer == "same"
    on = parse_log(titan_log([5.12347] * 9, [0.01] * 9, calls=9, impl="liger"), "on")
    assert judge(Runs(off, on), bounds).answer == "different"


# --- different -----------------------------------------------------------------------


def test_one_spike_of_the_noise_excuses_no_lasting_difference():
    curves = {tag: dict(curve) for tag, curve in OFF.curves.items()}
    curves[LOSS][4] *= 1.015
    spike = replace(OFF, name="off_again", curves=curves)
    on = changed((LOSS, 6, 0.93))  # less than five times the spike
    verdict = judge(Runs(OFF, on, (spike,)), BOUNDS)
    assert str(verdict) == "different at step 6"
    (reason,) = verdict.reasons
    assert reason.startswith("loss on average 0.26 apart (5.2 %), 0.019 allowed")
    short = make_run("off_again_2", steps=15)  # decides what it has
    assert judge(Runs(OFF, on, (spike, short)), BOUNDS).answer == "different"
    for tag in (LOSS, GRAD_NORM):
        curves[tag].update({s: 1.02 * curves[tag][s] for s in range(5, STEPS + 1)})
    assert judge(Runs(OFF, on, (spike,)), BOUNDS).answer == "same"


@pytest.mark.parametrize("first", [1, 2, 13, STEPS])
@pytest.mark.parametrize(
    "change",
    [(GRAD_NORM, 1.01), (GRAD_NORM, 0.99), (LOSS, 1.001)],
    ids=["gradients x 1.01", "gradients x 0.99", "z-loss left on"],
)
def test_a_fault_is_found_at_its_first_step(first, change):
    tag, factor = change
    verdict = judge(Runs(OFF, changed((tag, first, factor)), (AGAIN,)), BOUNDS)
    assert str(verdict) == f"different at step {first}"
    assert verdict.exit_code == 1
    (reason,) = verdict.reasons
    assert reason.startswith({GRAD_NORM: "gradient norm", LOSS: "loss"}[tag])


def test_of_two_curves_the_earlier_difference_counts():
    on = changed((LOSS, 5, 1.01), (GRAD_NORM, 3, 1.01))
    verdict = judge(Runs(OFF, on, (AGAIN,)), BOUNDS)
    assert str(verdict) == "different at step 3"
    assert [reason.split(" 2")[0] for reason in verdict.reasons] == ["gradient norm"]


def test_a_fault_before_the_noise_grows_is_still_found():
    loud = make_run("off_again", changes=[(LOSS, 9, 1.05), (GRAD_NORM, 9, 2.0)])
    on = changed((GRAD_NORM, 3, 1.01))
    assert str(judge(Runs(OFF, on, (loud,)), BOUNDS)) == "different at step 3"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tag", [LOSS, GRAD_NORM])
def test_not_finite_in_on_alone_is_a_difference(tag, value):
    on = changed()
    on.curves[tag][7] = value
    for again in ((), (AGAIN,)):
        assert str(judge(Runs(OFF, on, again), BOUNDS)) == "different at step 7"


def test_with_other_intervals_the_last_step_that_agreed_is_named():
    steps = [1, 5, 10, 15, 20]
    off, on = (
        replace(
            run, curves={t: {s: c[s] for s in steps} for t, c in run.curves.items()}
        )
        for run in (OFF, changed((LOSS, 7, 1.01)))
    )
    verdict = judge(Runs(off, on), BOUNDS)
    assert str(verdict) == "different at step 10"
    assert "no such difference up to step 5" in verdict.reasons[0]


def test_a_difference_counts_though_a_run_crashed_later():
    on = replace(changed((LOSS, 4, 1.01)), crash="RuntimeError: NCCL")
    assert str(judge(Runs(OFF, on, (AGAIN,)), BOUNDS)) == "different at step 4"


def test_bounds_and_noise_factor_can_be_set():
    on = changed((LOSS, 1, 1.002))
    assert judge(Runs(OFF, on), BOUNDS).answer == "different"
    assert judge(Runs(OFF, on), Bounds(loss_bound=0.01)).answer == "same"
    loud = make_run("off_again", changes=[(LOSS, 1, 1.001)])
    assert judge(Runs(OFF, on, (loud,)), BOUNDS).answer == "same"
    assert judge(Runs(OFF, on, (loud,)), Bounds(noise_factor=1)).answer == "different"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss_bound", "grad_norm_bound", "noise_factor"])
def test_a_bound_that_means_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        Bounds(**{name: value})


# --- cannot tell ---------------------------------------------------------------------


def cannot_tell(runs, **options):
    verdict = judge(runs, BOUNDS, **options)
    assert (str(verdict), verdict.exit_code) == ("cannot tell", 2)
    return "\n".join(verdict.reasons)


def test_too_few_common_steps():
    few = MIN_STEPS - 1
    reason = cannot_tell(Runs(make_run("off", steps=few), make_run("on", fused=True)))
    assert f"only {few} common steps with a loss; {MIN_STEPS} are needed" in reason


def test_no_steps_at_all():
    reason = cannot_tell(Runs(OFF, Run("on", {}, crash="ValueError: no such flavor")))
    assert "on crashed: ValueError: no such flavor" in reason
    assert "on has no loss" in reason


@pytest.mark.parametrize("which", ["off", "on", "off_again"])
def test_a_crash_in_any_run(which):
    runs = {"off": OFF, "on": ON, "off_again": AGAIN}
    runs[which] = replace(runs[which], crash="RuntimeError: NCCL")
    off, on, again = runs.values()
    assert f"{which} crashed: RuntimeError" in cannot_tell(Runs(off, on, (again,)))


@pytest.mark.parametrize("tag", [LOSS, GRAD_NORM])
def test_not_finite_in_off(tag):
    off = make_run("off")
    off.curves[tag][15] = math.nan
    reason = cannot_tell(Runs(off, changed((LOSS, 16, 1.5)), (AGAIN,)))
    assert "off: the " in reason
    assert "is nan at step 15" in reason
    # What comes before counts.
    earlier = changed((LOSS, 3, 1.01))
    assert str(judge(Runs(off, earlier), BOUNDS)) == "different at step 3"


def test_not_finite_in_both_is_not_the_same():
    off, on = make_run("off"), changed()
    off.curves[LOSS][18] = on.curves[LOSS][18] = math.nan
    assert "off: the loss is nan at step 18" in cannot_tell(Runs(off, on))


def test_not_finite_in_the_repetition_alone():
    again = make_run("off_again")
    again.curves[LOSS][18] = math.inf
    assert "off_again: the loss is inf" in cannot_tell(Runs(OFF, ON, (again,)))


def test_not_finite_in_on_where_the_noise_is_not_known():
    on = changed()
    on.curves[LOSS][18] = math.nan
    again = make_run("off_again", steps=15)
    assert "on: the loss is nan" in cannot_tell(Runs(OFF, on, (again,)))


def test_noise_that_would_allow_anything():
    loud = make_run("off_again", changes=[(LOSS, 8, 1.03)])
    reason = cannot_tell(Runs(OFF, changed((LOSS, 9, 1.02)), (loud,)))
    assert "the loss tells something at 5 of 20 steps only, 10 are needed" in reason
    assert "from step 6 on" in reason


def test_in_a_long_run_twenty_quiet_steps_are_enough():
    off, on = make_run("off", steps=300), changed((LOSS, 24, 1.1), steps=300)
    for first, answer in ((23, "same"), (22, "cannot tell")):
        loud = make_run("off_again", changes=[(LOSS, first, 1.03)], steps=300)
        verdict = judge(Runs(off, on, (loud,)), BOUNDS)
        assert verdict.answer == answer
    assert (
        "at 280 of 300 steps the noise floor is too large"
        in (
            judge(
                Runs(off, on, (make_run("x", changes=[(LOSS, 23, 1.03)], steps=300),)),
                BOUNDS,
            ).reasons[0]
        )
    )


def test_more_than_the_largest_noise_is_different():
    loud = make_run("off_again", changes=[(LOSS, 13, 1.03)])
    on = changed((LOSS, 15, 1.2))
    assert str(judge(Runs(OFF, on, (loud,)), BOUNDS)) == "different at step 15"


def test_a_noisy_gradient_norm_needs_few_steps_only_and_may_spike():
    loud = make_run("off_again", changes=[(GRAD_NORM, 8, 3.0)])
    verdict = judge(Runs(OFF, changed((GRAD_NORM, 15, 90.0)), (loud,)), BOUNDS)
    assert verdict.answer == "same"
    assert "at 15 of 20 steps the noise floor is too large" in verdict.reasons[1]


def test_a_curve_that_is_missing():
    blind = replace(ON, curves={LOSS: ON.curves[LOSS]})
    assert cannot_tell(Runs(OFF, blind)) == "on has no gradient norm"


def test_repetitions_that_begin_differently_are_no_noise_floor():
    other_data = make_run("off_again", loss=5.1)
    runs = Runs(OFF, ON, (other_data,))
    assert judge(runs, BOUNDS).answer == "same"  # a spread over seeds, perhaps
    reason = cannot_tell(runs, same_start=True)
    assert "off and off_again, which differ in nothing that matters, begin" in reason
    assert unlike_start(OFF, AGAIN, BOUNDS) == ""
    # With data that may be other data, a difference means nothing either.
    far = changed((LOSS, 1, 1.5))
    assert judge(Runs(OFF, far, (other_data,)), BOUNDS).answer == "different"
    cannot_tell(Runs(OFF, far, (other_data,)), same_start=True)


# --- proof ---------------------------------------------------------------------------


def counted(run, calls, impl="liger", **facts):
    return replace(run, log=replace(run.log, fused_calls=calls, impl=impl, **facts))


@pytest.mark.parametrize(
    ("on", "reason"),
    [
        (counted(ON, 0, "stock"), "on was not on: .* 0 fused losses .stock., where 20"),
        (counted(ON, 0, "reference"), "on was not on: .* 0 fused losses .reference."),
        (counted(ON, 20, "reference"), "on was not on"),
        (counted(ON, 19), "on was not on: .* 19 fused losses .*, where 20 were due"),
        (counted(ON, 40), "on was not on"),
        (counted(ON, None), "on: its log does not say how often"),
        (replace(ON, log=None), "on: there is no log to say how often"),
    ],
)
def test_on_that_was_not_on_is_never_the_same(on, reason):
    runs = Runs(OFF, on, (AGAIN,))
    (problem,) = missing_proof(runs)
    assert re.match(reason, problem)
    assert cannot_tell(runs) == problem
    assert judge(runs, BOUNDS, proof=False).answer == "same"


def far_from(run):
    curve = {step: 2 * loss for step, loss in run.curves[LOSS].items()}
    return replace(run, curves={**run.curves, LOSS: curve})


def test_off_that_was_on_is_never_the_same():
    assert "off was not off" in cannot_tell(Runs(replace(ON, name="off"), ON))
    # Nor is it different: nobody knows what was compared.
    assert "off was not off" in cannot_tell(Runs(replace(ON, name="off"), far_from(ON)))
    curves = {**OFF.curves, "head_loss/accuracy": {1: 0.5}}
    unsaid = replace(OFF, curves=curves, log=None)
    assert "off was not off: it has curves" in cannot_tell(Runs(unsaid, ON))
    again = replace(ON, name="off_again")
    assert "off_again was not off" in cannot_tell(Runs(OFF, ON, (again,)))


def test_micro_batches_are_counted():
    on = counted(ON, 80, accumulation_steps=4)
    assert missing_proof(Runs(OFF, on)) == []


# --- on again ------------------------------------------------------------------------


def test_a_repeated_on_tells_chance_from_fault():
    on = changed((LOSS, 9, 1.01))
    drifted = make_run("on_again", changes=[(LOSS, 10, 0.999)], fused=True)
    runs = Runs(OFF, on, (make_run("off_again", changes=[(LOSS, 11, 1.002)]),))
    assert str(judge(runs, BOUNDS)) == "different at step 9"
    runs = replace(runs, on_again=(drifted,))
    assert unrepeatable(runs, BOUNDS) == []
    assert judge(runs, BOUNDS).answer == "same"
    # The fault is in both: they agree with each other.
    faulty = replace(on, name="on_again")
    verdict = judge(replace(runs, on_again=(faulty,)), BOUNDS)
    assert str(verdict) == "different at step 9"


def test_an_on_that_cannot_repeat_itself_is_neither_same_nor_different():
    wild = make_run("on_again", changes=[(LOSS, 9, 1.5)], fused=True)
    reason = cannot_tell(Runs(OFF, ON, (AGAIN,), (wild,)))
    assert (
        "on does not repeat itself: the loss of on_again is 2.5 away at step 9"
        in reason
    )
    wild = replace(wild, name="on")
    reason = cannot_tell(Runs(OFF, wild, (AGAIN,), (replace(ON, name="on_again"),)))
    assert "while runs of off are at most 5e-06 apart" in reason


def test_noise_of_on_below_the_bounds_is_harmless():
    quiet = make_run("on_again", changes=[(LOSS, 9, 1 + 9e-5)], fused=True)
    assert judge(Runs(OFF, ON, (OFF,), (quiet,)), BOUNDS).answer == "same"


# --- notes ---------------------------------------------------------------------------


def told(*runs):
    return "\n".join(notes(Runs(*runs)))


def test_a_missing_or_empty_noise_floor_is_named():
    assert "There is no noise floor" in told(OFF, ON)
    assert "The noise floor of the loss is 0" in told(OFF, ON, (OFF,))
    assert told(OFF, ON, (AGAIN,)) == ""


def test_unequal_lengths_gaps_and_restarts_are_named():
    on = changed(steps=15)
    del on.curves[LOSS][7], on.curves[LOSS][8]
    text = told(OFF, replace(on, restarts=(4,)), (AGAIN,))
    assert "off ends at step 20, on at step 15; only common steps" in text
    assert "on lacks steps 7, 8." in text
    assert "on was restarted at step 4" in text


def test_values_that_are_not_finite_are_counted():
    on = changed()
    on.curves[LOSS].update(dict.fromkeys(range(10, 20), math.nan))
    assert "its loss is not finite at steps 10, 11, 12, 13, 14 and 5 more." in told(
        OFF, on, (AGAIN,)
    )


def test_other_settings_are_named():
    on = changed()
    on.curves["lr"], OFF_lr = {1: 1e-3, 2: 2e-3}, {1: 1e-3, 2: 1e-3}
    off = replace(OFF, curves={**OFF.curves, "lr": OFF_lr})
    text = told(off, on, (AGAIN,))
    assert "The learning rate of off and on differs at step 2." in text


def test_a_verdict_is_its_exit_code():
    codes = {"same": 0, "different": 1, "cannot tell": 2}
    assert {a: Verdict(a, None, ()).exit_code for a in codes} == codes
