"""Which replica holds how much of a prompt in its KV cache: what routing by prefix knows.

A prompt is cut into blocks of tokens. Each block's hash is made of its ids and of the hash before it, so one
hash stands for a whole prefix (`chain`). For each replica the index has the blocks that it should hold, as
many as fit into its cache and the least recently used first to go, as engines do it themselves. Two ways to
know them:

- **Estimated**: `insert` when a prompt is sent and when its answer ends; `correct` with the `cached_tokens`
  that the engine reports.
- **Exact**: `apply` what the engine tells of its cache (the KV events of vLLM and SGLang, as `KVEvent`s).
  From the first event on a replica's estimates are ignored, until it is forgotten. Only what it is computing
  at the moment counts besides, from `expect` to `settle`, so that prompts with one beginning that come at one
  time stay together.

Whatever clients send, a replica costs at most its capacity in memory, and a question costs no more than the
prompt has blocks. A hash collision misjudges one prompt's cost and nothing else. Nothing here does I/O.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice

import msgspec

from deepseek_api_compat.engines.kv_events import (
    BlocksRemoved,
    BlocksStored,
    Cleared,
    EngineHash,
    KVEvent,
)

BLOCK = 64  # tokens
# Of a replica whose cache size isn't known: 16,384 blocks, a million tokens.
CAPACITY = 16_384 * BLOCK
# Blocks that an engine may tell of: a bound on memory, four million tokens in blocks of 16.
MOST_TOLD = 1 << 18

# How many holders of a block are skipped at most to come to those whose turn it is: some microseconds.
FARTHEST = 1024


def chain(ids: Sequence[int], block: int = BLOCK, salt: bytes = b"") -> list[int]:
    """The hash of each whole block of `ids` with everything before it; the same in every process.

    Prompts with different salts share no hash: so one tenant's prefix isn't another's.
    """
    raw = array("I", ids).tobytes()
    link = _root(salt)
    links = []
    for end in range(4 * block, len(raw) + 1, 4 * block):
        link = blake2b(link + raw[end - 4 * block : end], digest_size=8).digest()
        links.append(int.from_bytes(link, "little"))
    return links


def _root(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=8).digest()


class BlockCache:
    """A set of blocks that forgets the least recently used ones: at most `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def longest(self, hashes: Sequence[int], expected: Container[int] = ()) -> int:
        """How many of the chain's first blocks are here, or among those `expected`."""
        blocks = self._blocks
        count = 0
        for block in hashes:
            if block not in blocks and block not in expected:
                break
            count += 1
        return count

    def use(self, hashes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Have the chain's first blocks, as many as fit. Returns the blocks that came and those that went."""
        blocks = self._blocks
        came = []
        # From the last to the first: a block is always used after those behind it, so these go before it.
        for block in reversed(hashes[: self.most]):
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
                came.append(block)
        return came, [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self.most)]

    def discard(self, hashes: Iterable[int]) -> list[int]:
        """Drop those of `hashes` that are here, and return them."""
        gone = [block for block in hashes if block in self._blocks]
        for block in gone:
            del self._blocks[block]
        return gone


class _Tail(msgspec.Struct, frozen=True):
    """What an engine's block ends with: the hash of our last whole block in it, and the ids behind that.

    `rest` has four bytes for each id. `whole` are our blocks that end in it.
    """

    link: bytes
    rest: bytes
    whole: tuple[int, ...]


class _ToldCache:
    """An engine's own blocks, and which of ours end in them."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._tails: OrderedDict[EngineHash, _Tail] = OrderedDict()
        self.expected: Counter[int] = Counter()  # blocks that are being computed: by how many prompts

    def store(self, event: BlocksStored) -> tuple[list[int], list[int]]:
        """Our blocks that came with the event, and those that had to go because the engine told too many."""
        tail = _Tail(_root(event.salt), b"", ())
        if event.parent is not None:
            parent = self._tails.get(event.parent)
            if parent is None:  # an event was missed: where these blocks stand isn't known
                return [], []
            tail = parent
        came: list[int] = []
        size = event.block_size
        for position, name in enumerate(event.blocks):
            tail = self._extend(tail, event.ids[position * size : (position + 1) * size])
            self._tails[name] = tail
            self._tails.move_to_end(name)
            came += tail.whole
        went: list[int] = []
        while len(self._tails) > MOST_TOLD:
            went += self._tails.popitem(last=False)[1].whole
        return came, went

    def remove(self, names: Iterable[EngineHash]) -> list[int]:
        tails = [self._tails.pop(name, None) for name in names]
        return [block for tail in tails if tail is not None for block in tail.whole]

    def settle(self, hashes: Iterable[int]) -> list[int]:
        """One prompt less expects these; returns those that none does now."""
        expected = self.expected
        gone = []
        for block in hashes:
            if expected[block] > 1:
                expected[block] -= 1
            elif expected.pop(block, 0):
                gone.append(block)
        return gone

    def _extend(self, tail: _Tail, ids: Sequence[int]) -> _Tail:
        raw = tail.rest + array("I", ids).tobytes()
        width = 4 * self._block
        link = tail.link
        whole = []
        for end in range(width, len(raw) + 1, width):
            link = blake2b(link + raw[end - width : end], digest_size=8).digest()
            whole.append(int.from_bytes(link, "little"))
        return _Tail(link, raw[len(whole) * width :], tuple(whole))


class PrefixIndex:
    """Which blocks each replica holds. Replicas are numbers, and appear when they are first named.

    Two things are known to be inexact. If the engine's blocks are smaller than ours, one of ours counts until
    the engine removes that in which it ends; engines evict a chain from its end. And when `correct` has
    dropped a block, what other prompts had behind it counts again once that block is back, until they are
    corrected themselves or age out.
    """

    def __init__(self, block: int = BLOCK, capacity: int = CAPACITY) -> None:
        """`block` and `capacity` (of a replica's cache, see `resize`) in tokens."""
        self.block = block
        self._most = max(1, capacity // block)
        self._sizes: dict[int, int] = {}
        self._caches: dict[int, BlockCache] = {}
        self._told: dict[int, _ToldCache] = {}
        # Most blocks are held once: then a number is enough, where a set would take 200 bytes.
        self._holders: dict[int, int | set[int]] = {}

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._holders)

    def resize(self, replica: int, capacity: int) -> None:
        """The replica's cache holds `capacity` tokens. Takes effect with what is inserted next."""
        self._sizes[replica] = most = max(1, capacity // self.block)
        if replica not in self._told:
            self._cache(replica).most = most

    def held(self, replica: int, hashes: Sequence[int]) -> int:
        """How many tokens of the chain's beginning the replica holds."""
        cache = self._caches.get(replica)
        if cache is None:
            return 0
        told = self._told.get(replica)
        return cache.longest(hashes, told.expected if told is not None else ()) * self.block

    def longest(self, hashes: Sequence[int]) -> dict[int, int]:
        """Tokens held by each replica that holds any."""
        held = {replica: self.held(replica, hashes) for replica in self._caches}
        return {replica: tokens for replica, tokens in held.items() if tokens}

    def best(self, hashes: Sequence[int], most: int, turn: int = 0) -> list[int]:
        """At most `most` replicas, those that hold the longest prefix first; quick with thousands of them.

        `turn` decides which of more replicas that hold the same.
        """
        known = []
        for block in hashes:
            holders = self._holders.get(block)
            if holders is None:
                break
            known.append(holders)
        found: dict[int, None] = {}
        for holders in reversed(known):
            if isinstance(holders, int):
                found[holders] = None
            else:
                first = turn * most % max(1, min(len(holders) - most + 1, FARTHEST))
                found.update(dict.fromkeys(islice(holders, first, first + most)))
            if len(found) >= most:
                break
        return list(islice(found, most))

    def insert(self, replica: int, hashes: Sequence[int]) -> None:
        """The replica holds this chain now, or will in a moment. Ignored where the engine tells itself."""
        if replica not in self._told:
            came, went = self._cache(replica).use(hashes)
            self._hold(replica, came)
            self._let_go(replica, went)

    def expect(self, replica: int, hashes: Sequence[int]) -> None:
        """The chain is on its way: an `insert`; where the engine tells itself it counts until `settle`."""
        told = self._told.get(replica)
        if told is None:
            self.insert(replica, hashes)
        else:
            told.expected.update(hashes)
            self._hold(replica, hashes)

    def settle(self, replica: int, hashes: Sequence[int]) -> None:
        """What was expected is computed, or given up: from here on the engine's word alone counts."""
        told = self._told.get(replica)
        if told is not None:
            cache = self._cache(replica)
            self._let_go(replica, [block for block in told.settle(hashes) if block not in cache])

    def told(self, replica: int) -> bool:
        """Whether the engine tells itself what it holds."""
        return replica in self._told

    def correct(self, replica: int, hashes: Sequence[int], cached_tokens: int) -> None:
        """The engine found `cached_tokens` of this chain in its cache: it holds these and not the rest.

        `insert` what it has computed since then after this.
        """
        if replica in self._told:
            return
        count = max(0, cached_tokens) // self.block
        self.insert(replica, hashes[:count])
        self._let_go(replica, self._cache(replica).discard(hashes[count:]))

    def apply(self, replica: int, event: KVEvent) -> None:
        """Take over what the engine tells of its cache.

        Events must be complete and in order: after a gap `forget` the replica and start anew.
        """
        told = self._told.get(replica)
        if told is None or isinstance(event, Cleared):
            expected = told.expected if told is not None else Counter[int]()
            self.forget(replica)
            told = self._told[replica] = _ToldCache(self.block)
            told.expected = expected
            self._hold(replica, expected)
            self._caches[replica] = BlockCache(sys.maxsize)
        cache = self._cache(replica)
        went: list[int] = []
        if isinstance(event, BlocksStored):
            came, went = told.store(event)
            self._hold(replica, cache.use(came)[0])
        elif isinstance(event, BlocksRemoved):
            went = told.remove(event.blocks)
        self._let_go(replica, [block for block in cache.discard(went) if block not in told.expected])

    def forget(self, replica: int) -> None:
        """The replica has been restarted, or is gone: it holds nothing. Its size stays known."""
        told = self._told.pop(replica, None)
        if told is not None:
            self._let_go(replica, told.expected)
        cache = self._caches.pop(replica, None)
        if cache is not None:
            self._let_go(replica, cache)

    def _cache(self, replica: int) -> BlockCache:
        cache = self._caches.get(replica)
        if cache is None:
            cache = self._caches[replica] = BlockCache(self._sizes.get(replica, self._most))
        return cache

    def _hold(self, replica: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            holders = self._holders.get(block)
            if holders is None:
                self._holders[block] = replica
            elif isinstance(holders, set):
                holders.add(replica)
            elif holders != replica:
                self._holders[block] = {holders, replica}

    def _let_go(self, replica: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            holders = self._holders.get(block)
            if isinstance(holders, set):
                holders.discard(replica)
                if len(holders) == 1:
                    self._holders[block] = holders.pop()
            elif holders == replica:
                del self._holders[block]
