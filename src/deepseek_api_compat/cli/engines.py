"""`deepseek-api engines`: the engines of the running service."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("engines", help="show the engines of the running service")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line for each replica: model, state, process id")
    listing.add_argument("--data-dir", metavar="DIR", help="of the running service")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from deepseek_api_compat import config, control

    flags = {"server": {"data_dir": args.data_dir}}
    data_dir: Path = config.load(flags=flags).data_dir
    engines = control.call(data_dir, "engines.list")
    if args.json:
        print(json.dumps(engines))
        return 0
    for engine in engines:
        process = f"pid {engine['pid']}" if engine["pid"] else "not ours"
        columns = (engine["model"], f"replica {engine['replica']}", engine["kind"], engine["state"], process)
        print("  ".join((*columns, engine["detail"])).rstrip())
    return 0
