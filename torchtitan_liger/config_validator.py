"""From a job config and a machine to a plan for the head: what runs, and why.

Every refusal and every fallback is a row of `RULES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type

from torchtitan_liger.head_loss import HeadLoss, HeadLossOptions
from torchtitan_liger.job_config import LigerKernel
from torchtitan_liger.liger_api import LigerHeadLoss, LigerStatus, liger_status

FLAG = "liger_kernel.enable_fused_linear_cross_entropy"
# How tyro, torchtitan's command line, spells "off".
FLAG_OFF = "--liger_kernel.no-enable_fused_linear_cross_entropy"


@dataclass(frozen=True)
class Environment:
    """What the machine decides."""

    device_type: str
    liger: LigerStatus


@lru_cache(maxsize=1)
def this_environment() -> Environment:
    """The environment of this process; looked at once."""
    return Environment(device_type, liger_status(device_type))


@dataclass(frozen=True)
class Rule:
    """When a job cannot have what it asks for.

    `reason` gives None when the rule does not apply, else the reason and a way out.
    """

    topic: str
    """The combination, for a reader of the README."""
    outcome: str
    """What happens, for the same reader."""
    reason: Callable[[JobConfig, Environment], str | None]
    effect: Literal["refuse", "fall back"]
    error: type[Exception]
    """Raised on refusal, and instead of falling back with `fallback = "error"`."""


def _pipeline_parallel(job: JobConfig, _: Environment) -> str | None:
    degree = job.parallelism.pipeline_parallel_degree
    if degree <= 1:
        return None
    return (
        "Liger-Kernel fused linear cross entropy loss is not compatible with Pipeline "
        f"Parallelism. parallelism.pipeline_parallel_degree is {degree}: disable either "
        "Pipeline Parallelism (--parallelism.pipeline_parallel_degree 1) or the fused "
        f"loss ({FLAG_OFF})"
    )


def _quantized_head(job: JobConfig, _: Environment) -> str | None:
    linear = job.quantize.linear
    filters = {
        "quantize.linear.float8": linear.float8.filter_fqns,
        "quantize.linear.mx": linear.mx.filter_fqns,
    }
    for converter, filter_fqns in filters.items():
        if converter in job.model.converters and "output" not in filter_fqns:
            kept = ",".join([*filter(None, filter_fqns), "output"])
            return (
                f"model.converters has {job.model.converters}, which would replace "
                f"the LM head; keep it in high precision with --{converter}.filter_fqns "
                f"{kept}, or turn the fused loss off ({FLAG_OFF})"
            )
    return None


def _tied_tensor_parallel(job: JobConfig, _: Environment) -> str | None:
    args = model_args(job)
    degree = job.parallelism.tensor_parallel_degree
    if not getattr(args, "enable_weight_tying", False) or degree <= 1:
        return None
    return (
        f"{job.model.name} {job.model.flavor} ties its embedding to its LM head, which "
        "tensor parallelism would shard in two ways "
        f"(parallelism.tensor_parallel_degree is {degree}): use "
        f"--parallelism.tensor_parallel_degree 1, or turn the fused loss off ({FLAG_OFF})"
    )


def _reference_tensor_parallel(job: JobConfig, _: Environment) -> str | None:
    degree = job.parallelism.tensor_parallel_degree
    if settings(job).impl != "reference" or degree <= 1:
        return None
    return (
        'liger_kernel.impl = "reference" needs the whole vocabulary on each rank, but '
        f"parallelism.tensor_parallel_degree is {degree}: use --liger_kernel.impl chunked"
    )


def _wants_liger(job: JobConfig) -> bool:
    return settings(job).impl in ("auto", "liger")


def _liger_not_importable(job: JobConfig, env: Environment) -> str | None:
    if not _wants_liger(job) or env.liger.importable:
        return None
    return env.liger.reason


def _liger_no_device(job: JobConfig, env: Environment) -> str | None:
    if not _wants_liger(job) or env.liger.usable:
        return None
    return env.liger.reason


def _liger_tensor_parallel(job: JobConfig, _: Environment) -> str | None:
    degree = job.parallelism.tensor_parallel_degree
    if not _wants_liger(job) or degree <= 1:
        return None
    return (
        "Liger-Kernel's fused loss needs the whole vocabulary on each rank, but "
        f"parallelism.tensor_parallel_degree is {degree}"
    )


def _seen_later(_job: JobConfig, _: Environment) -> None:
    """Only the built model shows it: `LMHead.from_linear` and `parallelize` refuse it."""


RULES = (
    Rule(
        "pipeline parallelism",
        f"refused: `--parallelism.pipeline_parallel_degree 1`, or `{FLAG_OFF}`",
        _pipeline_parallel,
        "refuse",
        RuntimeError,
    ),
    Rule(
        "a float8 or MX converter that would replace the LM head",
        "refused, unless its `filter_fqns` has `output`: the head stays in bf16",
        _quantized_head,
        "refuse",
        ValueError,
    ),
    Rule(
        "an LM head that is no plain linear layer (LoRA, a bias, your own)",
        "refused when the model is built",
        _seen_later,
        "refuse",
        ValueError,
    ),
    Rule(
        "tied embeddings with tensor parallelism",
        "refused: `--parallelism.tensor_parallel_degree 1`",
        _tied_tensor_parallel,
        "refuse",
        ValueError,
    ),
    Rule(
        '`impl = "reference"` with tensor parallelism',
        "refused: `--liger_kernel.impl chunked`",
        _reference_tensor_parallel,
        "refuse",
        ValueError,
    ),
    Rule(
        "Liger-Kernel missing, too old or broken",
        '`chunked`, with a warning; `fallback = "error"`: ImportError',
        _liger_not_importable,
        "fall back",
        ImportError,
    ),
    Rule(
        "Liger-Kernel without a GPU",
        '`chunked`; `fallback = "error"`: ImportError',
        _liger_no_device,
        "fall back",
        ImportError,
    ),
    Rule(
        "Liger-Kernel with tensor parallelism",
        '`chunked`; `fallback = "error"`: ValueError',
        _liger_tensor_parallel,
        "fall back",
        ValueError,
    ),
)


def support_table() -> str:
    """`RULES` as the table in the README."""
    rows = ["| with the flag on | |", "|---|---|"]
    return "\n".join(rows + [f"| {rule.topic} | {rule.outcome} |" for rule in RULES])


@dataclass(frozen=True)
class HeadLossPlan:
    """What computes the loss of a job, and why."""

    enabled: bool
    impl: Literal["liger", "chunked", "reference", "stock"]
    options: HeadLossOptions
    reason: str = ""
    """Why it is not Liger-Kernel, where that was wanted."""
    validate: bool = True
    """Whether validation goes through the head's loss as well."""
    preflight: bool = True
    """Whether the head is checked on the real mesh before the first step."""
    warning: str = ""
    """What the user has to hear about the choice; empty if nothing."""

    def head_loss(self) -> HeadLoss | LigerHeadLoss:
        if self.impl == "liger":
            return LigerHeadLoss(self.options)
        assert self.impl != "stock"
        return HeadLoss(options=self.options, impl=self.impl)

    def announcement(self) -> str:
        """One line for the log."""
        if self.impl == "liger":
            return "Using Liger-Kernel fused linear cross entropy loss"
        because = f": {self.reason}" if self.reason else ""
        return f"Using the {self.impl} linear cross entropy loss{because}"


