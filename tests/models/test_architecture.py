"""Parameter counts, against the tensors of the checkpoints and against published figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models.architecture import V3_CONFIG, Part, find_model, read_architecture
from deepseek_api_compat.models.catalogue import CATALOGUE
from deepseek_api_compat.models.v3_config import V3Config

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def total(parts: Any) -> int:
    return sum(part.parameters for part in parts)


def by_name(parts: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    part: Part
    for part in parts:
        found[part.name] = found.get(part.name, 0) + part.parameters
    return found


def write(folder: Path, **config: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def test_deepseek_v3_has_the_parameters_of_its_tensors() -> None:
    """The list of tensors comes from the checkpoint's layout and knows nothing of parts."""
    architecture = find_model("deepseek-v3").architecture
    tensors = msgspec.json.decode(V3_CONFIG.read_bytes(), type=V3Config).tensors()
    sizes = {name: math.prod(shape) for name, shape in tensors.items()}
    mtp = sum(size for name, size in sizes.items() if name.startswith("model.layers.61."))
    assert total(architecture.prediction()) == mtp
    assert total(architecture.model()) == sum(sizes.values()) - mtp
    parts = by_name(architecture.model())
    of_model = {name: size for name, size in sizes.items() if not name.startswith("model.layers.61.")}
    assert parts["routed experts"] == sum(size for name, size in of_model.items() if ".experts." in name)
    assert parts["shared experts"] == sum(size for name, size in of_model.items() if "shared_experts" in name)
    projections = sum(size for name, size in of_model.items() if "self_attn" in name and "_proj" in name)
    assert parts["attention"] == projections


def test_deepseek_v3_has_the_published_totals() -> None:
    """671B, 37B active (arXiv 2412.19437); 685B on the hub, with MTP and a scale for each 128 x 128."""
    architecture = find_model("deepseek-v3").architecture
    model, mtp = total(architecture.model()), total(architecture.prediction())
    assert round(model / 1e9) == 671
    parts = [*architecture.model(), *architecture.prediction()]
    scales = sum(part.parameters for part in parts if part.quantised)
    assert round((model + mtp + scales / 128**2) / 1e9) == 685
    # The head is active; the input embedding is only looked up.
    assert round(architecture.active() / 1e9) == 37
    # 58 layers x 256 experts x 3 matrices of 7168 x 2048.
    assert by_name(architecture.model())["routed experts"] == 58 * 256 * 3 * 7168 * 2048


def test_a_token_of_deepseek_v3_takes_70272_bytes() -> None:
    architecture = find_model("deepseek-v3").architecture
    assert architecture.cached() * 61 == (512 + 64) * 61 * 2 == 70_272
    assert architecture.cached(fp8=True) * 61 == 35_136
    assert architecture.kv_heads == 1


def test_v32_has_an_indexer_besides() -> None:
    plain, sparse = (find_model(name).architecture for name in ("deepseek-v3", "deepseek-v3.2"))
    # A layer: queries 1536 x 64 x 128, one key 7168 x 128, weights 7168 x 64, and a norm of 2 x 128.
    layer = 1536 * 64 * 128 + 7168 * 128 + 7168 * 64 + 256
    assert total(sparse.model()) - total(plain.model()) == 61 * layer
    assert sparse.cached() - plain.cached() == 132


@pytest.mark.parametrize(
    ("config", "billions", "active", "cached"),
    [
        # The model cards' 8.03B and 30.5B; the cache of a layer is 2 x heads x width x 2 bytes.
        (LLAMA_8B, 8.03, 7.50, 2 * 8 * 128 * 2),
        (QWEN3_30B_A3B, 30.53, 3.04, 2 * 4 * 128 * 2),
    ],
    ids=["dense", "experts"],
)
def test_other_models_by_their_own_keys(
    config: dict[str, Any], billions: float, active: float, cached: int, tmp_path: Path
) -> None:
    architecture = read_architecture(write(tmp_path, **config))
    assert round(total(architecture.model()) / 1e9, 2) == billions
    assert round(architecture.active() / 1e9, 2) == active  # without the input embedding
    assert architecture.cached() == cached
    assert architecture.native == "bf16"


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    apart = read_architecture(write(tmp_path, **LLAMA_8B))
    tied = read_architecture(write(tmp_path, **LLAMA_8B, tie_word_embeddings=True))
    assert total(apart.model()) - total(tied.model()) == 128256 * 4096


def test_a_model_is_found_by_name_folder_or_file(tmp_path: Path) -> None:
    file = write(tmp_path, **LLAMA_8B)
    for named in (str(tmp_path), str(file)):
        found = find_model(named)
        assert (found.name, found.path, found.format) == (tmp_path.name, str(tmp_path), "auto")
    assert find_model("deepseek-v3-0324").path == "deepseek-ai/DeepSeek-V3-0324"
    assert find_model("deepseek-r1-0528").format == "r1"


def test_only_models_of_v3s_architecture_are_known_by_name() -> None:
    known, unknown = [], []
    for entry in CATALOGUE:
        try:
            known.append(find_model(entry.name).name)
        except ModelError:
            unknown.append(entry.name)
    assert {"deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.2"} <= set(known)
    assert set(known) == {entry.name for entry in CATALOGUE if entry.parameters == "671B, 37B active"}
    assert "deepseek-r1-distill-qwen-7b" in unknown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA_8B, "model_type": "mamba"}, "sizes of a 'mamba' are not known"),
        ({"model_type": "llama"}, "does not describe a language model"),
        ({**LLAMA_8B, "hidden_size": "big"}, "does not describe a language model"),
        ({**LLAMA_8B, "num_attention_heads": 0}, "sizes below 1"),
        ({**QWEN3_30B_A3B, "mlp_only_layers": [0]}, "experts in only some layers"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(str(write(tmp_path, **config)))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Can't read"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b'{"model_type": \xff')
    with pytest.raises(ModelError, match="is not JSON"):
        find_model(str(tmp_path))
