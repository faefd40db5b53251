from __future__ import annotations

import re

import pytest
from torchtitan.config import JobConfig

from torchtitan_liger import job_config
from torchtitan_liger.train import check_launched, value_of_a_switch

CONFIGS = [JobConfig, job_config.JobConfig]


@pytest.mark.parametrize(
    ("argv", "unknown", "told"),
    [
        (
            ["--checkpoint.enable", "True"],
            "True",
            "--checkpoint.enable takes no value such as True: .* use --checkpoint.no-enable",
        ),
        (
            ["--checkpoint.no-enable", "False"],
            "False",
            "or use --checkpoint.no-enable$",
        ),
        (
            ["--training.dataset", "False", "--checkpoint.enable", "False"],
            "False",
            "--checkpoint.enable takes",
        ),
        (
            ["--liger-kernel.preflight", "off", "x"],
            "off x",
            "--liger-kernel.no-preflight",
        ),
        (["--quantize.linear.float8.emulate", "yes"], "yes", "float8.no-emulate"),
        (["--training.steps=3", "x"], "x", None),
        (["x", "--checkpoint.enable"], "x", None),
        (["--checkpoint.enable", "--checkpoint.x"], "--checkpoint.x", None),
        (["--checkpoint.enabel"], "--checkpoint.enabel", None),
    ],
)
def test_a_switch_takes_no_value(argv, unknown, told):
    found = value_of_a_switch(argv, f"Unrecognized options: {unknown}", CONFIGS)
    assert re.search(told or "^$", found)
    assert value_of_a_switch(argv, "Invalid choice", CONFIGS) == ""


def test_a_job_that_nobody_launched_says_how(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launched()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(
        ValueError, match=r"run_train\.sh, or .*torch\.distributed\.run"
    ):
        check_launched()
