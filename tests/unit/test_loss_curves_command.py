"""scripts/compare_loss_curves.py, with a stub in the place of run_train.sh."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_loss_curves import titan_log
from torchtitan_liger.loss_curves import LOSS, LogFacts, read_tensorboard

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare_loss_curves.py"
STEPS = 8

# Prints a log that is prepared, and keeps what it was called with.
STUB = """\
#!/bin/sh
for arg; do case $arg in --job.dump_folder=*) name=${arg##*/};; esac; done
echo "$name" >>"$STUB/names"
printf '%s\\n' "$@" >"$STUB/$name.args"
env >"$STUB/$name.env"
cat "$STUB/$name.log"
! grep -q Traceback "$STUB/$name.log"
"""


def prepared_log(name, fault):
    """What a run of this name prints."""
    on, accumulation = name.startswith("on"), 2 if name.endswith("again") else 1
    losses, norms = [10.0 - step / 10 for step in range(STEPS)], [1.0] * STEPS
    end = ("Training completed",)
    if accumulation > 1:
        losses[-1] += 1e-5
    if on and fault == "gradients":
        norms[2:] = [1.01] * (STEPS - 2)
    if name == "on" and fault == "chance":
        losses[3] += 0.02
    if accumulation > 1 and fault == "chance":
        losses[7] += 0.01
    if on and fault == "wild":
        losses[3:] = [loss + accumulation for loss in losses[3:]]
    if on and fault == "normalizer":
        losses = [loss / (1 + accumulation) for loss in losses]
    if accumulation > 1 and fault == "data":
        losses[0] += 1
    if fault == "typo":
        return "ValueError: Unrecognized options: --training.sep_len\n"
    if fault == f"crash {name}":
        end = ("Traceback (most recent call last):", "  RuntimeError: planted")
        losses, norms = losses[:3], norms[:3]
    return titan_log(
        losses,
        norms,
        calls=STEPS * accumulation if on and fault != "not on" else 0,
        impl="chunked" if on else "stock",
        accumulation=accumulation,
        steps=STEPS,
        end=end,
    )


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delitem(sys.modules, SCRIPT.stem, raising=False)
    return importlib.import_module(SCRIPT.stem)


@pytest.fixture
def command(script, tmp_path, monkeypatch, capfd):
    """Calls the command in an empty folder; gives its exit code and its output."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "run_train.sh").write_text(STUB)
    (root / "run_train.sh").chmod(0o755)
    monkeypatch.setattr(sys.modules["curve_runs"], "ROOT", root)
    # Drawing takes a second, and has its own tests.
    monkeypatch.setattr(script, "draw", lambda _, *paths: [p.touch() for p in paths])
    monkeypatch.setenv("STUB", str(root))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text("")

    def call(*args, fault=""):
        for name in ("off", "on", "off_again", "on_again"):
            (root / f"{name}.log").write_text(prepared_log(name, fault))
        monkeypatch.setattr(sys, "argv", ["compare_loss_curves.py", *map(str, args)])
        code = script.main()
        return code, capfd.readouterr()

    return call


RUN = ("run", "job.toml", f"--steps={STEPS}")
OUTPUT = Path("outputs", "compare_job")


def started(tmp_path):
    return (tmp_path / "root" / "names").read_text().split()


def arguments(tmp_path, name):
    return (tmp_path / "root" / f"{name}.args").read_text().splitlines()


def result():
    return json.loads((OUTPUT / "report.json").read_text())


# --- run -----------------------------------------------------------------------------


def test_run_trains_three_times_and_reports(command, tmp_path):
    code, output = command(*RUN, "--svg", "--tensorboard", "--", "--training.seq_len=9")
    assert code == 0
    assert "Verdict: same" in output.out
    assert "outputs/compare_job/report.md" in output.out
    files = {path.name for path in OUTPUT.iterdir()}
    runs = ["off", "on", "off_again"]
    assert files == {
        *runs,
        *("report.md", "report.json", "curves.png", "curves.svg", "tensorboard"),
    }
    assert started(tmp_path) == runs
    for name in runs:
        args = arguments(tmp_path, name)
        assert f"--training.steps={STEPS}" in args
        assert "--training.seq_len=9" in args
        env = (tmp_path / "root" / f"{name}.env").read_text().splitlines()
        assert "CONFIG_FILE=job.toml" in env
        assert f"PYTHON={sys.executable}" in env
        log = (OUTPUT / name / "run.log").read_text()
        assert log.startswith("$ CONFIG_FILE=job.toml ")
        assert f"step: {STEPS:2}  loss:" in log
    off, on, again = (arguments(tmp_path, name) for name in runs)
    # Alike but for the folder and the flag, which is last so that it wins.
    assert off[1:-1] == on[1:-1]
    assert on[-1] == "--liger_kernel.enable_fused_linear_cross_entropy"
    assert off[-1] == "--liger_kernel.no-enable_fused_linear_cross_entropy"
    splits = ["--training.local_batch_size=4", "--training.global_batch_size=8"]
    assert again[1:] == [*off[1:], *splits]
    assert set(read_tensorboard(OUTPUT / "tensorboard" / "off")[LOSS]) == set(
        range(1, STEPS + 1)
    )


def test_a_second_comparison_replaces_the_first(command, tmp_path):
    command(*RUN)
    (OUTPUT / "off" / "stale").write_text("")
    assert command(*RUN)[0] == 0
    assert not (OUTPUT / "off" / "stale").exists()


def test_a_folder_that_is_no_run_is_left_alone(command, tmp_path):
    precious = OUTPUT / "off" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("")
    code, output = command(*RUN)
    assert code == 2
    assert "is no run of an earlier comparison" in output.err
    assert precious.exists()


def test_a_fault_is_confirmed_by_a_second_run_of_on(command, tmp_path):
    code, output = command(*RUN, fault="gradients")
    assert code == 1
    assert "Verdict: different at step 3" in output.out
    assert started(tmp_path) == ["off", "on", "off_again", "on_again"]
    assert "on_again is on in micro-batches of 4 instead of 8." in result()["notes"]


def test_a_spike_by_chance_is_acquitted_by_a_second_run_of_on(command):
    code, _ = command(*RUN, fault="chance")
    assert code == 0
    notes = result()["notes"]
    assert "After three runs the verdict was `different at step 4`." in notes


def test_an_on_that_does_not_repeat_itself_cannot_be_judged(command):
    code, output = command(*RUN, fault="wild")
    assert code == 2
    assert "on does not repeat itself: the loss of on_again is 1 away at step 4" in (
        output.out
    )


def test_an_on_that_depends_on_the_micro_batches_stays_different(command):
    code, _ = command(*RUN, fault="normalizer")
    assert (code, result()["step"]) == (1, 1)
    assert any(
        "on_again does not count: on and on_again" in n for n in result()["notes"]
    )
    assert [run["is"] for run in result()["runs"]] == ["off", "off again", "on"]


@pytest.mark.parametrize("name", ["off", "on", "off_again"])
def test_a_crash_of_one_run_is_survived_and_shown(command, name):
    code, output = command(*RUN, fault=f"crash {name}")
    assert code == 2
    assert f"{name} crashed: RuntimeError: planted" in output.out
    text = (OUTPUT / "report.md").read_text()
    assert "Traceback (most recent call last):" in text
    assert (OUTPUT / "curves.png").exists()
    assert len(result()["runs"]) == 3


def test_a_typo_ends_the_comparison_and_leaves_an_earlier_report_alone(command):
    assert command(*RUN)[0] == 0
    before = (OUTPUT / "report.md").read_text()
    code, output = command(*RUN, fault="typo")
    assert code == 2
    assert "off ended before its first step: " in output.err
    assert str(OUTPUT / "off" / "run.log") in output.err
    assert "on: started" not in output.err
    assert (OUTPUT / "report.md").read_text() == before


def test_a_report_does_not_outlive_its_runs(command, script, monkeypatch):
    assert command(*RUN)[0] == 0

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "judge", fail)
    assert command(*RUN)[0] == 130
    assert not (OUTPUT / "report.md").exists()
    assert not (OUTPUT / "curves.png").exists()


