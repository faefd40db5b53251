"""The shell commands: run_train.sh, scripts/test.sh and scripts/setup_env.sh.

Nothing is installed and nothing trained. An "environment" here is a real one without
pip, whose torch, pytest and so on are stubs that print what they were asked to do; what
`python3 -m venv` makes has a stub of pip.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CUSTOM = "--job.custom_config_module=torchtitan_liger.job_config"

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


@pytest.fixture(scope="module")
def run_env(tmp_path_factory):
    """An environment that can train and cannot test."""
    return make_environment(tmp_path_factory.mktemp("env") / "run", RUN_STUBS)


@pytest.fixture(scope="module")
def dev_env(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("env") / "dev", DEV_STUBS)


@pytest.fixture(scope="module")
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


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


# run_train.sh


def test_a_missing_config_is_named_together_with_those_that_exist(shell, repo):
    done = shell(repo / "run_train.sh", CONFIG_FILE="nowhere.toml")
    assert done.returncode == 1
    assert "no CONFIG_FILE nowhere.toml" in done.stderr
    assert str(repo / "train_configs/debug_model.toml") in done.stderr
    assert shell.installs == []


def test_the_job_goes_to_torchrun_with_the_debug_model_by_default(shell, repo, run_env):
    report = shell.report(repo / "run_train.sh", VIRTUAL_ENV=run_env)
    assert report["module"] == "torch.distributed.run"
    config = repo / "train_configs/debug_model.toml"
    assert " ".join(report["args"]) == (
        "--nproc_per_node=1 --rdzv_backend c10d --rdzv_endpoint=localhost:0 "
        "--local-ranks-filter 0 --role rank --tee 3 "
        f"-m torchtitan_liger.train --job.config_file={config} {CUSTOM}"
    )


def test_torchtitans_variables_are_obeyed(shell, repo, run_env):
    write(shell.cwd / "my job.toml", "")
    args = shell.report(
        repo / "run_train.sh",
        VIRTUAL_ENV=run_env,
        CONFIG_FILE="my job.toml",
        NGPU=3,
        LOG_RANK="0,2",
        TRAIN_FILE="torchtitan.train",
    )["args"]
    assert "--nproc_per_node=3" in args
    assert args[args.index("--local-ranks-filter") + 1] == "0,2"
    assert args[args.index("-m") + 1] == "torchtitan.train"
    assert "--job.config_file=my job.toml" in args


def test_options_and_the_current_folder_reach_the_program_unchanged(
    shell, repo, run_env
):
    options = ["--model.name", "a b", "--training.steps=2", "$HOME", ""]
    report = shell.report(repo / "run_train.sh", *options, VIRTUAL_ENV=run_env)
    assert report["args"][-5:] == options
    assert report["cwd"] == str(shell.cwd)


def test_the_exit_code_is_that_of_the_run(shell, repo, run_env):
    done = shell(repo / "run_train.sh", VIRTUAL_ENV=run_env, STUB_EXIT=7)
    assert done.returncode == 7


@pytest.mark.parametrize(
    "options",
    [
        ["--job.custom_config_module=mine"],
        ["--job.custom_config_module", "mine"],
        ["--job.custom-config-module=mine"],
        ["--job.custom-config-module", "mine"],
    ],
)
def test_no_config_module_is_added_to_one_among_the_options(
    shell, repo, run_env, options
):
    args = shell.report(repo / "run_train.sh", *options, VIRTUAL_ENV=run_env)["args"]
    assert CUSTOM not in args


@pytest.mark.parametrize(
    ("toml", "added"),
    [
        ('[job]\ncustom_config_module = "mine"', False),
        ("[job]\n  custom_config_module='mine'", False),
        ('job.custom_config_module = "mine"', False),
        ('[job]\n# custom_config_module = "mine"', True),
        ('[job]\ncustom_config_module = ""', True),
        ('[job]\ndescription = "custom_config_module"', True),
    ],
)
def test_the_config_module_is_added_if_the_toml_names_none(
    shell, repo, run_env, toml, added
):
    write(shell.cwd / "job.toml", toml + "\n")
    args = shell.report(
        repo / "run_train.sh", VIRTUAL_ENV=run_env, CONFIG_FILE="job.toml"
    )["args"]
    assert (CUSTOM in args) is added


@pytest.mark.parametrize(
    "options", [["--job.config_file=other.toml"], ["--job.config-file", "other.toml"]]
)
def test_a_config_file_among_the_options_is_the_only_one(shell, repo, run_env, options):
    write(shell.cwd / "other.toml", 'job.custom_config_module = "mine"\n')
    args = shell.report(repo / "run_train.sh", *options, VIRTUAL_ENV=run_env)["args"]
    assert args[args.index("torchtitan_liger.train") + 1 :] == options


@pytest.mark.parametrize(
    ("visible", "processes"),
    [
        (None, 4),
        ("", 1),
        ("-1", 1),
        ("2", 1),
        ("0,3", 2),
        ("0,1,-1,2", 2),
        ("GPU-1a,GPU-2b,GPU-1c", 3),
        ("0,1,2,3,4,5", 4),
    ],
)
def test_each_visible_gpu_gets_a_process(shell, repo, run_env, visible, processes):
    shell.command("nvidia-smi", "for i in 0 1 2 3; do echo GPU $i: H200; done")
    shell.env.pop("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        shell.env["CUDA_VISIBLE_DEVICES"] = visible
    args = shell.report(repo / "run_train.sh", VIRTUAL_ENV=run_env)["args"]
    assert args[0] == f"--nproc_per_node={processes}"


def test_without_gpus_there_is_one_process(shell, repo, run_env):
    shell.command("nvidia-smi", "echo No devices were found")
    shell.env.pop("CUDA_VISIBLE_DEVICES")
    args = shell.report(repo / "run_train.sh", VIRTUAL_ENV=run_env)["args"]
    assert args[0] == "--nproc_per_node=1"


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"NGPU": 1}, None),
        ({"NGPU": 3}, "2"),
        ({"NGPU": 16}, "1"),
        ({"NGPU": 3, "OMP_NUM_THREADS": 5}, "5"),
        ({"NGPU": "auto"}, None),
    ],
)
def test_cpu_processes_share_the_cores(shell, repo, run_env, variables, threads):
    shell.command("nproc", "echo 8")
    done = shell(repo / "run_train.sh", VIRTUAL_ENV=run_env, **variables)
    assert done.stderr == ""
    assert json.loads(done.stdout)["env"]["OMP_NUM_THREADS"] == threads


def test_the_allocator_setting_is_torchtitans_unless_set(shell, repo, run_env):
    def setting(**env):
        report = shell.report(repo / "run_train.sh", VIRTUAL_ENV=run_env, **env)
        return report["env"]["PYTORCH_ALLOC_CONF"]

    assert setting() == "expandable_segments:True"
    assert setting(PYTORCH_ALLOC_CONF="backend:native") == "backend:native"
    assert setting(PYTORCH_CUDA_ALLOC_CONF="backend:native") is None


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains_the_variables_then_asks_the_program(shell, repo, run_env, flag):
    done = shell(repo / "run_train.sh", flag, VIRTUAL_ENV=run_env)
    assert done.returncode == 0
    assert done.stderr == ""
    *usage, last = done.stdout.splitlines()
    for variable in ("CONFIG_FILE", "NGPU", "LOG_RANK", "TRAIN_FILE", "PYTHON"):
        assert any(line.startswith(f"  {variable} ") for line in usage)
    report = json.loads(last)
    assert report["module"] == "torchtitan_liger.train"
    assert report["args"][1:] == [CUSTOM, flag]


# setup_env.sh: which interpreter


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
    assert "has no pytest, pytest_timeout;" in first
    assert "pip install -e '.[dev]'" in first
    report = shell.report(repo / "scripts/test.sh", "x", VIRTUAL_ENV=dev_env)
    assert report["python"] == str(dev_env / "bin/python")


def test_an_environment_that_is_gone_is_explained(shell, repo, tmp_path):
    done = shell(repo / "run_train.sh", VIRTUAL_ENV=tmp_path / "gone")
    assert done.returncode == 0
    assert "gone/bin/python does not run; using" in done.stderr


def test_sourcing_leaves_nothing_behind_but_python(shell, repo, run_env):
    script = (
        "names() { compgen -A function; compgen -v | grep -vx -e _ -e PIPESTATUS; }\n"
        'before=""; before=$(names)\nsource "$0/scripts/setup_env.sh" ""\n'
        'diff <(echo "$before") <(names) | grep "^[<>]"'
    )
    done = shell("bash", "-euc", script, repo, VIRTUAL_ENV=run_env)
    assert done.stdout.splitlines() == ["> PYTHON"]


# setup_env.sh: .venv


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


# test.sh


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
