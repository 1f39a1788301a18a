"""`deepseek-api keys`: make, list, change, rotate, disable and delete API keys; make tokens; back up.

While a service runs on the data directory the command goes through it, so that it returns when every worker
knows of the change; otherwise it opens the key database itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_api_compat.cli.key_options import (
    LIMITS,
    add_field_options,
    duration,
    fields_of,
    items,
    printable,
)
from deepseek_api_compat.errors import SetupError

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: SubParsers) -> None:
    """Add `keys` and its commands; each sets `run`: parsed arguments in, exit code out."""
    parser = subparsers.add_parser("keys", help="make, list and delete API keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    create = _command(commands, "create", _create, "make a key and show it, this once")
    create.add_argument("name", metavar="NAME", type=printable, help="what to call it; need not be unique")
    add_field_options(create)
    _add_output(create)

    listing = _command(commands, "list", _list, "show all keys (they themselves are not kept)")
    listing.add_argument("--json", action="store_true", help="print a JSON array")

    show = _on_key(commands, "show", _show, "show one key with all its limits")
    show.add_argument("--json", action="store_true", help="print a JSON object")

    update = _on_key(commands, "update", _update, "change what a key may do; what is not given stays")
    update.add_argument("--name", metavar="NAME", type=printable, help="its new name")
    add_field_options(update)

    rotate = _on_key(commands, "rotate", _rotate, "put a new key in the place of one, under the same id")
    rotate.add_argument(
        "--overlap",
        metavar="TIME",
        type=duration,
        default=0,
        help="how long the old one stays good (0): 1h, 7d",
    )
    _add_output(rotate)

    _on_key(commands, "disable", _disable, "refuse a key until it is enabled again")
    _on_key(commands, "enable", _enable, "accept a disabled key again")
    _on_key(commands, "delete", _delete, "forget a key for good")

    token = _on_key(commands, "token", _token, "make a temporary token for a key")
    token.add_argument("--expires-in", metavar="TIME", type=duration, default=3600, help="3600, 15m, 1h (1h)")
    token.add_argument("--models", metavar="NAME,...", type=items, help="only these models")
    token.add_argument("--allow", metavar="CIDR,...", type=items, help="only from these networks")
    token.add_argument("--max-tokens", metavar="N", type=int, help="at most so many tokens an answer")
    token.add_argument("--json", action="store_true", help='print {"token", "token_id", "expires"}')

    audit = _command(commands, "audit", _audit, "show what was done to keys, when and by whom, newest first")
    audit.add_argument("--limit", metavar="N", type=int, default=100, help="how many entries (100)")
    audit.add_argument("--json", action="store_true", help="print a JSON array")

    backup = _command(commands, "backup", _backup, "copy the keys and their master key to a new directory")
    backup.add_argument("to", metavar="DIR", type=Path, help="a directory that is empty or not there yet")


def _command(commands: SubParsers, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--data-dir", metavar="DIR", help="the service's data directory")
    parser.add_argument("--config", metavar="FILE", help="the service's configuration file")
    parser.set_defaults(run=run)
    return parser


def _on_key(commands: SubParsers, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, run, help)
    parser.add_argument("key", metavar="ID|NAME", type=printable, help="which key")
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print the key and nothing else")
    output.add_argument("--json", action="store_true", help='print {"id", "api_key", "secret_key"}')


def _create(args: argparse.Namespace) -> int:
    return _show_once(args, _call(args, "keys.create", name=args.name, **fields_of(args)))


def _rotate(args: argparse.Namespace) -> int:
    return _show_once(args, _call(args, "keys.rotate", key=args.key, overlap=args.overlap))


def _show_once(args: argparse.Namespace, key: dict[str, Any]) -> int:
    if args.quiet:
        print(key["api_key"])
    elif args.json:
        print(json.dumps({field: key[field] for field in ("id", "api_key", "secret_key")}))
    else:
        print(f"Key {key['name']!r} (id {key['id']}, role {key['role']}), shown only now:\n")
        print(f"  api_key     {key['api_key']}")
        print(f"  secret_key  {key['secret_key']}")
        if key["old_key_until"]:
            print(f"\nThe old one is good until {_time(key['old_key_until'])}.")
    return 0


def _list(args: argparse.Namespace) -> int:
    keys = _call(args, "keys.list")
    if args.json:
        print(json.dumps(keys))
        return 0
    row = "{:<12}  {:<7}  {:<8}  {:>7}  {:<20}  {:<20}  {}"
    print(row.format("ID", "ROLE", "STATE", "RPS", "CREATED", "EXPIRES", "NAME"))
    for key in keys:
        rps, times = _limit(key["limits"]["rps"]), (_time(key["created"]), _time(key["expires"]))
        owner = f" ({key['owner']})" if key["owner"] else ""
        print(row.format(key["id"], key["role"], _state(key), rps, *times, key["name"] + owner))
    return 0


def _show(args: argparse.Namespace) -> int:
    key = _call(args, "keys.get", key=args.key)
    if args.json:
        print(json.dumps(key))
        return 0
    lines = {name: key[name] for name in ("id", "name", "role", "owner")}
    lines |= {"state": _state(key), "created": _time(key["created"]), "expires": _time(key["expires"])}
    lines |= {name: ", ".join(key[name] or ["all"]) for name in ("models", "networks")}
    lines |= {"budget": key["budget"] or "none"}
    lines |= {name: f"{_limit(key['limits'][name])} ({help})" for name, (_, help) in LIMITS.items()}
    if key["old_key_until"]:
        lines["old key"] = f"good until {_time(key['old_key_until'])}"
    for label, value in lines.items():
        print(f"{label:<11}  {value}")
    return 0


def _state(key: dict[str, Any]) -> str:
    if not key["enabled"]:
        return "disabled"
    return "expired" if key["expires"] and key["expires"] <= time.time() else "enabled"


def _time(seconds: int | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _limit(limit: float | None) -> str:
    if limit is None:
        return "default"
    return f"{limit:g}" if isinstance(limit, float) and limit else str(limit or "none")


def _update(args: argparse.Namespace) -> int:
    fields = fields_of(args) if args.name is None else {**fields_of(args), "name": args.name}
    if not fields:
        raise SetupError("Nothing to change was given; see deepseek-api keys update --help.")
    return _report(_call(args, "keys.update", key=args.key, **fields), "changed")


def _disable(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.set_enabled", key=args.key, enabled=False), "disabled")


def _enable(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.set_enabled", key=args.key, enabled=True), "enabled")


def _delete(args: argparse.Namespace) -> int:
    return _report(_call(args, "keys.delete", key=args.key), "deleted")


def _token(args: argparse.Namespace) -> int:
    scope = {"models": args.models, "networks": args.allow, "max_tokens": args.max_tokens}
    made = _call(args, "keys.token", key=args.key, expires_in=args.expires_in, **scope)
    print(json.dumps(made) if args.json else made["token"])
    return 0


def _audit(args: argparse.Namespace) -> int:
    entries = _call(args, "keys.audit", limit=args.limit)
    if args.json:
        print(json.dumps(entries))
        return 0
    row = "{:<20}  {:<16}  {:<16}  {:<12}  {}"
    print(row.format("TIME", "BY", "WHAT", "KEY", "NAME AND CHANGES"))
    for entry in entries:
        by = f"{entry['actor']['kind']} {entry['actor']['id']}"
        changes = f"{entry['key_name']} {json.dumps(entry['changes'], ensure_ascii=False)}"
        print(row.format(_time(entry["at"] // 1000), by, entry["op"], entry["key_id"], changes))
    return 0


def _backup(args: argparse.Namespace) -> int:
    from deepseek_api_compat.security.admin import backup_keys

    id = backup_keys(_existing(_data_dir(args)), args.to)
    print(f"The keys and their master key (id {id}) are in {args.to}: keep it as safe as a password.")
    return 0


def _report(key: dict[str, Any], what: str) -> int:
    print(f"Key {key['name']!r} (id {key['id']}) is {what}.")
    return 0


def _call(args: argparse.Namespace, op: str, **params: Any) -> Any:
    """The result of `op`, by the running service or else directly. Raises SetupError."""
    from deepseek_api_compat import control

    data_dir = _data_dir(args)
    try:
        return control.call(data_dir, op, **params)
    except control.NotRunning:
        return _directly(data_dir, op, params)


def _data_dir(args: argparse.Namespace) -> Path:
    from deepseek_api_compat import config

    return config.load(args.config, flags={"server": {"data_dir": args.data_dir}}).data_dir


def _directly(data_dir: Path, op: str, params: dict[str, Any]) -> Any:
    # Imported here: SQLAlchemy costs more than the whole command when a service does the work.
    from deepseek_api_compat.security.admin import open_admin

    admin = open_admin(data_dir if op == "keys.create" else _existing(data_dir))
    try:
        return admin.handle(op, params)
    finally:
        admin.close()


def _existing(data_dir: Path) -> Path:
    from deepseek_api_compat.store.sql import DATABASE

    if not (data_dir / DATABASE).exists():
        raise SetupError(f"There are no keys in {data_dir}: no service has started there yet.")
    return data_dir
