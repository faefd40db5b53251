"""Import this first: where this Python cannot train, the script goes on in the environment
of run_train.sh, which is made if there is none.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if not all(map(importlib.util.find_spec, ("torchtitan", "torchtitan_liger"))):
    if os.environ.get("SET_UP_BY") == str(ROOT):
        sys.exit(f"{sys.prefix} is not complete: remove it, and run this again")
    os.environ["SET_UP_BY"] = str(ROOT)
    setup = f'source "{ROOT}/scripts/setup_env.sh" "" && exec "$PYTHON" "$0" "$@"'
    os.execvp("bash", ["bash", "-c", setup, *sys.argv])