def test_files_of_ones_own_are_left_alone(command, tmp_path):
    for name, text in (("off", titan_log([5.0] * STEPS)), ("on", titan_log([5.0] * 9))):
        (tmp_path / f"{name}.log").write_text(text)
    read = ("read", "off.log", "on.log", "--curves-only", "--output", "out")
    mine = Path("out", "tensorboard", "off.log", "events.out.tfevents.1")
    mine.parent.mkdir(parents=True)
    for file in (mine, Path("out", "curves.svg")):
        file.write_text("mine")
    code, output = command(*read, "--tensorboard")
    assert code == 2
    assert "is not of an earlier comparison" in output.err
    assert mine.read_text() == Path("out", "curves.svg").read_text() == "mine"


def test_overlays_are_of_the_runs_of_the_report(command, tmp_path):
    for name in ("off", "on", "more"):
        (tmp_path / f"{name}.log").write_text(titan_log([5.0] * STEPS))
    read = ("read", "off.log", "on.log")
    command(*read, "more.log", "--tensorboard", "--output", "out", "--curves-only")
    overlays = Path("out", "tensorboard")
    assert (overlays / "more.log").exists()
    command(*read, "--tensorboard", "--output", "out", "--curves-only")
    assert (overlays / "on.log").exists()
    assert not (overlays / "more.log").exists()


