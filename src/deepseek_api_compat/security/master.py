"""The master key: 32 random bytes that every stored hash and derived secret depends on.

Kept as hex in `master.key` in the data directory (mode 0600), or in DEEPSEEK_MASTER_KEY, which wins. The
key database notes its id, so that a wrong one is found at once.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path

from deepseek_api_compat.config import master_key_from_env
from deepseek_api_compat.errors import ConfigError, SetupError
from deepseek_api_compat.store.datadir import reason

FILE_NAME = "master.key"
MASTER_BYTES = 32


def load_master_key(data_dir: Path, *, create: bool) -> bytes:
    """The master key; a missing file is made if `create`. Raises SetupError.

    Pass `create=False` once keys exist: a new master key would silently make all of them wrong.
    """
    text = master_key_from_env()
    if text is not None:
        master = _decode(text)
        if master is None:
            raise ConfigError(f"The variable DEEPSEEK_MASTER_KEY must be {2 * MASTER_BYTES} hex digits.")
        return master
    path = data_dir / FILE_NAME
    if create and not path.exists():
        _write(path, secrets.token_bytes(MASTER_BYTES))
    return _read(path)


def write_master_key(data_dir: Path, master: bytes) -> None:
    """Make the file in another data directory, unless it has one. Raises SetupError."""
    _write(data_dir / FILE_NAME, master)


def master_id(master: bytes) -> str:
    """A name for the master key, 16 hex digits, that tells nothing of it."""
    return hmac.digest(master, b"id", "sha256")[:8].hex()


def master_key_place(data_dir: Path) -> str:
    """Where `load_master_key` found it."""
    return "DEEPSEEK_MASTER_KEY" if master_key_from_env() is not None else str(data_dir / FILE_NAME)


def _write(path: Path, master: bytes) -> None:
    """Make the file, whole and durable, unless it exists."""
    draft = path.with_name(f".{FILE_NAME}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(master.hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike a rename, never replaces the file of a process that was faster
        finally:
            draft.unlink()
    except FileExistsError:
        return
    except OSError as error:
        raise SetupError(f"Can't create the master key {path}: {reason(error)}.") from None


def _read(path: Path) -> bytes:
    try:
        with open(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(4096)
    except FileNotFoundError:
        raise SetupError(
            f"The master key {path} is missing, and without it the keys in the database are useless: "
            "restore it from a backup, or set DEEPSEEK_MASTER_KEY."
        ) from None
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise SetupError(f"Can't read the master key {path}: {reason(error)}.") from None
    if mode & 0o077:
        raise SetupError(f"The master key {path} is open to others (mode {mode:04o}): run chmod 600 {path}.")
    master = _decode(text)
    if master is None:
        raise SetupError(f"The master key {path} is damaged (it must be {2 * MASTER_BYTES} hex digits).")
    return master


def _decode(text: str) -> bytes | None:
    try:
        master = bytes.fromhex(text.strip())
    except ValueError:
        return None
    return master if len(master) == MASTER_BYTES else None
