"""Keys and values that do not exist, in every table of ours."""

from __future__ import annotations

from dataclasses import make_dataclass
from functools import partial

import pytest
from torchtitan.config import JobConfig

from torchtitan_liger import config_checks, job_config
from torchtitan_liger.config_checks import (
    check_config_module,
    check_values,
    check_weights,
)
from torchtitan_liger.job_config import HeadLoss, LigerKernel

check_keys = partial(
    config_checks.check_keys, configs=[JobConfig, job_config.JobConfig]
)


def test_an_unknown_key_is_named_with_its_value_and_its_neighbour():
    check_keys({"liger_kernel": {"impl": "auto"}, "model": {}}, "a.toml")
    with pytest.raises(ValueError, match=r"a.toml: .*no key impll .*'x'.* mean impl\?"):
        check_keys({"liger_kernel": {"impll": "x"}}, "a.toml")
    with pytest.raises(ValueError, match=r"no section \[liger_kernal\]; did you mean"):
        check_keys({"liger_kernal": {"impl": "x"}}, "a.toml")
    with pytest.raises(ValueError, match="liger_kernel is True; it must be a section"):
        check_keys({"liger_kernel": True}, "a.toml")
    with pytest.raises(ValueError, match="no key zzz .*logits_memory_mib"):
        check_keys({"liger_kernel": {"zzz": 1}}, "a.toml")
    flag = {"enable_fused_linear_cross_entropy": "yes"}
    with pytest.raises(ValueError, match=r"a.toml: .* is 'yes'; it must be true or"):
        check_keys({"liger_kernel": flag}, "a.toml")
    with pytest.raises(
        ValueError, match=r"head_loss.z_loss.weight is '1'; .* a finite number"
    ):
        check_keys({"head_loss": {"z_loss": {"weight": "1"}}}, "a.toml")


FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"


@pytest.mark.parametrize(
    ("argv", "toml", "section"),
    [
        ([FLAG, "--job.custom_config_module=others_config"], {}, "liger_kernel"),
        (["--head-loss.z-loss.weight=1"], {"module": "others_config"}, "head_loss"),
        (["--job.custom-config-module", "others_config"], {"liger": 1}, "liger_kernel"),
        ([FLAG, "--job.custom_config_module="], {}, "liger_kernel"),
    ],
)
def test_a_config_module_without_our_sections_is_named(
    argv, toml, section, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "others_config.py").write_text(
        "from torchtitan.config import JobConfig"
    )
    toml = {
        "job": {"custom_config_module": toml.get("module", "")},
        **({"liger_kernel": {}} if "liger" in toml else {}),
    }
    with pytest.raises(ValueError, match=f"JobConfig has no section {section}: derive"):
        check_config_module(argv, toml)
    check_config_module([a for a in argv if "custom" in a], {"job": toml["job"]})
    ours = "--job.custom_config_module=torchtitan_liger.job_config"
    check_config_module([ours, *argv], toml)  # torchtitan takes the first


@pytest.mark.parametrize("value", ["true", 1])
def test_compile_is_true_or_false(value):
    check_keys({"training": {"compile": True}}, "a.toml")
    with pytest.raises(ValueError, match=f"training.compile is {value!r}; it must be"):
        check_keys({"training": {"compile": value}}, "a.toml")


def test_sections_of_a_users_own_config_module_are_none_of_our_business():
    own = make_dataclass("JobConfig", [("head", make_dataclass("Head", [("x", set)]))])
    configs = [JobConfig, job_config.JobConfig, own]
    config_checks.check_keys({"head": {"x": "any"}}, "a.toml", configs)
    with pytest.raises(ValueError, match=r"a.toml: \[head\] has no key y "):
        config_checks.check_keys({"head": {"y": 1}}, "a.toml", configs)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ({"trainin": {}}, r"no section \[trainin\]; did you mean training\?"),
        ({"zzz": {}}, r"no section \[zzz\]; it has job, .*liger_kernel"),
        ({"training": {"stepz": 3}}, r"no key stepz .*3.*; did you mean steps\?"),
        ({"training": {"steps": "x"}}, "training.steps is 'x'; .* a whole number"),
        ({"training": {"steps": 2.5}}, "training.steps is 2.5; .* a whole number"),
        ({"optimizer": {"lr": "1e-3"}}, "optimizer.lr is '1e-3'; .* a finite number"),
        ({"model": {"name": 3}}, "model.name is 3; it must be a string"),
        ({"training": 3}, r"training is 3; it must be a section, \[training\]"),
        (
            {"training": {"mixed_precision_param": "fp8"}},
            "mixed_precision_param is 'fp8'; .* 'bfloat16', 'float32'",
        ),
    ],
)
def test_torchtitans_own_keys_and_values_are_named_with_the_file(toml, message):
    with pytest.raises(ValueError, match=f"a.toml: .*{message}"):
        check_keys(toml, "a.toml")


