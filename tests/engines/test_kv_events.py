"""Batches as vLLM and SGLang write them become events; what is none is refused, what is new passed over."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.engines.kv_events import BlocksRemoved, BlocksStored, Cleared, Decoder

IDS = [5, 6, 7, 8]
OLD = ["BlockStored", [11, 12], None, IDS, 2, None]
# Of vLLM 0.32, which may add fields to a map anywhere.
NEW = {
    "session_id": None,
    "type": "BlockStored",
    "token_ids": IDS,
    "a_field_to_come": {"x": 1},
    "block_hashes": [11, 12],
    "parent_block_hash": None,
    "lora_id": None,
    "block_size": 2,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [None, None],
    "group_idx": 0,
    "kv_cache_spec_kind": "mla_attention",
}
STORED = BlocksStored([11, 12], None, IDS, 2)


def decoded(*events, decoder=None):
    return (decoder or Decoder()).batch(msgspec.msgpack.encode([1.5, list(events), 0]))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (OLD, STORED),
        ([*OLD, "GPU", None, [None, None], 0, "full_attention", "and", {"more": 1}], STORED),
        (NEW, STORED),
        ({**NEW, "extra_keys": [["tenant"], None]}, BlocksStored([11, 12], None, IDS, 2, b"tenant")),
        ({**NEW, "parent_block_hash": b"\xff" * 32}, BlocksStored([11, 12], b"\xff" * 32, IDS, 2)),
        ([*OLD[:3], [[5, 6], [6, 7], [7, 8], [8, 9]], 2, None], STORED),  # pairs, as SGLang has with EAGLE
        (["BlockStored", [-(2**63), 2**64 - 1], 3, IDS, 2], BlocksStored([-(2**63), 2**64 - 1], 3, IDS, 2)),
        (["BlockRemoved", [11]], BlocksRemoved([11])),
        ({"type": "BlockRemoved", "block_hashes": [b"a"], "medium": "GPU"}, BlocksRemoved([b"a"])),
        (["AllBlocksCleared"], Cleared()),
        ({"type": "AllBlocksCleared"}, Cleared()),
    ],
)
def test_events_of_all_versions(event, expected):
    assert decoded(event) == [expected]


@pytest.mark.parametrize(
    "event",
    [
        {**NEW, "medium": "CPU"},
        {**NEW, "lora_id": 1, "lora_name": "mine"},
        {**NEW, "kv_cache_spec_kind": "sliding_window"},
        ["BlockRemoved", [11], "CPU"],
        ["AnEventToCome", 1, 2],
        {"type": "AnEventToCome"},
    ],
)
def test_what_says_nothing_of_a_prefix_in_the_gpu_is_passed_over(event):
    assert decoded(event, OLD) == [STORED]


def test_one_group_of_layers_is_listened_to():
    decoder = Decoder()
    assert decoded({**NEW, "group_idx": 3, "kv_cache_spec_kind": "mamba"}, decoder=decoder) == []
    assert decoded({**NEW, "group_idx": 1}, {**NEW, "group_idx": 2}, decoder=decoder) == [STORED]
    removed = {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU"}
    told = [{**removed, "group_idx": group} for group in (3, 2, 1)]
    assert decoded(*told, decoder=decoder) == [BlocksRemoved([11])]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode([1.5]),
        msgspec.msgpack.encode([1.5, "events"]),
        msgspec.msgpack.encode([1.5, [[]]]),
        msgspec.msgpack.encode([1.5, [["BlockStored", [11, 12], None, IDS[:3], 2]]]),
        msgspec.msgpack.encode([1.5, [["BlockStored", [11], None, [-1], 1]]]),
        msgspec.msgpack.encode([1.5, [["BlockStored", [11], None, [2**32], 1]]]),
        msgspec.msgpack.encode([1.5, [["BlockStored", [], None, [], 0]]]),
        msgspec.msgpack.encode([1.5, [["BlockStored", "no list"]]]),
        msgspec.msgpack.encode([1.5, [{"type": "BlockRemoved"}]]),
    ],
)
def test_what_is_no_batch_is_refused(payload):
    with pytest.raises(ValueError, match=r".+"):
        Decoder().batch(payload)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(payload):
    with contextlib.suppress(ValueError):
        Decoder().batch(payload)


VALUES = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]), st.lists(VALUES, max_size=10))
def test_no_values_of_an_events_fields_raise_anything_else(name, fields):
    with contextlib.suppress(ValueError):
        decoded([name, *fields])
