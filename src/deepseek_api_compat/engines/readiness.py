"""Whether an engine can be trusted with requests: it is asked for tokens, not for its health.

An engine may say that it is well and compute nonsense, or die of the first token. So readiness is one real
token; and where the model's folder has a record of what the model answers (`greedy.json`), it is that answer.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from deepseek_api_compat.engines.base import ModelInfo, TokenEngine
from deepseek_api_compat.engines.process import Unfit
from deepseek_api_compat.errors import ApiError, EngineFailed
from deepseek_api_compat.protocol.grammar import text
from deepseek_api_compat.protocol.job import Job, Sampling

RECORD = "greedy.json"


class Recorded(msgspec.Struct, frozen=True):
    """What the model answers to a prompt at temperature 0, in ids; `models build-tiny` writes such a list."""

    prompt: list[int]
    answer: list[int]


async def ready(engine: TokenEngine) -> ModelInfo:
    """What the engine serves, after one real token from it. Raises ApiError while it can't."""
    info = await engine.info()
    job = Job(prompt_ids=await engine.tokenize("Hello", special=False), max_tokens=1)
    if not await _answer(engine, job):
        raise EngineFailed("The engine says that it is ready, but generates nothing.")
    return info


async def check_record(engine: TokenEngine, folder: Path, context: int) -> None:
    """Raises Unfit if the engine's greedy answers are not those on record in the model's folder.

    context: tokens that a request may have; answers on record that are longer are left out.
    """
    for number, one in enumerate(_record(folder / RECORD)):
        wanted = one.answer
        if len(one.prompt) + len(wanted) > context:
            continue
        job = Job(prompt_ids=one.prompt, max_tokens=len(wanted), sampling=Sampling(temperature=0.0))
        made = await _answer(engine, job)
        if made != wanted:
            pairs = zip(made, wanted, strict=False)
            at = next((at for at, (one, other) in enumerate(pairs) if one != other), len(made))
            raise Unfit(
                f"The engine computes wrongly: answer {number} of {folder / RECORD} differs at token {at}: "
                f"{made[at : at + 1]} instead of {wanted[at : at + 1]}."
            )


async def keeps_to_grammars(engine: TokenEngine) -> bool:
    """Whether it can be held to a grammar: vLLM and SGLang only with the right backend for them."""
    prompt = await engine.tokenize("Hello", special=False)
    try:
        made = await _answer(engine, Job(prompt_ids=prompt, max_tokens=8, grammar=text("[!]")))
        return await engine.detokenize(made[:1]) in ("[", "[!", "[!]")
    except ApiError:
        return False


async def _answer(engine: TokenEngine, job: Job) -> list[int]:
    return [id async for pieces in engine.stream(job) for piece in pieces for id in piece.ids]


def _record(file: Path) -> list[Recorded]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Recorded])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unfit(f"Can't make sense of {file}: {error}.") from None