def test_what_torchtitan_understands_is_left_alone():
    toml = {
        "training": {"steps": 1e4, "max_norm": 1, "dataset_path": "x"},
        "optimizer": {"lr": 1},
        "model": {"converters": ["float8"]},
        "quantize": {"linear": {"float8": {"filter_fqns": ["output"]}}},
    }
    check_keys(toml, "a.toml")


def test_an_unknown_key_in_a_nested_table_is_named_as_well():
    check_keys({"head_loss": {"temperature": 2, "focal": {"weight": 1}}}, "a.toml")
    with pytest.raises(
        ValueError, match=r"\[head_loss\] has no key zloss .*1.* did you mean z_loss\?"
    ):
        check_keys({"head_loss": {"zloss": {"weight": 1}}}, "a.toml")
    with pytest.raises(
        ValueError, match=r"\[head_loss.z_loss\] has no key wieght \(its value is 0.1\)"
    ):
        check_keys({"head_loss": {"z_loss": {"wieght": 0.1}}}, "a.toml")
    with pytest.raises(
        ValueError, match=r"head_loss.z_loss is 0.1; .*\[head_loss.z_loss"
    ):
        check_keys({"head_loss": {"z_loss": 0.1}}, "a.toml")
    with pytest.raises(
        ValueError, match=r"no section \[head_los\]; did you mean head_l"
    ):
        check_keys({"head_los": {}}, "a.toml")


def test_a_table_without_a_weight_would_be_ignored():
    focal = {"head_loss": {"focal": {"gamma": 2.0}}}
    with pytest.raises(ValueError, match=r"a.toml: \[head_loss.focal\] does nothing"):
        check_weights([], focal, "a.toml")
    check_weights(["--head_loss.focal.weight=1"], focal, "a.toml")
    smoothed = {"head_loss": {"cross_entropy": {"label_smoothing": 0.1}}}
    check_weights([], smoothed, "a.toml")


def test_options_of_a_term_without_a_weight_would_be_ignored():
    """Also the default value, which does not tell that it was given."""
    for gamma in (["--head_loss.focal.gamma", "2"], ["--head-loss.focal.gamma=2"]):
        with pytest.raises(ValueError, match=r"--head_loss.focal.gamma does nothing"):
            check_weights(gamma, {}, "")
        check_weights([*gamma, "--head_loss.focal.weight", "0.5"], {}, "")
        check_weights(gamma, {"head_loss": {"focal": {"weight": 0.5}}}, "")
    check_weights(["--head_loss.cross_entropy.label_smoothing=0"], {}, "")
    check_weights(["--head_loss.z_loss.wieght=1"], {}, "")  # the parser's to refuse
    check_weights(["--head_loss.logit_softcap=30", "--head_loss.unknown.key=1"], {}, "")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("impl", "ligr", "must be one of 'auto', 'liger', 'chunked', 'reference'"),
        ("fallback", "ignore", "must be one of 'warn', 'error'"),
        ("acc_dtype", "float16", "must be one of 'float32', 'bfloat16'"),
        ("logits_memory_mib", "256", "must be a whole number"),
        ("enable_fused_linear_cross_entropy", "yes", "must be true or false"),
    ],
)
def test_values_of_another_type_are_named(field, value, message):
    config = LigerKernel()
    setattr(config, field, value)  # as a TOML can
    with pytest.raises(
        ValueError, match=rf"liger_kernel.{field} is {value!r}.*{message}"
    ):
        check_values(config, "liger_kernel")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", "2", "a finite number"),
        ("z_loss.weight", "1e-4", "a finite number"),
        ("z_loss.weight", True, "a finite number"),
        ("z_loss.weight", float("nan"), "a finite number"),
        ("z_loss.weight", 10**400, "a finite number"),
        ("cross_entropy.weight", None, "a finite number"),
        ("policy_gradient.kind", "ppoo", "one of 'ppo', 'cispo', 'reinforce'"),
    ],
)
def test_values_in_nested_tables_are_named_with_their_table(key, value, message):
    config = HeadLoss()
    check_values(config, "head_loss")
    table, _, field = key.rpartition(".")
    setattr(getattr(config, table) if table else config, field, value)
    with pytest.raises(ValueError, match=rf"head_loss.{key} is {value!r}; .*{message}"):
        check_values(config, "head_loss")


def test_whole_numbers_are_numbers():
    config = HeadLoss(temperature=2)
    config.z_loss.weight = 1
    check_values(config, "head_loss")
