#!/usr/bin/env bash
# Sets up an environment where there is none, then runs the tests. Arguments go to
# pytest; without any, the linter and the type checker run first, and the tests in two
# processes.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh" dev
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

failed=""
check() {
    if ! "$PYTHON" -m "$1" --version >/dev/null 2>&1; then
        echo "test.sh: $PYTHON has no $1: skipped"
    elif ! "$PYTHON" -m "$@"; then
        failed="$failed '$*'"
    fi
}

if [ $# -eq 0 ]; then
    check ruff check
    check ruff format --check
    check mypy
    if [ -n "$failed" ]; then
        echo "test.sh: failed, whatever the tests say:$failed" >&2
    fi
    set -- -n 2 --dist loadfile
fi
"$PYTHON" -m pytest "$@"
[ -z "$failed" ]
