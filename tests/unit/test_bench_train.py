"""scripts/bench_train.py: the search, and the command with a stub for run_train.sh."""

from __future__ import annotations

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, python_env

SCRIPTS = ROOT / "scripts"
HEAD_FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"

# Trains as long as batch x length is at most the implementation's capacity.
STUB = """\
#!{python}
import os, sys, time
options = dict(a.partition("=")[::2] for a in sys.argv[1:])
impl = options.get("--liger_kernel.impl", "stock")
off = "--liger_kernel.no-enable_fused_linear_cross_entropy" in options
assert off == (impl == "stock"), "the TOML may have the flag on"
length = int(options.get("--training.seq_len", 64))
batch = int(options.get("--training.local_batch_size", 8))
with open(os.environ["STUB_CALLS"], "a") as calls:
    print(impl, batch, length, file=calls)
ranks = os.environ["LOG_RANK"].split(",")
print("[rank0]:Trainer is initialized with local batch size", f"{{batch}},", "global",
      f"batch size 8, gradient accumulation steps 1, sequence length {{length}},",
      f"total steps {{options['--training.steps']}} (warmup 10)")
if sleep := os.environ.get("STUB_SLEEP"):
    print("sleeping", flush=True)
    time.sleep(float(sleep))
if error := os.environ.get("STUB_ERROR"):
    sys.exit(f"[rank0]:[rank0]: {{error}}")
capacity = {{"stock": 700, "liger": 1000, "chunked": 2000}}[impl]
if batch * length > capacity:
    sys.exit(f"[rank{{ranks[-1]}}]:[rank{{ranks[-1]}}]: torch.OutOfMemoryError: CUDA out "
             "of memory. Tried to allocate 16.00 GiB.")
for step in range(1, int(options["--training.steps"]) + 1):
    if step > 1 and step % int(os.environ.get("STUB_LOG_FREQ", 1)):
        continue
    for i, rank in enumerate(ranks):
        print(f"[rank{{rank}}]:[titan] root - INFO - step: {{step:2}}  loss: "
              f"{{10 - step / 10:8.5f}}  grad_norm:  1.5000  memory: {{7 + i + step / 4:5.2f}}GiB"
              f"(9.00%)  tps: {{1000 * step:,}}  tflops: 1.00  mfu: {{step}}.50%")
print("[rank0]:Training completed")
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("bench_train")


# --- The search ----------------------------------------------------------------------


def find(script, limit, start=1, grid=1, most=100):
    """The answer for what fits up to `limit`, and the sizes that were tried."""
    tried = []

    def fits(size):
        assert size % grid == 0
        assert grid <= size <= most
        assert size not in tried
        tried.append(size)
        return size <= limit

    return script.largest(fits, start, grid, most), tried


@pytest.mark.parametrize("start", [1, 2, 7, 31, 32, 50])
@pytest.mark.parametrize("most", [1, 2, 31, 32, 50])
def test_every_limit_is_found(script, start, most):
    for limit in range(most + 2):
        found, _ = find(script, limit, start, most=most)
        assert found == min(limit, most)


@pytest.mark.parametrize("limit", [0, 2047, 2048, 2049, 70_000, 131_071, 131_072])
def test_sizes_are_multiples_of_the_grid(script, limit):
    found, _ = find(script, limit, start=65_536, grid=2048, most=131_072)
    assert found == limit // 2048 * 2048


def test_doubling_then_bisection(script):
    found, tried = find(script, 23, start=4)
    assert found == 23
    assert tried == [4, 8, 16, 32, 24, 20, 22, 23]


def test_a_start_that_is_too_large_is_halved(script):
    found, tried = find(script, 9, start=64)
    assert found == 9
    assert tried == [64, 32, 16, 8, 12, 10, 9]


def test_if_all_fit_the_answer_is_the_most(script):
    assert find(script, math.inf, start=10, most=100) == (100, [10, 20, 40, 80, 100])


def test_if_none_fits_the_answer_is_zero(script):
    assert find(script, 0, start=8) == (0, [8, 4, 2, 1])


def test_a_good_start_and_bound_need_few_trials(script):
    # A gap of 16 multiples of the grid: four halvings after the start and the bound.
    found, tried = find(script, 110_000, start=98_304, grid=2048, most=131_072)
    assert found == 108_544
    assert len(tried) == 1 + 1 + 4


def test_no_more_trials_than_doublings_and_halvings(script):
    for limit in range(1025):
        _, tried = find(script, limit, start=1, most=1024)
        assert len(tried) <= 2 * math.log2(max(limit, 1)) + 3


@pytest.mark.parametrize(
    ("start", "tried_first"), [(1, 8), (15, 8), (17, 16), (99, 24)]
)
def test_a_start_off_the_grid_is_moved_onto_it(script, start, tried_first):
    _, tried = find(script, 0, start=start, grid=8, most=31)
    assert tried[0] == tried_first


def test_a_most_below_the_grid_leaves_nothing_to_try(script):
    assert find(script, 100, grid=8, most=7) == (0, [])


# --- What a log says -----------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "[rank3]:[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to ...",
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
        "torch.distributed.DistBackendError: NCCL error ... Cuda failure 2 'out of memory'",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 1 bytes",
    ],
)
def test_lack_of_memory_is_recognised(script, line):
    assert script.verdict(1, f"something\n{line}\n", 9) == script.OUT_OF_MEMORY
    command = f"$ run --data '{line}'\nlost\n"
    assert script.verdict(1, command, 9) != script.OUT_OF_MEMORY
    # One rank may say so while the others wait for it.
    assert script.verdict(None, line, 9) == script.OUT_OF_MEMORY


def test_a_run_that_ended_well_is_ok_whatever_it_warned_of(script):
    log = "2 CUDA OOM errors thrown.\nCUDA memory allocation retries."
    assert script.verdict(0, log, 9) == "ok"


def test_other_failures_are_named(script):
    log = "[rank0]:[rank0]: ValueError: seq_len must be a | of 4"
    assert script.verdict(1, log, 9) == "ValueError: seq_len must be a / of 4"
    assert script.verdict(3, "2 CUDA OOM errors thrown.", 9) == "exit code 3"
    assert script.verdict(None, "step: 1", 9) == "no end within 9 s"


# --- The command ---------------------------------------------------------------------


@pytest.fixture
def bench(script, tmp_path, monkeypatch, capfd):
    """Calls the command in an empty folder; gives its exit code."""
    stub = tmp_path / "root" / "run_train.sh"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    (tmp_path / "job.toml").write_text("[metrics]\nlog_freq = 1\n")
    monkeypatch.setattr(script, "ROOT", stub.parent)
    monkeypatch.setattr(sys.modules["train_table"], "heading", lambda: "HEADING\n")
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("NGPU", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*args):
        command = ["bench_train.py", "job.toml", "--output", "out/r.md", *args]
        monkeypatch.setattr(sys, "argv", command)
        return script.main()

    return call


def rows():
    with open("out/r.csv", newline="") as file:
        return list(csv.DictReader(file))


def calls():
    return Path("calls").read_text().splitlines()


def trials(column):
    return [(row["impl"], int(row[column]), row["result"]) for row in rows()]


def test_a_config_that_is_not_there_is_named_before_any_run(bench, capfd):
    Path("job.toml").unlink()
    with pytest.raises(SystemExit, match="2"):
        bench()
    assert "there is no config job.toml" in capfd.readouterr().err
    assert not Path("calls").exists()


def test_a_row_for_each_implementation(bench):
    assert bench("--impl", "stock", "liger", "--steps", "4", "--warmup", "1") == 0
    assert calls() == ["stock 8 64", "liger 8 64"]
    for row in rows():
        assert row["config"] == "job"
        assert (row["batch"], row["seq len"], row["steps"]) == ("8", "64", "4")
        assert row["tokens/s per device"] == "3000"  # the median of steps 2, 3 and 4
        assert row["MFU %"] == "3.5"
        assert row["peak GiB"] == "8.00"
        assert (row["first loss"], row["last loss"]) == ("9.90000", "9.60000")
        assert row["result"] == "ok"
    text = Path("out/r.md").read_text()
    assert text.startswith("HEADING\n\n| config | layout |")
    assert "arguments" not in text
    assert text.count("\n| job |") == 2


def test_layouts_have_labels_and_memory_is_that_of_the_worst_rank(bench, monkeypatch):
    monkeypatch.setenv("NGPU", "3")
    degree = "--parallelism.tensor_parallel_degree=2"
    bench("--impl", "stock", "--label", "TP 2", "--", degree)
    bench("--impl", "stock", "--", degree)
    labelled, plain = rows()
    assert labelled["layout"] == "TP 2"
    assert plain["layout"] == labelled["arguments"] == degree
    assert labelled["gpus"] == "3"
    assert labelled["peak GiB"] == "16.50"  # the third rank's, at step 30


def test_a_run_whose_speed_nobody_logged_is_not_ok(bench, monkeypatch):
    monkeypatch.setenv("STUB_LOG_FREQ", "5")
    assert bench("--impl", "stock", "--steps", "4", "--warmup", "1") == 1
    (row,) = rows()
    assert row["result"] == "no step logged after --warmup: see metrics.log_freq"


def test_the_first_step_is_always_logged(bench, monkeypatch):
    monkeypatch.setenv("STUB_LOG_FREQ", "5")
    options = ("--impl", "stock", "--steps", "4", "--warmup", "0")
    assert bench(*options, "--", "--metrics.log_freq=5") == 0


def test_lack_of_memory_in_a_plain_run_is_a_row_and_a_failure(bench):
    code = bench("--impl", "stock", "liger", "--", "--training.local_batch_size=12")
    assert code == 1
    assert trials("batch") == [("stock", 12, "out of memory"), ("liger", 12, "ok")]


def test_the_longest_sequence(bench, capfd):
    code = bench(
        *("--impl", "stock", "liger", "--largest", "seq"),
        *("--start", "512", "1024", "--grid", "128", "--most", "2048"),
    )
    assert code == 0
    assert trials("seq len") == [
        ("stock", 512, "ok"),
        ("stock", 1024, "out of memory"),
        ("stock", 768, "out of memory"),
        ("stock", 640, "ok"),
        ("liger", 1024, "out of memory"),
        ("liger", 512, "ok"),
        ("liger", 768, "ok"),
        ("liger", 896, "ok"),
    ]
    assert {row["batch"] for row in rows()} == {"1"}
    assert {row["search"] for row in rows()} == {"seq"}
    notes = [
        "- Largest seq, job, stock: 640 (768 is out of memory)",
        "- Largest seq, job, liger: 896 (1,024 is out of memory)",
    ]
    assert Path("out/r.md").read_text().splitlines()[-2:] == notes
    assert "job stock seq 640 ..." in capfd.readouterr().out  # as it begins


def test_the_largest_batch_up_to_the_most(bench):
    options = ("--impl", "chunked", "--largest", "batch", "--most", "5")
    assert bench(*options, "--", "--training.seq_len=100") == 0
    assert calls() == [f"chunked {batch} 100" for batch in (1, 2, 4, 5)]
    assert "chunked: 5 (no more than 5 was tried)" in Path("out/r.md").read_text()


def test_a_file_is_added_to_and_its_trials_are_not_repeated(bench):
    search = ("--impl", "stock", "--largest", "seq", "--grid", "128")
    bench(*search, "--start", "512", "--most", "1024")
    first = Path("out/r.md").read_text()
    before = len(calls())
    bench(*search, "--start", "768", "--most", "4096")
    assert len(calls()) == before  # 512 to 1024 are known
    text = Path("out/r.md").read_text()
    assert text.startswith(first)
    assert text.count("HEADING") == 2
    assert text.endswith("- Largest seq, job, stock: 640 (768 is out of memory)\n")
    # Another layout is another search.
    bench(*search, "--start", "512", "--most", "512", "--", "--some.option")
    assert len(calls()) == before + 1
    assert len(rows()) == before + 1


def test_an_error_is_not_taken_for_lack_of_memory(bench, monkeypatch):
    monkeypatch.setenv("STUB_ERROR", "ValueError: planted")
    search = ("--impl", "stock", "--largest", "seq", "--grid", "128", "--start", "512")
    assert bench(*search) == 1
    assert trials("seq len") == [("stock", 512, "ValueError: planted")]
    assert "not known, at least 0; stopped at 512: ValueError: planted" in (
        Path("out/r.md").read_text()
    )
    monkeypatch.delenv("STUB_ERROR")  # and it is tried again
    assert bench(*search, "--most", "512") == 0
    assert [row["result"] for row in rows()] == ["ValueError: planted", "ok"]


def test_a_trial_ends_at_its_time_limit(bench, monkeypatch):
    monkeypatch.setenv("STUB_SLEEP", "60")
    start = time.monotonic()
    code = bench("--impl", "stock", "--largest", "batch", "--limit", "1")
    assert code == 1
    assert time.monotonic() - start < 30
    assert rows()[0]["result"] == "no end within 1 s"


def test_a_table_with_other_columns_is_left_alone(bench):
    Path("out").mkdir()
    Path("out/r.md").write_text("old\n")
    Path("out/r.csv").write_text("config,impl\n")
    with pytest.raises(SystemExit, match="other columns.*another --output"):
        bench("--impl", "stock")
    Path("out/r.csv").unlink()
    with pytest.raises(SystemExit, match="without its CSV: .*another --output"):
        bench("--impl", "stock")
    assert Path("out/r.md").read_text() == "old\n"
    assert not Path("calls").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "8"], "belong to --largest"),
        (["--largest", "seq", "--start", "1", "2", "3"], "3 sizes for 2 of --impl"),
        (["--steps", "10"], "--warmup 10 leaves none of 10 steps"),
        (
            ["--steps", "4", "--warmup", "1", "--", "--metrics.log_freq=5"],
            "no step between --warmup 1 and --steps 4 is logged: metrics.log_freq is 5",
        ),
        (["--grid", "-5", "--largest", "seq"], "--grid must be above 0, got -5"),
        (["--", "--training.steps", "4"], "--training.steps is not for the arguments"),
        (["--", "--metrics.log_freq=0"], "a whole number above 0, got 0"),
        (["--", "--metrics.log_freq", "x"], "a whole number above 0, got x"),
    ],
)
def test_options_that_make_no_sense_are_refused(bench, capfd, options, message):
    with pytest.raises(SystemExit):
        bench(*options)
    assert message in capfd.readouterr().err


def test_two_configs_of_one_name_would_be_one_in_the_table(script, monkeypatch, capsys):
    configs = [str(ROOT / "train_configs" / "debug_model.toml")] * 2
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *configs])
    with pytest.raises(SystemExit):
        script.parse_args()
    assert "configs of different names" in capsys.readouterr().err


def test_the_run_in_progress_ends_with_the_command(bench, tmp_path):
    """Else it would hold its GPUs, and what comes next would not fit."""
    start = (
        "import sys, pathlib, bench_train\n"
        f"bench_train.ROOT = pathlib.Path({str(tmp_path / 'root')!r})\n"
        "bench_train.main()\n"
    )
    env = python_env(STUB_SLEEP="60", STUB_CALLS=str(tmp_path / "calls"))
    env["PYTHONPATH"] += os.pathsep + str(SCRIPTS)
    arguments = ["job.toml", "--impl", "stock", "--logs", "logs"]
    with subprocess.Popen(
        [sys.executable, "-c", start, *arguments], env=env
    ) as process:
        log = tmp_path / "logs" / "job-stock.log"
        deadline = time.monotonic() + 60
        while "sleeping" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143  # which waits for the run
