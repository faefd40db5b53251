"""scripts/bench_head_loss.py on a small CPU problem."""

from __future__ import annotations

import csv
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT, python_env, run_command
from torchtitan_liger.head_loss import HeadLossOutput

TOKENS, DIM, VOCAB = 65, 48, 517
SMALL = ("--device=cpu", "--tokens=65", "--dim=48", "--vocab=517", "--repeats=2")
QUANTITIES = ("loss", "d_hidden", "d_weight")
GRADIENT_BYTES = (TOKENS + VOCAB) * DIM * 4


@pytest.fixture
def cases(monkeypatch):
    """The module that holds the implementations."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("head_loss_cases")


@pytest.fixture
def mixtures(cases):
    """The module that holds the problems and the losses."""
    return importlib.import_module("head_loss_mixtures")


@pytest.fixture
def bench(cases, monkeypatch, tmp_path):
    """`bench(*arguments)` -> the CSV's rows by implementation, and the Markdown."""

    def run(*arguments, code=0):
        output = tmp_path / "result.md"
        command = ["bench_head_loss.py", *SMALL, *arguments, f"--output={output}"]
        monkeypatch.setattr(sys, "argv", command)
        assert importlib.import_module("bench_head_loss").main() == code
        with open(output.with_suffix(".csv"), newline="") as file:
            return list(csv.DictReader(file)), output.read_text()

    return run


def check_figures(row):
    assert row["result"] == "ok"
    assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"]) < 1e4
    assert float(row["us_per_token"]) == pytest.approx(
        1e3 * float(row["ms"]) / int(row["tokens"])
    )
    assert float(row["extra_bytes"]) >= GRADIENT_BYTES
    for name in QUANTITIES:
        assert 0 <= float(row[f"{name}_error"]) < 2e-6


def test_every_implementation_has_a_row_with_figures_or_a_reason(bench, cases):
    families = [name for name in cases.FAMILIES if name != "compiled"]  # takes long
    rows, text = bench(
        *("--impl", *families, "--liger-consts=4", "--budgets=1"),
        *("--repeats=1", "--warmup=0"),
    )
    names = [row["implementation"] for row in rows]
    assert names[0].startswith("floor")
    assert rows[0]["result"] == "ok"
    assert float(rows[0]["ratio"]) == 1
    assert names[1] == "the three products and one pass"
    assert rows[1]["result"] == "ok"
    assert {"stock eager", "chunked, 256 MiB", "chunked, 1 MiB"} < set(names)
    assert {"Liger, default", "Liger, chunk_mem_const 4"} < set(names)
    for row in rows[2:]:
        assert row["implementation"] in text
        assert row["result"] in text
        if not row["result"].startswith("not available: "):
            check_figures(row)
    stock = rows[names.index("stock eager")]
    assert all(float(stock[f"{name}_error_ratio"]) == 1 for name in QUANTITIES)
    # The logits in float32, their softmax, and the gradient of both.
    assert float(stock["extra_bytes"]) >= 2 * TOKENS * VOCAB * 4
    assert "tokens 65, dim 48, vocab 517, ignored 0.0, dtype float32" in text


def test_each_mixture_is_measured_in_one_call_in_several_and_from_full_logits(
    bench, mixtures
):
    rows, text = bench("--mixtures", "--ignored", "0", "0.5")
    half = len(rows) // 2
    count = len(mixtures.MIXTURES) + len(mixtures.MORE_MIXTURES)
    assert half == 3 * count  # one has no calls; and the product
    assert [row["ignored"] for row in rows[::half]] == ["0.0", "0.5"]
    for *losses, product in (rows[:half], rows[half:]):
        assert product["implementation"] == "teacher's product alone"
        ms = {row["implementation"]: float(row["ms"]) for row in losses}
        for row in losses:
            check_figures(row)
            others, *of_teacher = row["implementation"].split(" + distillation")
            if not of_teacher:
                assert not row["overhead"]
                continue
            beyond_ms = float(row["ms"]) - ms[f"{others}: one call"]
            beyond_ms -= float(product["ms"])
            share = beyond_ms / ms["cross entropy: one call"]
            assert float(row["overhead"]) == pytest.approx(share)
    assert "| overhead |" in text
    assert "The overhead of a distillation" in text


