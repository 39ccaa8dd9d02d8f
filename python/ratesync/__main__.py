"""`python -m ratesync` and the `ratesync` command, saying what to install when click or rich is missing."""

import sys


def main() -> None:
    """Runs the command line; exits with its status."""
    try:
        from ratesync.cli import cli
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("click", "rich"):
            raise
        sys.exit(f'ratesync: the command line needs {library}: pip install "ratesync[cli]"')
    cli(prog_name="ratesync")


if __name__ == "__main__":
    main()
