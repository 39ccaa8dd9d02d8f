#!/usr/bin/env bash
# The part of `make test-all` that repeats suites under other conditions: asyncio's debug mode, uvloop, every
# supported PostgreSQL, Redis 6.2 and Valkey, the other Pythons of this machine. Goes through all of it and
# fails at the end with the list of what failed. With words, only the steps whose names hold one of them:
#
#     tools/test_matrix.sh 'PostgreSQL 12' Valkey
#
# Files run side by side (WORKERS, as in the Makefile). On another server only what has to do with that server
# is repeated.
set -uo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
build=${BUILD:-build}
tree=$build/python-$("$venv/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')  # as make test left it
jobs=${JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}
side_by_side=(-q -n "${WORKERS:-$((jobs + 2))}" --dist loadfile)
server_suites=(tests/contract tests/integration tests/fault tests/property)
words=("$@")
failed=()

wanted() {  # wanted NAME
  [ ${#words[@]} -eq 0 ] && return
  local word
  for word in "${words[@]}"; do [[ $1 == *"$word"* ]] && return; done
  return 1
}

step() {  # step NAME COMMAND...
  wanted "$1" || return 0
  printf '\033[1m== %s\033[0m\n' "$1"
  "${@:2}" || failed+=("$1")
}

on_postgres() {  # on_postgres MAJOR
  local bin status=0
  bin=$("$venv/bin/python" tools/get_postgres.py "$1") || return
  export RATESYNC_PG_BIN=$bin
  "$venv/bin/python" -m pytest "${side_by_side[@]}" --only=postgres "${server_suites[@]}" || status=1
  ctest --test-dir "$tree" --output-on-failure --no-tests=error -j"$jobs" -R '^(postgres_|connection_|pg_pool_)' || status=1
  unset RATESYNC_PG_BIN
  return $status
}

on_redis() {  # on_redis SERVER
  local bin
  bin=$("$venv/bin/python" tools/get_redis.py "$1") || return
  RATESYNC_REDIS_BIN=$bin "$venv/bin/python" -m pytest "${side_by_side[@]}" --only=redis "${server_suites[@]}"
}

find_python() {  # find_python VERSION: one that runs; a shim of pyenv may be there and not run
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
    command -v "$candidate"
    return
  done
  return 1
}

on_python() {  # on_python VERSION
  local python
  python=$(find_python "$1") || { echo "Python $1: not on this machine"; return; }
  VENV=$venv-$1 PYTHON=$python BUILD=$build tools/setup.sh test &&
    "$venv-$1/bin/python" -m pytest "${side_by_side[@]}"
}

step "asyncio debug mode" "$venv/bin/python" -m pytest "${side_by_side[@]}" --asyncio-debug
step "uvloop" "$venv/bin/python" -m pytest "${side_by_side[@]}" --loop=uvloop
for major in 12 13 14 15 16 17 18; do step "PostgreSQL $major" on_postgres $major; done
step "Redis 6.2" on_redis redis-6.2
step "Valkey 9" on_redis valkey-9
for version in 3.12 3.13; do step "Python $version" on_python $version; done

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