def test_preferences_are_measured_beside_ligers(bench):
    rows, _ = bench("--preferences", "8", "--tokens=96", "--ignored", "0", "0.5")
    assert [row["implementation"] for row in rows[:5]] == [
        "cross entropy: one call",
        "cross entropy: full logits",
        "DPO: one call",
        "DPO: full logits",
        "DPO: Liger",
    ]
    assert len(rows) == 10
    for row in rows:
        check_figures(row)


def test_rows_can_be_chosen_by_their_names(bench, capsys):
    rows, _ = bench("--mixtures", "--rows", r"^cross entropy( \+ dist.*JSD.)?: one")
    (alone, distilled) = rows
    assert alone["implementation"] == "cross entropy: one call"
    assert distilled["implementation"] == "cross entropy + distillation (JSD): one call"
    for row in rows:
        check_figures(row)
    with pytest.raises(SystemExit, match="'none' is in none of: floor: the three"):
        bench("--rows", "none", "--impl", "floor")
    with pytest.raises(SystemExit):
        bench("--rows", "(")
    assert "'(' is no regular expression: missing )" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens=0"], "--tokens must be at least 1, got 0"),
        (["--grow=tokens", "--sizes", "0", "5"], "--sizes must be at least 1"),
        (["--warmup=-2"], "--warmup must be at least 0, got -2"),
        (["--mixtures", "--budgets", "64"], "--budgets are for rows of chunked"),
        (["--preferences", "8"], "[65] tokens are no pairs of such sequences"),
        (["--device=cuda"], "--device cuda: torch sees no GPU; use --device cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert message in capsys.readouterr().err


def test_rows_are_not_added_to_a_table_without_its_figures(bench, capsys, tmp_path):
    (tmp_path / "result.md").write_text("old")
    with pytest.raises(SystemExit):
        bench("--tp", "--append")
    assert "result.md and its CSV only one is there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_vocabulary_over_two_processes_is_measured_beside_one(
    bench, mixtures, tmp_path
):
    sizes = ("--tokens=2200", "--dim=16", "--vocab=101", "--ignored=0.05")
    rows, _ = bench("--tp", *sizes)
    names = [mixture.name for mixture in mixtures.MIXTURES]
    assert [row["mixture"] for row in rows] == names
    run_command(
        sys.executable,
        *("-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
        *(ROOT / "scripts/bench_head_loss.py", "--tp", "--device=cpu", *sizes),
        *("--repeats=2", "--uneven", "--append", "--output", tmp_path / "result.md"),
        env=python_env(),
        cwd=ROOT,
    )
    with open(tmp_path / "result.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixture"] for row in rows[::2]] == names
    assert [row["mixture"] for row in rows[1::2]] == names
    for single, double in zip(rows[::2], rows[1::2], strict=True):
        assert (single["tp"], single["shards"]) == ("1", "even")
        assert (double["tp"], double["shards"]) == ("2", "uneven")
        assert (single["chunks"], double["chunks"]) == ("3", "3")
        assert single["collectives"] == single["collectives_backward"] == "0"
        # A Jensen-Shannon divergence is known when both softmaxes are: one more.
        per_chunk = 2 if "JSD" in double["mixture"] else 1
        assert float(double["collectives_per_chunk"]) == per_chunk
        assert double["collectives_backward"] == "1"  # the gradient of hidden states
        assert 0 < float(double["ms_min"]) <= float(double["ms"])
        assert float(double["ms"]) <= float(double["ms_max"])
        assert float(double["ratio"]) == float(double["ms"]) / float(single["ms"])
        for name in QUANTITIES:
            assert 0 <= float(double[f"{name}_error"]) < 2e-6
    text = (tmp_path / "result.md").read_text()
    assert text.count("    python scripts/bench_head_loss.py --device=cpu") == 1
    assert str(tmp_path) not in text
    assert "    torchrun --nproc_per_node 2 scripts/bench_head_loss.py --tp" in text
    assert text.count("| TP |") == 1


