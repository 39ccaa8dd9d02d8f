#!/usr/bin/env bash
# Brings a machine to the point where one verb of the Makefile can run: system packages (Debian; with
# root or sudo, else the exact line is printed), the virtual environment, and the package installed in
# it. Does only what is missing, so a second run is quick and needs no network.
#
#     tools/setup.sh demo|demo-postgres|demo-redis|test|test-all|lint|bench|docs|all
#
# VENV (.venv), BUILD (build) and PYTHON (the newest of 3.11 and up) may be set.
set -euo pipefail
cd "$(dirname "$0")/.."

verb=${1:?usage: tools/setup.sh VERB}
venv=${VENV:-.venv}
build=${BUILD:-build}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# --- which Python -----------------------------------------------------------------------------------

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$candidate" >/dev/null && recent "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}

# --- system packages --------------------------------------------------------------------------------

missing=()
need_command() { command -v "$2" >/dev/null || missing+=("$1"); }
need_file() { compgen -G "$2" >/dev/null || missing+=("$1"); }

find_missing() {
  missing=()
  need_command g++ g++
  need_command cmake cmake
  need_command ninja-build ninja
  need_command pkg-config pkg-config
  need_file libasio-dev '/usr/include/asio.hpp'
  need_file libfmt-dev '/usr/include/fmt/format.h'
  need_file libpq-dev '/usr/include/postgresql/libpq-fe.h'
  need_file libhiredis-dev '/usr/include/hiredis/read.h'
  need_file libssl-dev '/usr/include/openssl/ssl.h'
  local python
  if python=$(find_python); then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
      || missing+=(python3-dev)
  else
    missing+=(python3 python3-venv python3-dev)
  fi
  case $verb in demo-postgres|test|test-all|bench|all)
    command -v initdb >/dev/null || need_file postgresql '/usr/lib/postgresql/*/bin/initdb' ;;
  esac
  case $verb in demo-redis|test|test-all|bench|all) need_command redis-server redis-server ;; esac
  case $verb in test|test-all|all) need_command openssl openssl ;; esac  # certificates for TLS tests
  case $verb in test|test-all|lint|all) need_file libgtest-dev '/usr/include/gtest/gtest.h' ;; esac
  case $verb in test|test-all|all) PATH=$PATH:/usr/sbin need_command pgbouncer pgbouncer ;; esac
  case $verb in lint|all)
    need_command clang-format clang-format
    need_command clang-tidy clang-tidy ;;
  esac
  case $verb in bench|all)
    need_command redis-tools redis-benchmark
    need_file libfaketime '/usr/lib/*/faketime/libfaketime.so.1' ;;
  esac
  case $verb in test-all|all) need_command maven mvn ;; esac
}

install_missing() {
  find_missing
  [ ${#missing[@]} -eq 0 ] && return
  local line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  local root=()
  if ! command -v apt-get >/dev/null; then
    fail "needed and not found: ${missing[*]} (names of Debian packages; install your system's equivalents)"
  elif [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || fail "these packages are missing; run as root: $line"
    root=(sudo -n)
  fi
  say "installing ${missing[*]}"
  "${root[@]}" apt-get update -q
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
  find_missing
  [ ${#missing[@]} -eq 0 ] || fail "still missing after installation: ${missing[*]}"
}

# On macOS the libraries come from Homebrew under other paths; CMake says what it misses.
[ "$(uname -s)" = Linux ] && install_missing

# --- virtual environment and package ------------------------------------------------------------------

case $verb in
  demo|demo-postgres|demo-redis) extra=demo ;;
  test) extra=test ;;
  lint) extra=lint ;;
  bench) extra=bench ;;
  docs) extra=docs ;;
  *) extra=dev ;;
esac

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python) || fail "no Python 3.11 or later found"
  say "making $venv with $("$python" -V)"
  "$python" -m venv "$venv"
fi

stamps=$venv/.ratesync
mkdir -p "$stamps"
requirements=$(sha256sum pyproject.toml | cut -c1-64)
# Everything that goes into the wheel. Compiled modules in the tree are not sources.
sources=$(find cpp python ./*.toml ./*.txt ./*.md LICENSE -type f ! -name '*.pyc' ! -name '*.so' -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64)

stamped() { [ -f "$stamps/$1" ] && [ "$(cat "$stamps/$1")" = "$2" ]; }

# One build tree for each Python, kept: the wheel is built in it again and again, and make test adds the C++ tests.
tree=$build/python-$("$venv/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')
install() {  # install PIP_ARGUMENTS...
  "$venv/bin/python" -m pip install -q --no-build-isolation -C "build-dir=$tree" -C cmake.define.RATESYNC_PCH=ON "$@"
}
# After make clean the package is still installed, but the C++ tests have nothing to be built in.
case $verb in test|test-all|all) [ -f "$tree/build.ninja" ] || rm -f "$stamps/package" ;; esac

if ! stamped build-requirements "$requirements"; then
  say "installing the build requirements"
  "$venv/bin/python" -m pip install -q 'pybind11>=3.0,<4' 'scikit-build-core>=0.10,<2'
  printf %s "$requirements" >"$stamps/build-requirements"
fi
if ! stamped "extra-$extra" "$requirements"; then
  say "building ratesync and installing what [$extra] needs"
  install ".[$extra]"
  printf %s "$requirements" >"$stamps/extra-$extra"
  printf %s "$sources" >"$stamps/package"
elif ! stamped package "$sources"; then
  say "building ratesync"
  install --no-deps --no-index .
  printf %s "$sources" >"$stamps/package"
fi
