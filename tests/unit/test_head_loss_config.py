"""`[head_loss]`, from TOML and command line to terms and options."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
from torchtitan.config import ConfigManager, JobConfig

from torchtitan_liger import job_config
from torchtitan_liger.cli import FLAG_ON, read_toml
from torchtitan_liger.config_checks import check_keys
from torchtitan_liger.config_validator import resolve
from torchtitan_liger.head_loss import (
    CrossEntropy,
    EntropyBonus,
    Focal,
    HeadLossOptions,
    PolicyGradient,
    ReferenceKL,
    SelfWeighted,
    ZLoss,
)
from torchtitan_liger.head_loss_config import READ_BY, TERMS, changes, listed
from torchtitan_liger.liger_api import LigerStatus

CPU = LigerStatus(True, "the kernels need a GPU")

ALL = """
[head_loss]
logit_softcap = 30
temperature = 0.7

[head_loss.cross_entropy]
weight = 0.5
label_smoothing = 0.1

[head_loss.z_loss]
weight = 1e-4

[head_loss.focal]
weight = 0.1
gamma = 3

[head_loss.entropy_bonus]
weight = 0.0

[head_loss.self_weighted]
weight = 1

[head_loss.policy_gradient]
weight = 2.0
kind = "cispo"
clip_low = 0.1
clip_high = 0.3

