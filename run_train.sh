#!/usr/bin/env bash
# Starts a training run; sets up an environment first where there is none. `--help` tells
# the rest.
set -euo pipefail
here=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || echo "${BASH_SOURCE[0]}")
root=$(CDPATH='' cd -- "$(dirname -- "$here")" && pwd -P)

# The GPUs that a process started here would see.
count_gpus() {
    local present listed
    if present=$(nvidia-smi -L 2>/dev/null); then
        present=$(printf '%s\n' "$present" | grep -c '^GPU ' || true)
    else
        present=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | grep -c . || true)
    fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        # CUDA stops reading the list at a -1.
        listed=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | sed '/^-1$/,$d' |
            grep -c . || true)
        if [ "$listed" -lt "$present" ]; then present=$listed; fi
    fi
    echo "$present"
}

config=${CONFIG_FILE:-$root/train_configs/debug_model.toml}
module=${TRAIN_FILE:-torchtitan_liger.train}
log_rank=${LOG_RANK:-0}
gpus=$(count_gpus)
ngpu=${NGPU:-$((gpus > 0 ? gpus : 1))}

case $ngpu in
    gpu | cpu | auto) ;;
    *[!0-9]* | "" | 0*)
        echo "$0: NGPU is '$ngpu': how many processes to start, such as 1" >&2
        exit 1
        ;;
esac
case $module in
    *.py | */*)
        echo "$0: TRAIN_FILE is '$module': a module that Python finds, such as my_train" \
            "for my_train.py in the current folder" >&2
        exit 1
        ;;
esac

help="" config_named=""
for arg in "$@"; do
    if [ "$config_named" = next ]; then config=$arg config_named=yes; fi
    case $arg in
        -h | --help) help=yes ;;
        --job.config_file | --job.config-file) config_named=${config_named:-next} ;;
        --job.config_file=* | --job.config-file=*)
            if [ -z "$config_named" ]; then config=${arg#*=} config_named=yes; fi
            ;;
    esac
done

if [ -n "$help" ]; then
    cat <<EOF
usage: [VARIABLE=value ...] $0 [--section.option value ...]

  CONFIG_FILE  the job, a TOML file ($config)
  NGPU         processes to start, one for each GPU ($ngpu; default: the GPUs here, or 1)
  LOG_RANK     ranks whose output is shown, such as 0,1 ($log_rank)
  TRAIN_FILE   module to run ($module)
  PYTHON       interpreter to use (default: the activated environment, or else
               $root/.venv, which is made if it is not there)

An option overrides its value in CONFIG_FILE. Results go below the current folder, where
job.dump_folder says. All options:

EOF
fi

if [ ! -f "$config" ]; then
    {
        echo "$0: there is no CONFIG_FILE $config (current folder: $PWD). There are:"
        printf '  %s\n' "$root"/train_configs/*.toml
    } >&2
    exit 1
fi

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh" ""

# The first --job.config_file counts, so ours must not precede the user's.
options=()
if [ -z "$config_named" ]; then options+=("--job.config_file=$config"); fi

export LAUNCHER=$0 # what the program calls itself in its help
if [ -n "$help" ]; then
    exec "$PYTHON" -m "$module" ${options[@]+"${options[@]}"} "$@"
fi

if [ -z "${PYTORCH_ALLOC_CONF+set}${PYTORCH_CUDA_ALLOC_CONF+set}" ]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True # as torchtitan's launcher does
fi
# Of several processes torchrun lets each have one thread, which is slow on CPUs.
if [ "$gpus" = 0 ] && [ -z "${OMP_NUM_THREADS:-}" ] && [ "$ngpu" -gt 1 ] 2>/dev/null; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > ngpu ? cores / ngpu : 1))
fi

exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$ngpu" \
    --rdzv_backend c10d --rdzv_endpoint=localhost:0 \
    --local-ranks-filter "$log_rank" --role rank --tee 3 \
    -m "$module" ${options[@]+"${options[@]}"} "$@"
