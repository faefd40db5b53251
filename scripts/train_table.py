"""The table of `bench_train.py`: Markdown, and a CSV beside it."""

from __future__ import annotations

import csv
from pathlib import Path

from provenance import heading

COLUMNS = (
    "config",
    "layout",
    "impl",
    "gpus",
    "seq len",
    "batch",
    "steps",
    "tokens/s per device",
    "MFU %",
    "peak GiB",
    "first loss",
    "last loss",
    "first grad norm",
    "result",
)
# `search` names the size that a trial belongs to; the heading shows the arguments.
CSV_COLUMNS = (*COLUMNS, "arguments", "search")

Row = dict[str, str]


class Table:
    """The rows of this command, below those that the files have from earlier ones."""

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.earlier_text = ""
        self.earlier_rows: list[Row] = []
        if output and output.exists():
            if not output.with_suffix(".csv").exists():
                raise SystemExit(
                    f"{output} is there without its CSV: choose another --output"
                )
            self.earlier_text = output.read_text() + "\n"
            with open(output.with_suffix(".csv"), newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
                    raise SystemExit(
                        f"{file.name} has other columns than this command writes: "
                        "choose another --output"
                    )
                self.earlier_rows = list(reader)

    @property
    def all_rows(self) -> list[Row]:
        return self.earlier_rows + self.rows

    def add(self, row: Row) -> None:
        row = dict.fromkeys(CSV_COLUMNS, "") | row
        self.rows.append(row)
        print("   ", *(f"{c}: {row[c]}" for c in COLUMNS[3:]), sep="  ", flush=True)
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    def write(self) -> None:
        if not self.output:
            return
        self.output.write_text(f"{self.earlier_text}{heading()}\n{self.markdown()}")
        with open(self.output.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.all_rows)

    def markdown(self) -> str:
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(r[c] for c in COLUMNS) + " |" for r in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"
