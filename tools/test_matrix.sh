#!/usr/bin/env bash
# The part of `make test-all` that repeats the Python suite under other conditions: asyncio's debug mode,
# uvloop, every supported PostgreSQL, and the other Pythons of this machine. Goes through all of it and
# fails at the end with the list of what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
build=${BUILD:-build}
failed=()

step() {  # step NAME COMMAND...
  printf '\033[1m== %s\033[0m\n' "$1"
  "${@:2}" || failed+=("$1")
}

step "asyncio debug mode" "$venv/bin/python" -m pytest -q --asyncio-debug tests
step "uvloop" "$venv/bin/python" -m pytest -q --loop=uvloop tests

server_suites=()
for suite in tests/contract tests/integration tests/fault; do
  [ -d "$suite" ] && server_suites+=("$suite")
done
for major in 12 13 14 15 16 17 18; do
  if bin=$("$venv/bin/python" tools/get_postgres.py "$major"); then
    step "PostgreSQL $major" env RATESYNC_PG_BIN="$bin" "$venv/bin/python" -m pytest -q "${server_suites[@]}"
  else
    failed+=("PostgreSQL $major (could not be fetched)")
  fi
done

for version in 3.12 3.13; do
  python=$(command -v "python$version" || compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python" | tail -1)
  if [ -n "$python" ] && "$python" -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$version'.split('.'))))" 2>/dev/null; then
    export VENV="$venv-$version"
    step "Python $version: set up" env PYTHON="$python" BUILD="$build" tools/setup.sh test
    step "Python $version" "$VENV/bin/python" -m pytest -q tests
  else
    echo "Python $version: not on this machine"
  fi
done

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
