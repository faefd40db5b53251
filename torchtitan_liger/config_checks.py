"""Whether the keys and the values of our sections are ones that exist."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from torchtitan_liger.cli import arguments_of, option_of, value_of
from torchtitan_liger.job_config import HeadLoss, LigerKernel

SECTIONS: dict[str, type] = {"liger_kernel": LigerKernel, "head_loss": HeadLoss}


def check_keys(toml: Mapping[str, Any], path: str) -> None:
    """Look for keys and values in the TOML's sections of ours that do not exist.

    Raises:
        ValueError: with the key, its value, and the nearest key that exists or what the
            value must be.
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
        elif wanted := _unlike(value, kind):
            raise ValueError(f"{path}: {name}.{key} is {value!r}; it must be {wanted}")


def check_config_module(argv: Sequence[str], toml: Mapping[str, Any]) -> None:
    """Look for our sections where the job's config module has none of them.

    Raises:
        ValueError: with the module and the section; torchtitan's parser would say that
            there is no such option.
    """
    used = [name for name in SECTIONS if name in toml or arguments_of(argv, name)]
    if not used:
        return
    key = "job", "custom_config_module"
    module = option_of(argv, *key) or value_of(toml, *key)
    config = importlib.import_module(module).JobConfig if module else None
    known = {field.name for field in fields(config)} if config else set()
    for name in used:
        if name not in known:
            raise ValueError(
                f"job.custom_config_module is {module!r}, whose JobConfig has no section "
                f"{name}: derive it from torchtitan_liger.job_config.JobConfig"
            )


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
        ValueError: for a value of `section` of the wrong type; the message begins with
            its key, after `name`, and holds the value.
    """
    for field in fields(section):
        key, value = f"{name}.{field.name}", getattr(section, field.name)
        if is_dataclass(field.type):
            check_values(value, key)
        elif wanted := _unlike(value, field.type):
            raise ValueError(f"{key} is {value!r}; it must be {wanted}")


def _unlike(value: Any, kind: Any) -> str | None:
    """What a value should be, if it is not."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if value is None and type(None) in get_args(kind):
        return None
    if kind is int:
        return None if type(value) is int else "a whole number"
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return None if is_number else "a finite number"


@contextmanager
def keys_of(table: str) -> Iterator[None]:
    """A ValueError of what takes the values of `table`, and begins with the name of one,
    begins with the whole key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{table}.{error}") from None