def test_ranks_that_share_a_gpu_have_all_figures_but_times(
    bench, mixtures, monkeypatch
):
    tp = importlib.import_module("head_loss_tp")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tp.shares_a_gpu("cuda")
    assert not tp.shares_a_gpu("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert not tp.shares_a_gpu("cuda")
    monkeypatch.setattr(tp, "shares_a_gpu", lambda device: True)
    rows, text = bench("--tp")
    assert len(rows) == len(mixtures.MIXTURES)
    for row in rows:
        assert row["ms"] == row["ms_min"] == row["ms_max"] == row["ratio"] == ""
        assert float(row["extra_bytes"]) > 0
        assert 0 <= float(row["d_weight_error"]) < 2e-6
    assert "| TP | extra GiB |" in text


def test_ranks_whose_clocks_differ_make_as_many_passes(cases, monkeypatch):
    """A pass has collectives: one more on one rank would wait for ever."""
    measure = importlib.import_module("head_loss_measure")
    tp = importlib.import_module("head_loss_tp")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    first_rank = iter([True, True, False])
    monkeypatch.setattr(tp, "gathered", lambda own, group: [next(first_rank), own])
    passes = []

    def settled(case, inputs, agreed):
        measure.settle(lambda: passes.append(case), inputs, agreed)
        return 1.0

    monkeypatch.setattr(tp, "time_once", settled)
    monkeypatch.setattr(measure, "SETTLING_SECONDS", 0)  # this rank's clock is over
    inputs = SimpleNamespace(hidden_TD=torch.zeros(1), weight_VD=torch.zeros(1))
    args = SimpleNamespace(seed=0, warmup=0, repeats=1)
    assert tp.take_times(["case"], inputs, args, None) == [1e3]
    assert passes == ["case"] * 2


def test_columns_of_the_ranks_cover_the_vocabulary_once(cases):
    columns_of = importlib.import_module("head_loss_tp").columns_of
    for uneven, expected in ((False, [25, 25, 25, 26]), (True, [10, 20, 30, 41])):
        slices = [columns_of(101, rank, 4, uneven) for rank in range(4)]
        assert [part.stop - part.start for part in slices] == expected
        words = [word for part in slices for word in range(101)[part]]
        assert words == list(range(101))


def test_growth_has_a_row_for_each_size_and_a_picture(bench, tmp_path):
    rows, text = bench(
        *("--grow=vocab", "--sizes", "128", "256"), "--impl", "stock", "chunked"
    )
    assert [row["vocab"] for row in rows] == ["128"] * 3 + ["256"] * 3
    assert all(row["result"] == "ok" and not row["loss_error"] for row in rows)
    assert "![Growth with vocab](result.png)" in text
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_shows_in_the_errors(bench, cases, monkeypatch):
    def loss_of(inputs):
        weight_VD = 1.01 * inputs.weight_VD - 0.01 * inputs.weight_VD.detach()
        return cases.stock_loss(inputs._replace(weight_VD=weight_VD), compiled=False)

    wrong = cases.autograd_case("wrong", loss_of)
    monkeypatch.setitem(cases.FAMILIES, "chunked", lambda args: [wrong])
    (row,), _ = bench("--impl=chunked")
    assert float(row["d_weight_error"]) == pytest.approx(0.01, rel=0.01)
    assert float(row["d_weight_error_ratio"]) > 1000
    assert float(row["d_hidden_error"]) < 2e-6
    assert float(row["loss_error"]) < 2e-6


def test_an_implementation_that_fails_says_why_in_its_row(bench, cases, monkeypatch):
    def loss_of(inputs):
        raise torch.OutOfMemoryError("tried to allocate\n 99 GiB")

    failing = cases.autograd_case("failing", loss_of)
    monkeypatch.setitem(cases.FAMILIES, "chunked", lambda args: [failing])
    rows, text = bench("--impl", "stock", "chunked")
    reason = "OutOfMemoryError: tried to allocate 99 GiB"
    assert [row["result"] for row in rows] == ["ok", reason]
    assert reason in text
    rows, _ = bench("--impl=chunked", code=1)  # nothing ran
    assert rows[0]["result"] == reason


def test_a_call_that_takes_the_number_of_labels_is_told_it(cases, mixtures):
    class Counting:
        terms = ()

        def __call__(self, *tensors, num_labeled=None, **kwargs):
            self.num_labeled = num_labeled
            return HeadLossOutput(tensors[0].sum(), {}, {})

    problem = mixtures.Problem(TOKENS, DIM, VOCAB, torch.float32, "cpu", ignored=0.9)
    inputs, counting = problem.inputs(), Counting()
    cases.engine_loss(counting, inputs)
    assert counting.num_labeled == (inputs.labels_T != cases.IGNORE_INDEX).sum() == 7
