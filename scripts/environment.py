"""Import this first: where this Python cannot train, the script goes on in the environment
of run_train.sh, which is made if there is none.
"""

import importlib.util
import os
import sys
from pathlib import Path

if not all(map(importlib.util.find_spec, ("torchtitan", "torchtitan_liger"))):
    folder = Path(__file__).resolve().parent
    setup = f'source "{folder}/setup_env.sh" "" && exec "$PYTHON" "$0" "$@"'
    os.execvp("bash", ["bash", "-c", setup, *sys.argv])
