"""What all scripts do before their own work: as commands, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize(
    "arguments",
    [["bench_head_loss", "--tp"], ["bench_train", "job.toml"], ["check_mesh"]],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("result.csv", "must name a Markdown file, such as results.md, got result.csv"),
        ("a.md/result.md", "cannot write a.md/result.md: [Errno"),
        ("folder.md", "must name a Markdown file, such as results.md, got folder.md"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    arguments, output, words, tmp_path
):
    (tmp_path / "a.md").touch()
    (tmp_path / "folder.md").mkdir()
    name, *others = arguments
    run = subprocess.run(
        [sys.executable, SCRIPTS / f"{name}.py", *others, "--output", output],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert f"error: argument --output: {words}" in run.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compare_loss_curves", "The exit code is the answer"),
        ("bench_head_loss", "Time, memory and errors of every implementation"),
        ("bench_train", "Whole training runs, fused loss off and on"),
        ("check_mesh", "The error of one training step on every layout"),
    ],
)
def test_a_python_without_the_package_finds_the_environment(name, words, tmp_path):
    """As called by its path, with whatever `python3` is first."""
    env = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHON"] = sys.executable
    script = SCRIPTS / f"{name}.py"
    isolated = [sys.executable, "-S", script, "--help"]  # -S: without site-packages
    run = subprocess.run(
        isolated, env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert words in run.stdout
