"""The `deepseek-api` command, and `start_server`, which is `deepseek-api serve` under its old name.

Each command is a module here, imported only when it was asked for: `--help`, `version` and `chat` need
no server packages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from deepseek_api_compat import __version__
from deepseek_api_compat.errors import SetupError

COMMANDS = {
    "serve": "start the service",
    "keys": "make, list and delete API keys",
    "import": "move in from LiteLLM or new-api",
    "ledger": "sum up, export and check requests",
    "models": "list, fetch and remove models",
    "plan": "see what a model needs, and how to launch it",
    "engines": "show the engines of the running service",
    "chat": "talk to a running service",
    "render": "turn requests into DeepSeek prompts (JSON lines)",
    "parse": "turn DeepSeek output into messages (JSON lines)",
    "version": "print the version",
}

# Those whose name can't be a module's.
_MODULES = {"import": "moving"}

_EPILOG = """examples:
  deepseek-api serve                              serve the embedded model on http://127.0.0.1:8000
  deepseek-api serve --model-path model.gguf      serve your own model
  deepseek-api keys create alice                  make an API key
  deepseek-api chat "What is a mixture of experts?"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0; 1 with one sentence on stderr; 130 after Ctrl-C."""
    try:
        return _run(_parser(sys.argv[1:] if argv is None else argv), argv)
    except KeyboardInterrupt:
        return 130


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-api",
        description="DeepSeek-V3 in a box: an OpenAI-compatible service, its keys, its models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == asked and name != "version":
            module = _MODULES.get(name, name)
            import_module(f"deepseek_api_compat.cli.{module}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary).set_defaults(run=_version)
    return parser


def start_server(argv: Sequence[str] | None = None) -> int:
    """`start_server --model-path ... --port ... --workers ...`: serves on all addresses."""
    parser = argparse.ArgumentParser(
        prog="start_server", description="Serve a model through the OpenAI API on all network addresses."
    )
    try:
        from deepseek_api_compat.cli import serve

        serve.add_arguments(parser, host="0.0.0.0")  # noqa: S104 - the documented default of this entry point
        return _run(parser, argv)
    except KeyboardInterrupt:
        return 130


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except SetupError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (
            error.name
            and find_spec("deepseek_api_compat")
            and not error.name.startswith("deepseek_api_compat")
        ):
            print(
                f"{parser.prog}: the package {error.name} is missing; "
                "install with: pip install 'deepseek-api-compat[embedded,formats]'",
                file=sys.stderr,
            )
            return 1
        raise
    except BrokenPipeError:
        return 1
