"""Launch plans: where the bytes of a model go on given GPUs, what fits beside them, and how to split it.

All from arithmetic: nothing here has been measured on the GPUs. What is assumed and not computed is named
(`PROCESS_BYTES`, `activations`) and said in docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models.architecture import Architecture, Known, Part
from deepseek_api_compat.models.gpus import GB, GPUS, Gpu

EngineKind = Literal["vllm", "sglang", "llamacpp"]
Quantisation = Literal["fp8", "bf16", "int8", "int4", "q8_0", "q4_k_m"]

GIB = 1024**3
UTILISATION = 0.9  # of a GPU's memory; the engines are told
# What a process holds besides weights and activations: CUDA context, NCCL's buffers, graphs. An assumption.
PROCESS_BYTES = 3 * GIB
BATCHED_TOKENS = 8192  # computed at once; the engines are told, since their defaults differ from GPU to GPU
HOST_BYTES = 8 * GIB  # of RAM left to the system, to llama.cpp's compute buffers and to this service
TYPICAL_TOKENS = 4096  # of a request, where the question doesn't say: for the number of slots
LEAST_TOKENS = 4096  # of context; a plan with less is no use
MOST_SLOTS = 256

# Bits a quantised parameter takes. FP8: an FP32 scale for 128 x 128. INT4: AWQ, 20 bits for a group of 128.
# GGUF: those of the published files, 404 and 713 GB for 671.03 * 10^9 parameters, all of them counted.
BITS: dict[Quantisation, float] = {
    "bf16": 16,
    "fp8": 8 + 32 / (128 * 128),
    "int8": 8 + 32 / (128 * 128),
    "int4": 4 + 20 / 128,
    "q8_0": 8.5,
    "q4_k_m": 404 * 8 / 671.026,
}
GGUF = frozenset({"q8_0", "q4_k_m"})


class DoesNotFit(ModelError):
    """What was asked for can't be had; the message has the numbers, and what would fit.

    requests: how many of the size that was asked for do fit; -1 if the weights already don't.
    """

    def __init__(self, message: str, requests: int = -1) -> None:
        super().__init__(message)
        self.requests = requests


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is asked for. count: GPUs of a node. ram: its bytes. context, concurrency: 0 for free."""

    model: Known
    gpu: Gpu | None
    count: int = 8
    nodes: int = 1
    ram: int = 0
    engine: Literal["auto", "vllm", "sglang", "llamacpp"] = "auto"
    quant: Quantisation | None = None
    fp8_cache: bool = False
    context: int = 0
    concurrency: int = 0
    prefer: Literal["latency", "throughput"] = "latency"
    mtp: bool = False
    path: str | None = None


class Layout(msgspec.Struct, frozen=True):
    """How ranks share a model: tensor x pipeline of them for each of `data` groups, each with its own batch.

    attention_data: SGLang's data parallel attention, where the same ranks form the tensor parallel group of
    all else; `tensor` is then what attention is split into, `data` the number of its copies.
    """

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    attention_data: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.data * self.pipeline

    def ways(self, part: Part, kv_heads: int) -> int:
        """Among how many ranks of a pipeline stage a part is divided."""
        if part.split == "expert":
            return self.tensor * self.data
        if part.split == "kv":
            return min(self.tensor, kv_heads)
        return self.tensor if part.split == "tensor" else 1

    def said(self, experts: int) -> str:
        words = [f"tensor parallel {self.tensor}"] if self.tensor > 1 else []
        words += [f"pipeline parallel {self.pipeline}"] if self.pipeline > 1 else []
        if self.data > 1:
            words.append(f"data parallel {'attention ' if self.attention_data else ''}{self.data}")
        if experts and self.tensor * self.data > 1:
            words.append(f"routed experts over {self.tensor * self.data} GPUs")
        return ", ".join(words) or "one GPU"


