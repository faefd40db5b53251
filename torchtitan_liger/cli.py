"""What the command line understands beyond torchtitan's own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def prepare_argv(argv: Sequence[str]) -> list[str]:
    """Rewrite arguments so that torchtitan's parser understands them.

    - `--section.key False` becomes `--section.no-key`, and `--section.key True`
      `--section.key`.
    - An assets path in the TOML that does not exist from here but does beside this
      package (our own tokenizer) is given as an absolute path.
    """
    prepared: list[str] = []
    for argument in argv:
        flag = prepared[-1] if prepared else ""
        if argument in ("True", "False") and re.fullmatch(r"--[\w-]+(\.[\w-]+)+", flag):
            prepared[-1] = _flag(flag, argument == "True")
        elif match := re.fullmatch(r"(--[\w-]+(?:\.[\w-]+)+)=(True|False)", argument):
            prepared.append(_flag(match[1], match[2] == "True"))
        else:
            prepared.append(argument)

    assets = read_toml(argv)[1].get("model", {}).get("hf_assets_path")
    if (
        isinstance(assets, str)
        and not os.path.exists(assets)
        and (PACKAGE_PARENT / assets).exists()
    ):
        # First, so that the user's own argument wins.
        prepared.insert(0, f"--model.hf_assets_path={PACKAGE_PARENT / assets}")
    return prepared


def read_toml(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The config file named in `argv` and what it holds; empty without one.

    A file that cannot be read is left to torchtitan, which says so.
    """
    path = ""
    for i, argument in enumerate(argv):
        key, _, value = argument.partition("=")
        if key in ("--job.config_file", "--job.config-file"):
            path = value or (argv[i + 1] if i + 1 < len(argv) else "")
    try:
        with open(path, "rb") as file:
            return path, tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError):
        return path, {}


def _flag(flag: str, value: bool) -> str:
    if value:
        return flag
    section, _, key = flag.rpartition(".")
    return f"{section}.no-{key}"
