# SPDX-License-Identifier: Apache-2.0
"""BlockPool and PrefixTree against a naive model that remembers whole prefixes in a dict.

The machine plays the scheduler: requests match, allocate, insert, release, fail and make room in any order.
After every step the native classes prove their own invariants and agree with the model on every count and
every reference.
"""

from __future__ import annotations

import array
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve._native import BlockPool, NativeError, OutOfBlocks, PrefixTree

BLOCK_SIZE = 2
NUM_BLOCKS = 8
TOKEN = st.integers(0, 1)
SALT = st.sampled_from(["", "alice", "bob"])
# Every way a caller may hand over token ids.
CONTAINER = st.sampled_from(
    [
        list,
        tuple,
        lambda ids: array.array("i", ids),
        lambda ids: np.array(ids, dtype=np.int32),
        lambda ids: np.array(ids, dtype=np.int64),
        lambda ids: np.repeat(np.array(ids, dtype=np.int32), 2)[::2],
    ]
)


@dataclass
class Request:
    salt: str
    node: int
    tokens: tuple[int, ...] = ()
    blocks: list[int] = field(default_factory=list)


Key = tuple[str, tuple[int, ...]]


@dataclass
class Entry:
    block: int
    released: int = 0


class KvMachine(RuleBasedStateMachine):
    @initialize(hash_bits=st.sampled_from([64, 1, 0]))
    def start(self, hash_bits: int) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.tree = PrefixTree(self.pool, BLOCK_SIZE, hash_bits=hash_bits)
        self.requests: list[Request] = []
        self.cached: dict[Key, Entry] = {}
        self.refs = [0] * NUM_BLOCKS
        self.clock = 0
        self.stale: list[int] = []

    # --- the model ---

    def children(self, key: Key) -> list[Key]:
        salt, tokens = key
        size = len(tokens) + BLOCK_SIZE
        return [
            other
            for other in self.cached
            if other[0] == salt and len(other[1]) == size and other[1][:-BLOCK_SIZE] == tokens
        ]

    def unref(self, block: int) -> None:
        self.pool.unref(block)
        self.model_unref(block)

    def model_unref(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.clock += 1
            for entry in self.cached.values():
                if entry.block == block:
                    entry.released = self.clock

    def model_evict(self, wanted: int) -> list[Key]:
        victims: list[Key] = []
        while len(victims) < wanted:
            leaves = [
                key for key, entry in self.cached.items() if self.refs[entry.block] == 0 and not self.children(key)
            ]
            if not leaves:
                break
            victims.append(min(leaves, key=lambda key: self.cached[key].released))
            del self.cached[victims[-1]]
        return victims

    # --- what a scheduler does ---

    @rule(tokens=st.lists(TOKEN, max_size=9), salt=SALT, container=CONTAINER)
    def admit(self, tokens: list[int], salt: str, container) -> None:
        node, blocks = self.tree.match(container(tokens), salt)
        expected = []
        length = 0
        while length + BLOCK_SIZE <= len(tokens):
            entry = self.cached.get((salt, tuple(tokens[: length + BLOCK_SIZE])))
            if entry is None:
                break
            expected.append(entry.block)
            self.refs[entry.block] += 1
            length += BLOCK_SIZE
        assert blocks == expected
        self.requests.append(Request(salt, node, tuple(tokens[:length]), blocks))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), container=CONTAINER)
    def grow(self, data: st.DataObject, container) -> None:
        request = data.draw(st.sampled_from(self.requests))
        count = data.draw(st.integers(0, min(3, self.pool.num_free)))
        tokens = data.draw(st.lists(TOKEN, min_size=count * BLOCK_SIZE, max_size=count * BLOCK_SIZE))
        mine = [self.pool.allocate() for _ in range(count)]
        for block in mine:
            assert self.refs[block] == 0
            self.refs[block] = 1
        node, blocks = self.tree.insert(request.node, container(tokens), container(mine))
        expected = []
        for i, block in enumerate(mine):
            request.tokens += tuple(tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
            entry = self.cached.setdefault((request.salt, request.tokens), Entry(block))
            if entry.block != block:
                self.refs[entry.block] += 1
                self.model_unref(block)
            expected.append(entry.block)
        assert blocks == expected
        request.node = node
        request.blocks += blocks

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests = [other for other in self.requests if other is not request]
        for block in data.draw(st.permutations(request.blocks)):
            self.unref(block)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Take back the end of a chain, as after a step that raised."""
        request = data.draw(st.sampled_from(self.requests))
        count = data.draw(st.integers(0, len(request.blocks)))
        keep = len(request.tokens) - count * BLOCK_SIZE
        gone = [
            (request.salt, request.tokens[:end])
            for end in range(keep + BLOCK_SIZE, len(request.tokens) + 1, BLOCK_SIZE)
        ]
        if any(set(self.children(key)) - set(gone) for key in gone):
            with pytest.raises(NativeError, match="would lose their parent"):
                self.tree.discard(request.node, count)
            return
        if any(other is not request and (other.salt, other.tokens) in gone for other in self.requests):
            return  # a real scheduler fails that request too, and whoever inserted first discards
        old_node = request.node
        request.node = self.tree.discard(request.node, count)
        if count:
            self.stale.append(old_node)
        request.tokens = request.tokens[:keep]
        for key in gone:
            del self.cached[key]
        for _ in range(count):
            self.unref(request.blocks.pop())

    @rule(count=st.integers(0, NUM_BLOCKS))
    def make_room(self, count: int) -> None:
        assert self.tree.evict(count) == len(self.model_evict(count))

    @rule()
    def clear(self) -> None:
        assert self.tree.clear() == len(self.model_evict(NUM_BLOCKS))

    # --- what no caller may do ---

    @rule(block=st.integers(-1, NUM_BLOCKS))
    def misuse_unreferenced_block(self, block: int) -> None:
        if 0 <= block < NUM_BLOCKS and self.refs[block] > 0:
            return
        with pytest.raises(NativeError):
            self.pool.unref(block)
        if block < 0 or block >= NUM_BLOCKS or not self.pool.is_cached(block):
            with pytest.raises(NativeError):
                self.pool.ref(block)

    @precondition(lambda self: self.pool.num_free == 0)
    @rule()
    def misuse_full_pool(self) -> None:
        with pytest.raises(OutOfBlocks):
            self.pool.allocate()

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def misuse_stale_node(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(self.stale))
        for use in (self.tree.depth, self.tree.parent, lambda node: self.tree.discard(node, 0)):
            with pytest.raises(NativeError, match="stale"):
                use(node)

    @precondition(lambda self: any(request.blocks for request in self.requests))
    @rule(data=st.data())
    def misuse_cached_block(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([request for request in self.requests if request.blocks]))
        root, _ = self.tree.match([], "a salt of its own")
        with pytest.raises(NativeError, match="cached under other tokens"):
            self.tree.insert(root, [0] * BLOCK_SIZE, request.blocks[:1])

    # --- what always holds ---

    @invariant()
    def native_proof_holds(self) -> None:
        self.tree.check()
        self.pool.check()

    @invariant()
    def counts_agree(self) -> None:
        evictable = sum(self.refs[entry.block] == 0 for entry in self.cached.values())
        assert [self.pool.ref_count(block) for block in range(NUM_BLOCKS)] == self.refs
        assert self.tree.num_cached == len(self.cached)
        assert self.pool.num_used == sum(count > 0 for count in self.refs)
        assert self.pool.num_evictable == evictable
        assert self.pool.num_free == NUM_BLOCKS - self.pool.num_used - evictable

    @invariant()
    def handles_climb_to_their_root(self) -> None:
        for request in self.requests:
            node = request.node
            assert self.tree.num_tokens(node) == len(request.tokens)
            for block in reversed(request.blocks):
                assert self.tree.block_id(node) == block
                node = self.tree.parent(node)
            assert self.tree.depth(node) == 0

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for request in self.requests:
            for block in request.blocks:
                self.unref(block)
        assert self.pool.num_used == 0
        while self.cached:  # one at a time, so that the whole eviction order is compared
            (victim,) = self.model_evict(1)
            assert self.tree.evict(1) == 1
            assert self.tree.match(victim[1], victim[0])[1] == self.model_match(victim)
        assert self.pool.num_free == NUM_BLOCKS
        self.tree.check()

    def model_match(self, key: Key) -> list[int]:
        """What matching an evicted key finds: all but its last block. Undone again."""
        salt, tokens = key
        blocks = [self.cached[salt, tokens[:end]].block for end in range(BLOCK_SIZE, len(tokens), BLOCK_SIZE)]
        for block in blocks:
            self.refs[block] += 1
        for block in blocks:
            self.unref(block)
        return blocks


TestKvMachine = KvMachine.TestCase
TestKvMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def small_cache() -> tuple[BlockPool, PrefixTree]:
    pool = BlockPool(4)
    return pool, PrefixTree(pool, 4)


def test_out_of_blocks_is_a_runtime_error() -> None:
    assert issubclass(OutOfBlocks, RuntimeError)
    pool = BlockPool(1)
    pool.allocate()
    with pytest.raises(OutOfBlocks, match="0 of 1 are free, 1 used, 0 evictable"):
        pool.allocate()


def test_the_tree_keeps_its_pool_alive() -> None:
    _, tree = small_cache()
    tree.check()
    assert tree.match([1, 2, 3, 4])[1] == []


def test_token_ids_of_every_kind_are_the_same_tokens() -> None:
    pool, tree = small_cache()
    root, _ = tree.match([])
    block = pool.allocate()
    tree.insert(root, [1, -2, 2**31 - 1, -(2**31)], [block])
    ids = [1, -2, 2**31 - 1, -(2**31)]
    for tokens in (
        ids,
        tuple(ids),
        array.array("i", ids),
        np.array(ids, np.int32),
        np.array(ids, np.int64),
        memoryview(array.array("i", ids)),
    ):
        assert tree.match(tokens)[1] == [block]


def test_range_is_a_sequence_too() -> None:
    _, tree = small_cache()
    assert tree.match(range(8))[1] == []


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (7, TypeError, "token_ids must be a sequence of ints or an int32 buffer, got int"),
        (None, TypeError, "token_ids must be a sequence of ints or an int32 buffer, got NoneType"),
        ("abcd", TypeError, r"token_ids\[0\] must be an int, got str"),
        ([1, 2.5], TypeError, r"token_ids\[1\] must be an int, got float"),
        (np.array([0.5]), TypeError, r"token_ids\[0\] must be an int"),
        (np.zeros((2, 2), np.int32), TypeError, r"token_ids\[0\] must be an int"),
        ([0, 2**31], NativeError, r"token_ids\[1\] must fit into 32 bits, got 2147483648"),
        ([-(2**70)], NativeError, r"token_ids\[0\] must fit into 32 bits, got -1180591620717411303424"),
    ],
)
def test_what_is_no_token_sequence_is_refused(tokens: object, error: type[Exception], message: str) -> None:
    _, tree = small_cache()
    with pytest.raises(error, match=message):
        tree.match(tokens)


def test_unsigned_and_wide_buffers_are_converted_not_reinterpreted() -> None:
    _, tree = small_cache()
    with pytest.raises(NativeError, match="must fit into 32 bits"):
        tree.match(np.array([2**32 - 1], np.uint32))
    with pytest.raises(NativeError, match="must fit into 32 bits"):
        tree.match(np.array([2**32], np.int64))


def test_a_list_that_shrinks_while_it_is_read_is_read_safely() -> None:
    _, tree = small_cache()
    tokens: list[object] = []

    class Token:
        def __index__(self) -> int:
            tokens.clear()
            return 1

    tokens.extend(Token() for _ in range(100))
    assert tree.match(tokens)[1] == []


def test_salts_share_nothing() -> None:
    pool, tree = small_cache()
    root, _ = tree.match([], "alice")
    tree.insert(root, [1, 2, 3, 4], [pool.allocate()])
    assert tree.match([1, 2, 3, 4], "alice")[1] == [0]
    assert tree.match([1, 2, 3, 4], "bob")[1] == []
    assert tree.match([1, 2, 3, 4])[1] == []


def test_repr_shows_the_counts() -> None:
    pool, tree = small_cache()
    pool.allocate()
    assert repr(pool) == "BlockPool(num_blocks=4, used=1, evictable=0, free=3)"
    assert repr(tree) == "PrefixTree(block_size=4, num_cached=0)"
