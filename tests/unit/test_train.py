from __future__ import annotations

import re

import pytest

from torchtitan_liger.train import value_of_a_switch


@pytest.mark.parametrize(
    ("argv", "said", "told"),
    [
        (
            ["--checkpoint.enable", "True"],
            "Unrecognized options: True",
            "--checkpoint.enable .* leave out True, or .*--checkpoint.no-enable",
        ),
        (["--training.steps=3", "x"], "Unrecognized options: x", ""),
        (["x", "--checkpoint.enable"], "Unrecognized options: x", ""),
        (["--checkpoint.enabel"], "Unrecognized options: --checkpoint.enabel", ""),
        (["--a.b", "c"], "Invalid choice", ""),
    ],
)
def test_a_switch_takes_no_value(argv, said, told):
    found = value_of_a_switch(argv, said)
    assert re.search(told, found)
    assert bool(found) == bool(told)
