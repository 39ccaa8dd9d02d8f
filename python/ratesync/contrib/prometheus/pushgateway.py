"""Metrics of short-lived and multi-process jobs, pushed to a Prometheus Pushgateway.

Nothing here raises because the gateway fails: errors are logged and answered with False. The blocking
client of prometheus_client runs in the event loop's default executor.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ratesync.contrib.prometheus import enable_metrics

__all__ = ["PeriodicPushHandle", "delete_from_gateway", "push_to_gateway", "start_periodic_push"]

log = logging.getLogger("ratesync.contrib.prometheus")


async def push_to_gateway(
    url: str, job: str, grouping_key: Mapping[str, str] | None = None, timeout: float = 10
) -> bool:
    """Replaces the metrics of this job and grouping key at the gateway.

    Args:
        url: of the gateway, such as `http://localhost:9091`.
        job: label `job`.
        grouping_key: further labels; give each process its own, or they replace each other.
        timeout: seconds.

    Returns:
        Whether the gateway took them.
    """
    if not enable_metrics():
        return False
    import prometheus_client

    push = functools.partial(
        prometheus_client.push_to_gateway,
        url,
        job=job,
        registry=prometheus_client.REGISTRY,
        grouping_key=dict(grouping_key or {}),
        timeout=timeout,
    )
    return await _attempt(push, f"pushing metrics of job {job!r}")


async def delete_from_gateway(
    url: str, job: str, grouping_key: Mapping[str, str] | None = None, timeout: float = 10
) -> bool:
    """Removes the metrics of this job and grouping key from the gateway. Arguments as for pushing."""
    if not enable_metrics():
        return False
    import prometheus_client

    delete = functools.partial(
        prometheus_client.delete_from_gateway,
        url,
        job=job,
        grouping_key=dict(grouping_key or {}),
        timeout=timeout,
    )
    return await _attempt(delete, f"deleting metrics of job {job!r}")


async def _attempt(call: Callable[[], Any], what: str) -> bool:
    try:
        await asyncio.get_running_loop().run_in_executor(None, call)
    except Exception as error:
        log.warning("%s failed: %s: %s", what, type(error).__name__, error)
        return False
    return True


class PeriodicPushHandle:
    """Pushes until told to stop.

    Attributes:
        event: set when it shall stop.
        task: the task that pushes.
    """

    def __init__(self, event: asyncio.Event, task: asyncio.Task[None]) -> None:
        self.event = event
        self.task = task

    def set(self) -> None:
        """Asks it to stop, after a last push."""
        self.event.set()

    def is_set(self) -> bool:
        """Whether it was asked to stop."""
        return self.event.is_set()

    async def stop(self) -> None:
        """Asks it to stop and waits for the last push."""
        self.event.set()
        await asyncio.gather(self.task, return_exceptions=True)

    def cancel(self) -> None:
        """Stops it without a last push."""
        self.event.set()
        self.task.cancel()


async def start_periodic_push(
    url: str,
    job: str,
    interval: float = 30,
    grouping_key: Mapping[str, str] | None = None,
    timeout: float = 10,
) -> PeriodicPushHandle:
    """Pushes now, every `interval` seconds, and once more when stopped. Other arguments as for pushing."""
    event = asyncio.Event()

    async def push() -> None:
        while True:
            stopping = event.is_set()
            await push_to_gateway(url, job, grouping_key, timeout)
            if stopping:
                return
            try:
                await asyncio.wait_for(event.wait(), interval)
            except TimeoutError:
                continue

    return PeriodicPushHandle(event, asyncio.create_task(push(), name="ratesync-push"))
