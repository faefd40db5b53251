"""Every row of the table of refusals and fallbacks, and what is neither."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchtitan.config import ConfigManager

from tests.helpers import ROOT
from torchtitan_liger import models
from torchtitan_liger.cli import FLAG_OFF, FLAG_ON
from torchtitan_liger.config_validator import (
    RULES,
    model_args,
    resolve,
    support_table,
)
from torchtitan_liger.head_loss import CrossEntropy, ZLoss
from torchtitan_liger.liger_api import INSTALL_HINT, LigerStatus

GPU = LigerStatus(True)
CPU = LigerStatus(True, "the kernels need a GPU")
MISSING = LigerStatus(False, INSTALL_HINT)
BROKEN = LigerStatus(False, "its import fails with OSError")


@pytest.fixture(scope="module", autouse=True)
def registered():
    for name in ("llama3", "qwen3"):
        models.register(name)


def job(*args: str, on: bool = True, flavor: str = "debugmodel_16k"):
    return ConfigManager().parse_args(
        [
            "--job.custom_config_module=torchtitan_liger.job_config",
            f"--model.flavor={flavor}",
            "--model.hf_assets_path=.",
            *([FLAG_ON] if on else []),
            *args,
        ]
    )


def test_off_by_default():
    plan = resolve(job(on=False), MISSING)
    assert not plan.enabled
    assert plan.warning == ""


def test_off_refuses_nothing():
    assert not resolve(
        job("--parallelism.pipeline_parallel_degree=2", on=False), GPU
    ).enabled
    with pytest.raises(RuntimeError):
        resolve(job("--parallelism.pipeline_parallel_degree=2"), GPU)
    # The way out that the message names.
    way_out = job("--parallelism.pipeline_parallel_degree=2", FLAG_OFF)
    assert not resolve(way_out, GPU).enabled
    assert resolve(job("--parallelism.pipeline_parallel_degree", "1"), GPU).enabled


def test_auto_is_liger_where_it_runs():
    plan = resolve(job(), GPU)
    assert plan.impl == "liger"
    assert plan.announcement() == "Using Liger-Kernel fused linear cross entropy loss"
    assert plan.warning == ""


@pytest.mark.parametrize("impl", ["liger", "chunked", "reference"])
def test_an_implementation_asked_for_by_name_is_used(impl):
    assert resolve(job(f"--liger_kernel.impl={impl}"), GPU).impl == impl


def test_auto_without_a_gpu_is_chunked_and_says_why_without_a_warning():
    plan = resolve(job(), CPU)
    assert plan.impl == "chunked"
    assert plan.warning == ""
    assert plan.announcement().endswith("loss: the kernels need a GPU")


def test_liger_by_name_without_a_gpu_warns():
    plan = resolve(job("--liger_kernel.impl=liger"), CPU)
    assert plan.impl == "chunked"
    assert "the kernels need a GPU" in plan.warning


@pytest.mark.parametrize("impl", ["auto", "liger"])
@pytest.mark.parametrize("environment", [MISSING, BROKEN], ids=["missing", "broken"])
def test_liger_missing_or_broken_warns_with_the_reason_and_trains_chunked(
    impl, environment
):
    plan = resolve(job(f"--liger_kernel.impl={impl}"), environment)
    assert plan.impl == "chunked"
    assert environment.reason in plan.warning


@pytest.mark.parametrize("environment", [MISSING, BROKEN, CPU])
def test_fallback_error_raises_an_import_error_with_the_reason(environment):
    with pytest.raises(ImportError, match=environment.reason) as error:
        resolve(job("--liger_kernel.fallback=error"), environment)
    assert "--liger_kernel.impl chunked" in str(error.value)
    # The way out works.
    plan = resolve(
        job("--liger_kernel.fallback=error", "--liger_kernel.impl=chunked"), environment
    )
    assert plan.impl == "chunked"


def test_chunked_does_not_ask_for_liger():
    plan = resolve(job("--liger_kernel.impl=chunked"), MISSING)
    assert plan.warning == ""
    assert plan.announcement() == "Using the chunked linear cross entropy loss"


def test_pipeline_parallelism_is_refused_in_the_documented_words():
    with pytest.raises(RuntimeError) as error:
        resolve(job("--parallelism.pipeline_parallel_degree=4"), GPU)
    message = str(error.value)
    assert message.startswith(
        "Liger-Kernel fused linear cross entropy loss is not compatible with "
        "Pipeline Parallelism. "
    )
    assert "--parallelism.pipeline_parallel_degree 1" in message
    assert FLAG_OFF in message


def test_tensor_parallelism_is_chunked():
    plan = resolve(job("--parallelism.tensor_parallel_degree=2"), GPU)
    assert plan.impl == "chunked"
    assert "tensor_parallel_degree is 2" in plan.reason
    assert plan.warning == ""


def test_the_reference_under_tensor_parallelism_is_refused():
    with pytest.raises(ValueError, match="use --liger_kernel.impl chunked"):
        resolve(
            job(
                "--parallelism.tensor_parallel_degree=2",
                "--liger_kernel.impl=reference",
            ),
            GPU,
        )


def test_tied_embeddings_under_tensor_parallelism_are_refused():
    args = ("--model.name=qwen3", "--parallelism.tensor_parallel_degree=2")
    with pytest.raises(ValueError, match="0.6B ties its embedding"):
        resolve(job(*args, flavor="0.6B"), GPU)
    assert resolve(job(*args, flavor="14B"), GPU).enabled


@pytest.mark.parametrize("key", ["quantize.linear.float8", "quantize.linear.mx"])
def test_a_converter_that_would_take_the_head_is_refused(key):
    converters = f"--model.converters={key}"
    with pytest.raises(ValueError, match=f"--{key}.filter_fqns") as error:
        resolve(job(converters, f"--{key}.filter_fqns=attention.wq"), GPU)
    assert "attention.wq,output" in str(error.value)
    way_out = f"--{key}.filter_fqns=attention.wq,output"
    assert resolve(job(converters, way_out), GPU).enabled


def test_a_converter_of_other_layers_is_none_of_our_business():
    assert resolve(job("--model.converters=quantize.grouped_mm.float8"), GPU).enabled


def test_validation_is_on_sequences_that_the_decoder_has_positions_for():
    lengths = ("--training.seq_len=64", "--validation.seq_len=128")
    assert resolve(job(*lengths), GPU).enabled
    with pytest.raises(ValueError, match="use --validation.seq_len 64"):
        resolve(job(*lengths, "--validation.enable"), GPU)


def test_a_budget_that_the_reference_ignores_is_said():
    args = "--liger_kernel.impl=reference", "--liger_kernel.logits_memory_mib=64"
    plan = resolve(job(*args), GPU)
    assert plan.warning == (
        "liger_kernel.logits_memory_mib = 64: unused by impl = reference"
    )
    assert resolve(job(args[0]), GPU).warning == ""


def test_the_readme_has_the_table_and_each_row_a_test_above():
    assert support_table() in (ROOT / "README.md").read_text()
    # A new row needs a new test: for the third one see test_parallelize, for the fourth
    # test_trainer and test_lm_head.
    assert len(RULES) == 15


@pytest.mark.parametrize("term", ["gspo", "preference", "kto"])
def test_terms_over_sequences_under_context_parallelism_are_refused(term):
    args = (f"--head_loss.{term}.weight=1", "--parallelism.context_parallel_degree=2")
    with pytest.raises(ValueError, match=f"head_loss.{term} needs whole sequences"):
        resolve(job(*args), GPU)
    assert resolve(job(args[0]), GPU).enabled


def test_half_a_pair_is_refused():
    args = "--head_loss.preference.weight=1", "--training.local_batch_size=3"
    with pytest.raises(ValueError, match="is 3: use --training.local_batch_size 4"):
        resolve(job(*args), GPU)
    assert resolve(job(args[1]), GPU).enabled


@pytest.mark.parametrize("option", ["logit_softcap=30", "temperature=2"])
def test_a_validation_that_would_ignore_a_softcap_or_a_temperature_is_refused(option):
    args = (
        f"--head_loss.{option}",
        "--liger_kernel.no-validation",
        "--validation.enable",
    )
    with pytest.raises(ValueError, match="liger_kernel.validation = false") as error:
        resolve(job(*args), GPU)
    assert f"head_loss.{option.replace('=', ' = ')}" in str(error.value)
    for kept in (args[:2], args[1:], args[::2]):
        assert resolve(job(*kept), GPU).enabled


def test_settings_without_the_flag_are_unused_and_that_is_said():
    warning = resolve(job("--liger_kernel.impl=chunked", on=False), GPU).warning
    assert warning == f"liger_kernel.impl = chunked: unused without {FLAG_ON}"
    assert resolve(job(on=False), GPU).warning == ""


OTHER_LOSSES = [
    ("--head_loss.temperature=2", "head_loss.temperature = 2.0"),
    ("--head_loss.focal.weight=0.5", "head_loss.focal.weight = 0.5"),
    ("--head_loss.cross_entropy.weight=0.5", "head_loss.cross_entropy.weight = 0.5"),
    ("--head_loss.z_loss.weight=0", "head_loss.z_loss.weight = 0.0"),
    ("--head_loss.reference_kl.weight=1", "head_loss.reference_kl.weight = 1.0"),
]


@pytest.mark.parametrize(("option", "named"), OTHER_LOSSES)
def test_losses_that_liger_lacks_are_chunked(option, named):
    plan = resolve(job(option), GPU)
    assert plan.impl == "chunked"
    assert named in plan.reason
    assert plan.warning == ""
    assert named in resolve(job(option, "--liger_kernel.impl=liger"), GPU).warning
    with pytest.raises(ValueError, match="--liger_kernel.impl chunked") as error:
        resolve(job(option, "--liger_kernel.fallback=error"), GPU)
    assert named in str(error.value)


def test_losses_that_liger_has_stay_with_it():
    plan = resolve(
        job(
            "--head_loss.z_loss.weight=1e-4",
            "--head_loss.cross_entropy.label_smoothing=0.1",
            "--head_loss.logit_softcap=30",
        ),
        GPU,
    )
    assert plan.impl == "liger"
    head_loss = plan.head_loss()
    assert head_loss.terms == (CrossEntropy(0.1), ZLoss(1e-4))
    assert head_loss.options.logit_softcap == 30


@pytest.mark.parametrize(("option", "named"), OTHER_LOSSES[1:])
def test_terms_that_the_reference_lacks_are_refused(option, named):
    with pytest.raises(ValueError, match="use --liger_kernel.impl chunked") as error:
        resolve(job(option, "--liger_kernel.impl=reference"), GPU)
    assert named in str(error.value)


def test_the_reference_has_temperature_and_z_loss():
    args = ("--head_loss.temperature=2", "--head_loss.z_loss.weight=1e-4")
    plan = resolve(job(*args, "--liger_kernel.impl=reference"), GPU)
    assert plan.impl == "reference"
    assert plan.head_loss().options.temperature == 2


def test_head_loss_settings_without_the_flag_are_refused():
    with pytest.raises(ValueError, match=FLAG_ON) as error:
        resolve(job("--head_loss.z_loss.weight=1e-4", on=False), GPU)
    assert "head_loss.z_loss.weight = 0.0001" in str(error.value)


def test_a_config_module_without_head_loss_trains_on_cross_entropy():
    config = job()
    del config.head_loss
    assert resolve(config, GPU).formula == "cross_entropy"


def test_settings_reach_the_options():
    plan = resolve(
        job("--liger_kernel.acc_dtype=bfloat16", "--liger_kernel.logits_memory_mib=64"),
        GPU,
    )
    assert plan.options.acc_dtype == torch.bfloat16
    assert plan.options.logits_memory_mib == 64


def test_a_job_without_our_sections_is_torchtitans():
    plan = resolve(ConfigManager().parse_args(["--model.hf_assets_path=."]), GPU)
    assert not plan.enabled
    assert not plan.warning


def test_a_wrong_flavor_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"'debugmodl'.*debugmodel_16k"):
        model_args(job(flavor="debugmodl"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(caplog):
    models.check_vocabulary(job(), 16384)
    models.check_vocabulary(job(on=False), 16384)
    assert not caplog.text
    models.check_vocabulary(job(on=False), 16385)  # torchtitan trains with it
    assert "has 16385 token ids" in caplog.text
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 16385)
    with pytest.raises(ValueError, match="has 16385 token ids, but .* only 16384"):
        models._build_dataloader(tokenizer=tokenizer, job_config=job())
