// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kv/block_pool.h"

namespace fs {

// Names a node of one tree. It carries a generation, so that a handle that outlived its node, or that belongs
// to another tree, is refused instead of silently meaning some other node.
using NodeId = int64_t;

// A path of the tree as the caller sees it: its last node and the blocks that were walked to get there.
struct Chain {
  NodeId node;
  std::vector<int32_t> block_ids;
};

// Which token sequences have their KV in blocks of the pool.
//
// A node is one full block of `block_size` tokens; it means "these tokens, after the tokens of all my
// ancestors", and its KV is the block with the same number: node slot == block id. Each salt has a root of
// its own, so that requests with different salts share nothing. A child is found through a hash of (parent,
// tokens), and the tokens are compared as well: a hash collision costs time, never a wrong block.
//
// Rules for callers:
//  - A request that references a node references all its ancestors. match() and insert() keep this; a request
//  that
//    returns its blocks returns all of them.
//  - The handle of a node is valid while its block is referenced. The handle of a root stays valid while the
//  root has
//    children, and until kMaxIdleRoots other salts have been used after it.
//
// For code that groups requests by what they share: two requests share a node exactly if their chains contain
// the same NodeId. depth() and parent() climb from any node to its root, so the deepest node two requests
// share is found by lifting the deeper one to equal depth and then both until they meet.
//
// With b blocks walked, match and insert are O(b); evict is amortised O(1) per evicted block; nothing
// recurses. Not thread-safe.
class PrefixTree {
 public:
  static constexpr int kMaxIdleRoots = 65536;

  // `hash_bits` < 64 makes collisions common, for tests: results must not depend on it.
  PrefixTree(BlockPool& pool, int block_size, int hash_bits = 64);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  // The longest chain of cached blocks that begins `token_ids`; a rest shorter than a block is ignored. Every
  // block returned is ref()ed for the caller. `node` is the last one matched, the root of `salt` if none was.
  Chain match(std::span<const int32_t> token_ids, std::string_view salt = "");

  // Caches full blocks that continue `node`: block_ids[i] holds token_ids[i * block_size, (i+1) *
  // block_size). Where such a node exists already, the caller's block is unref()ed and the node's block is
  // ref()ed and returned in its place. Throws, with nothing changed, unless all blocks are distinct,
  // referenced, and not cached anywhere else.
  Chain insert(NodeId node, std::span<const int32_t> token_ids, std::span<const int32_t> block_ids);

  // Frees up to `num_blocks` unreferenced blocks and returns how many. The next to go is always, among those
  // without cached children, the one that has been unreferenced for longest.
  int evict(int num_blocks);

  // Forgets the last `num_blocks` nodes of the chain that ends in `node` (their KV was never computed) and
  // returns the node that is now the last. Their references stay: blocks shared by several requests are freed
  // by the last unref(). Throws, with nothing changed, if one of them has children outside the chain; undo
  // the latest insert first.
  NodeId discard(NodeId node, int num_blocks);

  // Drops all nodes that no request references; returns how many.
  int clear() { return evict(pool_.num_evictable()); }

  int block_size() const { return block_size_; }
  int num_cached() const { return num_cached_; }

  // Number of blocks from the root to `node`, itself included: 0 for a root.
  int depth(NodeId node) const { return nodes_[resolve(node)].depth; }
  int64_t num_tokens(NodeId node) const { return static_cast<int64_t>(depth(node)) * block_size_; }
  // Both throw for a root.
  NodeId parent(NodeId node) const;
  int block_id(NodeId node) const;

  // Proves every invariant of the tree and of its pool, or throws with the values that break it.
  // O(num_blocks).
  void check() const;

 private:
  struct Node {
    uint64_t hash = 0;
    int32_t parent = -1;  // slot; -1 for a root
    int32_t next = -1;    // in the same bucket
    int32_t num_children = 0;
    int32_t depth = 0;
    uint32_t generation = 0;  // counts the nodes this slot has held
    bool live = false;
  };
  struct Root {
    std::string salt;
    std::list<int32_t>::iterator idle;  // valid while the root has no children
  };

  const int32_t* tokens(int slot) const { return &tokens_[static_cast<size_t>(slot) * block_size_]; }
  uint64_t hash(int parent, const int32_t* token_ids) const;
  int find_child(int parent, const int32_t* token_ids) const;  // slot or -1
  void add_child(int parent, const int32_t* token_ids, int block);
  void remove_leaf(int slot);

  bool is_root(int slot) const { return slot >= pool_.num_blocks(); }
  Root& root(int slot) { return roots_[slot - pool_.num_blocks()]; }
  const Root& root(int slot) const { return roots_[slot - pool_.num_blocks()]; }
  int find_or_add_root(std::string_view salt);
  void rest_root(int slot);  // it has no children: it may be forgotten when too many such roots exist

  NodeId handle(int slot) const;
  int resolve(NodeId node) const;

  BlockPool& pool_;
  const int block_size_;
  const int64_t tag_;    // this tree, in every handle
  const uint64_t seed_;  // secret, so that clients cannot craft prompts that collide
  const uint64_t hash_mask_;
  int num_cached_ = 0;
  std::vector<Node> nodes_;      // [0, num_blocks) by block id, then the roots
  std::vector<int32_t> tokens_;  // [num_blocks, block_size]
  std::vector<int32_t> buckets_;
  std::vector<Root> roots_;
  std::vector<int32_t> free_roots_;             // slots
  std::list<int32_t> idle_roots_;               // slots of roots without children, longest unused first
  std::unordered_map<std::string, int> salts_;  // salt -> slot
};

}  // namespace fs
