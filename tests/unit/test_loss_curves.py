from __future__ import annotations

import pytest
from torch.utils.tensorboard import SummaryWriter

from torchtitan_liger.loss_curves import read_tensorboard


def write(folder, values, first_step=1):
    with SummaryWriter(folder) as writer:
        for step, value in enumerate(values, first_step):
            writer.add_scalar("loss", value, step)


def test_scalars_by_tag_and_step(tmp_path):
    write(tmp_path / "tb" / "a", [3.0, 2.0, 1.5])
    assert read_tensorboard(tmp_path) == {"loss": {1: 3.0, 2: 2.0, 3: 1.5}}


def test_a_restart_replaces_the_steps_it_repeats(tmp_path):
    write(tmp_path / "a", [3.0, 2.0, 9.0])
    write(tmp_path / "b", [1.5, 1.0], first_step=3)
    assert read_tensorboard(tmp_path)["loss"] == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.0}


def test_no_events_say_what_to_switch_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="--metrics.enable_tensorboard"):
        read_tensorboard(tmp_path)
