from __future__ import annotations

import json
import math
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.colors import to_rgb

from tests.unit.test_loss_curves import titan_log
from torchtitan_liger import loss_curves_report
from torchtitan_liger.loss_curves import (
    GRAD_NORM,
    LOSS,
    PEAK_MEMORY_GIB,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    Run,
    Runs,
    parse_log,
)
from torchtitan_liger.loss_curves_judge import Bounds, judge, missing_proof
from torchtitan_liger.loss_curves_report import (
    Report,
    draw,
    markdown,
    overlays,
    table,
    table_text,
    to_json,
)
from torchtitan_liger.loss_curves_words import rule_text

OFF = parse_log(titan_log([5.0, 4.5, 4.25, 4.0, 3.5, 3.0]), "off")
AGAIN = parse_log(titan_log([5.0, 4.5, 4.25, 4.0, 3.5, 3.00005]), "off_again")
ON = parse_log(
    titan_log([5.0, 4.5, 4.25, 4.0, 3.5, 3.0001], calls=6, impl="liger"), "on"
)
FAULTY = parse_log(
    titan_log([5.0, 4.5, math.nan, 4.0, 3.5, 3.0], calls=6, impl="liger"), "on"
)


def make_report(on=ON, again=(AGAIN,), **changes):
    runs = Runs(OFF, on, again)
    bounds = Bounds()
    report = Report("a job", runs, judge(runs, bounds), bounds, missing_proof(runs))
    return replace(report, **changes)


def constant(values):
    return dict(enumerate(values, 1))


# --- The table -----------------------------------------------------------------------


def test_the_table_has_the_end_the_largest_and_the_mean_difference():
    off = Run("off", {LOSS: {1: 5.0, 2: 4.0, 3: 3.0, 4: 1.0}})
    on = Run("on", {LOSS: {1: 5.0, 2: 4.5, 3: 2.75}})
    again = Run("again", {LOSS: {1: 5.0, 2: 4.125, 3: 3.0}})
    (row,) = table(Runs(off, on, (again,)))
    assert (row.name, row.off, row.on) == ("loss", 3.0, 2.75)
    assert (row.largest, row.largest_step, row.mean) == (0.5, 2, 0.25)
    assert row.noise == 0.125


def test_speed_is_a_median_without_the_first_steps_and_memory_a_peak():
    curves = {
        TOKENS_PER_SECOND: constant([1.0, 1.0, 100.0, 200.0, 300.0, 400.0]),
        PEAK_MEMORY_GIB: constant([1.0, 3.0, 2.0]),
    }
    speed, memory = table(Runs(Run("off", curves), Run("on", curves)))
    assert (speed.off, memory.off) == (200.0, 3.0)


def test_terms_and_validation_have_rows_of_their_own():
    terms = ["head_loss/cross_entropy", "head_loss/z_loss"]
    tags = (*terms[::-1], VALIDATION_LOSS, LOSS)
    run = Run("run", {tag: {1: 1.0} for tag in (*tags, "loss_metrics/global_max_loss")})
    names = [row.name for row in table(Runs(run, run))]
    assert names == ["loss", *terms, "validation loss (not judged)"]


def test_values_that_are_not_finite_stay_out_of_the_table():
    run = Run("off", {LOSS: {1: 5.0, 2: math.nan, 3: 4.0}, GRAD_NORM: {1: math.inf}})
    on = Run("on", {LOSS: {1: 5.0, 2: 4.5, 3: math.inf}, GRAD_NORM: {1: 1.0}})
    (row,) = table(Runs(run, on))
    assert (row.off, row.largest, row.mean) == (5.0, 0.0, 0.0)
    assert math.isnan(row.noise)
    assert "none" in table_text(Runs(run, on))


# --- Text ----------------------------------------------------------------------------


def test_the_report_answers_and_says_by_which_rule():
    text = markdown(make_report(details={"on": {"command": "./run_train.sh --x"}}))
    assert "Verdict: **same**" in text
    assert "(curves.png)" in text
    assert "- 0.0001 of the loss, 0.001 of the gradient norm," in text
    assert "5 times the noise floor" in text
    assert "(off and off_again)" in text
    assert "as many as were due" in text
    assert "./run_train.sh --x" in text
    row = next(line for line in text.splitlines() if line.startswith("| on "))
    assert [cell.strip() for cell in row.split("|")[3:8]] == [
        "1 to 6",
        "6",
        "6",
        "liger",
        "finished",
    ]


def test_the_rule_in_the_report_is_the_rule_that_judged():
    text = rule_text(Bounds(0.5, 0.25, 7.0), Runs(OFF, ON))
    assert "- 0.5 of the loss, 0.25 of the gradient norm" in text
    assert "- 7 times the noise floor" in text
    assert "there are none here" in text


def test_missing_proof_and_crashes_stand_in_the_report():
    on = replace(OFF, name="on", crash="RuntimeError: NCCL")
    text = markdown(make_report(on))
    assert "on was not on: its LM head computed 0 fused losses (stock)" in text
    assert "crashed: RuntimeError: NCCL" in text
    assert "as many as were due" not in text


def test_without_a_question_for_proof_none_is_claimed():
    text = markdown(make_report(missing_proof=None))
    assert "the curves alone were compared" in text
    assert "as many as were due" not in text


