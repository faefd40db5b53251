"""A checkpoint of one training continues another: fused or not, in another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import FLAG, run_training
from torchtitan_liger.loss_curves import GRAD_NORM, LOSS, read_tensorboard

pytestmark = pytest.mark.slow

SMALL = (
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--debug.seed=1",
    "--debug.deterministic",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=6",
    "--checkpoint.enable",
    "--checkpoint.interval=3",
    "--checkpoint.no-last_save_model_only",
)
FUSED, STOCK = (FLAG,), ()
TP = "--parallelism.tensor_parallel_degree=2"


def train(
    folder: Path,
    steps: int,
    *args: str,
    ngpu: int = 1,
    tb: str = "tb",
    expected: int = 0,
) -> str:
    run = run_training(
        *SMALL,
        f"--job.dump_folder={folder}",
        f"--metrics.save_tb_folder={tb}",
        f"--training.steps={steps}",
        *args,
        ngpu=ngpu,
    )
    assert run.returncode == expected, run.stdout[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Six steps of stock training, with checkpoints after three and six."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, 6, *STOCK)
    return read_tensorboard(folder)


@pytest.mark.parametrize(
    ("first", "second"), [(FUSED, FUSED), (STOCK, FUSED), (FUSED, STOCK)]
)
def test_a_resumed_training_is_the_uninterrupted_one(
    first, second, uninterrupted, tmp_path
):
    train(tmp_path, 3, *first, tb="first")
    log = train(tmp_path, 6, *second, tb="second")
    assert "Training starts at step 4" in log
    curves = read_tensorboard(tmp_path)
    assert curves["lr"] == uninterrupted["lr"]
    for step in range(1, 7):
        for tag in (LOSS, GRAD_NORM):
            expected = uninterrupted[tag][step]
            assert curves[tag][step] == pytest.approx(expected, rel=1e-5), (tag, step)


def test_a_fused_training_resumes_bit_for_bit(tmp_path):
    train(tmp_path / "whole", 6, *FUSED)
    train(tmp_path / "cut", 3, *FUSED, tb="first")
    train(tmp_path / "cut", 6, *FUSED, tb="second")
    whole, cut = (read_tensorboard(tmp_path / name) for name in ("whole", "cut"))
    assert whole[LOSS] == cut[LOSS]
    assert whole[GRAD_NORM] == cut[GRAD_NORM]


def test_a_finished_training_says_how_to_go_on(tmp_path):
    train(tmp_path, 3, *FUSED)
    assert "No step was left to train: training.steps is 3" in train(
        tmp_path, 3, *FUSED
    )
    train(tmp_path, 4, *FUSED, "--checkpoint.last_save_model_only")
    last_lines = train(tmp_path, 5, *FUSED, expected=1)[-1500:]
    assert "Missing key in checkpoint state_dict: dataloader" in last_lines
    assert "(--checkpoint.load_step N)" in last_lines


def test_fsdp_and_fused_then_tensor_parallel_and_stock(tmp_path):
    """Other layout, other loss, the same weights."""
    train(tmp_path, 3, *FUSED, "--training.local_batch_size=1", ngpu=2, tb="first")
    last = read_tensorboard(tmp_path / "first")[LOSS][3]
    # torchtitan cannot deal out a data loader's place anew.
    load = (
        TP,
        "--checkpoint.load_only",
        "--checkpoint.exclude_from_loading=dataloader",
    )
    for tb, loss in (("second", STOCK), ("third", FUSED)):
        log = train(tmp_path, 4, *loss, *load, ngpu=2, tb=tb)
        assert "Training starts at step 4" in log
    second = read_tensorboard(tmp_path / "second")[LOSS][4]
    assert second < last + 1  # trained weights, not fresh ones
    third = read_tensorboard(tmp_path / "third")[LOSS][4]
    assert third == pytest.approx(second, rel=1e-5)


def test_hugging_face_format_has_the_same_keys_and_shapes(tmp_path):
    from safetensors import safe_open

    found = {}
    for name, args in (("fused", FUSED), ("stock", STOCK)):
        train(
            tmp_path / name,
            3,
            *args,
            "--checkpoint.last_save_model_only",
            "--checkpoint.last_save_in_hf",
        )
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        tensors = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                tensors |= {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        found[name] = tensors
    fused, stock = found["fused"], found["stock"]
    assert "lm_head.weight" in fused
    assert {k: v.shape for k, v in fused.items()} == {
        k: v.shape for k, v in stock.items()
    }
    for key, value in stock.items():
        error = (fused[key] - value).norm() / value.norm()
        assert error < 1e-4, (key, json.dumps(error.item()))
