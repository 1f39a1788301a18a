"""The embedded engine as a program: llama.cpp's HTTP server on a Unix socket.

    python -m deepseek_api_compat.engines.llamacpp_server --model FILE --socket PATH.sock --lifeline FD

It loads the model, serves until SIGTERM and then exits with 0 at once; what it was generating is lost,
so drain before. While the model loads, native code holds the process and SIGTERM ends it by default action.
A model that can't be read, or a wrong command line, is one sentence on stderr and exit code 2.

How the context is shared out: `--context` is tokens for each slot, and each slot owns its part of the KV
cache. llama.cpp could pool it (`kv_unified`), but when the pool runs full it ends requests that were
promised room. The memory is taken and zeroed at the start (SmolLM2-135M: 23 kB a token, so 1.5 GB for 8
slots of 8192, and a second more to start), hence the default: the model's own context, up to 8192 a slot
and 32768 in all, but at least 2048 a slot.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import xllamacpp

from deepseek_api_compat.engines.lifeline import die_with_parent
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import gguf

SLOT_CONTEXT = 8192
TOTAL_CONTEXT = 32768
LEAST_CONTEXT = 2048
# Prompt tokens in one step. Between steps the engine decodes the other slots' tokens and drops requests whose
# clients have left; on a CPU the 2048 of llama.cpp would let both wait for seconds. 64 costs 5 % of speed.
CPU_BATCH = 64
# A text to embed must fit into one step, and a step's buffers hold the vocabulary for each of its tokens.
EMBEDDING_BATCH = 2048
WARNINGS = 2  # llama.cpp's log level: errors and warnings; the next one logs every request


def main() -> None:
    options = _parse(sys.argv[1:])
    if options.lifeline is not None:
        die_with_parent(options.lifeline)
    try:
        header = gguf.inspect(options.model)
    except ModelError as error:
        _refuse(str(error))
    context = options.context or default_context(header.context_length, options.slots)
    # A socket that a killed predecessor left behind; the directory is ours alone.
    options.socket.unlink(missing_ok=True)
    try:
        server = xllamacpp.Server(parameters(options, context))
    except RuntimeError:
        # The engine has logged the cause: out of memory, an architecture that it doesn't know, ...
        _refuse(f"llama.cpp can't serve {options.model}; its messages are above.")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    print(f"serving {options.model} on {server.listening_address}", file=sys.stderr, flush=True)
    while True:
        signal.pause()


def default_context(trained: int | None, slots: int) -> int:
    """Tokens for each slot when none are asked for; `trained` is the model's own context length."""
    shared = max(TOTAL_CONTEXT // slots, LEAST_CONTEXT)
    return min(trained or SLOT_CONTEXT, SLOT_CONTEXT, shared)


def default_threads() -> int:
    """One less than there are cores, for the gateway and everybody else.

    After each operation llama.cpp's threads wait for the slowest one, spinning: one that has to share its
    core holds them all up (two threads on two busy cores: 3 tokens/s; one thread: 30).
    """
    return max(1, cores() - 1)


def cores() -> int:
    """Physical cores that this process may run on: hyperthreads slow llama.cpp down."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    allowed = os.sched_getaffinity(0)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(topology.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        return len(allowed)


def parameters(options: argparse.Namespace, context: int) -> Any:
    """llama.cpp's settings; what is not named here keeps its default."""
    p = xllamacpp.CommonParams()
    p.model.path = str(options.model)
    p.hostnames = [str(options.socket)]
    p.n_parallel = options.slots
    p.n_ctx = context * options.slots
    p.n_gpu_layers = options.gpu_layers
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = options.threads or default_threads()
    if not _has_gpu():
        p.fit_params = False  # measures what fits into a GPU by loading the model twice
        p.n_batch = p.n_ubatch = CPU_BATCH
    if options.embedding:
        p.embedding = True
        p.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        p.n_batch = p.n_ubatch = min(context, EMBEDDING_BATCH)
    # Each request in flight holds a thread, also while it waits for a slot: leave some for health checks
    # and tokenising, and for requests whose clients left a moment ago.
    p.n_threads_http = 2 * options.slots + 16
    p.warmup = False  # the supervisor's first question is one
    p.cache_prompt = True  # a slot keeps the tokens of its last request, for the next with the same beginning
    p.cache_idle_slots = False
    p.cache_ram_mib = 0  # no second cache of prompts in RAM (its default is 8 GiB)
    p.sse_ping_interval = -1  # the gateway sends its own keep-alives
    p.ui = False
    p.cors_origins = "localhost"  # nobody's browser reaches a Unix socket; `*` makes it warn
    p.verbosity = WARNINGS
    return p


def _has_gpu() -> bool:
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return any(device["type"] != cpu for device in xllamacpp.get_device_info())


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llamacpp_server", description="llama.cpp on a Unix socket.")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--socket", type=Path, required=True, help="ends in .sock, at most 107 bytes")
    parser.add_argument("--slots", type=int, default=8, help="requests at the same time")
    parser.add_argument("--context", type=int, default=0, help="tokens for each slot; 0: see above")
    parser.add_argument("--threads", type=int, default=0, help="0: physical cores but one")
    parser.add_argument("--gpu-layers", type=int, default=-1, help="layers on a GPU; -1: as many as fit")
    parser.add_argument("--embedding", action="store_true", help="serve embeddings")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="exit when this descriptor is at its end")
    return parser.parse_args(arguments)


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(2)  # not sys.exit: llama.cpp's threads may not join


if __name__ == "__main__":
    main()
