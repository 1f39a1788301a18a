"""The model in numpy.

That it computes what DeepSeek-V3 does is shown beside other engines: tests/engines, tools/tiny_exact.py.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models.deepseek_v3 import DeepSeekV3, Sequence
from fakes.small_v3 import SIZES, write_small

PROMPT = [0, 5, 17, 42, 99, 3, 150]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("v3") / "small")


def logits(model: DeepSeekV3, prompt: list[int] = PROMPT) -> np.ndarray:
    return Sequence(model).extend(prompt)


def test_a_prompt_at_once_and_token_by_token(folder: Path) -> None:
    model = DeepSeekV3(folder)
    sequence = Sequence(model)
    for token in PROMPT[:-1]:
        sequence.extend([token])
    assert np.abs(sequence.extend(PROMPT[-1:]) - logits(model)).max() < 1e-4


def test_a_token_sees_no_later_one(folder: Path) -> None:
    sequence = Sequence(DeepSeekV3(folder))
    first = sequence.extend(PROMPT[:4])
    assert np.abs(Sequence(DeepSeekV3(folder)).extend(PROMPT[:4]) - first).max() == 0
    assert np.abs(sequence.extend(PROMPT[4:]) - first).max() > 0.1


def test_greedy_takes_the_best_and_tells_its_lead(folder: Path) -> None:
    model = DeepSeekV3(folder)
    (first, lead), (second, _) = islice(model.greedy(PROMPT), 2)
    ranked = np.sort(logits(model))
    assert first == int(logits(model).argmax())
    assert lead == pytest.approx(ranked[-1] - ranked[-2])
    assert second == int(logits(model, [*PROMPT, first]).argmax())


CHANGES: dict[str, dict[str, Any]] = {
    "groups": {"n_group": 1, "topk_group": 1},
    "fewer experts": {"num_experts_per_tok": 3},
    "shares as they are": {"norm_topk_prob": False},
    "scale of the routed": {"routed_scaling_factor": 1.0},
    "rotation": {"rope_theta": 20000},
    "no YaRN": {"rope_scaling": None},
    "YaRN's factor": {"rope_scaling": {"factor": 4}},
    "YaRN's scale": {"rope_scaling": {"mscale": 0.5, "mscale_all_dim": 0.5}},
    "YaRN's slow end": {"rope_scaling": {"beta_slow": 8}},
    "norm": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_matters(folder: Path, tmp_path: Path, change: str) -> None:
    """An engine that gets one of them wrong gives other logits on the tiny model."""
    right = logits(DeepSeekV3(folder))
    config = json.loads((folder / "config.json").read_text())
    values = dict(CHANGES[change])
    if values.get("rope_scaling"):
        values["rope_scaling"] = config["rope_scaling"] | values["rope_scaling"]
    wrong = write_small(tmp_path / "wrong", **values)
    assert np.abs(logits(DeepSeekV3(wrong)) - right).max() > 0.05


def test_the_bias_decides_who_is_chosen_and_not_the_share(folder: Path) -> None:
    model = DeepSeekV3(folder)
    bias = model.weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    before = logits(model)
    bias += 3  # of all: nobody's rank changes
    assert np.abs(logits(model) - before).max() == 0
    bias[:4] += 3  # of one group
    assert np.abs(logits(model) - before).max() > 0.05


def test_experts_of_the_best_groups_only(folder: Path) -> None:
    """One excellent expert does not bring its group in: the two best count."""
    model = DeepSeekV3(folder)
    config = model.config
    model.weights["model.layers.1.mlp.gate.weight"] = np.zeros((16, config.hidden_size), np.float32)
    bias = np.zeros(16, np.float32)
    bias[0] = 1.0  # group 0: 1.5 + 0.5
    bias[[4, 5, 8, 9]] = 0.6  # groups 1 and 2: 1.1 + 1.1
    model.weights["model.layers.1.mlp.gate.e_score_correction_bias"] = bias
    chosen, shares = model.route("model.layers.1.mlp.", np.ones((1, config.hidden_size), np.float32))
    assert sorted(chosen[0].tolist()) == [4, 5, 8, 9]
    assert shares[0].tolist() == pytest.approx([2.5 / 4] * 4)


def test_fp8_is_nearly_the_same(folder: Path, tmp_path: Path) -> None:
    """It is read with its scales: without them weights would be hundreds of times too large."""
    exact = DeepSeekV3(folder)
    quantised = DeepSeekV3(write_small(tmp_path / "fp8", quantised=True))
    name = "model.layers.1.self_attn.q_b_proj.weight"
    error = quantised.weights[name] - exact.weights[name]
    assert 0 < np.abs(error).max() < np.abs(exact.weights[name]).max() / 16


def test_a_checkpoint_with_a_layer_too_few(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({**_config(folder), "num_hidden_layers": 4}))
    for file in folder.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.4\.embed_tokens\.weight, .* more"):
        DeepSeekV3(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "llama"}, "model_type is 'llama' and not 'deepseek_v3'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"q_lora_rank": None}, "Expected `int`, got `null` - at `\\$.q_lora_rank`"),
        ({"n_group": 3}, "16 experts don't make 3 equal groups"),
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are awq e4m3, and only fp8 e4m3"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 1}},
            "'linear'",
        ),
        ({"rope_scaling": {"factor": 2, "original_max_position_embeddings": 1}}, "mscale and mscale_all_dim"),
    ],
)
def test_other_architectures_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({**_config(folder), **change}))
    with pytest.raises(ModelError, match=f"is not that of a DeepSeek-V3: .*{reason}"):
        DeepSeekV3(tmp_path)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == SIZES["hidden_size"]
    return config
