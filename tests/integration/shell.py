"""Stubs for the shell commands' tests: nothing is installed and nothing trained.

An "environment" here is a real one without pip, whose torch, pytest and so on are stubs
that print what they were asked to do; what `python3 -m venv` makes has a stub of pip.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Stands for torchrun, pytest, ruff and mypy: one line of JSON, and the wished exit code.
REPORT = """
import json, os, sys
names = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF")
env = {name: os.environ.get(name) for name in names}
print(json.dumps({"module": __spec__.name, "args": sys.argv[1:], "env": env,
                  "cwd": os.getcwd(), "python": sys.executable}))
sys.exit(0 if "--version" in sys.argv else int(os.environ.get("STUB_EXIT", 0)))
"""
LINTER = REPORT.replace("STUB_EXIT", "STUB_LINTER_EXIT")
RUN_STUBS = {
    "torch/distributed/run.py": REPORT,
    "torchtitan/__init__.py": "raise RuntimeError('looking must not import')",
    "torchtitan_liger/__init__.py": "",
    "torchtitan_liger/train.py": REPORT,
}
DEV_STUBS = RUN_STUBS | {
    "pytest.py": REPORT,
    "pytest_timeout.py": "",
    "xdist.py": "",
    "ruff.py": LINTER,
    "mypy.py": LINTER,
}
PIP = """
import os, shutil, sys, time
if sys.argv[1] == "install":
    with open(os.environ["STUB_PIP_LOG"], "a") as log:
        print(*sys.argv[1:], file=log)
    time.sleep(float(os.environ.get("STUB_PIP_SECONDS", 0)))
    if status := int(os.environ.get("STUB_PIP_EXIT", 0)):
        sys.exit(status)
    site = os.path.dirname(os.path.dirname(__file__))
    shutil.copytree({stubs!r}, site, dirs_exist_ok=True)
"""


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def make_environment(folder: Path, stubs: dict[str, str]) -> Path:
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name, text in stubs.items():
        write(site / name, text)
    return folder


class Shell:
    """Runs commands in an environment of which every variable is known."""

    def __init__(self, tmp_path: Path):
        self.bin = tmp_path / "bin"
        self.log = tmp_path / "pip.log"
        self.cwd = tmp_path / "some where"
        self.cwd.mkdir()
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STUB_PIP_LOG": str(self.log),
            "CUDA_VISIBLE_DEVICES": "",
        }
        # Without this, `python3` is whatever the machine has, with a real pip.
        stubs = tmp_path / "stubs"
        for name, text in DEV_STUBS.items():
            write(stubs / name, text)
        write(tmp_path / "stub_pip/pip/__main__.py", PIP.format(stubs=str(stubs)))
        self.command(
            "python3",
            f'if [ "$1 $2" != "-m venv" ]; then exec "{sys.executable}" "$@"; fi\n'
            f'"{sys.executable}" -m venv --without-pip "${{@:3}}" &&\n'
            f'cp -r "{tmp_path}/stub_pip/pip" "${{@: -1}}"/lib/python3*/site-packages/',
        )

    def command(self, name: str, script: str) -> None:
        write(self.bin / name, f"#!/usr/bin/env bash\n{script}\n", 0o755)

    def start(self, *command: object, **env: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.cwd,
            env=self.env | {name: str(value) for name, value in env.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *command: object, **env: object):
        with self.start(*command, **env) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def report(self, *command: object, **env: object) -> dict:
        """What the stub that a successful command ended in was asked to do."""
        done = self(*command, **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    @property
    def installs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []
