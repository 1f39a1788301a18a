"""DeepSeek-V3 checkpoints of a few hundred kilobytes: the real layout with everything as small as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek_api_compat.models import gguf_vocabulary, tiny_v3

TOKENS = 256
WORDS = 200
CONTROLS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
FILL_IN = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": TOKENS,
}


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json that cuts as DeepSeek-V3's: words of one letter and one merge, and control tokens."""
    words = ["a", "b", "ab", *(chr(0x4E00 + number) for number in range(WORDS - 6))]
    cuts = [{"type": "Split", "pattern": {"Regex": regex}} for regex in gguf_vocabulary.CUTS]
    added = [*enumerate(CONTROLS), *enumerate(FILL_IN, WORDS), (WORDS + 3, "<think>")]
    return {
        "added_tokens": [{"id": id, "content": text, "special": text != "<think>"} for id, text in added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, {"type": "ByteLevel"}]},
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(words, len(CONTROLS))},
            "merges": ["a b"],
        },
    }


def write_small(folder: Path, *, quantised: bool = False, shard_bytes: int = 200_000, **changes: Any) -> Path:
    """Write one into the new folder, in several shards. changes: of config.json."""
    folder.mkdir()
    source = folder / "tokenizer.source"
    source.write_text(json.dumps(tokenizer()))
    tiny_v3.write_checkpoint(
        folder, source, quantised=quantised, changes={**SIZES, **changes}, shard_bytes=shard_bytes
    )
    source.unlink()
    return folder
