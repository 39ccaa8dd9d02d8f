"""Fetches PostgreSQL server programs of a major version and prints the directory of `initdb`.

    RATESYNC_PG_BIN=$(python tools/get_postgres.py 16) pytest tests/integration

They come from Maven Central through `mvn` (io.zonky.test.postgres, relocatable builds for tests: initdb,
pg_ctl and postgres only) and are kept where every user can read them, because the server does not run
as root. A version that is there already is not fetched again.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

VERSIONS = {
    "12": "12.22.0",
    "13": "13.22.0",
    "14": "14.19.0",
    "15": "15.14.0",
    "16": "16.10.0",
    "17": "17.6.0",
    "18": "18.0.0",
}
GROUP = "io.zonky.test.postgres"


def artifact() -> str:
    system = {"Linux": "linux", "Darwin": "darwin"}[platform.system()]
    machine = {"x86_64": "amd64", "aarch64": "arm64v8", "arm64": "arm64v8"}[platform.machine()]
    return f"embedded-postgres-binaries-{system}-{machine}"


def fetch(version: str) -> Path:
    """The jar, through Maven's local repository."""
    name = artifact()
    repository = Path(os.environ.get("MAVEN_REPOSITORY", Path.home() / ".m2" / "repository"))
    jar = repository.joinpath(*GROUP.split("."), name, version, f"{name}-{version}.jar")
    if not jar.exists():
        coordinates = f"{GROUP}:{name}:{version}"
        command = ["mvn", "-q", "-B", "dependency:get", f"-Dartifact={coordinates}", "-Dtransitive=false"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return jar


def unpack(jar: Path, target: Path) -> None:
    """A jar that holds one tar.xz with bin/, lib/ and share/."""
    with zipfile.ZipFile(jar) as archive:
        inner = next(name for name in archive.namelist() if name.endswith((".txz", ".tar.xz")))
        data = io.BytesIO(archive.read(inner))
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    with tarfile.open(fileobj=data, mode="r:xz") as tree:
        tree.extractall(partial, filter="tar")
    partial.chmod(0o755)
    partial.rename(target)


def main(major: str) -> Path:
    version = VERSIONS[major]
    home = Path(os.environ.get("RATESYNC_PG_CACHE", f"/var/tmp/ratesync-postgres-{os.getuid()}"))
    home.mkdir(mode=0o755, exist_ok=True)
    target = home / version
    if not target.exists():
        unpack(fetch(version), target)
    return target / "bin"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in VERSIONS:
        sys.exit(f"usage: get_postgres.py {'|'.join(VERSIONS)}")
    print(main(sys.argv[1]))
