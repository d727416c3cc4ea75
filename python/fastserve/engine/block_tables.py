# SPDX-License-Identifier: Apache-2.0
"""Which KV cache blocks a request holds, and which of them it shares.

Invariant between two steps: a block's ref_count is the number of block tables that contain it, and of held
prefixes (`prefix_holds.py`). A request
writes only into blocks that it took itself and that were in no other table before the step; a block enters
the prefix tree in the step that fills it and is never written again.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastserve.request import Request


class BlockPool(Protocol):
    """`fastserve._native.BlockPool`, as far as it is used here."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_evictable(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    def allocate(self) -> int: ...
    def ref(self, block_id: int, /) -> None: ...
    def unref(self, block_id: int, /) -> None: ...
    def ref_count(self, block_id: int, /) -> int: ...
    def check(self) -> None: ...


class PrefixTree(Protocol):
    """`fastserve._native.PrefixTree`, as far as it is used here."""

    def match(self, token_ids: Sequence[int], salt: str, /) -> tuple[int, list[int]]: ...
    def insert(self, node: int, token_ids: Sequence[int], block_ids: Sequence[int], /) -> tuple[int, list[int]]: ...
    def evict(self, num_blocks: int, /) -> int: ...
    def discard(self, node: int, num_blocks: int, /) -> int: ...
    def check(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Insertion:
    """What one request put into the prefix tree in one step."""

    num_new: int  # nodes created; they end at the request's tree_node
    duplicates: Sequence[tuple[int, int]]  # (index in the block table, equal block of the tree)


NOTHING_INSERTED = Insertion(0, ())


class BlockTables:
    """Takes blocks for requests from `pool`, shares full ones through `tree` (None: no prefix caching)."""

    def __init__(self, pool: BlockPool, tree: PrefixTree | None, block_size: int) -> None:
        self.pool = pool
        self.tree = tree
        self.block_size = block_size

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free, or cached and referenced by nobody."""
        return self.pool.num_free + self.pool.num_evictable

    def num_missing(self, request: Request) -> int:
        """Blocks that `request` lacks to compute all its tokens."""
        return -(-len(request.token_ids) // self.block_size) - len(request.block_ids)

    def num_shared(self, request: Request) -> int:
        """How many of its leading blocks are in other tables too. Further blocks are its own: who holds a block of the
        tree holds all before it."""
        ids, ref_count = request.block_ids, self.pool.ref_count
        if not ids or ref_count(ids[0]) == 1:
            return 0
        return bisect_left(ids, True, key=lambda block_id: ref_count(block_id) == 1)

    def reserve(self, request: Request, num_tokens: int) -> int:
        """Takes blocks for the next `num_tokens` of `request`, or for as many as there are blocks; returns
        how many."""
        missing = -(-(request.num_computed_tokens + num_tokens) // self.block_size) - len(request.block_ids)
        taken = min(missing, self.num_available)
        if taken > self.pool.num_free:
            assert self.tree is not None
            self.tree.evict(taken - self.pool.num_free)
        for _ in range(taken):
            request.block_ids.append(self.pool.allocate())
        return min(num_tokens, len(request.block_ids) * self.block_size - request.num_computed_tokens)

    def adopt_prefix(self, request: Request) -> int:
        """Moves `request` on to the end of the longest cached prefix; returns how many tokens that spares it.

        At least one token is left to compute: its row of the last layer is what the next token is sampled
        from. What another request computes in this very step counts as cached: a step writes all its KV
        before it reads any.
        """
        limit = (len(request.token_ids) - 1) // self.block_size * self.block_size
        reads_cache = self.tree is not None and request.params.prompt_logprobs is None  # those need every row
        if not reads_cache or limit <= request.num_computed_tokens:
            return 0
        assert self.tree is not None
        node, block_ids = self.tree.match(request.token_ids[:limit], request.cache_salt)
        spared = len(block_ids) * self.block_size - request.num_computed_tokens
        replaced = request.block_ids if spared > 0 else block_ids
        for block_id in reversed(replaced):
            self.pool.unref(block_id)
        if spared <= 0:
            return 0
        request.block_ids = list(block_ids)
        request.num_computed_tokens = len(block_ids) * self.block_size
        request.tree_node, request.num_tree_blocks = node, len(block_ids)
        return spared

    def share(self, request: Request, num_tokens: int) -> Insertion:
        """Puts the blocks into the tree that are full once the next `num_tokens` of `request` are computed.

        Where the tree has the same tokens already, the request still writes into its own block in this step
        and changes over to the tree's in `settle`: nobody ever writes into a block that others read.
        """
        begin, end = request.num_tree_blocks, (request.num_computed_tokens + num_tokens) // self.block_size
        if self.tree is None or begin == end:
            return NOTHING_INSERTED
        node = request.tree_node
        if node is None:
            node, _ = self.tree.match((), request.cache_salt)
        own = request.block_ids[begin:end]
        for block_id in own:  # survives the unref of a duplicate
            self.pool.ref(block_id)
        tokens = request.token_ids[begin * self.block_size : end * self.block_size]
        request.tree_node, block_ids = self.tree.insert(node, tokens, own)
        request.num_tree_blocks = end
        duplicates = []
        for index, (mine, shared) in enumerate(zip(own, block_ids, strict=True), begin):
            if mine == shared:
                self.pool.unref(mine)
            else:
                duplicates.append((index, shared))
        return Insertion(len(own) - len(duplicates), duplicates)

    def settle(self, request: Request, insertion: Insertion) -> None:
        """After the step: gives up the request's own copies of blocks that the tree had already."""
        for index, shared in insertion.duplicates:
            self.pool.unref(request.block_ids[index])
            request.block_ids[index] = shared

    def undo(self, request: Request, insertion: Insertion) -> None:
        """After a failed step: forgets what was inserted. Latest item first; the request must then be
        released."""
        self.settle(request, insertion)
        if insertion.num_new:
            assert self.tree is not None
            assert request.tree_node is not None
            self.tree.discard(request.tree_node, insertion.num_new)

    def release(self, request: Request) -> None:
        """Returns all blocks; those in the tree stay cached until their memory is needed."""
        for block_id in reversed(request.block_ids):
            self.pool.unref(block_id)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.tree_node, request.num_tree_blocks = None, 0

    def check(self, requests: Sequence[Request], held: Iterable[int] = ()) -> None:
        """Proves that `requests`, and references to the blocks `held`, are exactly what uses blocks; raises
        AssertionError with the values."""
        self.pool.check()
        if self.tree is not None:
            self.tree.check()
        expected = [0] * self.pool.num_blocks
        for request in requests:
            assert len(request.block_ids) >= -(-request.num_computed_tokens // self.block_size), request
            for block_id in request.block_ids:
                expected[block_id] += 1
        for block_id in held:
            expected[block_id] += 1
        counted = [self.pool.ref_count(block_id) for block_id in range(self.pool.num_blocks)]
        assert counted == expected, f"ref_counts {counted} differ from block tables {expected}"
