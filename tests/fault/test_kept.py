"""A row that is kept alive for its writer: renewed while wanted, lost with its version, left when dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ratesync._core import State
from ratesync._engine import Engine
from ratesync.errors import ConfigValidationError


class Rig:
    def __init__(self) -> None:
        self.engine = Engine(manual_clock=True)
        store = self.engine.add_store("memory", "memory", {})
        self.state = State(
            store, "acteon_", namespace="default", tenant="default", kind="idempotency", timeout=5
        )

    async def settle(self, seconds: float = 0.0) -> None:
        for _ in range(10 if seconds else 2):  # renewals are on time, so time passes in steps
            self.engine.advance(seconds / 10)
            self.engine.advance(0)
            for _ in range(3):
                await asyncio.sleep(0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.engine.shutdown()


async def test_it_lives_while_it_is_kept_and_its_ttl_after_that(rig: Rig) -> None:
    assert await rig.state._begin("k", "running", 3, None) == (True, 1, None)
    kept = rig.state._keep("k", 1, 3, None)
    for _ in range(10):
        await rig.settle(3)
    assert not kept.lost
    assert await rig.state.get("k") == "running"
    kept.stop()
    await rig.settle(3.1)
    assert await rig.state.get("k") is None
    assert not kept.lost
    assert await kept.lost_signal() is False


async def test_it_is_lost_with_its_version_and_rings(rig: Rig) -> None:
    await rig.state._begin("k", "running", 3, None)
    kept = rig.state._keep("k", 1, 3, None)
    signal = asyncio.ensure_future(kept.lost_signal())
    await rig.settle()
    await rig.state.set("k", "of another", ttl=60)
    await rig.settle(1.1)
    assert await signal is True
    assert kept.lost
    assert await rig.state.get("k") == "of another"
    # A touch writes nothing: the version is that of the two writes.
    assert await rig.state.delete("k", 2)


async def test_dropped_it_is_renewed_no_more(rig: Rig) -> None:
    await rig.state._begin("k", "running", 3, None)
    kept = rig.state._keep("k", 1, 3, None)
    await rig.settle(6)
    del kept
    await rig.settle(3.1)
    assert await rig.state.get("k") is None


async def test_what_was_asked_for_long_ago_is_lost_at_once(rig: Rig) -> None:
    await rig.state._begin("k", "running", 3, None)
    assert rig.state._keep("k", 1, 3, None, 3.5).lost
    assert not rig.state._keep("k", 1, 3, None, 2.5).lost


@pytest.mark.parametrize("bad", [("", 1, 3), ("k", 0, 3), ("k", 1, 0), ("k", 1, None), ("k", 1.5, 3)])
async def test_bad_terms_are_refused(rig: Rig, bad: tuple) -> None:
    with pytest.raises(ConfigValidationError):
        rig.state._keep(*bad, None)
