"""Lawfulness: does a limiter do what it says? The same probes against ratesync and its peers.

Measured: what is admitted, against what the configured limit allows. A probe has a lawful bound that it
computes from the time it really took, so a slow machine changes the bound, never the verdict. A miss of a
peer is reported as the figure that was seen; a miss of ours fails the run.

Traps avoided: every peer runs the algorithm that its documentation recommends for the job (contenders.py);
what a library does not offer is reported as such, not as a failure; the skewed clock is the system clock of a
process of its own (libfaketime), which native code sees as well as Python code.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator

from benchmarks.lawful import probes
from benchmarks.lawful.contenders import Contender, everybody, label
from benchmarks.report import Goal, Report, Table, progress


def run(quick: bool) -> Report:
    with _servers() as urls:
        return asyncio.run(_run(urls, quick))


@contextlib.contextmanager
def _servers() -> Iterator[dict[str, str]]:
    from benchmarks import pg
    from ratesync.testing import RedisServer

    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        postgres = stack.enter_context(pg.server())
        yield {"redis": redis.url, "postgres": pg.database(postgres), "memory": ""}


async def _run(urls: dict[str, str], quick: bool) -> Report:
    contenders = everybody()
    table = Table("lawful: what the limit allowed and what passed", ["", *(p.title for p in probes.ALL)])
    report = Report("lawful", [table])
    unlawful = 0
    with tempfile.TemporaryDirectory(prefix="ratesync-lawful-") as directory:
        for contender in contenders:
            row = [label(contender)]
            for probe in probes.ALL:
                progress(f"lawful: {contender.name}: {probe.title}")
                verdict = await _one(probe, contender, urls[contender.store], directory)
                row.append(verdict.text)
                unlawful += contender.library == "ratesync" and verdict.lawful is False
                report.data[f"{contender.name}/{probe.name}"] = {
                    "lawful": verdict.lawful,
                    "text": verdict.text,
                }
            table.rows.append(row)
    progress("")
    report.goals.append(Goal("ratesync: unlawful verdicts", unlawful, 0, gated=True))
    report.notes = [f"{probe.title}: {probe.explains}" for probe in probes.ALL]
    return report


async def _one(probe: probes.Probe, contender: Contender, url: str, directory: str) -> probes.Verdict:
    try:
        return await asyncio.wait_for(probe.run(contender, url, directory), 60)
    except TimeoutError:
        return probes.Verdict(False, "FAILS: no answer within 60 s")
    except Exception as error:
        if contender.library == "ratesync":
            raise
        return probes.Verdict(False, f"FAILS: {type(error).__name__}")
