"""scripts/setup_env.sh: which interpreter, and what it installs."""

import json
import re
import shutil
import sys

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.integration.shell import ROOT


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON"])
def test_an_environment_that_has_the_package_is_used_as_it_is(
    shell, repo, run_env, variable
):
    value = run_env / "bin/python" if variable == "PYTHON" else run_env
    done = shell(repo / "run_train.sh", **{variable: value})
    assert done.stderr == ""
    assert json.loads(done.stdout)["python"] == str(run_env / "bin/python")
    assert not (repo / ".venv").exists()


def test_an_environment_without_the_package_is_explained_and_left_alone(
    shell, repo, empty_env
):
    shell.cwd = repo  # the package's folder in the current one is not an installation
    done = shell(repo / "run_train.sh", VIRTUAL_ENV=empty_env)
    first, *_ = done.stderr.splitlines()
    assert f"{empty_env}/bin/python has no torchtitan, torchtitan_liger;" in first
    assert "pip install -e '.'" in first
    assert json.loads(done.stdout)["python"] == str(repo / ".venv/bin/python")


def test_tests_need_an_environment_with_pytest(shell, repo, run_env, dev_env):
    done = shell(repo / "scripts/test.sh", "x", VIRTUAL_ENV=run_env)
    first, *_ = done.stderr.splitlines()
    assert "has no pytest, pytest_timeout, xdist;" in first
    assert "pip install -e '.[dev]'" in first
    report = shell.report(repo / "scripts/test.sh", "x", VIRTUAL_ENV=dev_env)
    assert report["python"] == str(dev_env / "bin/python")


def test_an_environment_that_is_gone_is_explained(shell, repo, tmp_path):
    done = shell(repo / "run_train.sh", VIRTUAL_ENV=tmp_path / "gone")
    assert done.returncode == 0
    assert "gone/bin/python does not run; using" in done.stderr


def test_an_interpreter_that_is_named_has_to_run(shell, repo, tmp_path):
    done = shell(repo / "run_train.sh", PYTHON=tmp_path / "gone")
    assert done.returncode != 0
    assert f"PYTHON is {tmp_path}/gone, which does not run as a Python 3" in done.stderr
    assert shell.installs == []


def test_sourcing_leaves_nothing_behind_but_python(shell, repo, run_env):
    script = (
        "names() { compgen -A function; compgen -v | grep -vx -e _ -e PIPESTATUS; }\n"
        'before=""; before=$(names)\nsource "$0/scripts/setup_env.sh" ""\n'
        'diff <(echo "$before") <(names) | grep "^[<>]"'
    )
    done = shell("bash", "-euc", script, repo, VIRTUAL_ENV=run_env)
    assert done.stdout.splitlines() == ["> PYTHON"]


def test_the_first_call_installs_and_the_second_does_not(shell, repo):
    first = shell(repo / "run_train.sh")
    assert shell.installs == [
        "install --quiet --no-input --disable-pip-version-check "
        "-c scripts/constraints.txt -e .[dev]"
    ]
    assert "installing torch" in first.stderr
    assert "is ready" in first.stderr
    second = shell(repo / "scripts/test.sh", "x")
    assert second.stderr == ""
    assert len(shell.installs) == 1
    for done in first, second:
        assert json.loads(done.stdout)["python"] == str(repo / ".venv/bin/python")


@pytest.mark.parametrize("change", ["pyproject.toml", "scripts/constraints.txt", "."])
def test_a_changed_pin_or_a_moved_repository_is_brought_up_to_date(shell, repo, change):
    shell.report(repo / "run_train.sh")
    if change == ".":
        repo = repo.rename(repo.with_name("moved repo"))
    else:
        with open(repo / change, "a") as file:
            file.write("# changed\n")
    done = shell(repo / "run_train.sh")
    assert "up to date" in done.stderr
    assert len(shell.installs) == 2
    assert shell(repo / "run_train.sh").stderr == ""
    assert len(shell.installs) == 2


def test_a_failed_install_is_reported_and_tried_again(shell, repo):
    failed = shell(repo / "run_train.sh", STUB_PIP_EXIT=3)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "pip could not complete" in failed.stderr
    assert not list((repo / ".venv").glob("*stamp*"))
    shell.report(repo / "run_train.sh")
    assert len(shell.installs) == 2


def test_a_failed_update_does_not_pass_for_a_good_environment(shell, repo):
    shell.report(repo / "run_train.sh")
    pyproject = (repo / "pyproject.toml").read_text()
    (repo / "pyproject.toml").write_text(pyproject + "# changed\n")
    assert shell(repo / "run_train.sh", STUB_PIP_EXIT=1).returncode == 1
    (repo / "pyproject.toml").write_text(pyproject)
    shell.report(repo / "run_train.sh")
    assert len(shell.installs) == 3


def test_an_environment_whose_python_is_gone_is_made_anew(shell, repo):
    shell.report(repo / "run_train.sh")
    (repo / ".venv/bin/python").unlink()
    done = shell(repo / "run_train.sh")
    assert "no working Python 3.10 or newer; making it anew" in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_two_calls_at_once_install_once(shell, repo):
    calls = [shell.start(repo / "run_train.sh", STUB_PIP_SECONDS=0.5) for _ in "ab"]
    for call in calls:
        call.communicate(timeout=60)
    assert [call.returncode for call in calls] == [0, 0]
    assert len(shell.installs) == 1


PYTHONS = ["python3", "python", *(f"python3.{minor}" for minor in range(10, 14))]


def test_too_old_pythons_are_listed_with_the_way_out(shell, repo):
    for name in PYTHONS:
        shell.command(name, "exit 127")
    shell.command("python3", "echo 3.8")
    done = shell(repo / "run_train.sh")
    assert done.returncode == 1
    assert "needs Python 3.10 or newer (here, python3 is 3.8" in done.stderr
    assert "PYTHON=/path/to/python3" in done.stderr
    assert not (repo / ".venv").exists()


def test_a_python_that_cannot_make_environments_is_named(shell, repo):
    for name in PYTHONS:
        shell.command(name, 'case "$2" in *ensurepip*) exit 1 ;; esac; echo 3.11')
    done = shell(repo / "run_train.sh")
    assert done.returncode == 1
    assert "python (Python 3.11) cannot make a virtual environment" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_a_python_with_pins_is_preferred_to_a_newer_one(shell, repo):
    shell.command("python3.13", (shell.bin / "python3").read_text())
    shell.command("python3", "echo 3.99")
    done = shell(repo / "run_train.sh")
    assert done.returncode == 0, done.stderr


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = (ROOT / "scripts/constraints.txt").read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    assert {re.match(r"[\w.-]+", requirement)[0] for requirement in direct} <= pinned
