"""`deepseek-api keys`: make, list, disable, enable and delete API keys.

While a service runs on the data directory the command goes through it, so that it returns when every worker
knows of the change; otherwise it opens the key database itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_api_compat.errors import SetupError

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: SubParsers) -> None:
    """Add `keys` and its commands; each sets `run`: parsed arguments in, exit code out."""
    parser = subparsers.add_parser("keys", help="make, list and delete API keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    create = _command(commands, "create", _create, "make a key and show it, this once")
    create.add_argument("name", metavar="NAME", type=_printable, help="what to call it; need not be unique")
    create.add_argument("--role", choices=("user", "admin", "metrics"), default="user", help="default: user")
    create.add_argument("--rps", type=float, metavar="N", help="requests per second; 0: no limit")
    output = create.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print the key and nothing else")
    output.add_argument("--json", action="store_true", help='print {"id", "api_key", "secret_key"}')

    listing = _command(commands, "list", _list, "show all keys (they themselves are not kept)")
    listing.add_argument("--json", action="store_true", help="print a JSON array")

    for name, run, help in (
        ("disable", _disable, "refuse a key until it is enabled again"),
        ("enable", _enable, "accept a disabled key again"),
        ("delete", _delete, "forget a key for good"),
    ):
        _command(commands, name, run, help).add_argument(
            "key", metavar="ID|NAME", type=_printable, help="which key"
        )


def _command(commands: SubParsers, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--data-dir", metavar="DIR", help="the service's data directory")
    parser.add_argument("--config", metavar="FILE", help="the service's configuration file")
    parser.set_defaults(run=run)
    return parser


def _printable(text: str) -> str:
    # Bytes of an argument that are not text arrive as lone surrogates, which no encoder takes.
    if not text.isprintable():
        raise argparse.ArgumentTypeError("it is not printable text")
    return text


def _create(args: argparse.Namespace) -> int:
    key = _call(args, "keys.create", name=args.name, role=args.role, rps=args.rps)
    if args.quiet:
        print(key["api_key"])
    elif args.json:
        print(json.dumps({field: key[field] for field in ("id", "api_key", "secret_key")}))
    else:
        print(f"Key {key['name']!r} (id {key['id']}, role {key['role']}), shown only now:\n")
        print(f"  api_key     {key['api_key']}")
        print(f"  secret_key  {key['secret_key']}")
    return 0


def _list(args: argparse.Namespace) -> int:
    keys = _call(args, "keys.list")
    if args.json:
        print(json.dumps(keys))
        return 0
    print(f"{'ID':<12}  {'ROLE':<7}  {'RPS':>7}  {'STATE':<8}  {'CREATED':<16}  NAME")
    for key in keys:
        state = "enabled" if key["enabled"] else "disabled"
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(key["created"]))
        print(f"{key['id']}  {key['role']:<7}  {_rps(key['rps']):>7}  {state:<8}  {created}  {key['name']}")
    return 0


def _rps(rps: float | None) -> str:
    if rps is None:
        return "default"
    return f"{rps:g}" if rps else "none"


def _disable(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.set_enabled", key=args.key, enabled=False), "disabled")


def _enable(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.set_enabled", key=args.key, enabled=True), "enabled")


def _delete(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.delete", key=args.key), "deleted")


def _report(key: dict[str, Any], what: str) -> int:
    print(f"Key {key['name']!r} (id {key['id']}) is {what}.")
    return 0


def _call(args: argparse.Namespace, op: str, **params: Any) -> Any:
    """The result of `op`, by the running service or else directly. Raises SetupError."""
    from deepseek_api_compat import config, control

    data_dir = config.load(args.config, flags={"server": {"data_dir": args.data_dir}}).data_dir
    try:
        return control.call(data_dir, op, **params)
    except control.NotRunning:
        return _directly(data_dir, op, params)


def _directly(data_dir: Path, op: str, params: dict[str, Any]) -> Any:
    # Imported here: SQLAlchemy costs more than the whole command when a service does the work.
    from deepseek_api_compat.security.admin import open_admin
    from deepseek_api_compat.store.sql import DATABASE

    if op != "keys.create" and not (data_dir / DATABASE).exists():
        raise SetupError(f"There are no keys in {data_dir}: no service has started there yet.")
    admin = open_admin(data_dir)
    try:
        return admin.handle(op, params)
    finally:
        admin.close()