def resolve(job: JobConfig, environment: Environment | None = None) -> HeadLossPlan:
    """Decide what computes the loss of `job`. Pure: the same inputs, the same plan.

    Raises:
        RuntimeError: with pipeline parallelism.
        ImportError: when Liger-Kernel is wanted, cannot be used here, and
            `liger_kernel.fallback` is "error".
        ValueError: for settings that contradict each other or are out of range. Each
            message names the key, its value and a way out.
    """
    config = settings(job)
    _check_values(config)
    options = HeadLossOptions(
        acc_dtype=TORCH_DTYPE_MAP[config.acc_dtype],
        logits_memory_mib=config.logits_memory_mib,
    )
    if not config.enable_fused_linear_cross_entropy:
        return HeadLossPlan(False, "stock", options)
    environment = environment or this_environment()
    plan = HeadLossPlan(
        enabled=True,
        impl="liger" if config.impl == "auto" else config.impl,
        options=options,
        validate=config.validation,
        preflight=config.preflight,
    )
    for rule in RULES:
        reason = rule.reason(job, environment)
        if reason is None:
            continue
        if rule.effect == "refuse":
            raise rule.error(reason)
        if config.fallback == "error":
            raise rule.error(
                f"{reason}. Or train without it: --liger_kernel.impl chunked"
            )
        # "auto" on a machine or a mesh where Liger cannot run is a choice, not a loss;
        # what the user could mend, or asked for by name, is worth a warning.
        expected = config.impl == "auto" and environment.liger.importable
        warning = "" if expected else f"{reason}. Training with impl = chunked instead"
        return replace(plan, impl="chunked", reason=reason, warning=warning)
    return plan


