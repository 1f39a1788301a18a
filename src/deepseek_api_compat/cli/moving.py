"""`deepseek-api import`: move in from LiteLLM or new-api, with models, upstreams, keys, limits and quotas.

Writes a configuration, and keeps the keys, so that clients go on with those that they have. What can't be
carried over is listed.
"""

from __future__ import annotations

import argparse
import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_api_compat.errors import SetupError

if TYPE_CHECKING:
    from deepseek_api_compat.moving.result import Moved

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: SubParsers) -> None:
    """Add `import` and its commands; each sets `run`: parsed arguments in, exit code out."""
    parser = subparsers.add_parser("import", help="move in from LiteLLM or new-api", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="PROGRAM")
    litellm = _command(commands, "litellm", "move in from a LiteLLM proxy")
    litellm.add_argument("source", metavar="CONFIG", type=Path, help="its config.yaml")
    litellm.add_argument(
        "--keys", metavar="DUMP", type=Path, help="its keys: pg_dump as text, or its table as CSV or JSON"
    )
    new_api = _command(commands, "new-api", "move in from new-api or one-api")
    new_api.add_argument(
        "source", metavar="DUMP", type=Path, help="its one-api.db, or what mysqldump or pg_dump wrote"
    )


def _command(commands: SubParsers, name: str, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--data-dir", metavar="DIR", help="the service's data directory, for the keys")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("config.toml"), help="the configuration to write"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    parser.add_argument("--dry-run", action="store_true", help="write nothing, only report")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run, program=name)
    return parser


def _run(args: argparse.Namespace) -> int:
    from deepseek_api_compat import config
    from deepseek_api_compat.moving.result import check_places, write_files

    data_dir = config.load(flags={"server": {"data_dir": args.data_dir}}).data_dir
    moved = _read(args)
    output, environment = args.output, args.output.with_suffix(".env")
    files = {}
    if moved.models:
        files = {output: moved.toml(args.program)}
        if moved.secrets:
            files[environment] = moved.environment()
        _check(files[output])
    if not args.dry_run:
        check_places(files, force=args.force)
        _keep(data_dir, moved)
        write_files(files)
    start = _start(data_dir, output, environment if moved.secrets else None) if files else None
    report = moved.report
    if args.json:
        written = [] if args.dry_run else [str(path) for path in files]
        found = {"entries": report.as_json(), "counts": report.counts(), "files": written, "start": start}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(report.as_text())
    if args.dry_run:
        print("\nNothing was written: this was a dry run.")
    elif start:
        print(f"\nWritten: {', '.join(str(path) for path in files)}. To start:\n\n  {start}")
    else:
        print("\nNo model could be carried over, so that no configuration was written.")
    return 0


def _read(args: argparse.Namespace) -> Moved:
    if args.program == "new-api":
        from deepseek_api_compat.moving.new_api import read_database

        return read_database(args.source)
    from deepseek_api_compat.moving.litellm import read_config
    from deepseek_api_compat.moving.litellm_keys import read_keys

    moved = read_config(args.source)
    if args.keys:
        read_keys(args.keys, moved)
    return moved


def _check(text: str) -> None:
    """Raises SetupError where the service would not start with this configuration."""
    import tempfile

    from deepseek_api_compat import config

    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            config.load(file.name, environ={})
        except SetupError as error:
            raise SetupError(f"What was read makes no valid configuration: {error}") from None


def _keep(data_dir: Path, moved: Moved) -> None:
    """Store the keys, all or none, and have a running service accept them. Raises SetupError."""
    if not moved.keys:
        return
    from deepseek_api_compat import control
    from deepseek_api_compat.security.admin import open_admin

    admin = open_admin(data_dir)
    try:
        made: dict[str, Any] = admin.handle("keys.import", {"keys": moved.keys})
        if not any(record.role == "admin" for record in admin.store.list()):
            how = f"make one with: deepseek-api keys create admin --role admin --data-dir {data_dir}"
            moved.report.left("an admin key", how)
    finally:
        admin.close()
    for sha256 in made["present"]:
        moved.report.already(moved.places[sha256])
    with suppress(control.NotRunning):
        # The keys may be more than one request holds; none at all makes the service look at them again.
        control.call(data_dir, "keys.import", keys=[])


def _start(data_dir: Path, output: Path, environment: Path | None) -> str:
    serve = f"deepseek-api serve --config {shlex.quote(str(output))} --data-dir {shlex.quote(str(data_dir))}"
    if environment is None:
        return serve
    file = environment if environment.is_absolute() else f"./{environment}"
    return f"(set -a; . {shlex.quote(str(file))}; {serve})"
