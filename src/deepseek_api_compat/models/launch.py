"""How a plan is launched: each node's command line, and the same as settings of the service.

Options of vLLM: `vllm serve --help` (0.32) and its guide to DeepSeek-V3; of SGLang: its page on DeepSeek V3.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from deepseek_api_compat.config import EngineSettings, ModelSettings
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.models.plan import BATCHED_TOKENS, UTILISATION, Plan, Use

HEAD = "HEAD_ADDRESS"  # stands for the first node's address until it is given
MASTER_PORT = 29501
VLLM = ("vllm", "serve")
SGLANG = ("python3", "-m", "sglang.launch_server")
VLLM_GRAMMARS = '{"backend": "guidance"}'
VLLM_MTP = '{"method": "mtp", "num_speculative_tokens": 1}'


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What `deepseek-api plan --json` writes and `serve --plan` reads.

    nodes: the command line of each node's engine, the first node's first. models: what the first node's
    service has as `[[models]]`.
    """

    plan: Plan
    head: str
    nodes: list[list[str]]
    models: list[ModelSettings]


def launch(plan: Plan, head: str = HEAD) -> Launch:
    """The commands and settings of a plan; `head`: the first node's address, as the others reach it."""
    settings = engine_settings(plan, head)
    nodes = [command(plan, settings, head, rank) for rank in range(plan.nodes)]
    model = ModelSettings(name=plan.model, engines=[settings])
    if plan.format != "auto":
        model = msgspec.convert({**msgspec.to_builtins(model), "format": plan.format}, ModelSettings)
    return Launch(plan=plan, head=head, nodes=nodes, models=[model])


def read_launch(file: Path) -> Launch:
    """Of a file that `plan --json` wrote. Raises ConfigError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Launch)
    except OSError as error:
        raise ConfigError(f"Can't read the plan {file}: {error.strerror}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a plan of 'deepseek-api plan --json': {error}.") from None


def node_command(found: Launch, rank: int) -> list[str]:
    """What a node runs. Raises ConfigError for a rank that it doesn't have, or without the head's address."""
    if not 0 <= rank < len(found.nodes):
        raise ConfigError(f"The plan has nodes 0 to {len(found.nodes) - 1}, and no {rank}.")
    if len(found.nodes) > 1 and found.head == HEAD:
        raise ConfigError("The plan lacks the first node's address: make it with --head ADDRESS.")
    return found.nodes[rank]


def engine_settings(plan: Plan, head: str) -> EngineSettings:
    """The first node's engine, as the service starts it."""
    shared = {"path": plan.path, "batch_size": plan.concurrency, "context": plan.context}
    if plan.engine == "llamacpp":
        return msgspec.convert({"kind": "llamacpp", **shared, **_llamacpp(plan)}, EngineSettings)
    if plan.engine == "vllm":
        more: dict[str, object] = {"command": [*VLLM], "tensor_parallel": plan.layout.tensor}
        more["args"] = [*_vllm(plan), *_vllm_nodes(plan, head, 0)]
    else:
        more = {"command": [*SGLANG], "tensor_parallel": sglang_ranks(plan)}
        more["args"] = [*_sglang(plan), *_sglang_nodes(plan, head, 0)]
    return msgspec.convert({"kind": plan.engine, **shared, **more}, EngineSettings)


def command(plan: Plan, settings: EngineSettings, head: str, rank: int) -> list[str]:
    """A node's whole command line. The first node's server listens on 127.0.0.1:8001, for a service there."""
    if plan.engine == "llamacpp":
        size = plan.context * plan.concurrency
        named = ["--model", plan.path, "--ctx-size", str(size), "--parallel", str(plan.concurrency)]
        place = ["--host", "127.0.0.1", "--port", "8001"]
        return ["llama-server", *named, *place, *settings.args]
    place = ["--host", "127.0.0.1", "--port", "8001"]
    if plan.engine == "vllm":
        words = [*VLLM, plan.path, *_option("--tensor-parallel-size", plan.layout.tensor)]
        words += ["--max-model-len", str(plan.context), "--structured-outputs-config", VLLM_GRAMMARS]
        words += ["--enable-prompt-tokens-details", *_vllm(plan), *_vllm_nodes(plan, head, rank)]
        return [*words, *(place if rank == 0 else ["--headless"])]
    words = [*SGLANG, "--model-path", plan.path, *_option("--tp-size", sglang_ranks(plan))]
    words += ["--context-length", str(plan.context), "--max-running-requests", str(plan.concurrency)]
    words += ["--grammar-backend", "llguidance", *_sglang(plan), *_sglang_nodes(plan, head, rank)]
    return [*words, *(place if rank == 0 else [])]


