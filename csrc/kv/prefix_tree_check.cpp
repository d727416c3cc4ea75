// SPDX-License-Identifier: Apache-2.0
//
// The proof that a tree is sound: every link is followed in both directions and every count is recounted.
#include "kv/prefix_tree.h"

namespace fs {

void PrefixTree::check() const {
  pool_.check();
  const int num_blocks = pool_.num_blocks();
  int num_live = 0;
  std::vector<int32_t> num_children(nodes_.size(), 0);
  for (int slot = 0; slot < num_blocks; ++slot) {
    const Node& node = nodes_[slot];
    FS_CHECK(node.live == pool_.is_cached(slot), "block " << slot << ": node live " << node.live
                                                          << ", cached in the pool "
                                                          << pool_.is_cached(slot));
    if (!node.live) continue;
    ++num_live;
    FS_CHECK(node.parent >= 0 && node.parent < static_cast<int>(nodes_.size()) && nodes_[node.parent].live,
             "node " << slot << " has parent " << node.parent << ", which is no node");
    FS_CHECK(node.depth == nodes_[node.parent].depth + 1,
             "node " << slot << " has depth " << node.depth << ", its parent " << nodes_[node.parent].depth);
    FS_CHECK(is_root(node.parent) || pool_.ref_count(node.parent) > 0 || pool_.ref_count(slot) == 0,
             "block " << slot << " is referenced, its parent " << node.parent << " is not");
    ++num_children[node.parent];
    FS_CHECK(node.hash == hash(node.parent, tokens(slot)), "node " << slot << " is filed under a wrong hash");
    const int found = find_child(node.parent, tokens(slot));
    FS_CHECK(found == slot, "node " << slot << " is not found by its tokens, but " << found << " is");
  }
  FS_CHECK(num_live == num_cached_, num_live << " nodes are live, " << num_cached_ << " counted");

  size_t num_idle = 0;
  size_t num_roots = 0;
  for (int slot = 0; slot < static_cast<int>(nodes_.size()); ++slot) {
    FS_CHECK(!nodes_[slot].live || nodes_[slot].num_children == num_children[slot],
             "node " << slot << " counts " << nodes_[slot].num_children << " children, has "
                     << num_children[slot]);
    if (!is_root(slot)) {
      FS_CHECK(!pool_.is_aside(slot) || num_children[slot] > 0,
               "block " << slot << " is set aside without children");
      continue;
    }
    if (!nodes_[slot].live) continue;
    ++num_roots;
    num_idle += num_children[slot] == 0;
    const auto entry = salts_.find(root(slot).salt);
    FS_CHECK(entry != salts_.end() && entry->second == slot, "root " << slot << " is not found by its salt");
    FS_CHECK(num_children[slot] > 0 || *root(slot).idle == slot,
             "root " << slot << " is idle but not listed so");
  }
  FS_CHECK(num_roots == salts_.size() && num_roots + free_roots_.size() == roots_.size(),
           num_roots << " roots, " << free_roots_.size() << " free, of " << roots_.size() << "; "
                     << salts_.size() << " salts");
  FS_CHECK(num_idle == idle_roots_.size(),
           num_idle << " roots are idle, " << idle_roots_.size() << " listed");
  size_t num_filed = 0;
  for (int32_t head : buckets_) {
    for (int slot = head; slot >= 0; slot = nodes_[slot].next) {
      FS_CHECK(nodes_[slot].live, "the hash table holds node " << slot << ", which is not live");
      FS_CHECK(++num_filed <= static_cast<size_t>(num_cached_),
               "the hash table holds more than " << num_cached_);
    }
  }
}

}  // namespace fs
