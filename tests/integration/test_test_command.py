"""scripts/test.sh: what is run, and what makes it fail."""

import json

from tests.integration.shell import DEV_STUBS, make_environment


def modules(done):
    return [json.loads(line)["module"] for line in done.stdout.splitlines()]


def test_arguments_go_to_pytest_alone_in_the_repository(shell, repo, dev_env):
    done = shell(repo / "scripts/test.sh", "-k", "a or b", VIRTUAL_ENV=dev_env)
    assert modules(done) == ["pytest"]
    report = json.loads(done.stdout)
    assert report["args"] == ["-k", "a or b"]
    assert report["cwd"] == str(repo)


def test_without_arguments_linter_and_type_checker_come_first(shell, repo, dev_env):
    done = shell(repo / "scripts/test.sh", VIRTUAL_ENV=dev_env)
    assert modules(done) == ["ruff", "ruff", "mypy", "pytest"]
    # No test file is split: its runs of the trainer are shared by its tests.
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["args"] == ["-n", "2", "--dist", "loadfile"]
    assert done.returncode == 0


def test_a_lint_error_fails_the_command_and_the_tests_still_run(shell, repo, dev_env):
    done = shell(repo / "scripts/test.sh", VIRTUAL_ENV=dev_env, STUB_LINTER_EXIT=1)
    assert modules(done)[-1] == "pytest"
    assert "'ruff check' 'ruff format --check' 'mypy'" in done.stderr
    assert done.returncode == 1


def test_a_failed_test_fails_the_command(shell, repo, dev_env):
    done = shell(repo / "scripts/test.sh", VIRTUAL_ENV=dev_env, STUB_EXIT=5)
    assert done.returncode == 5


def test_an_environment_without_a_linter_can_still_test(shell, repo, tmp_path):
    stubs = {name: text for name, text in DEV_STUBS.items() if name != "ruff.py"}
    env = make_environment(tmp_path / "env", stubs)
    done = shell(repo / "scripts/test.sh", VIRTUAL_ENV=env)
    assert done.returncode == 0
    assert done.stdout.count("has no ruff: skipped") == 2
