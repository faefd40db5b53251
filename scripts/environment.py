"""Import this first: where this Python cannot train, the script goes on in the environment
of run_train.sh, which is made if there is none. And how a script with runs ends.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if not all(map(importlib.util.find_spec, ("torchtitan", "torchtitan_liger"))):
    if os.environ.get("SET_UP_BY") == str(ROOT):
        sys.exit(f"{sys.prefix} is not complete: remove it, and run this again")
    os.environ["SET_UP_BY"] = str(ROOT)
    setup = f'source "{ROOT}/scripts/setup_env.sh" "" && exec "$PYTHON" "$0" "$@"'
    os.execvp("bash", ["bash", "-c", setup, *sys.argv])


def exit_on_signals() -> None:
    """Let a run in progress end with this process, and give its GPUs back."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
