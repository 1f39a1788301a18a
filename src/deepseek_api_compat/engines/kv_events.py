"""What an engine tells of its KV cache, and how vLLM and SGLang write it.

A message is three frames: a topic, a sequence number (eight bytes, big-endian) and a batch in msgpack,
`[time, events, ...]`. An event is an array, `[its name, its fields in order]`, or in newer versions of vLLM a
map with the name as `type`. New fields come behind those that were there; what is unknown is passed over.

Sources: vLLM 0.32 (`distributed/kv_events.py`, `v1/core/block_pool.py`), SGLang 0.5
(`disaggregation/kv_events.py`, `mem_cache/events.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

EngineHash = int | bytes

GPU = (None, "GPU")
# Kinds of cache in which a prefix stays whole; of a sliding window or a state only the end is kept.
WHOLE = (None, "full_attention", "mla_attention", "sink_full_attention", "unknown")
# The fields of events that are arrays, after the name.
ORDER: Mapping[str, tuple[str, ...]] = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}


class BlocksStored(msgspec.Struct, frozen=True):
    """The engine keeps these blocks now: one after another, the first behind `parent` (None: at the start).

    `blocks` are the engine's own hashes, `ids` all their tokens, `block_size` each. `salt` matters in a first
    block only.
    """

    blocks: Sequence[EngineHash]
    parent: EngineHash | None
    ids: Sequence[int]
    block_size: int
    salt: bytes = b""


class BlocksRemoved(msgspec.Struct, frozen=True):
    """The engine has evicted these of its blocks."""

    blocks: Sequence[EngineHash]


class Cleared(msgspec.Struct, frozen=True):
    """The engine's cache is empty."""


KVEvent = BlocksStored | BlocksRemoved | Cleared


class KVSource(msgspec.Struct, frozen=True):
    """Where an engine publishes its events, and where it repeats those that were missed: ZeroMQ endpoints."""

    events: str
    replay: str | None = None


Id = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class _Stored(msgspec.Struct):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[Id]
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct):
    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class Decoder:
    """One engine's batches. Of what it tells only whole prefixes in the GPU's memory count, without LoRA."""

    def __init__(self) -> None:
        self._decode = msgspec.msgpack.Decoder(list[Any]).decode
        self._group: int | None = None  # of the engine's groups of layers, the one that is listened to

    def batch(self, payload: bytes) -> list[KVEvent]:
        """Its events in order. Raises ValueError for what is none of an engine's batches."""
        try:
            batch = self._decode(payload)
            if len(batch) < 2 or not isinstance(batch[1], list):
                raise ValueError("a batch without events")
            events = [self._event(*_named(raw)) for raw in batch[1]]
        except msgspec.MsgspecError as error:  # before msgspec 0.20 it was no ValueError
            raise ValueError(str(error)) from None
        return [event for event in events if event is not None]

    def _event(self, name: str, fields: Mapping[str, Any]) -> KVEvent | None:
        if name == "BlockStored":
            return self._stored(msgspec.convert(_unpaired(fields), _Stored))
        if name == "BlockRemoved":
            removed = msgspec.convert(fields, _Removed)
            heard = removed.medium in GPU and removed.group_idx in (None, self._group)
            return BlocksRemoved(removed.block_hashes) if heard else None
        return Cleared() if name == "AllBlocksCleared" else None

    def _stored(self, event: _Stored) -> BlocksStored | None:
        if event.medium not in GPU or event.lora_name is not None or event.lora_id is not None:
            return None
        if event.kv_cache_spec_kind not in WHOLE:
            return None
        if self._group is None:
            self._group = event.group_idx
        if event.group_idx != self._group:
            return None
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            raise ValueError("blocks and tokens don't add up")
        first = (event.extra_keys or [None])[0] or []
        salt = next((key for key in first if isinstance(key, str)), "")
        return BlocksStored(
            event.block_hashes, event.parent_block_hash, event.token_ids, event.block_size, salt.encode()
        )


def _unpaired(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """SGLang has pairs, each id with the next one, when it drafts with EAGLE."""
    ids = fields.get("token_ids")
    if not (isinstance(ids, list) and ids and isinstance(ids[0], list)):
        return fields
    return {**fields, "token_ids": [one[0] if isinstance(one, list) and one else one for one in ids]}


def _named(raw: object) -> tuple[str, dict[str, Any]]:
    """An event's name and its fields by theirs."""
    if isinstance(raw, dict):
        return str(raw.get("type")), {name: value for name, value in raw.items() if isinstance(name, str)}
    if isinstance(raw, list) and raw and isinstance(raw[0], str):
        return raw[0], dict(zip(ORDER.get(raw[0], ()), raw[1:], strict=False))
    raise ValueError("an event without a name")
