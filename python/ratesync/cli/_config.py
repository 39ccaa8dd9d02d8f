"""`ratesync check` and `ratesync init`: the configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ratesync import errors
from ratesync.cli._common import Failure, find, ignored_note

if TYPE_CHECKING:
    from ratesync._state_schema import StateConfig


@click.command()
@click.argument("file", required=False)
def check(file: str | None) -> None:
    """Validate FILE and print the effective configuration, passwords masked.

    \b
    Examples:
      ratesync check rate-sync.toml
      DATABASE_URL=postgresql://... ratesync check config/rate-sync.toml

    Exit status: 0 valid, 1 not valid (the line names file, table and key), 2 no such file.
    """
    import msgspec

    from ratesync._schemas import as_masked_dict
    from ratesync.config import read_config

    path = find(file)
    config = read_config(path)
    counts = [f"{len(config.stores)} stores", f"{len(config.limiters)} limiters"]
    if config.state is not None:
        counts.append(f"state in {config.state.options.store or config.state.engine}")
    out = [f"# {path}: valid; {', '.join(counts)}"]
    for store_id, store in config.stores.items():
        out += ["", f"[stores.{errors.toml_key(store_id)}]", f"engine = {_toml(store.engine)}"]
        out += _assignments(as_masked_dict(store.options))
    for limiter_id, limiter in config.limiters.items():
        out += [
            "",
            f"[limiters.{errors.toml_key(limiter_id)}]",
            *_assignments(msgspec.structs.asdict(limiter)),
        ]
    if config.fastapi.trusted_proxy_networks is not None:
        networks = ", ".join(_toml(network) for network in config.fastapi.trusted_proxy_networks)
        out += ["", "[fastapi]", f"trusted_proxy_networks = [{networks}]"]
    if config.state is not None:
        out += ["", "[state]", *_assignments(state_fields(config.state))]
    if config.ignored:
        out += ["", f"# {ignored_note(config.ignored)}"]
    click.echo("\n".join(out))


@click.command()
@click.argument("path", default="rate-sync.toml")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(path: str, force: bool) -> None:
    """Write a commented configuration to PATH (default: rate-sync.toml).

    \b
    Examples:
      ratesync init
      ratesync init config/rate-sync.toml --force
    """
    target = Path(path)
    try:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        with open(target, "w" if force else "x", encoding="utf-8") as file:
            file.write(_TEMPLATE)
    except OSError as error:
        if target.exists() and not force:
            raise Failure(f"{path} exists already; --force replaces it") from None
        raise Failure(f"{path} cannot be written: {error.strerror or error}") from None
    click.echo(f"wrote {path}; next: ratesync check {path}")


def state_fields(state: StateConfig) -> dict[str, Any]:
    """What `[state]` amounts to: its own fields and those of its backend, secrets masked."""
    import msgspec

    from ratesync._schemas import as_masked_dict

    own = {key: value for key, value in msgspec.structs.asdict(state.options).items() if value is not None}
    return own | (as_masked_dict(state.store_options) if state.store_options is not None else {})


def _assignments(values: dict[str, Any]) -> list[str]:
    return [
        f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
        for name, value in values.items()
    ]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


_TEMPLATE = """\
# Configuration of ratesync. Found as RATE_SYNC_CONFIG, ./rate-sync.toml or ./config/rate-sync.toml.
# Check it with: ratesync check
# ${VAR} takes an environment variable, ${VAR:-default} one with a default; $${ is a literal ${.

# Stores keep the state of the limits. `memory` exists without being configured: one process, nothing
# to set up. For limits that hold over processes and machines:
#
# [stores.db]
# engine = "postgres"
# url = "${DATABASE_URL}"
# auto_create = true            # create the tables at first use; otherwise: ratesync migrate
# table_name = "rate_limiter_state"
# schema_name = "public"
# pool_min_size = 2
# pool_max_size = 10            # connections of one process, for all limiters together
# timing_margin_ms = 10.0       # forgiven earliness of an arrival; never raises the long-run rate
# command_timeout = 5.0         # seconds
# connect_timeout = 5.0         # seconds
#
# [stores.cache]
# engine = "redis"              # Redis 6.2 or later, Valkey; Sentinel: redis+sentinel://, Cluster: redis+cluster://
# url = "${REDIS_URL}"
# password = "${REDIS_PASSWORD:-}"
# key_prefix = "rate_limit"
# hash_tag = "limits"           # Cluster: all limits in one slot, so that several can be acquired at once
# timing_margin_ms = 10.0
# socket_timeout = 5.0          # seconds
# socket_connect_timeout = 5.0  # seconds

# State: locks, dedup keys, counters, idempotency: ratesync.state(), ratesync.lock(). Left out: one process.
#
# [state]
# backend = "postgres"          # "redis" may lose what it acknowledged in a failover; "memory": one process
# url = "${DATABASE_URL}"       # and every other option of such a store; or instead of both: store = "db"
# prefix = "acteon_"            # of the tables or keys; `ratesync migrate` creates them
# namespace = "default"
# tenant = "default"
# timeout = 5.0                 # seconds that one operation may take

[limiters.api]
# store = "db"                  # left out: memory
rate_per_second = 100.0         # grants per second, in the long run
burst = 1                       # grants that may come at once after idling; 1 spaces evenly
# max_concurrent = 50           # slots held at the same time
# timeout = 30.0                # seconds that acquire() waits at most; left out: as long as it takes
# fail_closed = false           # true: an outage of the store refuses calls; false: it lets them pass
# outage_budget = 0.25          # seconds that a call may lose to a store that does not answer
# lease_seconds = 30            # a killed holder's slot comes back after this
# max_hold_seconds = 600        # a hung holder's slot comes back after this
"""
