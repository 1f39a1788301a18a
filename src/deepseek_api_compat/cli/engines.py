"""`deepseek-api engines`: the engines of the running service."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("engines", help="look after the engines of the running service")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line for each replica: model, state, process id")
    listing.set_defaults(run=run_list)
    drain = actions.add_parser("drain", help="no new work for a replica; its answers go on at the others")
    drain.set_defaults(run=run_drain)
    restart = actions.add_parser(
        "restart", help="start replicas anew, one after the other, while answers go on; ends a drain"
    )
    restart.add_argument(
        "--path", metavar="FILE", help="come back with this model, which has the same tokens"
    )
    restart.set_defaults(run=run_restart)
    for action in (drain, restart):
        action.add_argument("model", metavar="MODEL", help="as `engines list` names it")
        action.add_argument(
            "replica", metavar="REPLICA", type=int, nargs="?", help="its number; default: all"
        )
    for action in (listing, drain, restart):
        action.add_argument("--data-dir", metavar="DIR", help="of the running service")
        action.add_argument("--json", action="store_true", help="print JSON")


def run_list(args: argparse.Namespace) -> int:
    return _show(args, _call(args, "engines.list"))


def run_drain(args: argparse.Namespace) -> int:
    return _show(args, _call(args, "engines.drain", model=args.model, replica=args.replica))


def run_restart(args: argparse.Namespace) -> int:
    path = str(Path(args.path).absolute()) if args.path else None
    # Loading a large model takes minutes.
    found = _call(args, "engines.restart", timeout=None, model=args.model, replica=args.replica, path=path)
    return _show(args, found)


def _call(args: argparse.Namespace, op: str, **params: Any) -> list[dict[str, Any]]:
    from deepseek_api_compat import config, control

    data_dir = config.load(flags={"server": {"data_dir": args.data_dir}}).data_dir
    engines: list[dict[str, Any]] = control.call(data_dir, op, **params)
    return engines


def _show(args: argparse.Namespace, engines: list[dict[str, Any]]) -> int:
    if args.json:
        print(json.dumps(engines))
        return 0
    for engine in engines:
        process = f"pid {engine['pid']}" if engine["pid"] else "not ours"
        columns = (engine["model"], f"replica {engine['replica']}", engine["kind"], engine["state"], process)
        print("  ".join((*columns, engine["detail"])).rstrip())
    return 0
