"""A PostgreSQL server of our own for tests: on a Unix socket, in a directory, gone with the test run."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path | None:
    """Where `initdb` and `postgres` are: on the PATH, or where Debian puts them."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).resolve().parent if found else debian[-1].parent if debian else None


@contextmanager
def server(directory: Path, bin: Path) -> Iterator[str]:
    """An SQLAlchemy URL with `{name}` in the place of the database's name; the database `postgres` exists."""
    # The server refuses to run as root.
    user = pwd.getpwnam("postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name)
    os.chown(directory, user.pw_uid, user.pw_gid)
    switch = {"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}
    data = directory / "data"
    options = ["-A", "trust", "-U", "tester", "-E", "UTF8", "--locale", "C", "--no-sync"]
    subprocess.run([bin / "initdb", "-D", data, *options], check=True, stdout=subprocess.DEVNULL, **switch)
    settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(directory)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [bin / "postgres", "-D", data, *settings], stderr=log, cwd=directory, **switch
        )
    try:
        ready = [bin / "pg_isready", "-q", "-h", directory]
        while subprocess.run(ready).returncode != 0:
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.05)
        yield f"postgresql+psycopg://tester@/{{name}}?host={directory}"
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would wait for those who are still connected
        process.wait(60)
