"""The README's figures are those of the files that it names."""

from __future__ import annotations

import csv
import re
import sys

import pytest

from tests.helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text()
FILES = sorted(set(re.findall(r"\(benchmarks/(train\w*)\.md\)", README)))

# What the words of the first table stand for in the files.
CONFIG = {"config": "llama3_1.2b", "gpus": "1"}
IMPLS = {"torchtitan 0.2.2": "stock", "with the flag (Liger-Kernel)": "liger"}
COLUMNS = {"tokens/s": "tokens/s per device", "peak memory": "peak GiB"}


def first_table() -> list[list[str]]:
    """The cells of the README's first table: the header, then the rows."""
    lines = re.search(r"(?:^\|.*\n)+", README, re.MULTILINE)[0].splitlines()
    header, _rule, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    )
    return [header, *rows]


HEADER, *ROWS = first_table()


def measured(**wanted: str) -> dict[str, str]:
    """The one run with all of these, in the files that the README names."""
    rows = []
    for name in FILES:
        with open(ROOT / "benchmarks" / f"{name}.csv", newline="") as file:
            rows += csv.DictReader(file)
    found = [
        row
        for row in rows
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


def test_a_gpu_is_faster_without_the_flag_on_the_debug_model():
    """As the README says below the table."""
    speed = {
        impl: float(measured(config="debug_model", impl=impl)["tokens/s per device"])
        for impl in ("stock", "liger", "chunked")
    }
    assert speed["stock"] > max(speed["liger"], speed["chunked"])
