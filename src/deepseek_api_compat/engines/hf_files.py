"""Where the files of a Hugging Face model lie on this machine, and what engines need of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from deepseek_api_compat.config import huggingface_cache
from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.errors import EngineFailed, ModelError
from deepseek_api_compat.models import checkpoint


class _Content(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _Content | None = None
    eos_token: str | _Content | None = None


def folder_of(model: str) -> Path | None:
    """The folder of a model, given as a path or a repository in the Hub's cache; None if it is not here."""
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    snapshots = huggingface_cache() / f"models--{model.replace('/', '--')}"
    try:
        revision = (snapshots / "refs" / "main").read_text().strip()
    except OSError:
        return None
    found = snapshots / "snapshots" / revision
    return found if (found / "config.json").is_file() else None


def with_files(info: ModelInfo, folder: Path) -> ModelInfo:
    """`info`, and what the model's files say of its tokens and template. Raises EngineFailed."""
    try:
        files = checkpoint.read(folder)
    except ModelError as error:
        raise EngineFailed(str(error)) from None
    tokenizer = _tokenizer_config(folder / "tokenizer_config.json")
    return msgspec.structs.replace(
        info,
        chat_template=files.chat_template,
        bos=_text(tokenizer.bos_token),
        eos=_text(tokenizer.eos_token),
        controls=files.controls,
        eager=list(files.controls),
        format=files.format,
    )


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both models' ids stand for the same text. Raises ModelError for a file that can't be read."""
    try:
        return (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ModelError(f"Can't read {error.filename}: {error.strerror}.") from None


def _tokenizer_config(file: Path) -> _TokenizerConfig:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_TokenizerConfig)
    except FileNotFoundError:
        return _TokenizerConfig()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineFailed(f"Can't make sense of {file}: {error}.") from None


def _text(token: str | _Content | None) -> str:
    return token.content if isinstance(token, _Content) else token or ""
