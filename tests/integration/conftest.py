"""Environments, repositories and shells for the shell commands' tests."""

import shutil

import pytest

from tests.integration.shell import (
    DEV_STUBS,
    ROOT,
    RUN_STUBS,
    Shell,
    make_environment,
    write,
)


@pytest.fixture(scope="session")
def run_env(tmp_path_factory):
    """An environment that can train and cannot test."""
    return make_environment(tmp_path_factory.mktemp("env") / "run", RUN_STUBS)


@pytest.fixture(scope="session")
def dev_env(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("env") / "dev", DEV_STUBS)


@pytest.fixture(scope="session")
def empty_env(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("env") / "empty", {})


@pytest.fixture
def repo(tmp_path):
    """What the commands need of this repository, at a path with a space in it."""
    repo = tmp_path / "a repo"
    (repo / "scripts").mkdir(parents=True)
    for name in (
        "run_train.sh",
        "pyproject.toml",
        "scripts/constraints.txt",
        "scripts/setup_env.sh",
        "scripts/test.sh",
    ):
        shutil.copy(ROOT / name, repo / name)
    write(repo / "train_configs/debug_model.toml", "[training]\nsteps = 1\n")
    write(repo / "torchtitan_liger/__init__.py", "")
    return repo


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)
