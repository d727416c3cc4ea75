# SPDX-License-Identifier: Apache-2.0
"""The trie of a whole batch against tries built token by token: what is shared, what it saves, and the order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve import _native

# Two letters: prompts often repeat, begin alike, or are each other's prefix.
BATCHES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=12)


def analyse(prompts, block_size=1, **more):
    starts = np.cumsum([0, *map(len, prompts)])
    tokens = np.array([token for prompt in prompts for token in prompt], np.int32)
    return _native.PrefixAnalysis(tokens, starts, block_size=block_size, **more)


def brute_force_computed(prompts, order, block_size):
    """Tokens computed in this order by a cache that forgets nothing, in whole blocks, one row at least."""
    cached, computed = set(), 0
    for index in order:
        prompt = tuple(prompts[index])
        limit = (len(prompt) - 1) // block_size * block_size
        found = 0
        while found < limit and prompt[: found + block_size] in cached:
            found += block_size
        computed += len(prompt) - found
        cached.update(prompt[:end] for end in range(block_size, len(prompt) + 1, block_size))
    return computed


@settings(max_examples=300, deadline=None)
@given(prompts=BATCHES, block_size=st.integers(1, 4))
def test_savings_are_those_of_a_cache_that_forgets_nothing(prompts, block_size):
    analysis = analyse(prompts, block_size)
    assert sorted(analysis.order) == list(range(len(prompts)))
    assert analysis.num_tokens == sum(map(len, prompts))
    assert analysis.num_computed == brute_force_computed(prompts, analysis.order, block_size)
    prefixes = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    repeated = len(prompts) - len(set(map(tuple, prompts)))
    assert analysis.min_computed == len(prefixes) + repeated


@settings(max_examples=200, deadline=None)
@given(prompts=BATCHES, block_size=st.integers(1, 3), split=st.booleans())
def test_nodes_are_the_shared_prefixes_and_their_prompts_are_neighbours(prompts, block_size, split):
    roots = np.arange(len(prompts), dtype=np.int32) % 2 if split else np.zeros(len(prompts), np.int32)
    analysis = analyse(prompts, block_size, roots=roots)
    order, nodes = analysis.order.tolist(), analysis.nodes.tolist()
    chains = {-1: []}
    for number, (parent, begin, end, first, count, _) in enumerate(nodes):
        assert parent < number
        assert begin == (nodes[parent][2] if parent >= 0 else 0)
        assert end > begin
        assert end % block_size == 0
        chains[number] = [*chains[parent], number]
        members = order[first : first + count]
        shared = {(roots[i], *prompts[i][:end]) for i in members}
        assert len(shared) == 1
        everyone = [i for i in range(len(prompts)) if (roots[i], *prompts[i][:end]) in shared]
        assert sorted(members) == everyone
        assert count >= 2
    # Every block that two prompts share is in a node, and each prompt knows its innermost one.
    for i, prompt in enumerate(prompts):
        deepest = max(
            (common(prompt, other) // block_size * block_size)
            for j, other in enumerate([*prompts, []])
            if j != i and (j == len(prompts) or roots[j] == roots[i])
        )
        node = int(analysis.node_of[i])
        assert (nodes[node][2] if node >= 0 else 0) == deepest
    children = [0] * len(nodes)
    for parent in [node[0] for node in nodes] + analysis.node_of.tolist():
        if parent >= 0:
            children[parent] += 1
    assert children == [node[5] for node in nodes]


def common(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


@dataclass
class TrieNode:
    """A node of the published procedure; a prompt's end is a leaf of its own."""

    tokens: tuple = ()
    children: list = field(default_factory=list)
    prompt: int | None = None

    @property
    def is_leaf(self):
        return self.prompt is not None

    def prompts(self):
        return [self.prompt] if self.is_leaf else [p for child in self.children for p in child.prompts()]