def sglang_ranks(plan: Plan) -> int:
    """Its --tp-size counts all GPUs; data parallel attention divides them again."""
    return plan.layout.tensor * plan.layout.data


def toml(models: Iterable[ModelSettings]) -> str:
    """As `[[models]]` of a configuration file, without what is the default."""
    lines: list[str] = []
    for model in models:
        lines += ["[[models]]", *_values(model, ModelSettings(name=""), skip="engines"), ""]
        for engine in model.engines:
            lines += ["  [[models.engines]]"]
            lines += [f"  {line}" for line in _values(engine, EngineSettings(kind="openai"))]
    return "\n".join(lines) + "\n"


def _values(struct: msgspec.Struct, default: msgspec.Struct, skip: str = "") -> list[str]:
    """`key = value` lines. Text, numbers and lists of text are the same in TOML as in JSON."""
    lines = []
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if name != skip and value != getattr(default, name):
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")
    return lines


def _option(name: str, value: int) -> list[str]:
    return [name, str(value)] if value > 1 else []


def _vllm(plan: Plan) -> list[str]:
    """What all nodes have in common, besides what the service writes itself."""
    layout = plan.layout
    words = [*_option("--pipeline-parallel-size", layout.pipeline)]
    words += [*_option("--data-parallel-size", layout.data)]
    if layout.tensor * layout.data > 1 and any(use.name == "routed experts" for use in plan.uses):
        words.append("--enable-expert-parallel")
    words += ["--gpu-memory-utilization", str(UTILISATION)]
    words += ["--max-num-batched-tokens", str(BATCHED_TOKENS)]
    # It counts for each data parallel rank.
    words += ["--max-num-seqs", str(-(-plan.concurrency // layout.data))]
    if plan.fp8_cache:
        words += ["--kv-cache-dtype", "fp8"]
    if plan.convert:
        words += ["--quantization", "fp8"]
    if plan.quant == "int8" and plan.gpu == "ascend-910b":
        words += ["--quantization", "ascend"]
    if plan.format == "v3.2":
        words += ["--tokenizer-mode", "deepseek_v32"]
    if plan.mtp:
        words += ["--speculative-config", VLLM_MTP]
    return words


def _vllm_nodes(plan: Plan, head: str, rank: int) -> list[str]:
    if plan.nodes == 1:
        return []
    if plan.layout.data == 1:
        words = ["--nnodes", str(plan.nodes), "--node-rank", str(rank)]
        return [*words, "--master-addr", head, "--master-port", str(MASTER_PORT)]
    words = ["--data-parallel-size-local", str(plan.count), "--data-parallel-address", head]
    words += ["--data-parallel-rpc-port", str(MASTER_PORT)]
    return [*words, *(["--data-parallel-start-rank", str(rank * plan.count)] if rank else [])]


def _sglang(plan: Plan) -> list[str]:
    layout = plan.layout
    words = []
    if layout.attention_data:
        words += ["--enable-dp-attention", "--dp-size", str(layout.data)]
    words += ["--mem-fraction-static", f"{static_fraction(plan):.2f}"]
    words += ["--chunked-prefill-size", str(BATCHED_TOKENS)]
    if plan.fp8_cache:
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    if plan.convert:
        words += ["--quantization", "fp8"]
    if plan.mtp:
        words += ["--speculative-algorithm", "EAGLE"]
    return words


def static_fraction(plan: Plan) -> float:
    """The share of a GPU for weights and KV cache together, which is what SGLang is told; rounded down."""
    moving = sum(use.bytes for use in plan.uses if not _static(use))
    return int(100 * (plan.budget - moving) / plan.memory) / 100


def _static(use: Use) -> bool:
    return not use.name.endswith(("(estimated)", "(assumed)"))


def _sglang_nodes(plan: Plan, head: str, rank: int) -> list[str]:
    if plan.nodes == 1:
        return []
    words = ["--nnodes", str(plan.nodes), "--node-rank", str(rank)]
    return [*words, "--dist-init-addr", f"{head}:{MASTER_PORT}"]


def _llamacpp(plan: Plan) -> dict[str, object]:
    """Experts in RAM need a llama-server, since the embedded engine has no option for them."""
    if any(use.place == "RAM" for use in plan.uses) and plan.gpu:
        return {"command": ["llama-server"], "args": ["--cpu-moe", "--n-gpu-layers", "999"]}
    return {"command": ["llama-server"], "args": ["--n-gpu-layers", "999"]} if plan.gpu else {}
