"""Plans against published recipes, and bytes against arithmetic done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import plan as plans
from deepseek_api_compat.models.architecture import find_model
from deepseek_api_compat.models.gpus import GB, GPUS, find_gpu
from deepseek_api_compat.models.plan import DoesNotFit, Layout, Plan, Question, make_plan, stage_layers

V3 = find_model("deepseek-v3")
EXPERTS = 58 * 256 * 3 * 7168 * 2048  # parameters of all routed experts


def ask(gpu: str | None, count: int = 8, nodes: int = 1, **more: Any) -> Plan:
    asked = {"model": V3, "gpu": find_gpu(gpu) if gpu else None, "count": count, "nodes": nodes, **more}
    return make_plan(Question(**asked))


def uses(plan: Plan) -> dict[str, int]:
    return {use.name: use.bytes for use in plan.uses}


@pytest.mark.parametrize(
    ("gpu", "count", "nodes", "quant", "engine"),
    [
        # SGLang's page on DeepSeek V3, "recommended settings"; vLLM's recipe for DeepSeek-V3; and the model
        # card of DeepSeek-V3-AWQ (4 x H200).
        ("h200", 8, 1, "fp8", "vllm"),
        ("b200", 8, 1, "fp8", "vllm"),
        ("mi300x", 8, 1, "fp8", "vllm"),
        ("h100-80", 8, 2, "fp8", "vllm"),
        ("h100-80", 8, 2, "fp8", "sglang"),
        ("h800", 8, 2, "fp8", "sglang"),
        ("h20", 8, 2, "fp8", "sglang"),
        ("h200", 8, 2, "bf16", "sglang"),
        ("mi300x", 8, 2, "bf16", "sglang"),
        ("h100-80", 8, 4, "bf16", "sglang"),
        ("a100-80", 8, 4, "bf16", "sglang"),
        ("a800", 8, 2, "int8", "sglang"),
        ("l40s", 8, 4, "int8", "sglang"),
        ("h100-80", 8, 1, "int4", "sglang"),
        ("a100-80", 8, 1, "int4", "sglang"),
        ("h200", 4, 1, "int4", "vllm"),
    ],
)
def test_published_recipes_fit(gpu: str, count: int, nodes: int, quant: str, engine: str) -> None:
    plan = ask(gpu, count, nodes, quant=quant, engine=engine)
    assert plan.layout.gpus == count * nodes
    assert plan.tokens >= plans.LEAST_TOKENS


@pytest.mark.parametrize(
    ("gpu", "nodes", "quant"),
    [
        ("h100-80", 1, "fp8"),  # 671 GB of weights and 640 GB of memory
        ("h20", 1, "fp8"),  # the recipe has two nodes of these too
        ("h100-80", 2, "bf16"),  # 1,342 GB and 1,280 GB
        ("a100-80", 2, "bf16"),
        ("rtx4090", 1, "int4"),
    ],
)
def test_what_no_recipe_has_does_not_fit(gpu: str, nodes: int, quant: str) -> None:
    with pytest.raises(DoesNotFit, match="needs at least") as refusal:
        ask(gpu, 8, nodes, quant=quant)
    assert "What would fit: " in str(refusal.value)


def test_the_refusal_has_the_numbers_and_a_way_out() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        ask("h100-80")
    said = str(refusal.value)
    assert "90% of one are 77.0 GB" in said  # 81,559 MiB x 0.9
    assert "2 nodes of 8 x H100 80 GB" in said
    assert "INT4 weights on these GPUs (--quant int4)" in said
    assert "8 x H200 141 GB (FP8)" in said
    assert "(--ram 512)" in said


def test_bytes_of_8_h200_with_tensor_parallelism() -> None:
    """Per GPU, by hand. A layer's attention, in millions of parameters (K = 7168):

    not split: q_a 7168 x 1536 = 11.010, kv_a 7168 x 576 = 4.129: 15.139
    split by 8: q_b 1536 x 24576 = 37.749, kv_b 512 x 32768 = 16.777, o 16384 x 7168 = 117.441: 171.967
    171.967 / 8 = 21.496
    61 x (15.139 + 21.496) = 2,234.7; in FP8 a byte each, and 4 bytes for 16,384 of them: 2.2352 GB.
    """
    plan = ask("h200")
    assert (plan.engine, plan.quant, plan.layout) == ("vllm", "fp8", Layout(tensor=8))
    found = uses(plan)
    scales = 1 + 4 / 16384
    assert found["attention"] == pytest.approx(2.2347e9 * scales, rel=1e-4)
    # 32 of 256 experts of each of 58 layers: 81.74 GB.
    assert found["routed experts"] == pytest.approx(EXPERTS / 8 * scales, rel=1e-9)
    assert found["routed experts"] == pytest.approx(81.76e9, rel=1e-4)
    assert found["shared experts"] == pytest.approx(58 * 3 * 7168 * 2048 / 8 * scales, rel=1e-6)
    assert found["dense FFN"] == pytest.approx(3 * 3 * 7168 * 18432 / 8 * scales, rel=1e-6)
    # Both embeddings stay BF16: 2 x 129280 x 7168 x 2 / 8.
    assert found["embeddings"] == 2 * 129280 * 7168 * 2 // 8
    # kv_b of 16.777 million in BF16 once more, in 61 layers, split by 8.
    assert found["attention, absorbed"] == 61 * 512 * 32768 * 2 // 8
    # Routers of 58 layers in BF16 (256 x 7169) and norms; nothing of it is split.
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    assert found["router, norms"] == (58 * 256 * 7169 + norms) * 2
    assert plan.budget == int(143771 * 2**20 * 0.9)
    assert plan.free == plan.budget - sum(found.values())
    assert plan.tokens == plan.free // 70272
    assert plan.longest == 163840


def test_all_gpus_together_hold_the_whole_model() -> None:
    """What tensor parallelism doesn't split is there 8 times; the rest adds up to the published total."""
    plan = ask("h200")
    found = uses(plan)
    split = 8 * (found["routed experts"] + found["shared experts"] + found["dense FFN"])
    parts = V3.architecture.model()
    ffn = sum(p.parameters for p in parts if p.name in ("routed experts", "shared experts", "dense FFN"))
    assert split == pytest.approx(ffn * (1 + 4 / 16384), rel=1e-6)