def test_what_goes_wrong_is_no_verdict(command, script, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert command(*RUN, "--output", "file")[0] == 2
    assert not (tmp_path / "root" / "names").exists()  # before anything is trained

    def fail(*_):
        raise AssertionError("planted")

    monkeypatch.setattr(script, "markdown", fail)
    code, output = command(*RUN)
    assert code == 2
    assert "planted" in output.err


def test_a_log_of_ones_own_makes_no_run_of_a_comparison(command):
    mine = OUTPUT / "off" / "checkpoint" / "step-9"
    mine.mkdir(parents=True)
    (OUTPUT / "off" / "run.log").write_text(titan_log([5.0]))
    code, output = command(*RUN)
    assert code == 2
    assert "choose another --output" in output.err
    assert mine.exists()


def test_a_repetition_that_was_killed_sets_no_noise_floor(command, tmp_path):
    """It may be one of "on", whose log does not say so."""
    losses = [10.0 - step / 10 for step in range(STEPS)]
    wrong = [*losses[:4], *(loss + 0.05 for loss in losses[4:])]
    for name, curve, calls in (("off", losses, 0), ("on", wrong, STEPS)):
        log = titan_log(curve, calls=calls, impl="chunked" if calls else "stock")
        (tmp_path / f"{name}.log").write_text(log)
    killed = titan_log(wrong, end=())
    (tmp_path / "again.log").write_text(killed)
    assert command("read", "off.log", "on.log")[0] == 1
    code, output = command("read", "off.log", "on.log", "again.log")
    assert code == 2
    assert "again.log: its log does not say how often" in output.out


def test_runs_of_an_earlier_comparison_are_not_mixed_with_new_ones(command):
    command(*RUN, fault="chance")
    assert (OUTPUT / "on_again").exists()
    assert command(*RUN)[0] == 0
    assert not (OUTPUT / "on_again").exists()


def test_on_that_was_not_on_is_named(command):
    code, output = command(*RUN, fault="not on")
    assert code == 2
    assert (
        f"on was not on: its LM head computed 0 fused losses (chunked), where {STEPS}"
        in (output.out)
    )


def test_a_repetition_with_other_data_is_no_noise_floor(command):
    code, output = command(*RUN, fault="data")
    assert code == 2
    assert "begin with a loss 10 % apart" in output.out


def test_bounds_are_options(command):
    assert command(*RUN, "--grad-norm-bound=0.02", fault="gradients")[0] == 0
    assert result()["rule"]["grad_norm_bound"] == 0.02
    code, output = command(*RUN, "--noise-factor=0")
    assert code == 2
    assert "noise_factor is 0.0; it must be" in output.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "nowhere.toml"], "there is no CONFIG nowhere.toml"),
        (["run", "job.toml", "--steps=3"], "--steps is 3; 5 are needed"),
        (
            ["run", "job.toml", "--", "--head-loss.z-loss.weight=1"],
            "--head-loss.z-loss",
        ),
        (["run", "terms.toml"], "off cannot train on [head_loss]: leave it out"),
        (["read", "one"], "name two runs or more"),
        (["read", "one", "two"], "there is no run at one"),
        ([], "required: command"),
    ],
)
def test_wrong_arguments_exit_with_2(command, capfd, args, message):
    Path("terms.toml").write_text("[head_loss.z_loss]\nweight = 1e-4\n")
    try:
        code, output = command(*args)
    except SystemExit as stop:  # argparse
        code, output = stop.code, capfd.readouterr()
    assert code == 2
    assert message in output.err


