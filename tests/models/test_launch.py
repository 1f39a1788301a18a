"""Command lines and settings of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_api_compat import config
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.models.architecture import find_model
from deepseek_api_compat.models.gpus import GB, find_gpu
from deepseek_api_compat.models.launch import HEAD, Launch, launch, node_command, read_launch, toml
from deepseek_api_compat.models.plan import Question, make_plan


def launched(gpu: str | None = "h200", model: str = "deepseek-v3", head: str = HEAD, **more: Any) -> Launch:
    question = Question(model=find_model(model), gpu=find_gpu(gpu) if gpu else None, **more)
    return launch(make_plan(question), head)


def values(command: list[str]) -> dict[str, str]:
    """What follows each option; "" for a switch."""
    return {
        word: after if not after.startswith("--") else ""
        for word, after in zip(command, [*command[1:], "--"], strict=True)
        if word.startswith("--")
    }


def test_one_node_of_8_h200_is_vllms_published_command() -> None:
    [command] = launched().nodes
    assert command[:3] == ["vllm", "serve", "deepseek-ai/DeepSeek-V3"]
    given = values(command)
    assert given["--tensor-parallel-size"] == "8"
    assert given["--enable-expert-parallel"] == ""
    assert (given["--max-model-len"], given["--gpu-memory-utilization"]) == ("163840", "0.9")
    assert given["--max-num-batched-tokens"] == "8192"  # what room was left for
    assert not {"--nnodes", "--headless", "--quantization", "--kv-cache-dtype"} & set(given)


def test_many_requests_on_vllm_are_data_parallel() -> None:
    found = launched(prefer="throughput", concurrency=256)
    given = values(found.nodes[0])
    assert given["--data-parallel-size"] == "8"
    assert "--tensor-parallel-size" not in given
    assert given["--max-num-seqs"] == "32"  # of each rank
    assert found.models[0].engines[0].batch_size == 256


def test_two_nodes_of_vllm_differ_in_rank_and_head() -> None:
    head, worker = launched("h100-80", nodes=2, head="192.0.2.1").nodes
    first, second = values(head), values(worker)
    shared = {"--tensor-parallel-size": "8", "--pipeline-parallel-size": "2", "--nnodes": "2"}
    shared |= {"--master-addr": "192.0.2.1"}
    assert shared.items() <= first.items()
    assert shared.items() <= second.items()
    assert (first["--node-rank"], second["--node-rank"]) == ("0", "1")
    assert "--headless" in second
    assert "--headless" not in first
    assert "--port" in first
    assert "--port" not in second


def test_two_data_parallel_nodes_of_vllm() -> None:
    head, worker = launched("h100-80", nodes=2, prefer="throughput", head="192.0.2.1").nodes
    shared = {"--data-parallel-size": "16", "--data-parallel-size-local": "8"}
    shared |= {"--data-parallel-address": "192.0.2.1"}
    assert shared.items() <= values(head).items()
    assert shared.items() <= values(worker).items()
    assert values(worker)["--data-parallel-start-rank"] == "8"
    assert "--data-parallel-start-rank" not in values(head)


def test_two_nodes_of_sglang() -> None:
    head, worker = launched("h100-80", nodes=2, engine="sglang", head="192.0.2.1").nodes
    for rank, command in enumerate((head, worker)):
        given = values(command)
        assert command[:3] == ["python3", "-m", "sglang.launch_server"]
        assert (given["--tp-size"], given["--nnodes"], given["--node-rank"]) == ("16", "2", str(rank))
        assert given["--dist-init-addr"] == "192.0.2.1:29501"
        assert "--quantization" not in given  # the published weights are FP8 already


def test_sglang_is_told_the_share_of_weights_and_cache_together() -> None:
    """Of 150.75 GB 90 % are 135.68; less 2.68 of activations and 3.22 of the process 129.78: 0.86."""
    assert values(launched(engine="sglang").nodes[0])["--mem-fraction-static"] == "0.86"


def test_options_that_depend_on_the_model_and_the_question() -> None:
    assert values(launched(model="deepseek-v3.2").nodes[0])["--tokenizer-mode"] == "deepseek_v32"
    given = values(launched(mtp=True, fp8_cache=True).nodes[0])
    assert msgspec.json.decode(given["--speculative-config"])["method"] == "mtp"
    assert given["--kv-cache-dtype"] == "fp8"
    given = values(launched(engine="sglang", mtp=True, prefer="throughput", fp8_cache=True).nodes[0])
    assert (given["--speculative-algorithm"], given["--kv-cache-dtype"]) == ("EAGLE", "fp8_e4m3")
    assert (given["--tp-size"], given["--dp-size"], given["--enable-dp-attention"]) == ("8", "8", "")
    assert values(launched("ascend-910b", nodes=2, quant="int8").nodes[0])["--quantization"] == "ascend"


def test_llama_cpp_with_experts_in_ram() -> None:
    found = launched("rtx4090", count=1, ram=512 * GB, path="v3.gguf", context=8192, concurrency=2)
    given = values(found.nodes[0])
    assert found.nodes[0][0] == "llama-server"
    assert (given["--model"], given["--ctx-size"], given["--parallel"]) == ("v3.gguf", "16384", "2")
    assert "--cpu-moe" in given
    [engine] = found.models[0].engines
    assert (engine.kind, engine.command, engine.batch_size) == ("llamacpp", ["llama-server"], 2)
    assert "--cpu-moe" in engine.args
    alone = launched(None, ram=512 * GB)
    assert "--cpu-moe" not in alone.nodes[0]
    assert alone.models[0].engines[0].command == []  # the embedded engine


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prefer": "throughput"},
        {"gpu": "h100-80", "nodes": 2, "head": "192.0.2.1"},
        {"gpu": "h100-80", "nodes": 2, "engine": "sglang", "head": "192.0.2.1"},
        {"engine": "sglang", "prefer": "throughput"},
    ],
)
def test_the_service_starts_the_first_node_with_the_same_options(more: dict[str, Any]) -> None:
    """But for where it listens: the plan's command is for a port, the service's for a socket."""
    found = launched(**more)
    [engine] = found.models[0].engines
    endpoint = Endpoint(uds="socket") if engine.kind == "vllm" else Endpoint(port=1)
    started = values(kinds._program(engine, str(engine.path), endpoint, None))
    shown = values(found.nodes[0])
    places = {"--uds", "--host", "--port"}
    assert {k: v for k, v in started.items() if k not in places} == {
        k: v for k, v in shown.items() if k not in places
    }


@pytest.mark.parametrize("gpu", ["h200", None])
def test_toml_is_what_the_service_reads(gpu: str | None, tmp_path: Path) -> None:
    found = launched(gpu, ram=512 * GB, path='folder with "quotes" and \\')
    file = tmp_path / "config.toml"
    file.write_text(toml(found.models), encoding="utf-8")
    assert config.load(str(file), environ={}).models == found.models
    assert found.models[0].format == "v3"


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = launched("h100-80", nodes=2, head="192.0.2.1")
    file = tmp_path / "plan.json"
    file.write_bytes(msgspec.json.encode(found))
    assert read_launch(file) == found
    assert node_command(found, 1) == found.nodes[1]


def test_plans_that_can_not_be_launched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nodes 0 to 0, and no 1"):
        node_command(launched(), 1)
    with pytest.raises(ConfigError, match="lacks the first node's address"):
        node_command(launched("h100-80", nodes=2), 0)
    with pytest.raises(ConfigError, match="Can't read the plan"):
        read_launch(tmp_path / "missing")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a plan"):
        read_launch(tmp_path / "other.json")
