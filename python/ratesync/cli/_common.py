"""What the commands share: failures as one line, options, finding the configuration and its stores."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from ratesync.errors import toml_key

if TYPE_CHECKING:
    from ratesync._state_schema import StateOptions
    from ratesync.config import Config
    from ratesync.stores import Store


class Failure(click.ClickException):
    """One clear line and an exit status."""

    def show(self, file: Any = None) -> None:
        click.echo(f"ratesync: {self.format_message()}", file=file, err=file is None)


class NoFile(Failure):
    """There is nothing to work on."""

    exit_code = 2


config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="Configuration; found as the library does when left out.",
)
store_option = click.option("--store", "store_id", metavar="ID", help="Only this store.")


def find(file: str | None) -> str:
    from ratesync.config import find_config

    if file is not None:
        return file
    path, note = find_config()
    if path is None:
        raise NoFile(f"no configuration file{note}")
    return str(path)


def load(config_file: str | None) -> Config:
    """Reads the configuration and makes it that of this process."""
    from ratesync._registry import _registry
    from ratesync.config import read_config

    config = read_config(find(config_file))
    _registry.apply(config)
    return config


def open_stores(config_file: str | None, store_id: str | None) -> list[tuple[str, Store]]:
    """Loads the configuration and gives its stores, those that limiters use implicitly included."""
    import ratesync

    load(config_file)
    if store_id is not None:
        return [(store_id, ratesync.get_store(store_id))]
    used = [fields["store"] for fields in ratesync.list_limiters().values()]
    names = dict.fromkeys([*ratesync.list_stores(), *used])
    return [(name, ratesync.get_store(name)) for name in names]


def open_state(store_id: str | None = None) -> tuple[Store, StateOptions] | None:
    """The store of `[state]` in the configuration that was loaded, None without one (or in another store)."""
    from ratesync._registry import _registry

    if _registry._state is None:
        return None
    store, options = _registry.state()
    return (store, options) if store_id in (None, store.store_id) else None


def ignored_note(tables: Iterable[str]) -> str:
    """Which tables of the file belong to others."""
    names = ", ".join(f"[{toml_key(name)}]" for name in tables)
    return f"ignored, not of ratesync: {names}"


def say_ignored(config: Config) -> None:
    """Names them on stderr, so that what is piped on stays clean."""
    if config.ignored:
        click.echo(f"ratesync: {config.path}: {ignored_note(config.ignored)}", err=True)


def make_console() -> Console:
    # Piped output is not wrapped: a finding stays on one line.
    return Console(width=None if sys.stdout.isatty() else 400, highlight=False)