# --- read ----------------------------------------------------------------------------


def test_read_of_what_run_left_gives_the_same_answer(command):
    command(*RUN, fault="chance")
    folders = [OUTPUT / name for name in ("off", "on", "off_again", "on_again")]
    first = result()
    code, _ = command("read", *folders, "--output", OUTPUT)
    assert code == 0
    again = result()
    assert [run["is"] for run in again["runs"]] == [run["is"] for run in first["runs"]]
    assert again["table"] == first["table"]


def test_identical_logs_differ_by_exactly_0(command, tmp_path):
    (tmp_path / "a.log").write_text(titan_log([5.0, 4.0, 3.0, 2.0, 1.5]))
    code, output = command(
        "read", "a.log", "a.log", "--curves-only", "--output", OUTPUT
    )
    assert code == 0
    assert all(row["largest"] == row["mean"] == 0 for row in result()["table"])
    assert "off: a.log, on: a.log (2)" in output.out
    # But nothing was on.
    assert command("read", "a.log", "a.log", "--output", OUTPUT)[0] == 2


def test_another_seed_is_different_from_the_first_step(command, tmp_path):
    (tmp_path / "a.log").write_text(titan_log([5.0, 4.0, 3.0, 2.0, 1.5]))
    other = titan_log([5.01, 4.02, 3.03, 2.0, 1.5], calls=5, impl="liger")
    (tmp_path / "b.log").write_text(other)
    code, output = command("read", "a.log", "b.log")
    assert code == 1
    assert "Verdict: different at step 1" in output.out
    assert Path("outputs/compare/report.md").exists()


def test_names_are_short_and_distinct(script):
    names = script.distinct_names([Path("x/off"), Path("x/on"), Path("x/on")])
    assert names == ["off", "on", "on (2)"]
    names = script.distinct_names([Path("a/tb/1"), Path("b/tb/1")])
    assert names == ["a/tb/1", "b/tb/1"]


# --- the second baseline -------------------------------------------------------------


@pytest.mark.parametrize(("size", "smaller"), [(8, 4), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_sequences_are_split_into_more_micro_batches(script, size, smaller):
    other = script.reorder(LogFacts(local_batch_size=size, global_batch_size=4 * size))
    assert other.overrides == (
        f"--training.local_batch_size={smaller}",
        f"--training.global_batch_size={4 * size}",
    )
    assert not other.env


def test_a_single_sequence_gets_other_kernels(script):
    other = script.reorder(LogFacts(local_batch_size=1, global_batch_size=8))
    assert other.overrides == ()
    assert other.env == {
        "ATEN_CPU_CAPABILITY": "default",
        "TORCH_BLAS_PREFER_CUBLASLT": "1",
    }


# --- as a command --------------------------------------------------------------------


def test_help_tells_what_the_noise_floor_is():
    run = subprocess.run(
        [sys.executable, SCRIPT, "run", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "noise\n             floor" in run.stdout
    assert "-- --section.option value" in run.stdout
