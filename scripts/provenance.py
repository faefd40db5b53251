"""A file with results: where it goes, and its first lines: when, where and with what it was
measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def result_file(text: str) -> Path:
    """The type of `--output`: looked at before anything is measured. Its folder is made.

    Raises:
        ArgumentTypeError: for what cannot be a Markdown file with a CSV beside it.
    """
    path = Path(text)
    if path.suffix != ".md" or path.is_dir():
        raise argparse.ArgumentTypeError(
            f"must name a Markdown file, such as results.md, got {text}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: permission denied")
    return path


@functools.cache
def heading() -> str:
    """When, where and with what the table was measured."""
    names = ("torch", "triton", "torchtitan", "liger-kernel")
    versions = ", ".join(f"{name} {installed(name)}" for name in names)
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    command = [*launcher, f"scripts/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in ("--output", "--logs"):  # places on one machine
            next(arguments)
        elif not argument.startswith(("--output=", "--logs=")):
            command.append(argument)
    ngpu = f"NGPU={os.environ['NGPU']} " if "NGPU" in os.environ else ""
    return (
        f"{date.today()}, {device()}; {versions}; commit {commit()}.\n\n"
        f"    {ngpu}{shlex.join(command)}\n"
    )


def device() -> str:
    # Asked in another process: this one would hold memory on the GPU for its whole life.
    code = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        return f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return asked.stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(none)"


def commit() -> str:
    """The commit of this tree; BENCH_COMMIT where the tree is a copy that has another."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"
