"""`deepseek-api chat`: talk to a running service in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from deepseek_api_compat.errors import SetupError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a running service",
        description="Talk to a running service: print the answer to one question, or talk until Ctrl-D.",
    )
    parser.add_argument("question", nargs="?", help="ask this and exit; '-' reads it from standard input")
    parser.add_argument(
        "--url", help="address of the service (default $DEEPSEEK_BASE_URL or http://127.0.0.1:8000/v1)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="API key (default $DEEPSEEK_API_KEY)")
    parser.add_argument("--model", help="model name (default: the first that the service lists)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 to 2")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import openai

    from deepseek_api_compat.client.openai import OpenAI

    if not (args.api_key or os.environ.get("DEEPSEEK_API_KEY") or os.environ.get("OPENAI_API_KEY")):
        raise SetupError(
            "No API key: give --api-key or set DEEPSEEK_API_KEY; deepseek-api keys create NAME makes one."
        )
    client = OpenAI(api_key=args.api_key, base_url=args.url, max_retries=1)
    try:
        model = args.model or client.models.list().data[0].id
        talk(client, args, model)
    except openai.APIConnectionError:
        raise SetupError(
            f"No service answers at {client.base_url}. Start one with: deepseek-api serve"
        ) from None
    except openai.APIStatusError as error:
        raise SetupError(f"The service answered {error.status_code}: {error.message}") from None
    except openai.APIError as error:
        raise SetupError(f"The answer broke off: {error.message}") from None
    return 0


def talk(client: Any, args: argparse.Namespace, model: str) -> None:
    messages: list[dict[str, str]] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    if args.question is not None:
        question = sys.stdin.read() if args.question == "-" else args.question
        answer(client, args, model, [*messages, {"role": "user", "content": question}])
        return
    print(f"Talking to {model}. Ctrl-D ends.")
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if question.strip():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(client, args, model, messages)})


def answer(client: Any, args: argparse.Namespace, model: str, messages: list[dict[str, str]]) -> str:
    """Stream one answer to the terminal; Ctrl-C stops it and keeps what came."""
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, **{k: v for k, v in options.items() if v is not None}
    )
    parts: list[str] = []
    try:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                parts.append(chunk.choices[0].delta.content)
                print(parts[-1], end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        print(" (stopped)", end="")
    print()
    return "".join(parts)
