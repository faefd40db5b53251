"""scripts/bench_train.py on real runs."""

from __future__ import annotations

import csv
import sys

import pytest

from tests.helpers import ROOT, python_env, run_command

pytestmark = pytest.mark.slow

SMALL = ("--", "--training.seq_len=32", "--metrics.log_freq=1")


def bench(tmp_path, *args):
    """The rows of the table, which one command after another adds to."""
    output = tmp_path / "result.md"
    script = ROOT / "scripts" / "bench_train.py"
    command = (sys.executable, script, *args, "--output", output, *SMALL)
    run = run_command(*command, cwd=tmp_path, env=python_env(NGPU="1"))
    assert run.returncode == 0, run.stdout[-4000:]
    with open(output.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_off_and_on_train_alike_and_the_largest_batch_is_found(tmp_path):
    config = ROOT / "train_configs" / "debug_model.toml"
    steps = ("--steps", "3", "--warmup", "1")
    off, on = bench(tmp_path, config, "--impl", "stock", "chunked", *steps)
    for row in (off, on):
        assert row["result"] == "ok"
        assert (row["batch"], row["seq len"]) == ("8", "32")
        assert float(row["tokens/s per device"]) > 0
        assert float(row["peak GiB"]) > 0
    for column in ("first loss", "last loss"):
        assert float(on[column]) == pytest.approx(float(off[column]), rel=1e-4)
    assert float(on["last loss"]) < float(on["first loss"])

    search = ("--impl", "chunked", "--largest", "batch", "--most", "2", "--steps", "2")
    trials = bench(tmp_path, config, *search)[2:]
    assert [(row["batch"], row["result"]) for row in trials] == [
        ("1", "ok"),
        ("2", "ok"),
    ]
    assert "2 (no more than 2 was tried)" in (tmp_path / "result.md").read_text()
