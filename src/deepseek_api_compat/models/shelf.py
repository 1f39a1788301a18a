"""The models on this machine: one folder each in the cache, with a record of what is complete.

`<cache>/models/<name>/model.json` is written last, so a folder without it is work in progress. A model
counts as ready while its files have the sizes and modification times of the record; that check
reads no model data. Whoever changes a folder holds its lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from deepseek_api_compat import config
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models.progress import Progress, size

_RECORD = "model.json"
PART = ".part"


class File(msgspec.Struct, frozen=True):
    """A complete file: path inside the folder, size in bytes, modification time in ns, SHA-256."""

    path: str
    bytes: int
    mtime: int
    sha256: str


class Record(msgspec.Struct, frozen=True):
    files: list[File]


def folder(name: str) -> Path:
    return config.cache_dir() / "models" / name


@contextmanager
def lock(name: str, progress: Progress) -> Iterator[Path]:
    """Hold the model's folder against other processes; waits for its turn.

    The folder is made if need be, and taken away again if it is left empty.
    """
    place = folder(name)
    with on_disk(place):
        place.mkdir(parents=True, exist_ok=True)
        handle = os.open(place.parent / f".{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        with on_disk(place):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say(f"Another process is working on {name}; waiting for it.")
                fcntl.flock(handle, fcntl.LOCK_EX)
            # `remove` of the one before us may have taken the folder away.
            place.mkdir(parents=True, exist_ok=True)
        yield place
    finally:
        with suppress(OSError):
            place.rmdir()
        os.close(handle)


def record(name: str, hashes: dict[str, str]) -> None:
    """Note that these files (path inside the folder -> SHA-256) are complete."""
    place = folder(name)
    with on_disk(place):
        files = [_file(place, path, sha256) for path, sha256 in hashes.items()]
        part = place / (_RECORD + PART)
        part.write_bytes(msgspec.json.encode(Record(files)))
        publish(part, place / _RECORD)


def recorded(name: str) -> Record | None:
    """What the record says; None if there is none (or it can't be read)."""
    try:
        return msgspec.json.decode((folder(name) / _RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def ready(name: str) -> bool:
    """Is every recorded file there, untouched since it was recorded?"""
    found = recorded(name)
    return found is not None and all(_untouched(folder(name), file) for file in found.files)


def intact(name: str) -> bool:
    """Like `ready`, but a file that was only touched (copied, restored) is read again and passes."""
    found = recorded(name)
    if found is None or not all(_same_content(folder(name), file) for file in found.files):
        return False
    record(name, {file.path: file.sha256 for file in found.files})
    return True


def remove(name: str, progress: Progress) -> int:
    """Delete the model and anything half-fetched; returns the bytes freed."""
    place = folder(name)
    if not place.exists():
        return 0
    with lock(name, progress), on_disk(place):
        freed = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        shutil.rmtree(place)
    return freed


def publish(part: Path, target: Path) -> None:
    """Give finished content its name: whole after a power cut too, or not there at all."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def need_space(place: Path, needed: int, what: str) -> None:
    """Raises ModelError unless the disk of `place` has `needed` bytes free."""
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ModelError(
            f"Not enough disk space for {what}: it needs {size(needed)} and {place} has {size(free)} free; "
            "free some, or point DEEPSEEK_CACHE_DIR at a larger disk."
        )


@contextmanager
def on_disk(place: Path) -> Iterator[None]:
    """Turn a failing file operation into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"Can't write to the model cache {place}: {error.strerror or error}; free space there or fix its "
            "permissions, or point DEEPSEEK_CACHE_DIR at another directory."
        ) from error


def _file(place: Path, path: str, sha256: str) -> File:
    stat = (place / path).stat()
    return File(path, stat.st_size, stat.st_mtime_ns, sha256)


def _untouched(place: Path, file: File) -> bool:
    try:
        return _file(place, file.path, file.sha256) == file
    except OSError:
        return False


def _same_content(place: Path, file: File) -> bool:
    path = place / file.path
    try:
        return path.stat().st_size == file.bytes and sha256_of(path) == file.sha256
    except OSError:
        return False
