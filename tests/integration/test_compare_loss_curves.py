"""scripts/compare_loss_curves.py on real runs: healthy ones, and ones with a fault."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import FLAG, ROOT, python_env, run_command
from torchtitan_liger.loss_curves import GRAD_NORM, LOSS, Runs, read_run
from torchtitan_liger.loss_curves_judge import Bounds, judge

pytestmark = pytest.mark.slow

STEPS = 6
SMALL = ("--training.seq_len=32", "--training.local_batch_size=4")

# A trainer with a fault, in the place of torchtitan_liger.train.
FAULTY_TRAIN = """
import os, sys
from dataclasses import replace
from torchtitan_liger import cli, device, train
from torchtitan_liger.head_loss import ZLoss

sys.argv[1:] = cli.prepare_argv(sys.argv[1:])
device.prepare()
from torchtitan_liger import trainer


class Faulty(trainer.LigerTrainer):
    def __init__(self, job_config):
        super().__init__(job_config)
        if os.environ["FAULT"] == "z_loss":
            plan = self.head_loss_plan
            terms = (*plan.terms, ZLoss(1e-4))
            self.lm_head.head_loss = replace(plan, terms=terms).head_loss()

    def forward_backward_step(self, **kwargs):
        loss = super().forward_backward_step(**kwargs)
        if os.environ["FAULT"] == "gradients" and self.step >= 3:
            for parameter in self.model_parts[0].parameters():
                parameter.grad.mul_(1.01)
        return loss


trainer.LigerTrainer = Faulty
train.main()
"""
FAULTS = {"gradients": (), "z_loss": (), "seed": ("--debug.seed=2",)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and what the command said."""
    folder = tmp_path_factory.mktemp("compare")
    command = [
        ROOT / "scripts" / "compare_loss_curves.py",
        *("run", ROOT / "train_configs" / "debug_model.toml"),
        *("--steps", str(STEPS), "--output", "out", "--svg", "--tensorboard"),
        *("--", *SMALL),
    ]
    run = run_command(*command, cwd=folder, env=python_env(NGPU="1"))
    assert run.returncode == 0, run.stdout[-4000:]
    return folder / "out", run.stdout


@pytest.fixture(scope="module")
def faulty(compared, tmp_path_factory):
    """Runs like `on` of the comparison, each with a fault: their folders by its name."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty_train.py").write_text(FAULTY_TRAIN)

    def train(fault: str) -> Path:
        place = folder / fault
        place.mkdir()
        run = run_command(
            ROOT / "run_train.sh",
            *("--metrics.log_freq=1", "--metrics.disable_color_printing"),
            *("--debug.seed=1", "--debug.deterministic"),
            *(f"--training.steps={STEPS}", *SMALL, FLAG, *FAULTS[fault]),
            cwd=place,
            env=python_env(
                NGPU="1",
                FAULT=fault,
                TRAIN_FILE="faulty_train",
                PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]),
            ),
        )
        (place / "run.log").write_text(run.stdout)
        assert run.returncode == 0, run.stdout[-4000:]
        return place

    with ThreadPoolExecutor() as pool:
        return dict(zip(FAULTS, pool.map(train, FAULTS), strict=True))


def test_off_and_on_are_the_same_training(compared):
    folder, output = compared
    assert "Verdict: same" in output
    result = json.loads((folder / "report.json").read_text())
    assert result["missing_proof"] == []
    runs = {run["is"]: run for run in result["runs"]}
    assert list(runs) == ["off", "off again", "on"]
    assert [run["log"]["fused_calls"] for run in runs.values()] == [0, 0, STEPS]
    assert runs["on"]["log"]["impl"] in ("liger", "chunked")
    assert runs["off again"]["log"]["accumulation_steps"] == 2
    for tag in (LOSS, GRAD_NORM):
        assert result["curves"][tag]["steps"] == list(range(1, STEPS + 1))
    files = ("report.md", "curves.png", "curves.svg", "tensorboard", "on/run.log")
    assert all((folder / name).exists() for name in files)


def test_splitting_the_micro_batches_gives_noise_but_no_other_training(compared):
    folder, _ = compared
    off, again = (read_run(folder / name) for name in ("off", "off_again"))
    assert off.curves["n_tokens_seen"] == again.curves["n_tokens_seen"]
    noise = [abs(again.curves[LOSS][s] - v) for s, v in off.curves[LOSS].items()]
    assert 0 < max(noise) < 1e-5


@pytest.mark.parametrize(
    ("fault", "step", "curve"),
    [
        ("gradients", 3, "gradient norm"),
        ("z_loss", 1, "loss"),
        ("seed", 1, "loss"),
    ],
)
def test_a_planted_fault_is_found_at_its_first_step(
    compared, faulty, fault, step, curve
):
    folder, _ = compared
    off, again = (read_run(folder / name) for name in ("off", "off_again"))
    verdict = judge(Runs(off, read_run(faulty[fault]), (again,)), Bounds())
    assert str(verdict) == f"different at step {step}", verdict.reasons
    assert verdict.reasons[0].startswith(curve)