def test_the_json_holds_verdict_proof_and_curves():
    content = json.loads(to_json(make_report()))
    assert (content["verdict"], content["exit_code"], content["step"]) == (
        "same",
        0,
        None,
    )
    assert content["rule"] == {
        "loss_bound": 1e-4,
        "grad_norm_bound": 1e-3,
        "noise_factor": 5.0,
    }
    roles = {run["is"]: run for run in content["runs"]}
    assert list(roles) == ["off", "off again", "on"]
    assert roles["on"]["log"]["fused_calls"] == roles["on"]["fused_losses_due"] == 6
    assert content["curves"][LOSS]["on"][-1] == 3.0001
    assert content["curves"][LOSS]["steps"] == [1, 2, 3, 4, 5, 6]


def test_the_json_is_json_even_with_nan():
    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(to_json(make_report(FAULTY, ())), parse_constant=refuse)
    assert (content["verdict"], content["step"]) == ("different", 3)
    assert content["curves"][LOSS]["on"][2] == "nan"
    assert content["curves"][LOSS]["noise"] == ["nan"] * 6


# --- Pictures ------------------------------------------------------------------------


def drawn(report, monkeypatch):
    """The figure instead of its file."""
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *_, **__: figures.append(figure),
    )
    draw(report, loss_curves_report.PICTURE)
    (figure,) = figures
    return figure


def line(panel, label):
    (found,) = (x for x in panel.get_lines() if x.get_label() == label)
    return found


def test_the_picture_shows_curves_and_their_difference(monkeypatch):
    figure = drawn(make_report(), monkeypatch)
    assert figure.get_suptitle() == "The same training\na job"
    loss, _, difference, _, speed, memory = figure.axes
    assert list(line(loss, "off").get_ydata()) == [5.0, 4.5, 4.25, 4.0, 3.5, 3.0]
    assert line(loss, "on").get_ydata()[-1] == 3.0001
    sizes = list(line(difference, "on against off").get_ydata())
    assert sizes == pytest.approx([0, 0, 0, 0, 0, 1e-4])
    limits = line(difference, "allowed").get_ydata()
    assert limits[0] == pytest.approx(5e-4 + 1e-5)
    labels = [text.get_text() for text in difference.get_legend().get_texts()]
    assert "noise floor" in labels
    assert difference.get_yscale() == "symlog"
    for panel, value in ((speed, 2345), (memory, 0.87)):
        assert [bar.get_width() for bar in panel.patches] == [value, value]


def test_the_picture_marks_the_first_difference(monkeypatch):
    figure = drawn(make_report(FAULTY), monkeypatch)
    assert "Different training from step 3 on" in figure.get_suptitle()
    for panel in figure.axes[:4]:
        assert list(panel.get_lines()[-1].get_xdata()) == [3, 3]


def test_the_picture_marks_steps_that_tell_little(monkeypatch):
    off = parse_log(titan_log([5.0] * 8), "off")
    again = parse_log(titan_log([5.0] * 7 + [6.0]), "off_again")
    on = parse_log(titan_log([5.0] * 8, calls=8, impl="liger"), "on")
    runs = Runs(off, on, (again,))
    verdict = judge(runs, Bounds())
    assert verdict.answer == "same"
    figure = drawn(Report("a job", runs, verdict, Bounds()), monkeypatch)
    assert "(from step 6 on, too noisy to tell much)" in figure.get_suptitle()
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert "tells little" in labels


def test_off_and_on_are_told_apart_in_grey():
    def luminance(style):
        return sum(
            w * c
            for w, c in zip((0.3, 0.59, 0.11), to_rgb(style["color"]), strict=True)
        )

    off, on = loss_curves_report._OFF, loss_curves_report._ON
    assert luminance(off) - luminance(on) > 0.4
    assert off["linewidth"] > 3 * on["linewidth"]


@pytest.mark.parametrize(
    ("on", "again"),
    [
        (ON, (AGAIN,)),
        (ON, ()),
        (FAULTY, (AGAIN,)),
        (replace(OFF, name="on"), (OFF,)),
        (replace(ON, curves={}), (AGAIN,)),
        (parse_log(titan_log([5.0], [0.0], calls=1, impl="liger"), "on"), ()),
    ],
    ids=["noise", "no noise", "nan", "identical", "no curves", "one step"],
)
def test_any_report_can_be_drawn_and_written(tmp_path, on, again):
    report = make_report(on, again)
    draw(report, tmp_path / "curves.png", tmp_path / "curves.svg")
    height, width, _ = matplotlib.image.imread(tmp_path / "curves.png").shape
    assert min(height, width) > 1000
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert markdown(report)
    json.loads(to_json(report))


def test_overlays_are_the_runs_and_what_was_compared():
    found = overlays(make_report())
    assert list(found) == [
        "off",
        "off_again",
        "on",
        "difference",
        "noise_floor",
        "allowed",
    ]
    assert found["on"] == ON.curves
    assert found["difference"][f"difference/{LOSS}"][6] == pytest.approx(1e-4)
    assert found["allowed"][f"difference/{LOSS}"][1] == pytest.approx(5e-4 + 1e-5)
