from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import gguf
from fakes.tiny_gguf import write_gguf


def test_header_says_what_the_model_is(tiny_gguf: Path) -> None:
    assert gguf.inspect(tiny_gguf) == gguf.Header(
        architecture="llama",
        name="Tiny",
        context_length=128,
        file_type=3,
        chat_template="{{ messages }}",
        tensors=2,
    )


def test_its_control_tokens(tmp_path: Path, weights: np.ndarray) -> None:
    path = write_gguf(
        tmp_path / "tokens.gguf",
        weights,
        GGMLQuantizationType.Q4_0,
        control=["<s>", "<｜User｜>"],
        user_defined=["<think>"],
        fim=[3, 4, 5],
    )
    assert gguf.vocabulary(path) == gguf.Vocabulary(
        kind="gpt2", control={"<s>": 3, "<｜User｜>": 4}, user_defined={"<think>": 5}, fim=(3, 4, 5)
    )


def test_a_file_without_tokens(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "empty.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert gguf.vocabulary(tmp_path / "empty.gguf") == gguf.Vocabulary("", {}, {})


def test_a_file_cut_short_anywhere_is_refused(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    # The writer pads the last tensor (8 floats fill 32 bytes: no padding), so every byte counts.
    for length in range(len(whole)):
        tiny_gguf.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"is not a readable GGUF file: .*(short|empty|GGUF)"):
            gguf.inspect(tiny_gguf)


def test_missing_bytes_are_counted(tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=f"cut short, {len(whole) - 1:,} of {len(whole):,} bytes are there"):
        gguf.inspect(tiny_gguf)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_gets_past_as_another_error(tiny_gguf: Path, data: st.DataObject) -> None:
    whole = bytearray(tiny_gguf.read_bytes())
    damaged = tiny_gguf.with_name("damaged.gguf")
    at = data.draw(st.integers(0, len(whole) - 8))
    whole[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8) | st.just(b"\xff" * 8))
    damaged.write_bytes(whole)
    for read in (gguf.inspect, gguf.vocabulary):
        with suppress(ModelError):  # or it reads: the damage hit a value
            read(damaged)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 a zip, say", "does not start with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "format version is 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "names no model architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "damaged or cut short"),
    ],
)
def test_what_is_no_gguf_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        gguf.inspect(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Can't read the model file .*: No such file or directory"):
        gguf.inspect(tmp_path / "none.gguf")
