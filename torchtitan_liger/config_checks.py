"""Whether the keys and the values of our sections are ones that exist."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from torchtitan_liger.cli import value_of
from torchtitan_liger.job_config import HeadLoss, LigerKernel

SECTIONS: dict[str, type] = {"liger_kernel": LigerKernel, "head_loss": HeadLoss}

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "logits_memory_mib": (lambda x: x >= 0, "0 (planned) or a number of MiB"),
    "logit_softcap": (lambda x: x >= 0, "0 (off) or positive"),
    "temperature": (lambda x: x > 0, "positive"),
    "weight": (lambda x: x >= 0, "at least 0 (at 0 the term is only reported)"),
    "label_smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "gamma": (lambda x: x >= 0, "at least 0"),
    "clip_low": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "clip_high": (lambda x: x >= 0, "at least 0"),
    "dual_clip": (lambda x: x > 1, "above 1"),
    "importance_cap": (lambda x: x > 0, "positive"),
    "floor": (lambda x: 0 < x < 1, "in (0, 1)"),
    "beta": (lambda x: x >= 0, "at least 0"),
}
"""The values that a key may have, in whichever table it is."""


def check_keys(toml: Mapping[str, Any], path: str) -> None:
    """Look for keys in the TOML's sections of ours that do not exist.

    Raises:
        ValueError: with the key, its value, and the nearest key that exists.
    """
    for name in SECTIONS:
        others = set(toml) - set(SECTIONS)
        # Nearly the same: a config module of the user's own may have other sections.
        for other in difflib.get_close_matches(name, others, cutoff=0.8):
            raise ValueError(
                f"{path}: there is no section [{other}]; did you mean {name}?"
            )
    compiled = value_of(toml, "training", "compile")
    if compiled is not None and type(compiled) is not bool:
        raise ValueError(
            f"{path}: training.compile is {compiled!r}; it must be true or false"
        )
    for name, section in SECTIONS.items():
        _check_table(toml.get(name, {}), section, name, path)


def _check_table(table: Any, section: type, name: str, path: str) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{path}: {name} is {table!r}; it must be a section, [{name}]")
    known = {field.name: field for field in fields(section)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
            raise ValueError(
                f"{path}: [{name}] has no key {key} (its value is {value!r}); {hint}"
            )
        kind = known[key].type
        if isinstance(kind, type) and is_dataclass(kind):
            _check_table(value, kind, f"{name}.{key}", path)


def check_weights(argv: Sequence[str], toml: Mapping[str, Any], path: str) -> None:
    """Look for terms to which neither the options nor the TOML give a weight.

    Raises:
        ValueError: with a setting of such a term; its value may be the default, and would
            not be missed.
    """
    option = re.compile(r"--head[_-]loss\.([\w-]+)\.([\w-]+)(=.*)?")
    tables = toml.get("head_loss", {})
    given: dict[str, list[str]] = {name: [] for name in tables}
    defaults = HeadLoss()
    for argument in argv:
        if match := option.fullmatch(argument):
            name, key = (part.replace("-", "_") for part in match.groups()[:2])
            # What does not exist is the parser's to refuse.
            if hasattr(getattr(defaults, name, None), key):
                given.setdefault(name, []).append(key)
    for name, keys in given.items():
        if getattr(getattr(defaults, name, None), "weight", 1.0) is not None:
            continue
        if "weight" not in {*keys, *tables.get(name, {})}:
            in_toml = f"{path}: [head_loss.{name}]"
            setting = f"--head_loss.{name}.{keys[0]}" if keys else in_toml
            raise without_weight(setting, name)


def without_weight(setting: str, name: str) -> ValueError:
    """What is wrong with a setting of `[head_loss]`'s table `name` that has no weight."""
    return ValueError(
        f"{setting} does nothing without head_loss.{name}.weight: set it too"
    )


def check_values(section: Any, name: str) -> None:
    """
    Raises:
        ValueError: for a value of `section` of the wrong type or out of range; the
            message begins with its key, after `name`, and holds the value.
    """
    for field in fields(section):
        key, value = f"{name}.{field.name}", getattr(section, field.name)
        if is_dataclass(field.type):
            check_values(value, key)
        elif wanted := _unlike(value, field.type, field.name):
            raise ValueError(f"{key} is {value!r}; it must be {wanted}")


def _unlike(value: Any, kind: Any, key: str) -> str | None:
    """What a value should be, if it is not."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if value is None and type(None) in get_args(kind):
        return None
    if kind is int:
        if type(value) is not int:
            return "a whole number"
    elif type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        return "a number"
    inside, wanted = RANGES.get(key, (lambda _: True, ""))
    return None if inside(value) else wanted
