"""What the command line understands beyond torchtitan's own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan_liger.job_config import JobConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The switch that this project is about, and how tyro, torchtitan's parser, spells it.
FLAG_ON = "--liger_kernel.enable_fused_linear_cross_entropy"
FLAG_OFF = "--liger_kernel.no-enable_fused_linear_cross_entropy"

BOOLEANS = {"true": True, "false": False}
PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def prepare_argv(argv: Sequence[str]) -> list[str]:
    """Rewrite arguments so that torchtitan's parser understands them.

    - `--liger_kernel.key False` becomes `--liger_kernel.no-key`, and
      `--liger_kernel.key True` `--liger_kernel.key`; so for `--training.compile`.
    - `--training.compile` becomes `--compile.enable`, in the TOML as well.
    - An assets path that does not exist from here but does beside this package (our own
      tokenizer) is given as an absolute path.
    """
    prepared: list[str] = []
    ours = partial(is_switch, configs=[JobConfig])
    for argument in argv:
        flag, _, value = argument.partition("=")
        if argument.lower() in BOOLEANS and prepared and ours(prepared[-1]):
            prepared[-1] = _switch(prepared[-1], BOOLEANS[argument.lower()])
        elif value.lower() in BOOLEANS and ours(flag):
            prepared.append(_switch(flag, BOOLEANS[value.lower()]))
        else:
            prepared.append(argument)
    older = re.compile(r"--training\.(no[-_])?compile")
    for i, argument in enumerate(prepared):
        if match := older.fullmatch(argument):
            prepared[i] = _switch("--compile.enable", not match[1])

    option = re.compile(r"--model\.hf[-_]assets[-_]path")
    for i, argument in enumerate(prepared):
        flag, _, value = argument.partition("=")
        if option.fullmatch(flag) and value:
            prepared[i] = f"{flag}={_beside_the_package(value)}"
        elif i and option.fullmatch(prepared[i - 1]):
            prepared[i] = _beside_the_package(argument)
    # What the TOML says goes first, so that the user's own arguments win.
    toml = read_toml(argv, lenient=True)[1]
    assets = value_of(toml, "model", "hf_assets_path")
    if isinstance(assets, str) and (path := _beside_the_package(assets)) != assets:
        prepared.insert(0, f"--model.hf_assets_path={path}")
    compiled = value_of(toml, "training", "compile")
    if isinstance(compiled, bool) and value_of(toml, "compile", "enable") is None:
        prepared.insert(0, _switch("--compile.enable", compiled))
    return prepared


def name_config_module(argv: Sequence[str]) -> list[str]:
    """Add ours, unless the arguments or the TOML name a `job.custom_config_module`."""
    if option_of(argv, "job", "custom_config_module") is not None:
        return list(argv)
    if value_of(read_toml(argv, lenient=True)[1], "job", "custom_config_module"):
        return list(argv)
    return ["--job.custom_config_module=torchtitan_liger.job_config", *argv]


def option_of(argv: Sequence[str], section: str, key: str) -> str | None:
    """What the command line says: the first time, as torchtitan reads it before it parses
    the rest. None where it says nothing."""
    names = {f"--{section}.{key}", f"--{section}.{key.replace('_', '-')}"}
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None


def arguments_of(argv: Sequence[str], section: str) -> list[str]:
    """Those of the arguments that are options of a section."""
    option = re.compile(f"--{section.replace('_', '[_-]')}[.].*")
    return [argument for argument in argv if option.fullmatch(argument)]


def read_toml(
    argv: Sequence[str], *, lenient: bool = False
) -> tuple[str, dict[str, Any]]:
    """The config file named in `argv` and what it holds; empty without one.

    A file that is not there is left to torchtitan, which says so.

    Raises:
        ValueError: for what is no TOML, unless `lenient`, which takes it for empty.
    """
    path = option_of(argv, "job", "config_file") or ""
    try:
        with open(path, "rb") as file:
            return path, tomllib.load(file)
    except OSError:
        return path, {}
    except tomllib.TOMLDecodeError as error:
        if lenient:
            return path, {}
        raise ValueError(f"{path}: {error}") from None


def _beside_the_package(path: str) -> str:
    beside = PACKAGE_PARENT / path
    is_there = not path or os.path.exists(path) or not beside.exists()
    return path if is_there else str(beside)


def is_switch(option: str, configs: Sequence[type]) -> bool:
    """Whether `--section.key` is one that takes no value."""
    kinds: list[Any] = list(configs)
    for name in option.removeprefix("--").replace("-", "_").split("."):
        names = name, name.removeprefix("no_")
        tables = [kind for kind in kinds if is_dataclass(kind)]
        kinds = [f.type for kind in tables for f in fields(kind) if f.name in names]
    return bool in kinds


def _switch(flag: str, value: bool) -> str:
    """How torchtitan's command line spells a switch that is on, or off; `flag` may already
    say "no"."""
    section, _, name = flag.rpartition(".")
    key = re.sub("^no[-_]", "", name)
    return f"{section}.{key}" if value == (key == name) else f"{section}.no-{key}"


def value_of(toml: Mapping[str, Any], section: str, key: str) -> Any:
    """What the TOML says; None where it says nothing."""
    values = toml.get(section)
    return values.get(key) if isinstance(values, Mapping) else None