class Use(msgspec.Struct, frozen=True):
    """Bytes of one thing, on one GPU or in a node's RAM."""

    name: str
    bytes: int
    place: Literal["GPU", "RAM"] = "GPU"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. Bytes are those of the fullest GPU; tokens those of one data parallel rank's KV cache.

    convert: whether the engine makes the quantised weights while it loads others.
    """

    model: str
    path: str
    format: str
    engine: EngineKind
    quant: Quantisation
    fp8_cache: bool
    convert: bool
    mtp: bool
    gpu: str | None
    count: int
    nodes: int
    layout: Layout
    parameters: int
    active: int
    uses: list[Use]
    memory: int
    budget: int
    cached: int
    tokens: int
    context: int
    concurrency: int
    longest: int
    notes: list[str]

    @property
    def free(self) -> int:
        """Bytes of the budget that are left for the KV cache."""
        return self.budget - sum(use.bytes for use in self.uses if use.place == self.cache_place)

    @property
    def cache_place(self) -> Literal["GPU", "RAM"]:
        return "GPU" if self.gpu else "RAM"


def make_plan(question: Question) -> Plan:
    """The first that fits, of those usual for the engine. Raises DoesNotFit: why not, and what would fit."""
    try:
        return _first(question)
    except DoesNotFit as reason:
        raise DoesNotFit(" ".join([str(reason), *_instead(question)])) from None


def _first(question: Question) -> Plan:
    reasons: list[DoesNotFit] = []
    for engine in _engines(question):
        for quant in _quantisations(question, engine):
            for layout in _layouts(question, engine):
                try:
                    return _plan(question, engine, quant, layout)
                except DoesNotFit as reason:
                    reasons.append(reason)
    if not reasons:
        raise DoesNotFit("Multi-token prediction is not planned over pipeline stages.")
    # The weights may fit one way with room for few requests, and another way not at all: tell the best.
    raise max(reasons, key=lambda reason: reason.requests)


def weights(question: Question, quant: Quantisation, layout: Layout, stage: int) -> dict[str, int]:
    """Bytes of each kind of part on one GPU of a pipeline stage."""
    architecture = question.model.architecture
    found: dict[str, int] = {}
    for part in _stage_parts(architecture, layout, stage):
        size = part_bytes(part, quant) // layout.ways(part, architecture.kv_heads)
        found[part.name] = found.get(part.name, 0) + size
    if architecture.latent and quant not in GGUF:
        layers = len(stage_layers(architecture.num_hidden_layers, layout.pipeline)[stage])
        found["attention, absorbed"] = 2 * architecture.absorbed() * layers // layout.tensor
    if question.mtp:
        parts = architecture.prediction()
        sizes = (part_bytes(part, quant) // layout.ways(part, architecture.kv_heads) for part in parts)
        found["multi-token prediction"] = sum(sizes)
    return found


def part_bytes(part: Part, quant: Quantisation) -> int:
    bits = BITS[quant] if part.quantised or quant in GGUF else BITS["bf16"]
    return int(part.parameters * bits / 8)


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage, as vLLM divides them: what is left over goes to all but the last."""
    sizes = [layers // stages] * stages
    for late in range(2, layers % stages + 2):
        sizes[-late] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def activations(architecture: Architecture, layout: Layout) -> int:
    """Bytes at the peak of a step of BATCHED_TOKENS: estimated by the largest arrays there at once.

    Eight arrays of the hidden size, the routed experts' inputs and outputs for every choice (or the dense
    FFN's), in BF16; and logits of MOST_SLOTS tokens, in FP32, twice.
    """
    hidden = architecture.hidden_size
    if architecture.experts:
        expert = architecture.moe_intermediate_size or architecture.intermediate_size
        wide = architecture.active_experts * (hidden + 2 * expert)
    else:
        wide = 2 * architecture.intermediate_size // layout.tensor
    return BATCHED_TOKENS * 2 * (8 * hidden + wide) + MOST_SLOTS * architecture.vocab_size * 4 * 2


def _stage_parts(architecture: Architecture, layout: Layout, stage: int) -> Iterator[Part]:
    last = stage == layout.pipeline - 1
    if stage == 0:
        yield architecture.embedding()
    if last and (not architecture.tie_word_embeddings or layout.pipeline > 1):
        yield architecture.embedding()
    if last:
        yield architecture.final_norm()
    for layer in stage_layers(architecture.num_hidden_layers, layout.pipeline)[stage]:
        yield from architecture.layer(layer)


def _engines(question: Question) -> list[EngineKind]:
    if question.engine != "auto":
        return [question.engine]
    if question.gpu is None or question.quant in GGUF:
        return ["llamacpp"]
    return ["vllm", "llamacpp"] if question.ram and not question.quant else ["vllm"]


def _quantisations(question: Question, engine: EngineKind) -> list[Quantisation]:
    """Those to try, best first. Raises DoesNotFit for one that the engine or the GPU can't compute with."""
    if engine == "llamacpp":
        if question.quant not in (None, *GGUF):
            raise DoesNotFit(f"llama.cpp takes GGUF files: --quant q4_k_m or q8_0, not {question.quant}.")
        return [question.quant] if question.quant else ["q4_k_m"]
    gpu = question.gpu
    if gpu is None:
        raise DoesNotFit(f"{engine} needs GPUs here; on a CPU use --engine llamacpp.")
    if question.quant in GGUF:
        raise DoesNotFit(f"{engine} does not take {question.quant} files here; llama.cpp does.")
    if question.quant == "fp8" and not gpu.fp8:
        raise DoesNotFit(
            f"{gpu.title} has no FP8 arithmetic; it needs other weights: --quant bf16 (twice the size), "
            "int8 or int4 (weights of 4 bits, arithmetic of 16)."
        )
    if question.quant:
        return [question.quant]
    if question.model.architecture.native == "fp8":
        return ["fp8"] if gpu.fp8 else ["bf16", "int8", "int4"]
    return ["bf16"]


def _layouts(question: Question, engine: EngineKind) -> list[Layout]:
    """What is usual for an engine; the first is for few requests, the second for many."""
    count, nodes = question.count, question.nodes
    if engine == "llamacpp":
        return [Layout()]
    if engine == "sglang":
        found = [Layout(tensor=count * nodes)]
        copies = Layout(data=count * nodes, attention_data=True)
    else:
        found = [Layout(tensor=count, pipeline=nodes)]
        copies = Layout(data=count * nodes)
    # Copies of attention pay off where its cache can't be split: MLA's. They need experts to share.
    if question.model.architecture.latent and question.model.architecture.experts and copies.data > 1:
        found.append(copies)
    if question.mtp:
        found = [layout for layout in found if layout.pipeline == 1]
    return found[::-1] if question.prefer == "throughput" else found


def _plan(question: Question, engine: EngineKind, quant: Quantisation, layout: Layout) -> Plan:
    architecture = question.model.architecture
    if engine == "llamacpp":
        uses, memory, budget, cached, tokens = _on_llamacpp(question, quant)
    else:
        uses, memory, budget, cached, tokens = _on_gpus(question, quant, layout)
    longest = min(tokens, architecture.max_position_embeddings)
    context, concurrency = _ask(
        question, tokens * layout.data, longest, layout.data, paged=engine != "llamacpp"
    )
    path = question.path or _path(question, engine, quant)
    return Plan(
        model=question.model.name,
        path=path,
        format=question.model.format,
        engine=engine,
        quant=quant,
        fp8_cache=question.fp8_cache,
        convert=quant == "fp8" and architecture.native != "fp8",
        mtp=question.mtp,
        gpu=question.gpu.name if question.gpu else None,
        count=question.count if question.gpu else 0,
        nodes=question.nodes,
        layout=layout,
        parameters=sum(part.parameters for part in architecture.model()),
        active=architecture.active(),
        uses=uses,
        memory=memory,
        budget=budget,
        cached=cached,
        tokens=tokens,
        context=context,
        concurrency=concurrency,
        longest=longest,
        notes=list(_notes(question, engine, quant, path)),
    )


Room = tuple[list[Use], int, int, int, int]  # uses, memory, budget, bytes a cached token, tokens


def _on_gpus(question: Question, quant: Quantisation, layout: Layout) -> Room:
    """Of the pipeline stage with the least room for tokens."""
    architecture, gpu = question.model.architecture, question.gpu
    assert gpu is not None
    _check_split(architecture.num_attention_heads, "attention heads", layout.tensor)
    _check_split(architecture.experts, "experts", layout.tensor * layout.data)
    if layout.pipeline > architecture.num_hidden_layers:
        raise DoesNotFit(
            f"{architecture.num_hidden_layers} layers make no {layout.pipeline} pipeline stages."
        )
    budget = int(gpu.memory * UTILISATION)
    stages = []
    for stage, layers in enumerate(stage_layers(architecture.num_hidden_layers, layout.pipeline)):
        uses = [Use(name, size) for name, size in weights(question, quant, layout, stage).items()]
        uses.append(Use("activations (estimated)", activations(architecture, layout)))
        uses.append(Use("process, graphs (assumed)", PROCESS_BYTES))
        cached = _cached(question, layout, len(layers))
        stages.append((_tokens(budget, uses, cached), uses, cached))
    tokens, uses, cached = min(stages, key=lambda stage: stage[0])
    if tokens < LEAST_TOKENS:
        need = sum(use.bytes for use in uses) + LEAST_TOKENS * cached
        raise DoesNotFit(
            f"{question.model.name} in {quant.upper()} does not fit on {question.nodes * question.count} x "
            f"{gpu.title} with {layout.said(architecture.experts)}: it needs at least {need / 1e9:.1f} GB of "
            f"each GPU, with {LEAST_TOKENS:,} tokens of context, and {UTILISATION:.0%} of one are "
            f"{budget / 1e9:.1f} GB."
        )
    return uses, gpu.memory, budget, cached, tokens


def _check_split(things: int, name: str, gpus: int) -> None:
    if things % gpus:
        raise DoesNotFit(f"{things} {name} can't be split evenly among {gpus} GPUs.")


def _cached(question: Question, layout: Layout, layers: int) -> int:
    """Bytes on one GPU for a token. MLA's latent vector is on every rank; other heads are shared."""
    architecture = question.model.architecture
    layers += architecture.num_nextn_predict_layers if question.mtp else 0
    return architecture.cached(fp8=question.fp8_cache) * layers // min(layout.tensor, architecture.kv_heads)


def _tokens(budget: int, uses: Iterable[Use], cached: int) -> int:
    return max(0, budget - sum(use.bytes for use in uses)) // cached


def _on_llamacpp(question: Question, quant: Quantisation) -> Room:
    """All in RAM; all in GPUs; or the routed experts in RAM and the rest in GPUs."""
    architecture, gpu = question.model.architecture, question.gpu
    if question.nodes > 1:
        raise DoesNotFit("A plan with llama.cpp is for one node.")
    if gpu is None and not question.ram:
        raise DoesNotFit("How much memory there is must be said: --ram GB.")
    if question.fp8_cache:
        raise DoesNotFit("llama.cpp's cache has no FP8: leave --kv-dtype out.")
    sizes: dict[str, int] = {}
    for part in architecture.model():
        sizes[part.name] = sizes.get(part.name, 0) + part_bytes(part, quant)
    cached = _llamacpp_cached(architecture)
    ram = max(0, question.ram - HOST_BYTES)
    if gpu is None:
        uses = [Use(name, size, "RAM") for name, size in sizes.items()]
        return _checked(question, quant, uses, question.ram, ram, cached, "RAM")
    # Its layers are dealt out to the GPUs, so together they are one memory.
    memory = gpu.memory * question.count
    budget = int(memory * UTILISATION)
    extra = Use("activations, process (assumed)", PROCESS_BYTES * question.count)
    uses = [*(Use(name, size) for name, size in sizes.items()), extra]
    if _tokens(budget, uses, cached) < LEAST_TOKENS and sizes.get("routed experts", ram + 1) <= ram:
        experts = Use("routed experts", sizes.pop("routed experts"), "RAM")
        uses = [*(Use(name, size) for name, size in sizes.items()), extra]
        return _checked(question, quant, [*uses, experts], memory, budget, cached, "GPU")
    return _checked(question, quant, uses, memory, budget, cached, "GPU")


def _checked(
    question: Question, quant: str, uses: list[Use], memory: int, budget: int, cached: int, place: str
) -> Room:
    needed = [use for use in uses if use.place == place]
    tokens = _tokens(budget, needed, cached)
    if tokens < LEAST_TOKENS:
        need = sum(use.bytes for use in needed) + LEAST_TOKENS * cached
        raise DoesNotFit(
            f"{question.model.name} in {quant.upper()} needs at least {need / 1e9:.1f} GB of "
            f"{place if place == 'RAM' else 'GPU memory'} with {LEAST_TOKENS:,} tokens of context, and "
            f"{budget / 1e9:.1f} GB of {memory / 1e9:.1f} GB can be used."
        )
    return uses, memory, budget, cached, tokens


def _llamacpp_cached(architecture: Architecture) -> int:
    """In 16 bits. Of MLA it may keep the latent vector twice, as key and as value: counted so, to be safe."""
    layer = architecture.cached() + 2 * (architecture.kv_lora_rank or 0)
    return layer * architecture.num_hidden_layers


def _ask(question: Question, room: int, longest: int, ranks: int, *, paged: bool) -> tuple[int, int]:
    """Context and concurrency. room: tokens of the caches of all `ranks` together. Raises DoesNotFit."""
    most = question.model.architecture.max_position_embeddings
    if question.context > most:
        raise DoesNotFit(
            f"{question.model.name} has positions for {most:,} tokens, not {question.context:,}."
        )
    context = question.context or longest
    if context > longest:
        raise DoesNotFit(f"A request of {context:,} tokens does not fit: at most {longest:,} do.", 0)
    if not question.concurrency:
        # llama.cpp gives each slot its whole context from the start; the others share pages of one cache.
        size = context if not paged or question.context else min(TYPICAL_TOKENS, longest)
        return context, max(1, min(room // ranks // size * ranks, MOST_SLOTS))
    if question.context and -(-question.concurrency // ranks) * context > room // ranks:
        fit = room // ranks // context * ranks
        raise DoesNotFit(
            f"{question.concurrency} requests of {context:,} tokens each do not fit: {fit} do.", fit
        )
    if not question.context:
        context = min(longest, room // ranks // -(-question.concurrency // ranks))
        if context < LEAST_TOKENS:
            raise DoesNotFit(
                f"{question.concurrency} requests at a time leave {context:,} tokens for each: too few.", 0
            )
    return context, question.concurrency


def _path(question: Question, engine: EngineKind, quant: Quantisation) -> str:
    """Where the weights are: the published ones, or a name that the reader has to replace."""
    model = question.model
    if engine == "llamacpp":
        return f"{model.name}-{quant.upper()}.gguf"
    if quant in ("int4", "int8") or (quant == "bf16" and model.architecture.native == "fp8"):
        return f"{model.name}-{quant}"
    return model.path


def _notes(question: Question, engine: EngineKind, quant: Quantisation, path: str) -> Iterator[str]:
    native, gpu = question.model.architecture.native, question.gpu
    if native == "fp8" and gpu is not None and not gpu.fp8 and engine != "llamacpp":
        yield f"{gpu.title} has no FP8 arithmetic, so this is for weights in {quant.upper()}."
    if not question.path and path != question.model.path:
        yield f"{path} stands for weights in {quant.upper()} that you must make or find: --path names them."
    if engine == "llamacpp" and question.model.architecture.latent:
        yield "llama.cpp's cache is counted with the latent vector kept twice; some versions need half."
    if engine == "vllm" and gpu is not None and gpu.maker == "Huawei":
        yield "On Ascend vLLM needs the plug-in vllm-ascend."
    if quant == "fp8" and native != "fp8" and engine != "llamacpp":
        yield "The published weights are not FP8: the engine converts them while it loads."


def _instead(question: Question) -> list[str]:
    """A sentence on what would fit, of the same context and concurrency; none if nothing usual does."""
    if question.gpu is None:
        return []
    found = []
    for nodes in (2, 4, 8):
        if nodes > question.nodes and _possible(msgspec.structs.replace(question, nodes=nodes)):
            found.append(f"{nodes} nodes of {question.count} x {question.gpu.title}")
            break
    for quant in ("int8", "int4"):
        other = msgspec.structs.replace(question, quant=quant)
        if question.quant != quant and _possible(other):
            found.append(f"{quant.upper()} weights on these GPUs (--quant {quant})")
            break
    mixed = msgspec.structs.replace(question, ram=512 * GB, nodes=1)
    if not question.ram and not question.quant and _possible(mixed):
        found.append("Q4_K_M on llama.cpp, with the experts in 512 GB of RAM (--ram 512)")
    for gpu in GPUS:
        other = msgspec.structs.replace(question, gpu=gpu, count=8, nodes=1)
        if gpu.memory >= question.gpu.memory and other != question and (plan := _possible(other)):
            found.append(f"8 x {gpu.title} ({plan.quant.upper()})")
    return [f"What would fit: {'; '.join(found[:5])}."] if found else []


def _possible(question: Question) -> Plan | None:
    try:
        return _first(question)
    except DoesNotFit:
        return None
