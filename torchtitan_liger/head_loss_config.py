"""The section `[head_loss]` as terms and options of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torchtitan_liger import job_config
from torchtitan_liger.config_checks import keys_of, without_weight
from torchtitan_liger.head_loss import (
    Collision,
    CrossEntropy,
    Distillation,
    EntropyBonus,
    Focal,
    HeadLossOptions,
    PolicyGradient,
    Preference,
    ReferenceKL,
    SelfWeighted,
    SequencePolicyGradient,
    Term,
    Unlikelihood,
    UnpairedPreference,
    ZLoss,
)

TERMS: dict[str, Callable[..., Term]] = {
    "cross_entropy": CrossEntropy,
    "z_loss": ZLoss,
    "focal": Focal,
    "entropy_bonus": EntropyBonus,
    "self_weighted": SelfWeighted,
    "policy_gradient": PolicyGradient,
    "reference_kl": ReferenceKL,
    "collision": Collision,
    "unlikelihood": Unlikelihood,
    "distillation": Distillation,
    "gspo": SequencePolicyGradient,
    "preference": Preference,
    "kto": UnpairedPreference,
}
"""For each table of `job_config.HeadLoss` the term that takes its keys as arguments."""

READ_BY = {
    "head_loss.policy_gradient.clip_low": ("ppo", "cispo"),
    "head_loss.policy_gradient.clip_high": ("ppo", "cispo"),
    "head_loss.policy_gradient.dual_clip": ("ppo",),
    "head_loss.distillation.beta": ("jsd",),
    "head_loss.preference.gamma": ("simpo",),
}
"""The kinds of a term that read a setting which others do not."""


def terms_and_options(
    config: job_config.HeadLoss, options: HeadLossOptions
) -> tuple[tuple[Term, ...], HeadLossOptions]:
    """What `HeadLoss(terms, options)` takes.

    Args:
        options: the settings that `[head_loss]` does not have.

    Raises:
        ValueError: for values that contradict each other; the message names the key.
    """
    with keys_of("head_loss"):
        options = replace(
            options, logit_softcap=config.logit_softcap, temperature=config.temperature
        )
    terms = tuple(
        term for name in TERMS if (term := _term(name, getattr(config, name)))
    )
    if not any(term.weight for term in terms):
        names = ", ".join(f"head_loss.{name}" for name in TERMS)
        raise ValueError(
            "there is nothing to learn from: no loss has a weight other than 0; give one "
            f"of {names} a weight, such as --head_loss.cross_entropy.weight 1"
        )
    return terms, options


def _term(name: str, table: Any) -> Term | None:
    key = f"head_loss.{name}"
    settings = changes(table, key)
    if table.weight is None:
        if settings:
            (setting, value), *_ = settings.items()
            raise without_weight(f"{setting} = {value}", name)
        return None
    if table.weight < 0:
        raise ValueError(
            f"{key}.weight must be at least 0 (at 0 the term is only reported), got "
            f"{table.weight}"
        )
    for setting, value in settings.items():
        kinds = READ_BY.get(setting)
        if kinds and table.kind not in kinds:
            raise ValueError(
                f"{setting} = {value} does nothing with {key}.kind = {table.kind}: leave it "
                f"out, or choose the kind {' or '.join(kinds)}"
            )
    with keys_of(key):
        return TERMS[name](**vars(table))


def changes(section: Any, name: str) -> dict[str, Any]:
    """The settings of a section that are not the default: `name.key` -> value."""
    found: dict[str, Any] = {}
    default = type(section)()
    for field in fields(section):
        key, value = f"{name}.{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            found |= changes(value, key)
        elif value != getattr(default, field.name):
            found[key] = value
    return found


def listed(settings: Mapping[str, Any]) -> str:
    """As in a TOML, on one line."""
    return ", ".join(f"{key} = {value}" for key, value in settings.items())