def test_mlas_cache_is_on_every_gpu_and_grouped_heads_are_shared(tmp_path: Path) -> None:
    assert ask("h200").cached == 70_272
    assert ask("h200", fp8_cache=True).cached == 35_136
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256}
    config |= {"max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = ask("h100-80", model=find_model(str(tmp_path)))
    assert plan.cached == 80 * 2 * 8 * 128 * 2 // 8
    # 70.6B in BF16 over 8: about 17.6 GB of weights a GPU.
    weights = sum(use.bytes for use in plan.uses if "(" not in use.name)
    assert weights == pytest.approx(70.55e9 * 2 / 8, rel=0.01)
    # Two of 16 ranks would hold the same head: it can't be split further.
    assert ask("h100-80", 16, model=find_model(str(tmp_path))).cached == plan.cached


def test_two_nodes_of_h100() -> None:
    """vLLM: tensor parallel 8 in a node and the layers in two halves; SGLang: tensor parallel 16."""
    plan = ask("h100-80", 8, 2)
    assert plan.layout == Layout(tensor=8, pipeline=2)
    # The later half is the fuller: 30 layers, all with experts. The first has 31, 3 of them dense.
    assert uses(plan)["routed experts"] == pytest.approx(EXPERTS * 30 / 58 / 8 * (1 + 4 / 16384), rel=1e-6)
    assert plan.cached == 576 * 2 * 30
    plan = ask("h100-80", 8, 2, engine="sglang")
    assert plan.layout == Layout(tensor=16)
    assert uses(plan)["routed experts"] == pytest.approx(EXPERTS / 16 * (1 + 4 / 16384), rel=1e-6)
    assert plan.cached == 70_272


def test_layers_are_divided_as_vllm_does() -> None:
    assert [len(stage) for stage in stage_layers(61, 2)] == [31, 30]
    assert [len(stage) for stage in stage_layers(61, 4)] == [15, 15, 16, 15]
    assert [layer for stage in stage_layers(61, 4) for layer in stage] == list(range(61))


def test_many_requests_get_copies_of_attention() -> None:
    plan = ask("h200", prefer="throughput")
    assert plan.layout == Layout(data=8)
    found = uses(plan)
    # All of attention is on each GPU, the experts are shared still.
    assert found["attention"] == pytest.approx(61 * 187_105_280 * (1 + 4 / 16384), rel=1e-6)
    assert found["routed experts"] == uses(ask("h200"))["routed experts"]
    assert plan.tokens * 8 > 4 * ask("h200").tokens
    # Asked for more than one cache holds, it takes this way by itself.
    assert ask("h200", context=131072, concurrency=4).layout.data == 1
    assert ask("h200", context=131072, concurrency=16).layout.data == 8
    assert ask("h200", engine="sglang", prefer="throughput").layout.attention_data


def test_too_many_requests_are_refused_with_how_many_fit() -> None:
    with pytest.raises(DoesNotFit, match="64 requests of 131,072 tokens each do not fit: 16 do") as refusal:
        ask("h200", context=131072, concurrency=64)
    assert "2 nodes of 8 x H200" in str(refusal.value)
    plan = ask("h200", 8, 2, context=131072, concurrency=64)
    assert -(-plan.concurrency // plan.layout.data) * plan.context <= plan.tokens


def test_context_and_concurrency_follow_from_each_other() -> None:
    plan = ask("h200", concurrency=100)
    assert (plan.context, plan.concurrency) == (plan.tokens // 100, 100)
    plan = ask("h200", context=32768)
    assert (plan.context, plan.concurrency) == (32768, plan.tokens // 32768)
    with pytest.raises(DoesNotFit, match="positions for 163,840 tokens, not 200,000"):
        ask("h200", context=200_000)
    with pytest.raises(DoesNotFit, match="too few"):
        ask("h200", concurrency=100_000)


def test_multi_token_prediction_takes_its_layer_too() -> None:
    plain, mtp = ask("h200"), ask("h200", mtp=True)
    # One layer of experts over 8 GPUs is 1.41 GB; with two embeddings and a projection about 2 GB.
    assert uses(mtp)["multi-token prediction"] == pytest.approx(2.02e9, rel=0.01)
    assert mtp.cached - plain.cached == 576 * 2
    assert mtp.layout.pipeline == 1


def test_a_gpu_without_fp8_gets_other_weights_and_says_so() -> None:
    with pytest.raises(DoesNotFit, match="A100 80 GB has no FP8 arithmetic"):
        ask("a100-80", quant="fp8")
    small, large = ask("a100-80"), ask("a100-80", 8, 4)
    assert (small.quant, large.quant) == ("int4", "bf16")
    assert any("no FP8 arithmetic" in note for note in small.notes)
    assert any("--path" in note for note in small.notes)
    assert small.path == "deepseek-v3-int4"
    assert ask("a100-80", path="weights").path == "weights"


def test_ram_alone_takes_the_published_gguf_files() -> None:
    """404 GB for Q4_K_M and 713 GB for Q8_0."""
    plan = ask(None, ram=512 * GB)
    assert (plan.engine, plan.quant, plan.gpu) == ("llamacpp", "q4_k_m", None)
    assert sum(use.bytes for use in plan.uses) == pytest.approx(404e9, rel=1e-5)
    assert plan.context * plan.concurrency <= plan.tokens  # a slot has its whole context from the start
    large = ask(None, ram=768 * GB, quant="q8_0")
    assert sum(use.bytes for use in large.uses) == pytest.approx(713e9, rel=1e-3)
    with pytest.raises(DoesNotFit, match=r"needs at least 404.5 GB of RAM"):
        ask(None, ram=384 * GB)


def test_experts_in_ram_and_the_rest_in_one_gpu() -> None:
    plan = ask("rtx4090", 1, ram=512 * GB)
    places = {use.name: use.place for use in plan.uses}
    assert plan.engine == "llamacpp"
    assert places["routed experts"] == "RAM"
    assert {place for name, place in places.items() if name != "routed experts"} == {"GPU"}
    # 16.4B parameters beside the experts, at 4.8 bits.
    beside = sum(use.bytes for use in plan.uses if use.place == "GPU" and "assumed" not in use.name)
    assert beside == pytest.approx((671_026_419_200 - EXPERTS) * 404 / 671.026, rel=1e-3)
    with pytest.raises(DoesNotFit, match="of GPU memory"):
        ask("rtx4090", 1, ram=256 * GB, engine="llamacpp")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"engine": "llamacpp", "quant": "fp8"}, "llama.cpp takes GGUF files"),
        ({"engine": "llamacpp", "quant": "q4_k_m", "nodes": 2}, "one node"),
        ({"engine": "llamacpp", "fp8_cache": True}, "no FP8"),
        ({"engine": "vllm", "quant": "q4_k_m"}, "does not take q4_k_m"),
        ({"engine": "vllm", "gpu": None}, "needs GPUs"),
        ({"gpu": None, "ram": 0}, "--ram GB"),
        ({"count": 6}, "128 attention heads can't be split evenly among 6 GPUs"),
        ({"nodes": 64}, "61 layers make no 64 pipeline stages"),
    ],
)
def test_what_makes_no_sense_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(DoesNotFit, match=message):
        ask(**{"gpu": "h200", **more} if "gpu" not in more else {"ram": 512 * GB, **more})


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("H200").memory == 143_771 * 2**20
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    with pytest.raises(ModelError, match=r"no GPU 'h300'.*h100-80.*none"):
        find_gpu("h300")