def settings(job: JobConfig) -> LigerKernel:
    """The section `[liger_kernel]`.

    Raises:
        ValueError: when the job was parsed without our config module.
    """
    config = getattr(job, "liger_kernel", None)
    if config is None:
        raise ValueError(
            "the job config has no section liger_kernel: set job.custom_config_module "
            'to "torchtitan_liger.job_config", or to a module whose JobConfig has a '
            "field liger_kernel of that class"
        )
    return config


def model_args(job: JobConfig) -> BaseModelArgs:
    """The arguments of the job's model.

    Raises:
        ValueError: for a flavor that the model does not have.
    """
    flavors, name = get_train_spec(job.model.name).model_args, job.model.flavor
    if name not in flavors:
        raise ValueError(
            f"model.flavor is {name!r}; {job.model.name} has {', '.join(flavors)}"
        )
    return flavors[name]


def check_vocabulary(job: JobConfig, tokenizer_size: int) -> None:
    """
    Raises:
        ValueError: when the tokenizer knows more words than the model.
    """
    vocab_size = model_args(job).vocab_size
    if tokenizer_size > vocab_size:
        raise ValueError(
            f"the tokenizer in model.hf_assets_path = {job.model.hf_assets_path!r} has "
            f"{tokenizer_size} words, but {job.model.name} {job.model.flavor} only "
            f"{vocab_size}: choose another model.flavor or another tokenizer"
        )


def _check_values(config: LigerKernel) -> None:
    for field in fields(LigerKernel):
        value, choices = getattr(config, field.name), get_args(field.type)
        if choices and value not in choices:
            raise ValueError(
                f"liger_kernel.{field.name} is {value!r}; it must be one of "
                f"{', '.join(map(repr, choices))}"
            )
        if not choices and type(value) is not field.type:
            raise ValueError(
                f"liger_kernel.{field.name} is {value!r}; it must be "
                f"{'true or false' if field.type is bool else 'a whole number'}"
            )
    if config.logits_memory_mib < 0:
        raise ValueError(
            f"liger_kernel.logits_memory_mib is {config.logits_memory_mib}; it must be 0 "
            "(planned) or a number of MiB"
        )


def check_keys(toml: Mapping[str, Any], path: str) -> None:
    """Look for keys in the TOML's `[liger_kernel]` that do not exist.

    Raises:
        ValueError: with the key, its value, and the nearest key that exists.
    """
    known = [field.name for field in fields(LigerKernel)]
    for other in difflib.get_close_matches(
        "liger_kernel", set(toml) - {"liger_kernel"}
    ):
        raise ValueError(
            f"{path}: there is no section [{other}]; did you mean liger_kernel?"
        )
    section = toml.get("liger_kernel", {})
    if not isinstance(section, Mapping):
        raise ValueError(
            f"{path}: liger_kernel is {section!r}; it must be a section, [liger_kernel]"
        )
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
            raise ValueError(
                f"{path}: [liger_kernel] has no key {key} (its value is {value!r}); {hint}"
            )
