"""The `ratesync` command: check and write configuration, migrate, diagnose, and look at limits.

Every failure is one line on stderr, never a traceback (RATESYNC_DEBUG=1 shows it). Exit status: 0 all
is well, 1 something is wrong (invalid configuration, findings, store out), 2 wrong usage or no file.
"""

from __future__ import annotations

import os
from typing import Any

import click

from ratesync import errors
from ratesync._version import __version__
from ratesync.cli._common import Failure, NoFile
from ratesync.cli._config import check, init
from ratesync.cli._locks import locks
from ratesync.cli._simulate import simulate
from ratesync.cli._status import status
from ratesync.cli._stores import doctor, migrate
from ratesync.cli._top import top

__all__ = ["cli"]


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("RATESYNC_DEBUG"):
                raise
            if isinstance(error, errors.ConfigFileNotFoundError):
                raise NoFile(str(error)) from None
            if isinstance(error, errors.RateLimiterError):
                raise Failure(str(error)) from None
            raise Failure(
                f"internal error: {type(error).__name__}: {error} (RATESYNC_DEBUG=1 shows where)"
            ) from None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ratesync")
def cli() -> None:
    """Rate and concurrency limits, locks and state over memory, PostgreSQL and Redis.

    \b
    Examples:
      ratesync init                     write a commented rate-sync.toml
      ratesync check rate-sync.toml     is it valid, and what does it amount to?
      ratesync migrate --dry-run        what would be created?
      ratesync doctor                   is the database ready?
      ratesync status                   who holds what?
      ratesync locks                    who has which lock?
      ratesync top                      the same, live
      ratesync simulate f.toml --trace requests.csv
                                        what would f.toml have done with that traffic?

    Without -c the file is found as the library does: RATE_SYNC_CONFIG, ./rate-sync.toml,
    ./config/rate-sync.toml. Exit status: 0 fine, 1 something is wrong, 2 wrong usage or no file.
    """


for _command in (check, init, migrate, doctor, status, top, locks, simulate):
    cli.add_command(_command)
