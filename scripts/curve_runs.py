"""The runs of `compare_loss_curves.py`: trained one after the other, with a bar."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from environment import ROOT
from tqdm import tqdm

from torchtitan_liger.loss_curves import LOG_NAME, Run, read_run
from torchtitan_liger.loss_curves_report import PICTURE

OVERLAYS = "tensorboard"
TAIL = 40  # lines of a crashed run's log that go into the report


class Trainer:
    """Starts the runs of a comparison, one after the other."""

    def __init__(
        self,
        args: argparse.Namespace,
        progress: Progress,
        details: dict[str, dict[str, str]],
    ) -> None:
        self.args = args
        self.progress = progress
        self.details = details

    def forget(self, name: str) -> None:
        """Remove what an earlier comparison left of a run."""
        log = self.args.output / name / LOG_NAME
        if log.is_file():
            with open(log, errors="replace") as lines:
                command = lines.readline()
            if command.startswith("$ ") and "run_train.sh" in command:  # ours
                shutil.rmtree(log.parent)

    def train(
        self, name: str, changes: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Run:
        """Train once; keep the log, whatever happens."""
        args, folder = self.args, self.args.output / name
        self.forget(name)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} is no run of an earlier comparison (it has no {LOG_NAME} of "
                "one): choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        steps = [] if args.steps is None else [f"--training.steps={args.steps}"]
        command = [
            str(ROOT / "run_train.sh"),
            f"--job.dump_folder={folder}",
            "--metrics.log_freq=1",
            "--metrics.enable_tensorboard",
            "--metrics.disable_color_printing",
            "--debug.seed=1",
            "--debug.deterministic",
            "--debug.deterministic_warn_only",
            *steps,
            *args.overrides,
            *changes,
        ]
        variables = {"CONFIG_FILE": str(args.config), **(env or {})}
        shown = shlex.join([*(f"{k}={v}" for k, v in variables.items()), *command])
        self.progress.begin(name)
        has_trained = False
        start, tail = time.monotonic(), deque[str](maxlen=TAIL)
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHON": sys.executable, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with process, open(folder / LOG_NAME, "w") as log:
            log.write(f"$ {shown}\n")
            log.flush()  # by which this is known as a run of a comparison
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    tail.append(line)
                    if self.progress.read(line) and not has_trained:
                        forget_report(args.output)
                        has_trained = True
            except BaseException:
                process.terminate()  # torchrun ends its workers
                raise
        seconds = time.monotonic() - start
        run = read_run(folder, name)
        self.details[name] = {"command": shown, "seconds": f"{seconds:.0f}"}
        if process.returncode:
            crash = run.crash or f"exit code {process.returncode}"
            run = replace(run, crash=crash)
            self.details[name]["end of the log"] = "".join(tail).rstrip()
        self.progress.end(name, f"crashed: {run.crash}" if run.crash else "finished")
        return run


def forget_report(folder: Path) -> None:
    """Remove an earlier comparison's report: it is of other runs."""
    try:
        ours = {"verdict", "rule"} <= json.loads(
            (folder / "report.json").read_text()
        ).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        return
    for events in (folder / OVERLAYS).glob("*/events.out.tfevents.*"):
        events.unlink()
        if not any(events.parent.iterdir()):
            events.parent.rmdir()
    for name in ("report.md", "report.json", PICTURE, PICTURE.replace("png", "svg")):
        (folder / name).unlink(missing_ok=True)


class Progress:
    """A bar over the steps of all runs, with the time that is left."""

    def __init__(self, num_runs: int) -> None:
        self.num_runs = num_runs
        self.num_done = 0
        self.last_step = 0  # of each run
        self.bar = tqdm(unit="step", smoothing=0, disable=None, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add_run(self) -> None:
        self.num_runs += 1
        self._show()

    def begin(self, name: str) -> None:
        self.bar.write(f"{name}: started", file=sys.stderr)
        self.bar.set_description(name)

    def read(self, line: str) -> bool:
        """Look for the number of steps, and for a step, in a line of a log; whether there is
        a step."""
        if match := re.search(r"total steps (\d+)", line):
            self.last_step = int(match[1])
            self._show()
        elif match := re.search(r"(?<!validate )step:\s*(\d+)\s+loss:", line):
            self._show(int(match[1]))
            return True
        return False

    def end(self, name: str, how: str) -> None:
        self.num_done += 1
        self._show()
        self.bar.write(f"{name}: {how}", file=sys.stderr)

    def _show(self, step: int = 0) -> None:
        self.bar.total = self.num_runs * self.last_step or None
        self.bar.n = self.num_done * self.last_step + step
        self.bar.refresh()
