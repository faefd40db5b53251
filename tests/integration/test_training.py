"""Whole training runs on the CPU, started as a user starts them."""

from __future__ import annotations

import functools
import math
import os
import re
import site
import sys
from pathlib import Path

import pytest

from tests.helpers import FLAG, ROOT, python_env, run_command, run_training
from torchtitan_liger.loss_curves import GRAD_NORM, LOSS, read_tensorboard

pytestmark = pytest.mark.slow

SMALL = (
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--debug.seed=1",
    "--debug.deterministic",
    "--training.seq_len=64",
    "--training.local_batch_size=4",
)


@functools.cache
def train(
    tmp: Path, name: str, *args: str, ngpu: int = 1
) -> tuple[str, dict[str, dict[int, float]]]:
    """Run `run_train.sh` in a folder of its own; its log and its curves."""
    folder = tmp / name
    folder.mkdir()
    run = run_training(*SMALL, *args, ngpu=ngpu, cwd=folder)
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout, read_tensorboard(folder)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


STEPS = "--training.steps=20"


def test_off_and_on_are_the_same_training(tmp):
    _, off = train(tmp, "off", STEPS)
    _, on = train(tmp, "on", STEPS, FLAG)
    more = {"cross_entropy", "accuracy", "max_prob", "perplexity"}
    assert on.keys() - off.keys() == {f"head_loss/{name}" for name in more}
    assert off.keys() <= on.keys()
    assert on["head_loss/cross_entropy"] == on[LOSS]
    perplexity = on["head_loss/perplexity"][20]
    assert perplexity == pytest.approx(math.exp(on[LOSS][20]), rel=1e-5)
    assert list(off[LOSS]) == list(on[LOSS]) == list(range(1, 21))
    for step in off[LOSS]:
        assert on[LOSS][step] == pytest.approx(off[LOSS][step], rel=1e-5)
        assert on[GRAD_NORM][step] == pytest.approx(off[GRAD_NORM][step], rel=1e-4)
    assert on["lr"] == off["lr"]
    assert off[LOSS][1] - off[LOSS][20] > 2  # and it is one that learns


def test_the_log_says_once_what_runs_and_in_which_memory(tmp):
    log, curves = train(tmp, "on", STEPS, FLAG)
    assert log.count("Using the chunked linear cross entropy loss: ") == 1
    assert log.count("The LM head holds at most") == 1
    off, _ = train(tmp, "off", STEPS)
    assert "linear cross entropy" not in off
    memory = re.findall(r"step: +\d+ .*memory: +([\d.]+)GiB", log)
    assert len(memory) == 20
    assert 0.3 < float(memory[-1]) < 4
    assert curves["memory/max_reserved(GiB)"][20] == pytest.approx(
        float(memory[-1]), abs=0.01
    )


def test_off_and_on_are_the_same_training_under_fsdp(tmp):
    log, off = train(tmp, "off2", "--training.steps=3", ngpu=2)
    assert "Applied FSDP to the model" in log
    _, on = train(tmp, "on2", "--training.steps=3", FLAG, ngpu=2)
    for step in off[LOSS]:
        assert on[LOSS][step] == pytest.approx(off[LOSS][step], rel=1e-5)
        assert on[GRAD_NORM][step] == pytest.approx(off[GRAD_NORM][step], rel=1e-4)


def test_older_spelling_of_compile_and_true_after_a_flag(tmp):
    log, curves = train(
        tmp, "compile", "--training.steps=2", "--training.compile", FLAG, "True"
    )
    assert "Compiling each TransformerBlock with torch.compile" in log
    assert len(curves[LOSS]) == 2


def test_pipeline_parallelism_stops_before_a_model_is_built(tmp_path):
    run = run_command(
        ROOT / "run_train.sh",
        FLAG,
        "--parallelism.pipeline_parallel_degree=2",
        cwd=tmp_path,
    )
    assert run.returncode != 0
    assert (
        "RuntimeError: Liger-Kernel fused linear cross entropy loss is not compatible "
        "with Pipeline Parallelism. " in run.stdout
    )
    assert "Building llama3" not in run.stdout


def test_an_unknown_key_in_the_toml_is_explained(tmp_path):
    config = tmp_path / "job.toml"
    text = (ROOT / "train_configs" / "debug_model.toml").read_text()
    config.write_text(text.replace("enable_fused_linear", "enable_fussed_linear"))
    run = run_command(
        ROOT / "run_train.sh", cwd=tmp_path, env=python_env(CONFIG_FILE=str(config))
    )
    assert run.returncode != 0
    assert re.search(
        r"job.toml: \[liger_kernel\] has no key enable_fussed_linear_cross_entropy "
        r"\(its value is False\); did you mean enable_fused_linear_cross_entropy\?",
        run.stdout,
    )


def test_an_unknown_option_is_in_the_last_lines(tmp_path):
    run = run_command(ROOT / "run_train.sh", "--liger_kernel.impll=auto", cwd=tmp_path)
    assert run.returncode != 0
    error = run.stdout[run.stdout.rindex("ValueError: ") :]
    assert "Unrecognized options: --liger_kernel.impll=auto" in error
    assert "--liger-kernel.impl {auto,liger,chunked,reference}" in error


@pytest.fixture(scope="module")
def without_liger(tmp):
    """A Python path with everything but liger-kernel: code and metadata."""
    packages = tmp / "site-packages"
    packages.mkdir()
    for folder in {*site.getsitepackages(), *sys.path}:
        if not folder.endswith(("site-packages", "dist-packages")):
            continue
        for entry in os.scandir(folder):
            link = packages / entry.name
            if not entry.name.startswith("liger") and not link.exists():
                link.symlink_to(entry.path)
    return python_env(
        PYTHONPATH=os.pathsep.join([str(ROOT), str(packages)]),
        PYTHONNOUSERSITE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
    )


def train_without_liger(env, folder, *args):
    # -S: without the real site-packages
    config = ROOT / "train_configs" / "debug_model.toml"
    command = ("-S", "-m", "torchtitan_liger.train", "--job.config_file", config)
    return run_command(
        sys.executable, *command, *SMALL, FLAG, *args, env=env, cwd=folder
    )


def test_without_liger_it_warns_and_trains(without_liger, tmp_path):
    proof = run_command(
        sys.executable, "-S", "-c", "import liger_kernel", env=without_liger
    )
    assert "ModuleNotFoundError" in proof.stdout
    run = train_without_liger(without_liger, tmp_path, "--training.steps=3")
    assert run.returncode == 0, run.stdout[-4000:]
    hint = "Liger-Kernel is not installed. Please install it with: pip install liger-kernel"
    warnings = [line for line in run.stdout.splitlines() if "WARNING" in line]
    assert sum(hint in line for line in warnings) == 1
    assert len(read_tensorboard(tmp_path)[LOSS]) == 3


def test_without_liger_fallback_error_is_an_import_error(without_liger, tmp_path):
    run = train_without_liger(without_liger, tmp_path, "--liger_kernel.fallback=error")
    assert run.returncode != 0
    assert (
        "ImportError: Liger-Kernel is not installed. Please install it with: "
        "pip install liger-kernel" in run.stdout
    )
    assert "Building llama3" not in run.stdout
