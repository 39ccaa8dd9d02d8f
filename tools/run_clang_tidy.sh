#!/usr/bin/env bash
# clang-tidy (checks: .clang-tidy) over the sources that the build knows; skips what did not change since
# it was last clean.
#
#     tools/run_clang_tidy.sh BUILD_DIR JOBS
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1 jobs=$2
stamp=$build/.clang-tidy-clean
newer=()
[ -f "$stamp" ] && [ -z "$(find cpp .clang-tidy \( -name '*.h' -o -name .clang-tidy \) -newer "$stamp")" ] && newer=(-newer "$stamp")
# The bindings are not part of this build (no Python in it).
find cpp -name '*.cc' ! -path '*/bindings/*' "${newer[@]}" -print0 |
  xargs -0 -r -n 1 -P "$jobs" clang-tidy -p "$build" --quiet --warnings-as-errors='*'
touch "$stamp"
