"""`deepseek-api models`: what there is, fetching it, deleting it, what its files say, making one."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue, checkpoint, prepared, shelf
from deepseek_api_compat.models.catalogue import CATALOGUE, Entry
from deepseek_api_compat.models.progress import Progress, size

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ASK_ABOVE = 50 * catalogue.GB
_EPILOG = "Models are kept in ~/.cache/deepseek-api (DEEPSEEK_CACHE_DIR changes that) for all your services."


def add_parser(subparsers: Subparsers) -> None:
    """Add `models`; each of its commands sets `run`, a function from the arguments to the exit code."""
    parser = subparsers.add_parser(
        "models",
        help="list, fetch, inspect and delete models",
        description="See which models there are, fetch them by name, look at their files, delete them.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("list", help="what there is, what each is good for and what it needs")
    command.add_argument("--json", action="store_true", help="all fields, for scripts")
    command.set_defaults(run=_list)

    command = commands.add_parser("pull", help="fetch a model", epilog=_EPILOG)
    command.add_argument("name", metavar="NAME", help="a name that 'models list' shows")
    command.add_argument(
        "--from",
        dest="source",
        choices=("huggingface", "modelscope"),
        default="huggingface",
        help="where to fetch it, if both have it (default: huggingface; HF_ENDPOINT names a mirror)",
    )
    command.add_argument("--yes", action="store_true", help="fetch even more than 50 GB")
    command.set_defaults(run=_pull)

    command = commands.add_parser("show", help="what a model's files say, and which format that makes it")
    command.add_argument(
        "model",
        metavar="PATH_OR_NAME",
        help="a GGUF file, a folder with a model, or the name of a fetched one",
    )
    command.set_defaults(run=_show)

    command = commands.add_parser("rm", help="delete a fetched model")
    command.add_argument("name", metavar="NAME", help="a name that 'models list' shows as ready")
    command.set_defaults(run=_rm)

    command = commands.add_parser(
        "build-tiny",
        help="make a tiny DeepSeek-V3, for trying engines",
        description="Make a checkpoint with DeepSeek-V3's architecture, tokenizer and file layout, and small "
        "random weights: every part of the real model is there, and what it answers is no language.",
    )
    command.add_argument("folder", metavar="OUT_DIR", type=Path, help="a new folder, of about 160 MB")
    command.add_argument(
        "--fp8", action="store_true", help="FP8 weights in blocks, as DeepSeek publishes them"
    )
    command.add_argument("--seed", type=int, default=0, help="other weights for each number (default: 0)")
    command.set_defaults(run=_build_tiny)

    command = commands.add_parser(
        "convert",
        help="make a GGUF file of a DeepSeek-V3 checkpoint",
        description="Make a GGUF file, for the embedded engine and llama.cpp, of a checkpoint with "
        "DeepSeek-V3's architecture in Hugging Face's layout. FP8 weights are understood.",
    )
    command.add_argument(
        "folder", metavar="CHECKPOINT_DIR", type=Path, help="with config.json and safetensors"
    )
    command.add_argument("target", metavar="OUT.gguf", type=Path, help="a new file")
    command.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0", "q4_0"),
        default="q8_0",
        help="of the matrices (default: q8_0, 8.5 bits a weight, which loses next to nothing of FP8)",
    )
    command.set_defaults(run=_convert)


def _list(args: argparse.Namespace) -> int:
    if args.json:
        text = msgspec.json.format(msgspec.json.encode([_fields(entry) for entry in CATALOGUE])).decode()
    else:
        # Wrapped for a person, one line for each model for grep.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        text = "\n".join(_table(width))
    print(text)
    return 0


def _pull(args: argparse.Namespace) -> int:
    entry = catalogue.find(args.name)
    if entry.bytes > _ASK_ABOVE and not args.yes and not shelf.ready(entry.name):
        raise ModelError(
            f"{entry.name} is {size(entry.bytes)}, and serving it needs {entry.needs}; "
            f"if you want that, run: deepseek-api models pull {entry.name} --yes."
        )
    path = prepared.pull(entry, Progress(), args.source)
    print(f"{entry.name} is ready: {path}")
    if entry.embedded:
        print(f"Serve it with: deepseek-api serve --model-path {entry.name}")
    return 0


def _show(args: argparse.Namespace) -> int:
    path = _files_of(args.model)
    files = checkpoint.read(path)
    context = "not given" if files.context is None else f"{files.context:,} tokens"
    rows = {
        "files": str(path),
        "architecture": files.architecture,
        "context": context,
        "format": f"{files.format}, because {files.why}",
        "control tokens": str(len(files.controls)),
        "fill-in tokens": ", ".join(map(str, files.fim)) if files.fim else "not given",
    }
    print("\n".join(f"{name:<19}{value}" for name, value in rows.items()))
    return 0


def _files_of(path_or_name: str) -> Path:
    """A GGUF file, or a folder as Hugging Face lays it out. Raises ModelError."""
    path = Path(path_or_name).expanduser()
    entry = next((entry for entry in CATALOGUE if entry.name == path_or_name), None)
    if not path.exists() and entry and not entry.embedded and entry.runs_on and shelf.ready(entry.name):
        path = prepared.location(entry)
    if (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        return path
    return prepared.resolve(path_or_name)


def _rm(args: argparse.Namespace) -> int:
    entry = catalogue.find(args.name)
    freed = shelf.remove(entry.name, Progress())
    print(f"{entry.name}: {size(freed)} freed." if freed else f"{entry.name} was not on this machine.")
    return 0


def _build_tiny(args: argparse.Namespace) -> int:
    from deepseek_api_compat.models import tiny_v3  # takes numpy

    tokenizer = prepared.pull(catalogue.find("deepseek-v3-tokenizer"), Progress())
    path = tiny_v3.build(args.folder.expanduser(), tokenizer, seed=args.seed, quantised=args.fp8)
    print(f"A tiny DeepSeek-V3 is ready: {path}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from deepseek_api_compat.models import convert  # takes numpy and gguf

    folder, target = args.folder.expanduser(), args.target.expanduser()
    convert.to_gguf(folder, target, args.type, Progress())
    print(f"The GGUF file is ready: {target}")
    print(f"Serve it with: deepseek-api serve --model-path {target}")
    return 0


def _fields(entry: Entry) -> dict[str, Any]:
    ready = shelf.ready(entry.name)
    fields: dict[str, Any] = {**msgspec.to_builtins(entry), "format": _format(entry, ready)}
    return {**fields, "ready": ready, "path": str(prepared.location(entry)) if ready else None}


def _format(entry: Entry, ready: bool) -> str | None:
    """What the files say if they are here, else what is known of the model."""
    if not ready or not entry.runs_on:
        return entry.format
    try:
        return checkpoint.read(prepared.location(entry)).format
    except ModelError:  # a half-deleted folder: the list must still be told
        return entry.format


_HERE, _GPUS, _TOKENIZERS = (
    "Run on this machine (embedded engine, llama.cpp)",
    "DeepSeek, for GPU servers (vLLM or SGLang)",
    "Tokenizers",
)
_HEADINGS = ("NAME", "SIZE", "LICENCE", "FORMAT", "STATE", "GOOD FOR; NEEDS; WHERE FROM")


def _table(width: int) -> Iterator[str]:
    rows = {entry.name: _row(entry) for entry in CATALOGUE}
    columns = list(zip(_HEADINGS, *rows.values(), strict=True))[:-1]
    widths = [max(map(len, column)) for column in columns]
    yield from _line(_HEADINGS, widths, width)
    for group in (_HERE, _GPUS, _TOKENIZERS):
        yield f"\n{group}"
        for entry in CATALOGUE:
            if _group(entry) == group:
                yield from _line(rows[entry.name], widths, width)


def _group(entry: Entry) -> str:
    return _HERE if entry.embedded else _GPUS if entry.runs_on else _TOKENIZERS


def _row(entry: Entry) -> tuple[str, ...]:
    ready = shelf.ready(entry.name)
    about = f"{entry.good_for}; needs {entry.needs}; from {entry.source.where}"
    licence, format = entry.licence.split(" (")[0], _format(entry, ready) or "—"
    return entry.name, size(entry.bytes), licence, format, "ready" if ready else "—", about


def _line(row: tuple[str, ...], widths: list[int], width: int) -> Iterator[str]:
    *cells, about = row
    start = "  ".join(f"{cell:<{wide}}" for cell, wide in zip(cells, widths, strict=True)) + "  "
    room = width - len(start)
    if width and room < 24:  # too narrow for the last column: put it below
        yield start.rstrip()
        yield from textwrap.wrap(about, width, initial_indent="    ", subsequent_indent="    ")
    else:
        first, *more = textwrap.wrap(about, room) if width else [about]
        yield start + first
        yield from (" " * len(start) + line for line in more)