[head_loss.reference_kl]
weight = 0.01
kind = "k1"
"""


def plan_of(*args, toml=None):
    argv = [
        "--job.custom_config_module=torchtitan_liger.job_config",
        "--model.hf_assets_path=.",
        FLAG_ON,
        *args,
    ]
    if toml is not None:
        argv.append(f"--job.config_file={toml}")
        configs = JobConfig, job_config.JobConfig
        check_keys(read_toml(argv)[1], str(toml), configs)
    return resolve(ConfigManager().parse_args(argv), CPU)


def test_a_toml_with_every_table(tmp_path):
    config = tmp_path / "job.toml"
    config.write_text(ALL)
    plan = plan_of(toml=config)
    assert plan.terms == (
        CrossEntropy(0.1, weight=0.5),
        ZLoss(1e-4),
        Focal(3, weight=0.1),
        EntropyBonus(0.0),
        SelfWeighted(1),
        PolicyGradient("cispo", 0.1, 0.3, weight=2.0),
        ReferenceKL(0.01, "k1"),
    )
    assert plan.options.logit_softcap == 30
    assert plan.options.temperature == 0.7
    assert plan.formula == (
        "0.5 * cross_entropy + 0.0001 * z_loss + 0.1 * focal + 0 * entropy_bonus + "
        "self_weighted + 2 * policy_gradient + 0.01 * reference_kl"
    )
    assert plan.row_inputs == {
        "advantages": "head_loss.policy_gradient",
        "old_logp": "head_loss.policy_gradient",
        "ref_logp": "head_loss.reference_kl",
    }
    assert plan.head_loss().terms == plan.terms


def test_the_command_line_wins_over_the_toml(tmp_path):
    config = tmp_path / "job.toml"
    config.write_text("[head_loss.z_loss]\nweight = 1e-4\n")
    assert plan_of(toml=config).formula == "cross_entropy + 0.0001 * z_loss"
    plan = plan_of("--head_loss.z_loss.weight", "1e-3", toml=config)
    assert plan.formula == "cross_entropy + 0.001 * z_loss"
    plan = plan_of("--head_loss.z_loss.weight=None", toml=config)
    assert plan.formula == "cross_entropy"


def test_the_default_is_plain_cross_entropy():
    plan = plan_of()
    assert plan.terms == (CrossEntropy(),)
    assert plan.options == HeadLossOptions()
    assert plan.is_plain
    assert plan.row_inputs == {}


def test_weight_zero_is_a_term_and_no_weight_is_none():
    assert plan_of("--head_loss.z_loss.weight=0").terms == (CrossEntropy(), ZLoss(0.0))
    plan = plan_of("--head_loss.cross_entropy.weight=0", "--head_loss.focal.weight=1")
    assert plan.terms == (CrossEntropy(weight=0.0), Focal())


def test_a_job_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="nothing to learn from.*cross_entropy"):
        plan_of("--head_loss.cross_entropy.weight=0", "--head_loss.z_loss.weight=0")


def test_a_setting_of_a_term_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="head_loss.focal.gamma = 3.0 does nothing"):
        plan_of("--head_loss.focal.gamma=3")
    plan = plan_of("--head_loss.focal.gamma=3", "--head_loss.focal.weight", "1")
    assert plan.terms == (CrossEntropy(), Focal(3.0))


def test_an_unknown_option_has_its_neighbours_listed(capsys):
    with pytest.raises(SystemExit):
        plan_of("--head_loss.z_loss.weigth=1e-4")
    error = capsys.readouterr().err
    assert "--head_loss.z_loss.weigth" in error
    assert "--head-loss.z-loss.weight" in error


def test_reinforce_reads_no_old_probabilities():
    plan = plan_of(
        "--head_loss.policy_gradient.weight=1",
        "--head_loss.policy_gradient.kind=reinforce",
    )
    assert list(plan.row_inputs) == ["advantages"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("liger_kernel.logits_memory_mib", -1, "must be 0 .*got -1"),
        ("head_loss.temperature", 0, "must be a positive int or float, got 0"),
        (
            "head_loss.logit_softcap",
            -1,
            r"must be 0 \(off\) or a positive int or float, got -1",
        ),
        ("head_loss.z_loss.weight", -1e-4, "must be at least 0 .*got -0.0001"),
        ("head_loss.cross_entropy.label_smoothing", 1, r"in \[0, 1\), got 1"),
        ("head_loss.focal.gamma", -1, "must be at least 0 and finite, got -1"),
        ("head_loss.unlikelihood.floor", 1, r"must be in \(0, 1\), got 1"),
        ("head_loss.policy_gradient.clip_low", 2, r"must be in \[0, 1\], got 2"),
        ("head_loss.policy_gradient.dual_clip", 1, "must be above 1, got 1"),
        ("head_loss.policy_gradient.importance_cap", 0, "must be positive, got 0"),
        ("head_loss.distillation.beta", 2, "does nothing with .*choose the kind jsd"),
        ("head_loss.preference.gamma", 1, "does nothing with .*choose the kind simpo"),
    ],
)
def test_values_out_of_range_are_named(key, value, message):
    args = [f"--{key}={value}"]
    table = key.rpartition(".")[0]
    if table.count(".") and not key.endswith(".weight"):
        args += [f"--{table}.weight=1"]
    with pytest.raises(ValueError, match=rf"^{key}.* {message}"):
        plan_of(*args)


def test_settings_that_another_kind_reads_are_refused():
    """Nothing would show that they have no effect."""
    weight = "--head_loss.policy_gradient.weight=1"
    dual, cispo = (
        f"--head_loss.policy_gradient.{x}" for x in ("dual_clip=3", "kind=cispo")
    )
    with pytest.raises(
        ValueError,
        match="^head_loss.policy_gradient.dual_clip = 3.0 does nothing with .*cispo: .*ppo",
    ):
        plan_of(weight, dual, cispo)
    plan_of(weight, dual)
    plan_of(
        "--head_loss.distillation.weight=1",
        "--head_loss.distillation.kind=jsd",
        "--head_loss.distillation.beta=0.1",
    )


def test_every_setting_of_some_kinds_exists():
    for key, kinds in READ_BY.items():
        _, table, name = key.split(".")
        section = getattr(job_config.HeadLoss(), table)
        assert hasattr(section, name)
        assert set(kinds) < set(get_args(get_type_hints(type(section))["kind"]))


def test_every_table_has_a_term_of_its_name_with_its_keys():
    tables = {
        n: t for n, t in vars(job_config.HeadLoss()).items() if hasattr(t, "weight")
    }
    assert tables.keys() == TERMS.keys()
    for name, table in tables.items():
        term = TERMS[name](**{**vars(table), "weight": 1.0})
        assert term.name == name
        # Nobody has to look up a default in two places.
        for field in dataclasses.fields(table):
            if field.name != "weight":
                default = next(
                    f.default for f in dataclasses.fields(term) if f.name == field.name
                )
                assert field.default == default, (name, field.name)


def test_changes_are_listed_as_settings():
    assert changes(job_config.HeadLoss(), "head_loss") == {}
    config = job_config.HeadLoss(temperature=2.0, z_loss=job_config.ZLoss(weight=1e-4))
    changed = changes(config, "head_loss")
    assert changed == {"head_loss.temperature": 2.0, "head_loss.z_loss.weight": 1e-4}
    wanted = "head_loss.temperature = 2.0, head_loss.z_loss.weight = 0.0001"
    assert listed(changed) == wanted


@pytest.mark.parametrize("kind", ["dpo", "cpo", "ipo", "orpo"])
def test_a_margin_is_for_simpo_alone(kind):
    table = "--head_loss.preference"
    with pytest.raises(ValueError, match="choose the kind simpo"):
        plan_of(f"{table}.weight=1", f"{table}.kind={kind}", f"{table}.gamma=0.7")


def test_a_number_that_equals_the_default_is_no_change():
    table = job_config.HeadLoss()
    table.focal.gamma = float("2.0")
    assert changes(table, "head_loss") == {}
