# shellcheck shell=bash
# Sets PYTHON to an interpreter that has torchtitan and torchtitan_liger, and pytest
# where the argument is `dev`. Sourced: `source scripts/setup_env.sh ""` or `... dev`.
#
#   1. PYTHON, or else the activated environment: used as it is, if it has them.
#   2. .venv beside this folder: made at the first call, brought up to date when its
#      stamp no longer matches, used at once (no pip) when it does.
#
# PYTHON is the only name left behind. Works with bash 3.2, the one of macOS.

_env_say() { printf 'torchtitan_liger: %s\n' "$*" >&2; }

# _env_probe PYTHON MODULE...: prints the interpreter's full path and, on a second line,
# the modules it lacks. It only looks: importing torch takes seconds. The current folder
# does not count, because training may be started in any.
_env_probe() {
    "$1" -c '
import importlib.util, sys
sys.path = [entry for entry in sys.path if entry]
def lacks(name):
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None  # a folder without code has no origin
print(sys.executable)
print(*filter(lacks, sys.argv[1:]))
' "${@:2}" 2>/dev/null
}

# What .venv was made from. The path belongs to it: an editable install points there.
_env_stamp() {
    cat "$root/pyproject.toml" "$root/scripts/constraints.txt" \
        "$root/scripts/setup_env.sh" | cksum
    "$venv/bin/python" -V 2>&1
    printf '%s\n' "$root"
}

_env_is_current() {
    [ -x "$venv/bin/python" ] && [ -f "$venv/torchtitan_liger.stamp" ] &&
        [ "$(_env_stamp)" = "$(cat "$venv/torchtitan_liger.stamp")" ]
}

# Prints a Python to make .venv with. 3.10 to 3.13 come first: the pins exist for them.
_env_base_python() {
    local newest name version found="" without_venv=""
    for newest in 13 99; do
        for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 \
            python3.10 python; do
            version=$("$name" -c 'import sys
print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
            found="$found, $name is $version"
            if [ "${version%%.*}" != 3 ] || [ "${version#*.}" -lt 10 ] ||
                [ "${version#*.}" -gt "$newest" ]; then
                continue
            elif "$name" -c 'import ensurepip, venv' 2>/dev/null; then
                printf '%s\n' "$name"
                return 0
            fi
            without_venv="$name (Python $version)"
        done
    done
    if [ -n "$without_venv" ]; then
        _env_say "$without_venv cannot make a virtual environment: its module venv or" \
            "ensurepip is missing. On Debian and Ubuntu: apt install python3-venv"
    else
        _env_say "needs Python 3.10 or newer${found:+ (here$found)}. Install one, or" \
            "name it: PYTHON=/path/to/python3 $0"
    fi
    return 1
}

# Makes .venv or brings it up to date. One call at a time, where there is flock; the lock
# is on pyproject.toml, so that no lock file is left over, and ends with this subshell.
_env_install() (
    if command -v flock >/dev/null && ! flock -n 9; then
        _env_say "another call is setting up $venv; waiting for it"
        flock 9
    fi
    if _env_is_current; then exit 0; fi

    start=$SECONDS
    task="installing torch, torchtitan and the rest into $venv (once; downloads \
0.6 GB with a CPU build of torch, about 4 GB with a CUDA build; a few minutes)"
    if [ -f "$venv/torchtitan_liger.stamp" ]; then
        task="bringing $venv up to date with pyproject.toml and scripts/"
        rm -f "$venv/torchtitan_liger.stamp"
    fi
    if ! "$venv/bin/python" -c 'import sys
sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        base=$(_env_base_python) || exit 1
        if [ -e "$venv" ]; then
            _env_say "$venv has no working Python 3.10 or newer; making it anew"
        fi
        if ! "$base" -m venv --clear "$venv" >&2; then
            _env_say "'$base -m venv' could not make $venv; the reason is above"
            exit 1
        fi
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        ! "$venv/bin/python" -m ensurepip >&2; then
        _env_say "$venv has no pip and ensurepip could not add it. Remove that folder," \
            "then try again."
        exit 1
    fi
    _env_say "$task"
    if ! (cd "$root" && "$venv/bin/python" -m pip install --quiet --no-input \
        --disable-pip-version-check -c scripts/constraints.txt -e ".[dev]") \
        >&2 </dev/null; then
        _env_say "pip could not complete $venv; the reason is above (network? disk?)." \
            "The next call tries again. To use an environment of your own: activate it," \
            "pip install -e '.[dev]' there, then call again."
        exit 1
    fi
    _env_stamp >"$venv/torchtitan_liger.stamp.$$" &&
        mv "$venv/torchtitan_liger.stamp.$$" "$venv/torchtitan_liger.stamp"
    _env_say "$venv is ready, after $((SECONDS - start)) s"
) 9<"$root/pyproject.toml"

_env_setup() {
    local root venv python probe missing
    local -a needed
    root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    venv=$root/.venv
    needed=(torchtitan torchtitan_liger)
    if [ "$1" = dev ]; then needed+=(pytest pytest_timeout xdist); fi

    for python in ${PYTHON:+"$PYTHON"} ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} \
        ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"}; do
        if ! probe=$(_env_probe "$python" "${needed[@]}"); then
            if [ "$python" = "${PYTHON:-}" ]; then
                _env_say "PYTHON is $python, which does not run as a Python 3: correct it, or" \
                    "unset it"
                return 1
            fi
            _env_say "$python does not run; using $venv"
            continue
        fi
        missing=$(printf '%s\n' "$probe" | sed 1d)
        if [ -z "$missing" ]; then
            PYTHON=$(printf '%s\n' "$probe" | sed q)
            return 0
        fi
        _env_say "$python has no ${missing// /, }; using $venv (to change that:" \
            "cd '$root' && $python -m pip install -e '.${1:+[$1]}')"
    done
    _env_is_current || _env_install || return 1
    PYTHON=$venv/bin/python
}

_env_setup "${1:-}" || PYTHON=""
unset -f _env_say _env_probe _env_stamp _env_is_current _env_base_python _env_install \
    _env_setup
[ -n "$PYTHON" ] # the status of this file: `set -e` ends the caller here
