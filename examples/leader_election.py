"""One of three replicas works at a time; when it goes, the next takes over, and its late writes are refused.

    python examples/leader_election.py

The lock says who leads. The fencing token says it to those who store what the leader writes: it grows with
every leader, and whoever comes with an older one is too late.
"""

import asyncio

import ratesync


class Ledger:
    """Stands for the storage of the leader: it remembers the newest token and refuses older ones."""

    def __init__(self) -> None:
        self.newest = 0
        self.rows: list[tuple[int, str]] = []

    def write(self, token: int, row: str) -> bool:
        if token < self.newest:
            return False
        self.newest = token
        self.rows.append((token, row))
        return True


async def lead(name: str, lease: ratesync.Lease, ledger: Ledger) -> None:
    for step in range(3):
        if lease.lost:  # the store was out of reach for longer than the ttl: somebody else leads by now
            return
        ledger.write(lease.token, f"{name} step {step}")
        await asyncio.sleep(0.001)


async def replica(name: str, ledger: Ledger, leaders: list[int]) -> None:
    # Waits in line; woken when the leader leaves, or when its lease ends because it was killed.
    async with ratesync.lock("report-leader", ttl=10) as lease:
        leaders.append(lease.token)
        await lead(name, lease, ledger)


async def main() -> None:
    ledger, leaders = Ledger(), []
    await asyncio.gather(*(replica(name, ledger, leaders) for name in ("a", "b", "c")))
    late = ledger.write(leaders[0], "a, long after")
    grow = leaders == sorted(set(leaders))
    print(f"{len(leaders)} leaders, tokens grow: {grow}, a late write passed: {late}")


if __name__ == "__main__":
    asyncio.run(main())
