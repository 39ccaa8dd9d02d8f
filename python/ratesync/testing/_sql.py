"""A few statements on a server, for the harness itself, from any thread and inside or outside a loop.

Uses asyncpg: independent of the product's own client, so that it can also serve as a witness.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any


def execute(url: str, *statements: str) -> list[Any]:
    """Runs the statements one by one in autocommit; returns the rows of the last one."""
    try:
        import asyncpg
    except ImportError:
        raise RuntimeError(
            "the PostgreSQL fixtures of ratesync.testing need asyncpg: pip install asyncpg"
        ) from None

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url, timeout=30, statement_cache_size=0)
        try:
            rows: list[Any] = []
            for statement in statements:
                rows = await connection.fetch(statement)
            return rows
        finally:
            await connection.close()

    result: list[list[Any]] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(asyncio.run(run()))
        except BaseException as error:
            failure.append(error)

    # A thread of its own: the caller may be inside a running event loop.
    thread = threading.Thread(target=work, name="ratesync-sql")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
