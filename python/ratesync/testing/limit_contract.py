"""The contract of rate and concurrency limits: what every store has to keep, as tests to inherit.

    class TestMyStore(LimitContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

Everything goes through the public API. The parts, by theme, can be inherited one by one.
"""

from __future__ import annotations

from ratesync.testing.contract import SLOW, Caller, MakeLimiter, eventually
from ratesync.testing.rate_contract import RateContract
from ratesync.testing.slot_contract import SlotContract
from ratesync.testing.window_contract import WindowContract

__all__ = [
    "SLOW",
    "Caller",
    "LimitContract",
    "MakeLimiter",
    "RateContract",
    "SlotContract",
    "WindowContract",
    "eventually",
]


class LimitContract(RateContract, SlotContract, WindowContract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""
