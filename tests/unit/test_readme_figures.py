"""The README's figures are those of the files that it names."""

from __future__ import annotations

import csv
import math
import re
import sys
from statistics import fmean

import pytest

from tests.helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text()
FILES = ["train_h200_202611"]

# What the words of the first table stand for in the files.
CONFIG = {"config": "llama3_1.2b", "gpus": "1"}
IMPLS = {
    "torchtitan 0.2.2": "stock",
    "with the flag (Liger-Kernel)": "liger",
    'with the flag, `impl = "chunked"`': "chunked",
}
COLUMNS = {"tokens/s": "tokens/s per device", "peak memory": "peak GiB"}


def first_table() -> list[list[str]]:
    """The cells of the README's first table: the header, then the rows."""
    lines = re.search(r"(?:^\|.*\n)+", README, re.MULTILINE)[0].splitlines()
    header, _rule, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    )
    return [header, *rows]


HEADER, *ROWS = first_table()


def runs(name: str) -> list[dict[str, str]]:
    with open(ROOT / f"benchmarks/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def measured(**wanted: str) -> dict[str, str]:
    """The one run with all of these, in the files that the README names."""
    found = [
        row
        for name in FILES
        for row in runs(name)
        if wanted.items() <= row.items()
        # Neither a layout of its own nor a trial of a search.
        and not row.get("layout")
        and not row.get("search")
    ]
    assert len(found) == 1, f"{len(found)} rows of {FILES} have {wanted}"
    assert found[0]["result"] == "ok"
    return found[0]


@pytest.mark.parametrize("column", HEADER[1:])
@pytest.mark.parametrize("label", [row[0] for row in ROWS])
def test_each_number_of_the_first_table_was_measured(label, column):
    (row,) = [row for row in ROWS if row[0] == label]
    shown = row[HEADER.index(column)].split()[0]
    value = float(measured(**CONFIG, impl=IMPLS[label])[COLUMNS[column]])
    decimals = len(shown.partition(".")[2])
    assert shown == f"{value:,.{decimals}f}"


def test_the_first_table_says_how_many_tokens_a_step_has():
    config = (ROOT / "train_configs" / f"{CONFIG['config']}.toml").read_text()
    training = tomllib.loads(config)["training"]
    num_tokens = training["local_batch_size"] * training["seq_len"]
    assert f"{num_tokens:,} tokens" in HEADER[0]


def test_the_files_are_of_the_gpu_and_the_version_that_the_table_names():
    assert FILES
    for name in FILES:
        heading = (ROOT / "benchmarks" / f"{name}.md").read_text().splitlines()[0]
        assert "NVIDIA H200" in heading
        assert "torchtitan 0.2.2," in heading


def test_a_gpu_is_faster_without_the_engine_on_the_debug_model():
    """As the README says where it explains the table."""
    stock, ours = (
        float(measured(config="debug_model", impl=impl)["tokens/s per device"])
        for impl in ("stock", "chunked")
    )
    assert stock > ours


def test_how_much_the_speed_differs_from_run_to_run_was_measured():
    ratios = [
        f"{speed_of_1_2b(layout) / speed_of_1_2b(layout, 'stock'):.3f}"
        for layout in (
            "",
            "third",
            "other order",
            "second",
            "taking turns",
            "earlier",
            "two budgets",
            "before",
        )
    ]
    text = " ".join(README.split())
    assert f"`chunked` is {ratios[0]} times as fast as torchtitan" in text
    assert f"it was {', '.join(ratios[1:-1])} and {ratios[-1]}:" in text


def test_what_more_memory_for_logits_gains_was_measured():
    stock = speed_of_1_2b("two budgets", "stock")
    default = speed_of_1_2b("two budgets") / stock
    larger = speed_of_1_2b("two budgets, 4096MiB") / stock
    words = f"{larger:.3f}, in the run where the default had the {default:.3f}"
    assert words in " ".join(README.split())


def speed_of_1_2b(layout: str, impl: str = "chunked") -> float:
    """The mean of the rows: a run whose implementations take turns has each twice."""
    wanted = ("llama3_1.2b", layout, impl, "")
    keys = ("config", "layout", "impl", "search")
    return fmean(
        float(row["tokens/s per device"])
        for row in runs("train_h200_202611")
        if tuple(row[key] for key in keys) == wanted
    )


def table_after(words: str) -> list[list[str]]:
    """The cells of the first table after these words, without its header."""
    text = README[README.index(words) :]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def shown(value: str, decimals: int) -> str:
    return f"{float(value):,.{decimals}f}" if value else ""


def test_the_heads_figures_are_those_of_its_file():
    rows = {row["implementation"]: row for row in runs("head_loss_h200_202611")}
    table = table_after("The head alone")
    assert len(table) > 5
    for name, *cells in table:
        row = rows[name]
        gib = str(float(row["extra_bytes"]) / 2**30) if row["extra_bytes"] else ""
        expected = [shown(row["ms"], 1), shown(row["ratio"], 3), shown(gib, 2)]
        assert cells == [*expected, shown(row["d_weight_error_ratio"], 2)], name


def test_the_figures_of_the_8b_model_are_those_of_its_file():
    """A run that was repeated counts as one, with the mean of its figures."""
    repeated: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in runs("train_8b_h200_202611"):
        if not row["search"]:
            repeated.setdefault((row["layout"], row["impl"]), []).append(row)
    expected = []
    for names, rows in repeated.items():
        speed = fmean(float(row["tokens/s per device"]) for row in rows)
        memory = max(float(row["peak GiB"]) for row in rows)
        expected.append([*names, f"{speed:,.0f}", f"{memory:.2f}"])
    assert table_after("Llama 3 8B on four H200s") == expected


SEARCHES = {
    "sequence, Llama 1.2B, one H200": ("train_h200_202611", "seq len", ""),
    "batch, Llama 3 8B, FSDP2": ("train_8b_h200_202611", "batch", "FSDP2"),
    "batch, Llama 3 8B, FSDP2 x TP 2": (
        "train_8b_h200_202611",
        "batch",
        "FSDP2 x TP 2",
    ),
}


def largest(file: str, column: str, layout: str, impl: str) -> str:
    trials = [
        row
        for row in runs(file)
        if row["search"] and (row["layout"], row["impl"]) == (layout, impl)
    ]
    fits = max(int(row[column]) for row in trials if row["result"] == "ok")
    ended = any(int(row[column]) > fits for row in trials)
    return f"{fits:,}" if ended else f"{fits:,} or more"


@pytest.mark.parametrize("row", table_after("What fits into the saved"))
def test_the_largest_that_train_are_those_of_the_searches(row):
    name, *cells = row
    expected = [largest(*SEARCHES[name], impl) for impl in ("stock", "chunked")]
    assert cells == expected


def test_what_sharded_vocabularies_gain_and_lose_is_measured():
    rows = runs("head_loss_tp_h200_202611")
    ratios = {
        int(row["tp"]): float(row["ratio"])
        for row in rows
        if row["mixture"] == "cross entropy"
    }
    assert f"{ratios[2]:.2f} and {ratios[4]:.2f} of the time of one" in README
    text = " ".join(README.split())
    worst = max(float(row["d_hidden_error_ratio"]) for row in rows)
    assert f"up to {worst:.1f} times the rounding error" in text
    worst = max(float(row["d_weight_error_ratio"]) for row in rows)
    assert worst <= 1.05
    assert "That of the weight is as exact." in text


def test_as_many_layouts_were_checked_as_the_readme_says():
    table = (ROOT / "benchmarks/mesh_h200_202611.md").read_text()
    row = r"^\| (.*? \| \d) \| .* \| (\w+) \|$"
    layouts, passed = zip(*re.findall(row, table, re.MULTILINE), strict=True)
    assert set(passed) == {"yes"}
    assert f"for {len(set(layouts))} layouts" in " ".join(README.split())


def test_a_token_takes_as_long_as_the_readme_says_whatever_the_batch():
    rows = runs("head_loss_growth_h200_202611")
    mine = [row for row in rows if row["implementation"] == "chunked, default"]
    times = [float(row["us_per_token"]) for row in mine]
    percent = math.ceil(100 * (max(times) / min(times) - 1))
    sizes = sorted(int(row["tokens"]) for row in mine)
    words = f"within {percent} %, in batches of {sizes[0]:,} to {sizes[-1]:,} tokens"
    assert words in " ".join(README.split())


def test_what_mixtures_and_preferences_cost_was_measured():
    table = (ROOT / "benchmarks/head_loss_mixtures_h200_202611.md").read_text()
    measured = re.findall(
        r"^\| (.*): one call \|.*?\|.*?\| ([\d.]+) \| ([\d.]*)%? \|",
        table,
        re.MULTILINE,
    )
    several = "cross entropy + z-loss + entropy + accuracy + GRPO"
    ratios = [float(ratio) for name, ratio, _ in measured if name == several]
    assert len(ratios) == 3
    mixtures = [
        (row["implementation"], float(row["ratio"]))
        for row in runs("head_loss_mixtures_h200_202611")
    ]
    of_csv = [round(r, 3) for name, r in mixtures if name.endswith(": one call")]
    assert of_csv == [float(ratio) for _, ratio, _ in measured[: len(of_csv)]]
    words = (
        f"take {min(ratios):.2f} to {max(ratios):.2f} times as long as cross entropy"
    )
    text = " ".join(README.split())
    assert words in text
    teachers = [
        float(overhead)
        for name, _, overhead in measured
        if name.endswith(("KL)", "(soft cross entropy)"))
    ]
    assert len(teachers) == 14
    assert f"adds {min(teachers):.1f} to {max(teachers):.1f} % to that" in text
    newest = table.partition("\nOf earlier code, with an older kernel for a JSD")[0]
    jsd = re.findall(r"\(JSD\): one call \|.*?\|.*?\|.*?\| ([\d.]+)% \|", newest)
    assert len(jsd) == 4
    low, high = min(jsd, key=float), max(jsd, key=float)
    assert f"needs the mixture of both softmaxes first, {low} to {high} %" in text
    preferences = {
        row["implementation"]: f"{float(row['ratio']):.2f}"
        for row in runs("head_loss_preferences_h200_202611")
        if float(row["ignored"]) == 0
    }
    ours, ligers = preferences["DPO: one call"], preferences["DPO: Liger"]
    assert f"takes {ours} times as long" in text
    assert f"Liger-Kernel's takes {ligers}" in text


def test_the_distance_from_the_floor_at_a_small_width_was_measured():
    table = (ROOT / "benchmarks/head_loss_d2048_h200_202611.md").read_text()
    ratios = re.findall(r"^\| chunked, default \|.*?\|.*?\| ([\d.]+) \|", table, re.M)
    low, high = f"{float(min(ratios)):.2f}", f"{float(max(ratios)):.2f}"
    assert f"further from the floor: {low} to {high}" in " ".join(README.split())
