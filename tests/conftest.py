"""What holds for the whole suite: which event loop it runs on, and no configuration from outside.

`pytest --loop=uvloop` runs everything on uvloop, `--asyncio-debug` in asyncio's debug mode.
The fixtures come from `ratesync.testing.plugin`, which pytest finds because ratesync is installed.
"""

from __future__ import annotations

import asyncio
import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop", choices=("asyncio", "uvloop"), default="asyncio", help="event loop of the suite"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the suite in the background lets it ignore Ctrl-C, and its children too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--loop") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_report_header(config: pytest.Config) -> str:
    return f"event loop: {config.getoption('--loop')}"
