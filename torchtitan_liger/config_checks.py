"""Whether the keys and the values of a job are ones that exist."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan_liger.cli import arguments_of, option_of, value_of
from torchtitan_liger.job_config import HeadLoss, LigerKernel

SECTIONS: dict[str, type] = {"liger_kernel": LigerKernel, "head_loss": HeadLoss}


def check_keys(toml: Mapping[str, Any], path: str, configs: Sequence[type]) -> None:
    """Look for sections, keys and values in the TOML that do not exist.

    Args:
        configs: the dataclasses that torchtitan merges into one, whose fields are sections.

    Raises:
        ValueError: with the key, its value, and the nearest key that exists or what the
            value must be.
    """
    _check_table(toml, configs, "", path)


def _check_table(
    table: Mapping[str, Any], kinds: Sequence[type], name: str, path: str
) -> None:
    known: dict[str, list[Any]] = {}
    for kind in kinds:
        for field in fields(kind):
            known.setdefault(field.name, []).append(field.type)
    for key, value in table.items():
        whole = f"{name}.{key}" if name else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
            there_is_no = (
                f"[{name}] has no key {key} (its value is {value!r})"
                if name
                else f"there is no section [{key}]"
            )
            raise ValueError(f"{path}: {there_is_no}; {hint}")
        tables = [x for x in known[key] if isinstance(x, type) and is_dataclass(x)]
        if tables and isinstance(value, Mapping):
            _check_table(value, tables, whole, path)
            continue
        is_whole = isinstance(value, float) and value.is_integer()
        # A later config overrides an earlier one; 1e4 is a whole number in a TOML.
        wanted = _unlike(int(value) if is_whole else value, known[key][-1])
        if tables:
            wanted = f"a section, [{whole}]"
        if wanted:
            raise ValueError(f"{path}: {whole} is {value!r}; it must be {wanted}")


def own_config(argv: Sequence[str], toml: Mapping[str, Any]) -> type | None:
    """The `JobConfig` of the job's config module, if it names one."""
    module = _config_module(argv, toml)
    return importlib.import_module(module).JobConfig if module else None


def _config_module(argv: Sequence[str], toml: Mapping[str, Any]) -> str | None:
    key = "job", "custom_config_module"
    return option_of(argv, *key) or value_of(toml, *key)


def check_config_module(argv: Sequence[str], toml: Mapping[str, Any]) -> None:
    """Look for our sections where the job's config module has none of them.

    Raises:
        ValueError: with the module and the section; torchtitan's parser would say that
            there is no such option.
    """
    used = [name for name in SECTIONS if name in toml or arguments_of(argv, name)]
    if not used:
        return
    config = own_config(argv, toml)
    known = {field.name for field in fields(config)} if config else set()
    for name in used:
        if name not in known:
            raise ValueError(
                f"job.custom_config_module is {_config_module(argv, toml)!r}, whose "
                f"JobConfig has no section {name}: derive it from "
                "torchtitan_liger.job_config.JobConfig"
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


NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
}


def _unlike(value: Any, kind: Any) -> str | None:
    """What a value should be, if it is not and that is easily said."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [k for k in get_args(kind) if k is not type(None)]
        if len(kinds) > 1 or (value is None and len(kinds) < len(get_args(kind))):
            return None
        (kind,) = kinds
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"
    if kind is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    else:
        fits = kind not in NAMES or type(value) is kind
    return None if fits else NAMES[kind]


@contextmanager
def keys_of(table: str) -> Iterator[None]:
    """A ValueError of what takes the values of `table`, and begins with the name of one,
    begins with the whole key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{table}.{error}") from None
