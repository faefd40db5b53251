"""Entry point: `python -m torchtitan_liger.train`, started by `run_train.sh`."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from itertools import pairwise

from torchtitan_liger import device
from torchtitan_liger.cli import is_switch, name_config_module, prepare_argv, read_toml
from torchtitan_liger.config_checks import (
    check_config_module,
    check_keys,
    check_weights,
    own_config,
)


def main(register: Callable[[], None] | None = None) -> None:
    """Train the job that the command line describes.

    Args:
        register: called before the trainer is built, and the place for imports of
            torchtitan: to register a dataloader or datasets of your own.
    """
    # torchtitan's parser reads the command line while it is imported.
    sys.argv[1:] = prepare_argv(name_config_module(sys.argv[1:]))
    # What it tells the user to call for help.
    sys.argv[0] = os.environ.get("LAUNCHER", "python -m torchtitan_liger.train")
    device.prepare()
    if register is not None:
        register()
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_train)()  # torchrun's last lines say what was wrong
    device.let_gloo_finish()


def _train() -> None:
    from torchtitan.config import JobConfig
    from torchtitan.train import main as torchtitan_main

    from torchtitan_liger.trainer import LigerTrainer

    path, toml = read_toml(sys.argv[1:])
    check_config_module(sys.argv[1:], toml)
    own = own_config(sys.argv[1:], toml)
    configs = [JobConfig] if own is None else [JobConfig, own]
    check_keys(toml, path, configs)
    check_weights(sys.argv[1:], toml, path)
    check_options(configs)
    check_launched()
    torchtitan_main(LigerTrainer)


def check_options(configs: Sequence[type]) -> None:
    """Have torchtitan's parser look at the command line.

    Args:
        configs: the dataclasses that it merges.

    Raises:
        ValueError: with what it says. It would exit, and torchrun's last lines not say why.
    """
    from torchtitan.config import ConfigManager

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            ConfigManager().parse_args()
    except SystemExit as error:
        if not error.code:  # --help
            raise
        before, corner, box = said.getvalue().partition("╭")
        sys.stderr.write(before)
        lines = (line.strip(" ╮╰╯│─") for line in box.splitlines())
        title, *others = filter(None, lines) if corner else (before,)
        text = "\n".join(others) or title
        hint = value_of_a_switch(sys.argv[1:], text, configs)
        raise ValueError(text + hint) from None
    sys.stderr.write(said.getvalue())  # of a config module, which is read once


def check_launched() -> None:
    """
    Raises:
        ValueError: where nothing has said which of a job's processes this is.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "LOCAL_RANK is not set: start the job with run_train.sh, or with `python -m "
            "torch.distributed.run --nproc_per_node 1 -m torchtitan_liger.train ...`"
        )


def value_of_a_switch(argv: Sequence[str], said: str, configs: Sequence[type]) -> str:
    """What to do about a word that follows a switch and that nobody recognizes."""
    words = re.findall(r"[Uu]nrecognized options?: (.*)", said)
    for switch, word in pairwise(argv):
        is_value = words and word in words[0].split() and not word.startswith("--")
        if is_value and is_switch(switch, configs):
            section, _, key = switch.rpartition(".")
            off = f"{section}.no-{re.sub('^no[-_]', '', key)}"
            return (
                f"\n{switch} takes no value such as {word}: leave it out, or use {off}"
            )
    return ""


if __name__ == "__main__":
    main()
