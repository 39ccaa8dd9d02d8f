"""Command line of the benchmarks; see --help."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.report import Report, provenance, save

ALL = ("memory", "footprint", "counts", "postgres", "redis", "state", "lawful")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; all when left out")
    parser.add_argument("--quick", action="store_true", help="a look in a minute; too short for conclusions")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/performance.md")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ALL]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(ALL)}")

    reports: list[Report] = []
    extra: list[str] = []
    for name in options.names or ALL:
        report = importlib.import_module(f"benchmarks.{name}").run(options.quick)
        extra += [note for note in report.data.pop("provenance", []) if note not in extra]
        reports.append(report)
        if not options.markdown:
            print(report.render(False), flush=True)
            print()
    where = provenance(extra)
    if options.markdown:
        print(f"Measured with {where}{' (--quick)' if options.quick else ''}.\n")
        print("\n\n".join(report.render(True) for report in reports))
    else:
        print(where)
    if options.json:
        save(options.json, reports, where)
    return 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
