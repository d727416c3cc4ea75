# SPDX-License-Identifier: Apache-2.0
"""The simplest block pool and prefix tree that are right: what the native ones are compared with."""

from collections.abc import Sequence


class NaiveBlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.free = list(range(num_blocks))
        self.cached: set[int] = set()
        self.released: list[int] = []  # evictable blocks, longest unreferenced first

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_evictable(self) -> int:
        return len(self.released)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - self.num_evictable

    def allocate(self) -> int:
        if not self.free:
            raise RuntimeError("out of blocks")
        block_id = self.free.pop()
        self.refs[block_id] = 1
        return block_id

    def ref(self, block_id: int) -> None:
        if block_id in self.released:
            self.released.remove(block_id)
        elif self.refs[block_id] == 0:
            raise RuntimeError(f"ref of free block {block_id}")
        self.refs[block_id] += 1

    def unref(self, block_id: int) -> None:
        if self.refs[block_id] == 0:
            raise RuntimeError(f"unref of unreferenced block {block_id}")
        self.refs[block_id] -= 1
        if self.refs[block_id] == 0:
            (self.released if block_id in self.cached else self.free).append(block_id)

    def ref_count(self, block_id: int) -> int:
        return self.refs[block_id]

    def check(self) -> None:
        used = [i for i in range(self.num_blocks) if self.refs[i] > 0]
        assert sorted(used + self.free + self.released) == list(range(self.num_blocks))
        assert set(self.released) <= self.cached
        assert not self.cached & set(self.free)


class NaivePrefixTree:
    """A node is the tuple of everything from the salt to its last token; its handle is its index in
    `handles`."""

    def __init__(self, pool: NaiveBlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.nodes: dict[tuple[str, tuple[int, ...]], int] = {}  # (salt, all tokens up to the node) -> block
        self.handles: list[tuple[str, tuple[int, ...]]] = []

    def _handle(self, node: tuple[str, tuple[int, ...]]) -> int:
        if node not in self.handles:
            self.handles.append(node)
        return self.handles.index(node)

    @property
    def num_cached(self) -> int:
        return len(self.nodes)

    def match(self, token_ids: Sequence[int], salt: str = "") -> tuple[int, list[int]]:
        tokens, node, block_ids = tuple(token_ids), (salt, ()), []
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            if (salt, tokens[:end]) not in self.nodes:
                break
            node = (salt, tokens[:end])
            self.pool.ref(self.nodes[node])
            block_ids.append(self.nodes[node])
        return self._handle(node), block_ids

    def insert(self, node: int, token_ids: Sequence[int], block_ids: Sequence[int]) -> tuple[int, list[int]]:
        assert len(token_ids) == len(block_ids) * self.block_size
        salt, tokens = self.handles[node]
        assert not tokens or (salt, tokens) in self.nodes, "stale node"
        result = []
        for i, block_id in enumerate(block_ids):
            tokens += tuple(token_ids[i * self.block_size : (i + 1) * self.block_size])
            if (salt, tokens) in self.nodes:
                self.pool.ref(self.nodes[salt, tokens])
                self.pool.unref(block_id)
            else:
                assert block_id not in self.pool.cached
                self.nodes[salt, tokens] = block_id
                self.pool.cached.add(block_id)
            result.append(self.nodes[salt, tokens])
        return self._handle((salt, tokens)), result

    def _children(self, node: tuple[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
        end = len(node[1])
        return [n for n in self.nodes if n[0] == node[0] and n[1][:end] == node[1] and len(n[1]) > end]

    def evict(self, num_blocks: int) -> int:
        for evicted in range(num_blocks):
            leaves = {self.nodes[n]: n for n in self.nodes if not self._children(n)}
            block_id = next((b for b in self.pool.released if b in leaves), None)
            if block_id is None:
                return evicted
            del self.nodes[leaves[block_id]]
            self.pool.cached.remove(block_id)
            self.pool.released.remove(block_id)
            self.pool.free.append(block_id)
        return num_blocks

    def discard(self, node: int, num_blocks: int) -> int:
        salt, tokens = self.handles[node]
        for _ in range(num_blocks):
            assert not self._children((salt, tokens))
            block_id = self.nodes.pop((salt, tokens))
            self.pool.cached.remove(block_id)
            if block_id in self.pool.released:
                self.pool.released.remove(block_id)
                self.pool.free.append(block_id)
            tokens = tokens[: -self.block_size]
        return self._handle((salt, tokens))

    def clear(self) -> int:
        return self.evict(self.pool.num_evictable)

    def check(self) -> None:
        assert sorted(self.nodes.values()) == sorted(self.pool.cached)
        for salt, tokens in self.nodes:
            parent = tokens[: -self.block_size]
            assert not parent or (salt, parent) in self.nodes
            if parent and self.pool.refs[self.nodes[salt, tokens]]:
                assert self.pool.refs[self.nodes[salt, parent]]
