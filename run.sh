#!/usr/bin/env bash
# The one entry: makes .venv from requirements.lock on first use (again only when the lock changes), then runs.
set -euo pipefail

self=${BASH_SOURCE[0]}
[[ -L $self ]] && self=$(readlink -f -- "$self")
[[ $self == */* ]] || self=./$self
root=$(CDPATH='' cd -P -- "${self%/*}" && pwd)
venv=$root/.venv
unfinished=$root/.venv.unfinished # exists while .venv is being changed, and after a change that was cut short

say() { printf 'kvarena: %s\n' "$*" >&2; }
die() { say "$@"; exit 3; }

usage() {
    printf '%s\n' \
        "kvarena: how should an LLM server allocate its KV cache, and what does that cost in memory, speed and code?" \
        "" \
        "  ./run.sh experiment=NAME [key=value ...]  run an experiment; Hydra's overrides and -m (multirun) pass through" \
        "  ./run.sh summarize FOLDER                 make summary and figure again from the frames of a finished run" \
        "  ./run.sh kernels                          print which kernel can read which allocator's memory" \
        "  ./run.sh regression [--base REV]          say whether anything got worse; --help says more" \
        "  ./run.sh report                           write results/report.html and results/SCORECARD.md" \
        "  ./run.sh claim=ID [key=value ...]         run what one claim of the papers needs, and judge it" \
        "  ./run.sh gpu-validation --out DIR         run what needs a GPU, by plans of 300 s; --help says more" \
        "  ./run.sh gpu-kit --out DIR                gather what a GPU without a network needs; --help says more" \
        "  ./run.sh test [pytest arguments]          run the tests" \
        "  ./run.sh mutants [NAME ...]               plant small faults one by one, and see whether tests fail" \
        "  ./run.sh benchmark NAME [arguments]       run a program of benchmarks/" \
        "  ./run.sh lint                             ruff and mypy" \
        "  ./run.sh lock                             write the lock files anew from what .venv holds" \
        "  ./run.sh --help                           this text" \
        "" \
        "KVARENA_PYTHON=/path/to/python3 uses that interpreter as it is and installs nothing." \
        "KVARENA_RUNS=/some/folder takes the results instead of results/runs." \
        "KVARENA_COMMIT=HASH names the commit of a copy that has no git history." \
        "experiment=NAME --help prints every key of that experiment."
    local file names=
    for file in "$root"/conf/experiment/*.yaml; do
        [[ -e $file ]] || continue
        file=${file##*/}
        names+=" ${file%.yaml}"
    done
    [[ -z $names ]] || printf '\nexperiments:%s\n' "$names"
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # prints the first Python >= 3.11 that can make a virtual environment
    local candidate recent=
    for candidate in python3 python3.12 python3.11 python3.13 python3.14; do
        is_recent "$candidate" || continue
        recent=$candidate
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    [[ -z $recent ]] || die "$recent lacks the modules venv and ensurepip (Debian, Ubuntu: apt install python3-venv)"
    die "no Python >= 3.11 found on PATH; install one, or name one with KVARENA_PYTHON"
}

is_current() { # is_current LOCK: whether .venv holds what the lock says
    [[ -x $venv/bin/python && -f $venv/$1 && $(<"$venv/$1") == "$(<"$root/$1")" ]]
}

one_at_a_time() { # two first runs at once: the second waits for the first (where there is flock), then finds it done
    [[ -w $root ]] || die "$root is read-only, so .venv cannot be made; KVARENA_PYTHON names another interpreter"
    command -v flock >/dev/null || return 0
    exec 9>>"$root/requirements.lock"
    flock --nonblock 9 || { say "waiting for another set-up of $venv"; flock 9; }
}

make_venv() {
    local python
    python=$(find_python)
    say "making $venv with $python"
    : >"$unfinished"
    rm -rf -- "$venv"
    "$python" -m venv "$venv" || give_up fresh "could not make $venv"
}

give_up() { # give_up fresh|kept MESSAGE: nothing half-made stays; pip itself rolls back a change to a kept .venv
    [[ $1 == kept ]] || rm -rf -- "$venv"
    rm -f -- "$unfinished"
    die "$2 (messages above). It takes a package index (pip's own settings apply) and some gigabytes of disk." \
        "The same command tries again."
}

set_up() { # set_up LOCK: bring .venv up to a lock file
    is_current "$1" && return
    one_at_a_time
    if ! is_current "$1"; then
        local state=kept
        if [[ -e $unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            state=fresh
            make_venv
        fi
        : >"$unfinished"
        rm -f -- "$venv/$1"
        say "installing $1 (the first time takes some minutes)"
        "$venv/bin/python" -m pip install --no-input --disable-pip-version-check -r "$root/$1" >&2 ||
            give_up "$state" "could not install $1"
        cp -- "$root/$1" "$venv/$1"
        rm -f -- "$unfinished"
    fi
    exec 9>&-
}

without_caches() { # in a checkout that is read-only, or another user's
    [[ ! -w $root ]] || return 0
    say "$root cannot be written: ruff, mypy and pytest keep no caches"
    export RUFF_NO_CACHE=true MYPY_CACHE_DIR=/dev/null PYTEST_ADDOPTS="-p no:cacheprovider ${PYTEST_ADDOPTS:-}"
}

benchmark() {
    local names=$(cd -- "$root/benchmarks" && echo *.py)
    [[ -f $root/benchmarks/${1:-}.py ]] || die "no benchmark '${1:-}'; there are: ${names//.py/}"
    exec "$python" "$root/benchmarks/$1.py" "${@:2}"
}

lint() { # all three, whatever the first says
    local status=0
    "$python" -m ruff check . || status=1
    "$python" -m ruff format --check . || status=1
    "$python" -m mypy || status=1
    return "$status"
}

case ${1:-} in
    '' | -h | --help) usage; exit 0 ;;
esac

python=${KVARENA_PYTHON:-}
if [[ $python ]]; then
    [[ $python != */* || $python == /* ]] || python=$PWD/$python
    is_recent "$python" || die "KVARENA_PYTHON=$KVARENA_PYTHON is not a Python >= 3.11 that runs"
else
    set_up requirements.lock
    case $1 in test | mutants | lint | lock | benchmark) set_up requirements-dev.lock ;; esac
    python=$venv/bin/python
    PYTHONPATH='' # what lies there could hide what the lock pins
fi

# .import holds a link to kvarena/ and nothing else. The root itself must not be on sys.path: its folder `kernels`
# would pass for the distribution of that name, which transformers looks for at import.
export PYTHONPATH=$root/.import${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # two OpenMP pools (torch's, numba's) that spin stall each other

case $1 in
    test) shift; cd -- "$root"; without_caches; exec "$python" -m pytest "$@" ;;
    benchmark) shift; benchmark "$@" ;;
    mutants) shift; exec "$python" "$root/.ci/mutants.py" "$@" ;;
    lint) cd -- "$root"; without_caches; lint ;;
    lock) exec "$python" "$root/.ci/lock.py" ;;
    *) exec "$python" -m kvarena "$@" ;;
esac