def token_trie(prompts):
    def node(members, depth):
        """The members agree up to depth; group what follows."""
        children = []
        for i in [i for i in members if len(prompts[i]) == depth]:
            children.append(TrieNode((), [], i))
        for first in sorted({prompts[i][depth] for i in members if len(prompts[i]) > depth}):
            below = [i for i in members if len(prompts[i]) > depth and prompts[i][depth] == first]
            if len(below) == 1:
                children.append(TrieNode(tuple(prompts[below[0]][depth:]), [], below[0]))
                continue
            end = depth
            while len({tuple(prompts[i][depth : end + 1]) for i in below}) == 1 and all(
                len(prompts[i]) > end for i in below
            ):
                end += 1
            children.append(TrieNode(tuple(prompts[below[0]][depth:end]), node(below, end)))
        return children

    return TrieNode((), node(list(range(len(prompts))), 0))


def enlarge(node):
    """BatchLLM's enlargement of the first level of prefixes, as published."""
    for child in [c for c in node.children if not c.is_leaf]:
        enlarge(child)
        for grandchild in [g for g in child.children if not g.is_leaf]:
            gain = (len(grandchild.prompts()) - 1) * len(grandchild.tokens) - len(child.tokens)
            if gain > 0:
                child.children.remove(grandchild)
                grandchild.tokens = child.tokens + grandchild.tokens
                node.children.append(grandchild)
        if len(child.children) == 1:
            only = child.children[0]
            child.tokens, child.children, child.prompt = child.tokens + only.tokens, only.children, only.prompt
    node.children = [c for c in node.children if c.is_leaf or c.children]


@settings(max_examples=400, deadline=None)
@given(prompts=BATCHES | st.lists(st.lists(st.integers(1, 2), min_size=6, max_size=16), min_size=4, max_size=24))
def test_single_level_groups_are_the_published_ones(prompts):
    trie = token_trie(prompts)
    enlarge(trie)
    expected = {(len(c.tokens), tuple(sorted(c.prompts()))) for c in trie.children if not c.is_leaf}
    group, prefix_length = analyse(prompts).single_level()
    found = {
        (int(length), tuple(np.flatnonzero(group == number).tolist())) for number, length in enumerate(prefix_length)
    }
    assert found == expected
    for number, length in enumerate(prefix_length):
        assert len({tuple(prompts[i][:length]) for i in np.flatnonzero(group == number)}) == 1


def test_siblings_go_by_descending_share_of_decodes():
    # Two groups that share 4 tokens each, and one prompt of its own: decodes / tokens are 3/6, 40/6 and 9/3.
    prompts = [[1, 1, 1, 1, 5], [2, 2, 2, 2, 5], [3, 3, 3], [1, 1, 1, 1, 6], [2, 2, 2, 2, 6]]
    analysis = analyse(prompts, 1, expected_output=np.array([1, 20, 9, 2, 20]))
    assert analysis.order.tolist() == [1, 4, 2, 3, 0]
    # Without expectations, and among equals, the order of arrival stays.
    assert analyse(prompts).order.tolist() == [0, 3, 1, 4, 2]


def test_long_chains_of_prefixes_need_no_recursion():
    prompts = [[1] * length for length in range(1, 3001)]
    analysis = analyse(prompts)
    assert analysis.num_computed == analysis.min_computed == 3000
    assert len(analysis.nodes) == 2999
    assert analysis.order.tolist() == list(range(3000))  # each computes one token more than the one before
    analysis.single_level()


def test_what_does_not_fit_is_refused():
    tokens = np.ones(4, np.int32)
    for starts, text in ([[0, 2, 2, 4], "prompt 1 has 0 tokens"], [[0, 3], "end with 4"], [[1, 4], "begin with 0"]):
        with pytest.raises(_native.NativeError, match=text):
            _native.PrefixAnalysis(tokens, np.array(starts), block_size=1)
    with pytest.raises(_native.NativeError, match="block_size"):
        _native.PrefixAnalysis(tokens, np.array([0, 4]), block_size=0)
    with pytest.raises(_native.NativeError, match="3 expected outputs for 1"):
        _native.PrefixAnalysis(tokens, np.array([0, 4]), block_size=1, expected_output=np.ones(3, np.int64))
    assert analyse([]).order.tolist() == []
