"""run_train.sh: what reaches the program, with which processes and settings."""

import json
import re

import pytest

from tests.integration.shell import write


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
        f"-m torchtitan_liger.train --job.config_file={config}"
    )


def test_a_link_to_the_script_is_the_script(shell, repo, run_env, tmp_path):
    (tmp_path / "train").symlink_to(repo / "run_train.sh")
    report = shell.report(tmp_path / "train", VIRTUAL_ENV=run_env)
    config = repo / "train_configs/debug_model.toml"
    assert f"--job.config_file={config}" in report["args"]


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
    "options", [["--job.config_file=other.toml"], ["--job.config-file", "other.toml"]]
)
def test_a_config_file_among_the_options_is_the_only_one(shell, repo, run_env, options):
    write(shell.cwd / "other.toml", "")
    args = shell.report(repo / "run_train.sh", *options, VIRTUAL_ENV=run_env)["args"]
    assert args[args.index("torchtitan_liger.train") + 1 :] == options


def test_of_several_config_files_the_first_counts(shell, repo, run_env):
    write(shell.cwd / "here.toml", "")
    options = ["--job.config_file", "here.toml", "--job.config_file=nowhere.toml"]
    args = shell.report(repo / "run_train.sh", *options, VIRTUAL_ENV=run_env)["args"]
    assert args[args.index("torchtitan_liger.train") + 1 :] == options
    done = shell(repo / "run_train.sh", *options[::-1], "here.toml")
    assert "no CONFIG_FILE nowhere.toml" in done.stderr


@pytest.mark.parametrize("options", [["--job.config_file="], ["--job.config_file", ""]])
def test_an_empty_config_file_is_not_the_default_one(shell, repo, options):
    done = shell(repo / "run_train.sh", *options)
    assert done.returncode == 1
    assert "there is no CONFIG_FILE " in done.stderr


def test_a_config_file_without_a_name_is_for_the_program_to_refuse(
    shell, repo, run_env
):
    options = ["--job.config_file"]
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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NGPU", "x", "NGPU is 'x': how many processes to start"),
        ("NGPU", "0", "NGPU is '0'"),
        ("NGPU", "-1", "NGPU is '-1'"),
        ("TRAIN_FILE", "my_train.py", "'my_train.py': a module .* my_train"),
        ("TRAIN_FILE", "jobs/my_train", "'jobs/my_train': a module"),
    ],
)
def test_variables_that_make_no_sense_are_named(shell, repo, variable, value, message):
    done = shell(repo / "run_train.sh", **{variable: value})
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert shell.installs == []


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
    assert report["args"][1:] == [flag]
