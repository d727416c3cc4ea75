# SPDX-License-Identifier: Apache-2.0
"""Keeps the KV of a batch's shared prefixes in the cache for exactly as long as requests of the batch need it."""

from collections.abc import Iterable

from fastserve.engine.block_tables import BlockTables
from fastserve.request import Request, SharedPrefix


class PrefixHolds:
    """One reference on every block of every prefix that is held.

    A prefix is held from the step in which the first of its requests has computed it until the last of them has
    ended: through gaps in which none of them runs, and through preemptions. A prefix is held only while those that it
    continues are.
    """

    def __init__(self, blocks: BlockTables) -> None:
        self._blocks = blocks
        self._held: dict[SharedPrefix, None] = {}  # a parent before its children

    @property
    def num_blocks(self) -> int:
        return sum(len(prefix.block_ids or ()) for prefix in self._held)

    def keep(self, request: Request) -> None:
        """After a step: holds those of the request's prefixes that it has computed. O(1) once all are held."""
        prefix = request.shared_prefix
        if prefix is None or prefix.block_ids is not None or self._blocks.tree is None:
            return
        found = []
        while prefix is not None and prefix.block_ids is None:
            if prefix.num_tokens <= request.num_computed_tokens:
                found.append(prefix)
            prefix = prefix.parent
        size = self._blocks.block_size
        for prefix in reversed(found):
            begin = 0 if prefix.parent is None else prefix.parent.num_tokens // size
            prefix.block_ids = request.block_ids[begin : prefix.num_tokens // size]
            for block_id in prefix.block_ids:
                self._blocks.pool.ref(block_id)
            self._held[prefix] = None

    def leave(self, request: Request) -> None:
        """`request` has ended: gives up its prefixes that nobody else will need."""
        prefix, request.shared_prefix = request.shared_prefix, None
        if prefix is not None:
            self.give_up(prefix)

    def give_up(self, prefix: SharedPrefix, num_requests: int = 1) -> None:
        """So many requests whose innermost prefix it is need it no longer, or will never come."""
        innermost: SharedPrefix | None = prefix
        while innermost is not None:
            innermost.num_open -= num_requests
            if innermost.num_open > 0:
                return
            self._release(innermost)
            innermost, num_requests = innermost.parent, 1

    def drop(self, prefixes: Iterable[SharedPrefix] | None = None) -> bool:
        """Gives up `prefixes`, and those that continue them must be among these; or all. Requests that still need
        them compute them again. False: none was held."""
        wanted = self._held if prefixes is None else set(prefixes)
        dropped = [prefix for prefix in reversed(self._held) if prefix in wanted]
        for prefix in dropped:
            self._release(prefix)
        return bool(dropped)

    def block_ids(self) -> Iterable[int]:
        """Every reference held. For tests."""
        return (block_id for prefix in self._held for block_id in prefix.block_ids or ())

    def _release(self, prefix: SharedPrefix) -> None:
        if prefix.block_ids is None:
            return
        for block_id in reversed(prefix.block_ids):
            self._blocks.pool.unref(block_id)
        prefix.block_ids = None
        del self._held[prefix]
