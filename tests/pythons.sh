#!/usr/bin/env bash
# `make test` on each Python that pyproject.toml names and this machine has, each in an environment
# of its own (.venv-3.12 for 3.12), and a line for each:
#
#     tests/pythons.sh                    what `make test-pythons` runs
#     tests/pythons.sh --fast             what .ci/run runs: `make test-fast` on the oldest and the
#                                         newest, but not where torch would come as gigabytes of CUDA
set -uo pipefail
cd "$(dirname "$0")/.."
verb=test
named=$(sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)
if [ "${1:-}" = --fast ]; then
    verb=test-fast
    named=$(sed -n '1p;$p' <<<"$named" | uniq)
fi

find_python() { # VERSION: the first that starts; pyenv's names in PATH are there without one
    for each in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        "$each" -c '' 2>/dev/null && echo "$each" && return
    done
    return 1
}

torch_is_large() { # VERSION: whether pip would take a torch that needs CUDA's libraries
    python3 -m pip install --quiet --dry-run --no-deps --only-binary :all: --python-version "$1" \
        --target none --report - "$(grep ^torch== requirements.txt)" 2>/dev/null |
        grep -q '"cuda-toolkit\|"nvidia-'
}

failed=0
for version in $named; do
    venv=.venv-$version log=.venv-$version.log
    if ! python=$(find_python "$version"); then
        echo "Python $version: not run, it is not installed here"
    elif [ $verb = test-fast ] && [ ! -e "$venv/dev" ] && torch_is_large "$version"; then
        echo "Python $version: not run, its torch needs gigabytes of CUDA; make test-pythons installs it"
    elif make VENV="$venv" PYTHON="$python" $verb >"$log" 2>&1; then
        echo "$("$python" -V): $(tail -n 1 "$log")"
    else
        echo "$("$python" -V): FAILED, $log says why: $(tail -n 1 "$log")"
        failed=1
    fi
done
exit $failed
