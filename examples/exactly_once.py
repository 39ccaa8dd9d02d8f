"""Jobs that a queue delivers more than once, each charged once.

    python examples/exactly_once.py

The queue promises "at least once", so every job comes twice here, and two workers may get the same one at the
same time. The first caller of a key runs; the others get its result.
"""

import asyncio

import ratesync

charged: list[str] = []


async def charge(order: str, cents: int) -> dict[str, object]:
    await asyncio.sleep(0.01)  # the request to the payment provider
    charged.append(order)
    return {"order": order, "cents": cents, "receipt": f"r-{len(charged)}"}


async def handle(order: str, cents: int) -> object:
    # `wait`: while another worker runs this job, wait for its result instead of failing.
    async with ratesync.idempotent(f"charge-{order}", fingerprint=str(cents), wait=10) as op:
        if not op.done:
            op.result = await charge(order, cents)
    return op.result


async def worker(jobs: asyncio.Queue[tuple[str, int]], receipts: dict[str, list[object]]) -> None:
    while True:
        order, cents = await jobs.get()
        try:
            receipts.setdefault(order, []).append(await handle(order, cents))
        finally:
            jobs.task_done()


async def main() -> None:
    jobs: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    for number in range(20):
        job = (f"order-{number}", 100 * number)
        jobs.put_nowait(job)
        jobs.put_nowait(job)  # delivered twice
    receipts: dict[str, list[object]] = {}
    workers = [asyncio.create_task(worker(jobs, receipts)) for _ in range(4)]
    await jobs.join()
    for task in workers:
        task.cancel()
    same = all(first == second for first, second in receipts.values())
    print(f"40 deliveries, {len(charged)} charges, the same receipt for both: {same}")


if __name__ == "__main__":
    asyncio.run(main())
