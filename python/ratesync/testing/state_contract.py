"""The contract of state: what every store has to keep, as tests to inherit.

    class TestMyStore(StateContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

Everything goes through the public API, and no test rests on the speed of the machine. The parts, by
theme, can be inherited one by one. Needs pytest-asyncio.
"""

from __future__ import annotations

from ratesync.testing.contract import Caller
from ratesync.testing.state_argument_contract import StateArgumentContract
from ratesync.testing.state_batch_contract import StateBatchContract, StateTimeoutContract
from ratesync.testing.state_counter_contract import StateCounterContract
from ratesync.testing.state_expiry_contract import StateExpiryContract
from ratesync.testing.state_name_contract import HOSTILE, StateNameContract
from ratesync.testing.state_value_contract import LARGEST, SMALLEST, StateSuite, StateValueContract

__all__ = [
    "HOSTILE",
    "LARGEST",
    "SMALLEST",
    "Caller",
    "StateArgumentContract",
    "StateBatchContract",
    "StateContract",
    "StateCounterContract",
    "StateExpiryContract",
    "StateNameContract",
    "StateSuite",
    "StateTimeoutContract",
    "StateValueContract",
]


class StateContract(
    StateValueContract,
    StateCounterContract,
    StateExpiryContract,
    StateNameContract,
    StateBatchContract,
    StateTimeoutContract,
    StateArgumentContract,
):
    """Inherit, and say in the fixture `store_options` how to configure the store."""
