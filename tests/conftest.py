"""What holds for the whole suite: which event loop it runs on, and no configuration from outside.

`pytest --loop=uvloop` runs everything on uvloop, `PYTHONASYNCIODEBUG=1` in asyncio's debug mode.
The fixtures come from `ratesync.testing.plugin`, which pytest finds because ratesync is installed.
"""

from __future__ import annotations

import asyncio
import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop", choices=("asyncio", "uvloop"), default="asyncio", help="event loop of the suite"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--loop") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_report_header(config: pytest.Config) -> str:
    debug = ", debug mode" if os.environ.get("PYTHONASYNCIODEBUG") else ""
    return f"event loop: {config.getoption('--loop')}{debug}"
