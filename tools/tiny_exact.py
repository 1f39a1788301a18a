"""Is greedy output of the tiny DeepSeek-V3 the same, token for token, in every implementation?

    python tools/tiny_exact.py CHECKPOINT_DIR            # one that `deepseek-api models build-tiny` made

Compares the record that lies beside the weights (made by the model in numpy) with Hugging Face transformers
(`DeepseekV3ForCausalLM`, float32), which needs torch, and with llama.cpp, which needs xllamacpp: whichever of
them is installed, so run it in two environments if they don't fit in one. llama.cpp runs a float32 GGUF
with a float32 KV cache and without flash attention, which rounds to half precision whatever the cache is.
Prints a line for each prompt and exits with 1 if any answer differs, or nothing could be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What an implementation answers to a prompt, and the least lead of its tokens, in logits."""

    ids: list[int]
    lead: float


def main() -> int:
    folder = Path(sys.argv[1])
    record = json.loads((folder / "greedy.json").read_bytes())
    same, compared = True, 0
    for name, package, answers in (
        ("transformers", "torch", _transformers),
        ("llama.cpp", "xllamacpp", _llamacpp),
    ):
        if find_spec(package) is None:
            print(f"{name:<13} not compared: {package} is not installed here")
            continue
        for recorded, answer in zip(record, answers(folder, record), strict=True):
            compared += 1
            same &= answer.ids == recorded["answer"]
            print(f"{name:<13} {_verdict(recorded, answer)}")
    return 0 if same and compared else 1


def _verdict(recorded: dict[str, Any], answer: Answer) -> str:
    pairs = enumerate(zip(recorded["answer"], answer.ids, strict=True))
    first = next((at for at, (one, other) in pairs if one != other), None)
    what = "all the same" if first is None else f"differ from token {first} on"
    leads = f"least lead {answer.lead:.4f}, recorded {recorded['lead']:.4f}"
    return f"{len(recorded['prompt']):>4} prompt ids, {len(answer.ids)} answered: {what}; {leads}"


def _transformers(folder: Path, record: list[dict[str, Any]]) -> Iterator[Answer]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for one in record:
        prompt = torch.tensor([one["prompt"]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(one["answer"]),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=2,
        )
        tops = [torch.topk(logits[0], 2).values for logits in out.logits]
        ids = out.sequences[0, prompt.shape[1] :].tolist()
        yield Answer(ids, min(float(first - second) for first, second in tops))


def _llamacpp(folder: Path, record: list[dict[str, Any]]) -> Iterator[Answer]:
    from deepseek_api_compat.models import convert

    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "tiny.gguf"
        convert.to_gguf(folder, file, "f32")
        server = _server(file)
        for one in record:
            yield _ask(server.listening_address, one)


def _server(file: Path) -> Any:
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = str(file)
    p.hostnames, p.port = ["127.0.0.1"], 0
    p.n_ctx, p.n_parallel = 1024, 1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.warmup = False
    p.verbosity = 1
    return xllamacpp.Server(p)


def _ask(address: str, one: dict[str, Any]) -> Answer:
    body = {"prompt": one["prompt"], "n_predict": len(one["answer"]), "temperature": 0, "return_tokens": True}
    body |= {"n_probs": 2, "cache_prompt": False}
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=300) as response:
        answer = json.load(response)
    tops = [token["top_logprobs"] for token in answer["completion_probabilities"]]
    return Answer(answer["tokens"], min(first["logprob"] - second["logprob"] for first, second in tops))


if __name__ == "__main__":
    sys.exit(main())
