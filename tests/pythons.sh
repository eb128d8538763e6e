#!/usr/bin/env bash
# `make test` on each Python that pyproject.toml names and this machine has, each in an environment
# of its own (.venv-3.12 for 3.12; .venv where that one is of this Python), and a line for each:
#
#     tests/pythons.sh            what `make test-pythons` runs
#     tests/pythons.sh --fast     what .ci/run runs after `make test`: `make test-fast` on the oldest
#                                 and the newest, but not where torch comes with gigabytes of CUDA
set -uo pipefail
cd "$(dirname "$0")/.."
verb=test
named=$(sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)
if [ "${1:-}" = --fast ]; then
    verb=test-fast
    named=$(sed -n '1p;$p' <<<"$named" | uniq)
fi
version_of='import sys; print("%d.%d" % sys.version_info[:2])'
default=$(.venv/bin/python -c "$version_of" 2>/dev/null)

find_python() { # VERSION: the first that starts; pyenv puts names into PATH that do not
    for each in "python$1" "${HOME:-}/.pyenv/versions/$1".*/bin/python; do
        "$each" -c '' 2>/dev/null && echo "$each" && return
    done
    return 1
}

small_torch() { # VERSION: whether pip finds a torch for it that does not require CUDA's libraries
    report=$(.venv/bin/python -m pip install --quiet --dry-run --no-deps --only-binary :all: \
        --python-version "$1" --target none --report - "$(grep ^torch== requirements.txt)" 2>/dev/null) &&
        ! grep -q '"cuda-toolkit\|"nvidia-' <<<"$report"
}

failed=0
for version in $named; do
    venv=.venv-$version log=.venv-$version.log
    [ "$version" = "$default" ] && venv=.venv
    if ! python=$(find_python "$version"); then
        echo "Python $version: not run, it is not installed"
        continue
    fi
    found=$("$python" -V)
    if [ $verb = test-fast ] && [ $venv = .venv ]; then
        echo "$found: as make test has shown"
    elif [ $verb = test-fast ] && [ ! -e $venv/dev ] && ! small_torch "$version"; then
        echo "$found: not run, its torch comes with gigabytes of CUDA; make test-pythons installs it"
    elif make VENV=$venv PYTHON="$python" $verb >"$log" 2>&1; then
        echo "$found: $(grep -v ^make "$log" | tail -n 1)"
    else
        echo "$found: FAILED: $(grep -v ^make "$log" | tail -n 1); all of it is in $log"
        failed=1
    fi
done
exit $failed
