"""Background jobs against an API that allows 50 requests per second and 5 at the same time.

    python examples/background_jobs.py

Workers take jobs from a queue; whatever their number, here or on other machines, the limits hold, because
they are the limits of the API and not of a worker.
"""

import asyncio
import random

from ratesync import acquire, configure_limiter, get_limiter

configure_limiter("partner-api", rate_per_second=50.0, burst=5, max_concurrent=5)
# A batch import must not keep interactive work waiting: it may use two of the five slots.
configure_limiter("partner-api-batch", max_concurrent=2)


async def call_partner(job: int) -> None:
    await asyncio.sleep(random.uniform(0.01, 0.03))  # the request


async def interactive(job: int) -> None:
    async with acquire("partner-api", timeout=30):  # gives up at once when 30 s cannot be kept
        await call_partner(job)


async def batch(job: int) -> None:
    async with acquire("partner-api", "partner-api-batch"):  # both limits, or none is charged
        await call_partner(job)


async def worker(jobs: asyncio.Queue[int]) -> None:
    while True:
        job = await jobs.get()
        try:
            await (batch(job) if job % 2 else interactive(job))
        finally:
            jobs.task_done()


async def main() -> None:
    jobs: asyncio.Queue[int] = asyncio.Queue()
    for job in range(60):
        jobs.put_nowait(job)
    workers = [asyncio.create_task(worker(jobs)) for _ in range(20)]
    await jobs.join()
    for task in workers:
        task.cancel()
    metrics = get_limiter("partner-api").get_metrics()
    print(f"{metrics.total_acquisitions} jobs, {metrics.avg_wait_time_ms:.0f} ms mean wait")


if __name__ == "__main__":
    asyncio.run(main())
