from __future__ import annotations

import pytest

from torchtitan_liger.cli import (
    PACKAGE_PARENT,
    name_config_module,
    prepare_argv,
    read_toml,
)

FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"
OFF = "--liger_kernel.no-enable_fused_linear_cross_entropy"
ASSETS = "torchtitan_liger/assets/tokenizer"


@pytest.mark.parametrize(
    ("argv", "prepared"),
    [
        ([FLAG], [FLAG]),
        ([FLAG, "True"], [FLAG]),
        ([FLAG, "False"], [OFF]),
        ([FLAG, "false"], [OFF]),
        (["--liger-kernel.preflight=True"], ["--liger-kernel.preflight"]),
        (["--liger-kernel.preflight", "False"], ["--liger-kernel.no-preflight"]),
        ([f"{FLAG}=False", "--training.steps", "3"], [OFF, "--training.steps", "3"]),
        ([f"{FLAG}=True"], [FLAG]),
        (["--job.description", "False"], ["--job.description", "False"]),
        (["--training.compile"], ["--compile.enable"]),
        (["--training.no-compile"], ["--compile.no-enable"]),
        (["--training.compile", "False"], ["--compile.no-enable"]),
        (["--training.compile=True"], ["--compile.enable"]),
        (["--training.no-compile", "False"], ["--compile.enable"]),
        (["--training.no_compile=true"], ["--compile.no-enable"]),
        ([OFF, "False"], [FLAG]),
        (["--liger_kernel.no_preflight=true"], ["--liger_kernel.no-preflight"]),
        (["False"], ["False"]),
        # No switches: torchtitan's parser says what is wrong with the value.
        (["--liger_kernel.impl", "False"], ["--liger_kernel.impl", "False"]),
        (["--liger_kernel.impl=False"], ["--liger_kernel.impl=False"]),
    ],
)
def test_true_and_false_may_follow_a_flag(argv, prepared):
    assert prepare_argv(argv) == prepared


def test_our_assets_are_found_from_any_folder(tmp_path, monkeypatch):
    config = tmp_path / "c.toml"
    config.write_text(f'[model]\nhf_assets_path = "{ASSETS}"\n')
    argv = ["--job.config_file", str(config), "--training.steps", "3"]
    monkeypatch.chdir(tmp_path)
    assert prepare_argv(argv) == [
        f"--model.hf_assets_path={PACKAGE_PARENT / ASSETS}",
        *argv,
    ]
    path = str(PACKAGE_PARENT / ASSETS)
    for option in ("--model.hf_assets_path", "--model.hf-assets-path"):
        assert prepare_argv([f"{option}={ASSETS}"]) == [f"{option}={path}"]
        typed = [option, ASSETS, "--training.steps", "3"]
        assert prepare_argv(typed) == [option, path, "--training.steps", "3"]
    empty = ["--model.hf_assets_path", ""]
    assert prepare_argv(empty) == empty
    (tmp_path / ASSETS).mkdir(parents=True)  # the user's own of that name wins
    assert prepare_argv(argv) == argv
    assert prepare_argv([f"--model.hf_assets_path={ASSETS}"])[0].endswith(f"={ASSETS}")


@pytest.mark.parametrize(
    ("toml", "first"),
    [
        ("[training]\ncompile = true", ["--compile.enable"]),
        ("[training]\ncompile = false", ["--compile.no-enable"]),
        ("[training]\ncompile = true\n[compile]\nenable = false", []),
        ("[compile]\nenable = true", []),
        ("training = 3", []),
    ],
)
def test_the_older_spelling_of_compile_in_a_toml(tmp_path, toml, first):
    config = tmp_path / "c.toml"
    config.write_text(toml)
    # The command line comes later, and wins.
    argv = [f"--job.config_file={config}", "--compile.no-enable"]
    assert prepare_argv(argv) == [*first, *argv]


def test_other_assets_are_left_alone(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('[model]\nhf_assets_path = "assets/hf/Llama-3.1-8B"\n')
    argv = [f"--job.config-file={config}"]
    assert prepare_argv(argv) == argv
    argv += ["--model.hf_assets_path", "assets/hf/Llama-3.1-8B"]
    assert prepare_argv(argv) == argv


@pytest.mark.parametrize("key", ["custom_config_module", "custom-config-module"])
def test_a_config_module_of_the_users_own_wins(tmp_path, key):
    for argv in ([f"--job.{key}=mine"], [f"--job.{key}", "mine"]):
        assert name_config_module(argv) == argv
    config = tmp_path / "c.toml"
    argv = [f"--job.config_file={config}"]
    for table in (f'[job]\n{key} = "mine"', f'job = {{{key} = "mine"}}'):
        config.write_text(table.replace("-", "_"))
        assert name_config_module(argv) == argv


@pytest.mark.parametrize(
    "job", ['description = "custom_config_module"', 'custom_config_module = ""']
)
def test_a_toml_of_torchtitans_knows_our_sections(tmp_path, job):
    config = tmp_path / "c.toml"
    config.write_text(f"[job]\n{job}\n")
    argv = [f"--job.config_file={config}", FLAG]
    ours = "--job.custom_config_module=torchtitan_liger.job_config"
    assert name_config_module(argv) == [ours, *argv]


def test_a_config_that_cannot_be_read_is_left_to_torchtitan(tmp_path):
    assert read_toml(["--job.config_file", str(tmp_path / "none.toml")])[1] == {}
    assert read_toml(["--job.config_file"])[1] == {}


def test_a_config_that_is_no_toml_is_named(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[training]\nsteps =\n")
    argv = [f"--job.config_file={broken}"]
    assert prepare_argv(argv) == argv  # before anybody can show an error
    with pytest.raises(ValueError, match=r"broken\.toml: Invalid value \(at line 2"):
        read_toml(argv)
