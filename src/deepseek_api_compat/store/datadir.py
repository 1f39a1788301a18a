"""The data directory: keys, their database and the control socket live in it, so only its owner may enter."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from deepseek_api_compat.errors import SetupError

_REASONS = {
    errno.EEXIST: "it is not a directory",
    errno.ENOTDIR: "a part of this path is not a directory",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
}


def reason(error: OSError) -> str:
    """Why a file operation failed, in words that fit after a colon."""
    return _REASONS.get(error.errno or 0) or (error.strerror or str(error)).lower()


def make_data_dir(path: Path) -> None:
    """Make sure that `path` is a directory we can write to; a new one has mode 0700. Raises SetupError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise SetupError(f"Can't use {path} as the data directory: {reason(error)}.") from None
