"""A file system of a test's own, small enough to be really filled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NEEDS = "mounts a file system: takes root, or a kernel that lets users have namespaces (unshare -rm)"


def may_mount() -> bool:
    """Whether this process may mount; if not, `in_namespace` runs a test in one that may."""
    return os.geteuid() == 0


def in_namespace(test: str) -> None:
    """Run that test ("path::name") as root of a namespace of its own. Skips if none is to be had."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip(NEEDS)
    command = [*unshare, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mounted at `place` until the end. Skips where nothing may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(NEEDS)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Leave not a byte free; returns the file whose removal makes room again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for piece in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(piece)):
                    pass
    return ballast
