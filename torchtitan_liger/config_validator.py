"""From a job config and a machine to a plan for the head: what runs, and why.

Every refusal and every fallback is a row of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type

from torchtitan_liger import job_config
from torchtitan_liger.cli import FLAG_OFF, FLAG_ON
from torchtitan_liger.config_checks import check_values, keys_of
from torchtitan_liger.head_loss import HeadLossOptions, SequenceTerm
from torchtitan_liger.head_loss.terms import plain_of
from torchtitan_liger.head_loss_config import changes, listed, terms_and_options
from torchtitan_liger.head_loss_plan import HeadLossPlan
from torchtitan_liger.liger_api import LigerStatus, liger_status


@lru_cache(maxsize=1)
def liger_here() -> LigerStatus:
    """Whether this process can use Liger-Kernel; looked at once."""
    return liger_status(device_type)


@dataclass(frozen=True)
class Rule:
    """When a job cannot have what it asks for.

    `reason` gives None when the rule does not apply, else the reason and a way out. The
    default never applies: such a job is refused later, when the trainer is built.
    """

    topic: str
    """The combination, for a reader of the README."""
    outcome: str
    """What happens, for the same reader."""
    reason: Callable[[JobConfig, LigerStatus], str | None] = lambda *_: None
    effect: Literal["refuse", "fall back"] = "refuse"
    error: type[Exception] = ValueError
    """Raised on refusal, and instead of falling back with `fallback = "error"`."""


def _pipeline_parallel(job: JobConfig, _: LigerStatus) -> str | None:
    degree = job.parallelism.pipeline_parallel_degree
    if degree <= 1:
        return None
    return (
        "Liger-Kernel fused linear cross entropy loss is not compatible with Pipeline "
        f"Parallelism. parallelism.pipeline_parallel_degree is {degree}: disable either "
        "Pipeline Parallelism (--parallelism.pipeline_parallel_degree 1) or the fused "
        f"loss ({FLAG_OFF})"
    )


def _quantized_head(job: JobConfig, _: LigerStatus) -> str | None:
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


def _tied_tensor_parallel(job: JobConfig, _: LigerStatus) -> str | None:
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


def _reference_tensor_parallel(job: JobConfig, _: LigerStatus) -> str | None:
    degree = job.parallelism.tensor_parallel_degree
    if settings(job).impl != "reference" or degree <= 1:
        return None
    return (
        'liger_kernel.impl = "reference" needs the whole vocabulary on each rank, but '
        f"parallelism.tensor_parallel_degree is {degree}: use --liger_kernel.impl chunked"
    )


def _reference_other_terms(job: JobConfig, _: LigerStatus) -> str | None:
    plan = _requested(job)
    if plan.impl != "reference" or plain_of(plan.terms) is not None:
        return None
    return (
        'liger_kernel.impl = "reference" has cross entropy (weight 1) and z-loss alone, '
        f"but {head_loss_settings(job)}: use --liger_kernel.impl chunked"
    )


def _sequence_context_parallel(job: JobConfig, _: LigerStatus) -> str | None:
    degree = job.parallelism.context_parallel_degree
    names = [t.name for t in _requested(job).terms if isinstance(t, SequenceTerm)]
    if not names or degree <= 1:
        return None
    return (
        f"head_loss.{names[0]} needs whole sequences on each rank, but "
        f"parallelism.context_parallel_degree is {degree}: use "
        "--parallelism.context_parallel_degree 1"
    )


def _half_a_pair(job: JobConfig, _: LigerStatus) -> str | None:
    batch, config = job.training.local_batch_size, _head_loss(job)
    if config.preference.weight is None or batch % 2 == 0:
        return None
    return (
        "head_loss.preference needs pairs of sequences on each rank, but "
        f"training.local_batch_size is {batch}: use --training.local_batch_size "
        f"{batch + 1}"
    )


def _transforms_in_stock_validation(job: JobConfig, _: LigerStatus) -> str | None:
    options = _requested(job).options
    plain = not options.logit_softcap and options.temperature == 1
    if settings(job).validation or not job.validation.enable or plain:
        return None
    return (
        "liger_kernel.validation = false leaves the validation loss to torchtitan, which "
        f"has no softcap and no temperature, but {head_loss_settings(job)}: leave it out, "
        "or let the head validate (--liger_kernel.validation)"
    )


def _long_validation(job: JobConfig, _: LigerStatus) -> str | None:
    longest, length = job.training.seq_len, job.validation.seq_len
    is_bounded = hasattr(model_args(job), "max_seq_len")
    if not (job.validation.enable and is_bounded and length > longest):
        return None
    return (
        f"validation.seq_len is {length}, but the decoder's positions end at "
        f"training.seq_len = {longest}: use --validation.seq_len {longest}"
    )


def _wants_liger(job: JobConfig) -> bool:
    return settings(job).impl in ("auto", "liger")


def _liger_not_importable(job: JobConfig, liger: LigerStatus) -> str | None:
    return liger.reason if _wants_liger(job) and not liger.importable else None


def _liger_no_device(job: JobConfig, liger: LigerStatus) -> str | None:
    return liger.reason if _wants_liger(job) and not liger.usable else None


def _liger_tensor_parallel(job: JobConfig, _: LigerStatus) -> str | None:
    degree = job.parallelism.tensor_parallel_degree
    if not _wants_liger(job) or degree <= 1:
        return None
    return (
        "Liger-Kernel's fused loss needs the whole vocabulary on each rank, but "
        f"parallelism.tensor_parallel_degree is {degree}"
    )


def _liger_other_losses(job: JobConfig, _: LigerStatus) -> str | None:
    plan = _requested(job)
    plain = plain_of(plan.terms) is not None and plan.options.temperature == 1
    if not _wants_liger(job) or plain:
        return None
    return (
        "Liger-Kernel's fused loss has cross entropy (weight 1), label smoothing, z-loss "
        f"and softcap alone, but {head_loss_settings(job)}"
    )


RULES = (
    Rule(
        "pipeline parallelism",
        f"refused: `--parallelism.pipeline_parallel_degree 1`, or `{FLAG_OFF}`",
        _pipeline_parallel,
        error=RuntimeError,
    ),
    Rule(
        "a float8 or MX converter that would replace the LM head",
        "refused, unless its `filter_fqns` has `output`: the head stays in bf16",
        _quantized_head,
    ),
    Rule(
        "an LM head that is no plain linear layer (LoRA, a bias, your own)",
        "refused when the model is built",
    ),
    Rule(
        "a train spec with its own loss, or a model that changes its logits after the head",
        "refused when the trainer is built, by the preflight, or in the first step",
    ),
    Rule(
        "tied embeddings with tensor parallelism",
        "refused: `--parallelism.tensor_parallel_degree 1`",
        _tied_tensor_parallel,
    ),
    Rule(
        '`impl = "reference"` with tensor parallelism',
        "refused: `--liger_kernel.impl chunked`",
        _reference_tensor_parallel,
    ),
    Rule(
        '`impl = "reference"` with more in `[head_loss]` than cross entropy and z-loss',
        "refused: `--liger_kernel.impl chunked`",
        _reference_other_terms,
    ),
    Rule(
        "`head_loss.gspo`, `head_loss.preference` or `head_loss.kto` with context "
        "parallelism",
        "refused: `--parallelism.context_parallel_degree 1`",
        _sequence_context_parallel,
    ),
    Rule(
        "`head_loss.preference` with an odd number of sequences in a batch",
        "refused: an even `--training.local_batch_size`",
        _half_a_pair,
    ),
    Rule(
        "`liger_kernel.validation = false` with validation, and a softcap or a temperature",
        "refused: torchtitan's validation has neither",
        _transforms_in_stock_validation,
    ),
    Rule(
        "validation on longer sequences than training",
        "refused: a `--validation.seq_len` of at most that of training",
        _long_validation,
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
    ),
    Rule(
        "Liger-Kernel with more in `[head_loss]` than cross entropy (weight 1), label "
        "smoothing, z-loss and softcap",
        '`chunked`; `fallback = "error"`: ValueError',
        _liger_other_losses,
        "fall back",
    ),
)


def support_table() -> str:
    """`RULES` as the table in the README."""
    rows = ["| with the flag on | |", "|---|---|"]
    return "\n".join(rows + [f"| {rule.topic} | {rule.outcome} |" for rule in RULES])


def resolve(job: JobConfig, liger: LigerStatus | None = None) -> HeadLossPlan:
    """Decide what computes the loss of `job`. Pure: the same inputs, the same plan.

    Raises:
        RuntimeError: with pipeline parallelism.
        ImportError: when Liger-Kernel is wanted, cannot be used here, and
            `liger_kernel.fallback` is "error".
        ValueError: for settings that contradict each other or are out of range. Each
            message names the key, its value and a way out.
    """
    plan = _requested(job)
    if not plan.enabled:
        if ignored := head_loss_settings(job):
            raise ValueError(
                f"{ignored}, which torchtitan's own loss would ignore: turn the fused loss "
                f"on ({FLAG_ON}), or leave this out"
            )
        unused = listed(changes(settings(job), "liger_kernel"))
        return replace(plan, warning=unused and f"{unused}: unused without {FLAG_ON}")
    liger = liger or liger_here()
    config = settings(job)
    for rule in RULES:
        reason = rule.reason(job, liger)
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
        expected = config.impl == "auto" and liger.importable
        warning = "" if expected else f"{reason}. Training with impl = chunked instead"
        return replace(plan, impl="chunked", reason=reason, warning=warning)
    if plan.impl == "reference" and plan.options.logits_memory_mib:
        key = f"liger_kernel.logits_memory_mib = {plan.options.logits_memory_mib}"
        return replace(plan, warning=f"{key}: unused by impl = reference")
    return plan


def _requested(job: JobConfig) -> HeadLossPlan:
    """The plan where nothing is in the way."""
    config, head_loss = settings(job), _head_loss(job)
    check_values(config, "liger_kernel")
    check_values(head_loss, "head_loss")
    with keys_of("liger_kernel"):
        options = HeadLossOptions(
            acc_dtype=TORCH_DTYPE_MAP[config.acc_dtype],
            logits_memory_mib=config.logits_memory_mib,
        )
    terms, options = terms_and_options(head_loss, options)
    if not config.enable_fused_linear_cross_entropy:
        return HeadLossPlan("stock", options)
    return HeadLossPlan(
        impl="liger" if config.impl == "auto" else config.impl,
        options=options,
        terms=terms,
        validate=config.validation,
        preflight=config.preflight,
    )


def settings(job: JobConfig) -> job_config.LigerKernel:
    """The section `[liger_kernel]`; its defaults where a config module of the user's own has
    none (`check_config_module` looks whether it is used)."""
    return getattr(job, "liger_kernel", job_config.LigerKernel())


def _head_loss(job: JobConfig) -> job_config.HeadLoss:
    return getattr(job, "head_loss", job_config.HeadLoss())


def head_loss_settings(job: JobConfig) -> str:
    """What `[head_loss]` changes, in the user's own words; empty for nothing."""
    return listed(changes(_head_loss(job), "head_loss"))


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
