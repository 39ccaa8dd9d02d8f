"""Webhooks that are sent until they are answered, each handled once.

    python examples/webhook_dedup.py

The sender repeats an event whose answer it did not get, for up to three days, and several workers receive.
`check_and_set` says True to exactly one of them.
"""

import asyncio

import ratesync

KEPT = 4 * 86_400  # seconds; longer than the sender repeats

handled: list[str] = []


async def handle(event_id: str) -> None:
    await asyncio.sleep(0.001)
    handled.append(event_id)


async def receive(event_id: str) -> int:
    """What the web framework calls; returns the HTTP status."""
    seen = ratesync.state(kind="dedup")
    if not await seen.check_and_set(f"stripe:{event_id}", "1", ttl=KEPT):
        return 200  # a repetition: answered, not handled again
    try:
        await handle(event_id)
    except BaseException:
        await seen.delete(f"stripe:{event_id}")  # let the next delivery try
        raise
    return 200


async def main() -> None:
    deliveries = [f"evt_{number % 50}" for number in range(200)]
    answers = await asyncio.gather(*(receive(event) for event in deliveries))
    print(f"{len(deliveries)} deliveries, {len(handled)} handled, all answered 200: {set(answers) == {200}}")


if __name__ == "__main__":
    asyncio.run(main())
