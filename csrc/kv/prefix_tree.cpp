// SPDX-License-Identifier: Apache-2.0
#include "kv/prefix_tree.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <random>

namespace fs {
namespace {

// A handle is tag : generation : slot, a positive int64.
constexpr int kSlotBits = 26;
constexpr int kGenerationBits = 30;
constexpr int kTagBits = 7;
static_assert(kSlotBits + kGenerationBits + kTagBits == 63);
// Slots are for nodes, for roots with children (at most one per node) and for idle roots.
constexpr int64_t kMaxBlocks = ((int64_t{1} << kSlotBits) - PrefixTree::kMaxIdleRoots - 1) / 2;
constexpr uint32_t kGenerationMask = (1u << kGenerationBits) - 1;

// Never 0, so that small integers are no handles.
int64_t next_tag() {
  static std::atomic<uint32_t> count{0};
  constexpr uint32_t kTags = (1u << kTagBits) - 1;
  return 1 + count.fetch_add(1) % kTags;
}

uint64_t random_seed() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) ^ device();
}

// Both halves of the 128-bit product: every input bit reaches every output bit.
uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace

PrefixTree::PrefixTree(BlockPool& pool, int block_size, int hash_bits)
    : pool_(pool),
      block_size_(block_size),
      tag_(next_tag()),
      seed_(random_seed()),
      hash_mask_(hash_bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max(hash_bits, 0)) - 1) {
  FS_CHECK(block_size > 0, "PrefixTree: block_size must be > 0, got " << block_size);
  FS_CHECK(hash_bits >= 0 && hash_bits <= 64, "PrefixTree: hash_bits must be in [0, 64], got " << hash_bits);
  FS_CHECK(pool.num_blocks() <= kMaxBlocks,
           "PrefixTree: at most " << kMaxBlocks << " blocks, the pool has " << pool.num_blocks());
  nodes_.resize(pool.num_blocks());
  tokens_.resize(static_cast<size_t>(pool.num_blocks()) * block_size);
  buckets_.assign(std::bit_ceil(2 * static_cast<size_t>(pool.num_blocks())), -1);
  pool.attach_tree();
}

PrefixTree::~PrefixTree() {
  for (int slot = 0; slot < pool_.num_blocks(); ++slot) {
    if (nodes_[slot].live) pool_.uncache(slot);
  }
  pool_.detach_tree();
}

Chain PrefixTree::match(std::span<const int32_t> token_ids, std::string_view salt) {
  int slot = find_or_add_root(salt);
  Chain chain;
  const size_t num_blocks = token_ids.size() / block_size_;
  for (size_t i = 0; i < num_blocks; ++i) {
    const int child = find_child(slot, &token_ids[i * block_size_]);
    if (child < 0) break;
    chain.block_ids.push_back(child);
    slot = child;
  }
  for (int id : chain.block_ids) pool_.ref(id);
  chain.node = handle(slot);
  return chain;
}

Chain PrefixTree::insert(NodeId node, std::span<const int32_t> token_ids,
                         std::span<const int32_t> block_ids) {
  int slot = resolve(node);
  const size_t num_blocks = block_ids.size();
  FS_CHECK(token_ids.size() == num_blocks * block_size_,
           "insert: " << num_blocks << " blocks of " << block_size_ << " tokens need "
                      << num_blocks * block_size_ << " token ids, got " << token_ids.size());
  // Look first, change later: a refused call changes nothing.
  Chain chain;
  chain.block_ids.reserve(num_blocks);
  for (size_t i = 0; i < num_blocks; ++i) {
    const int child = find_child(slot, &token_ids[i * block_size_]);
    if (child < 0) break;
    chain.block_ids.push_back(child);
    slot = child;
  }
  const size_t num_existing = chain.block_ids.size();
  for (size_t i = 0; i < num_blocks; ++i) {
    const int id = block_ids[i];
    FS_CHECK(pool_.ref_count(id) > 0, "insert: block " << id << " (at " << i << ") is not referenced");
    const bool already_here = i < num_existing && chain.block_ids[i] == id;
    FS_CHECK(already_here || !pool_.is_cached(id),
             "insert: block " << id << " (at " << i << ") is cached under other tokens already");
  }
  std::vector<int32_t> sorted(block_ids.begin(), block_ids.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  FS_CHECK(twice == sorted.end(), "insert: block " << *twice << " is given twice");

  for (size_t i = 0; i < num_existing; ++i) {
    if (chain.block_ids[i] == block_ids[i]) continue;
    pool_.ref(chain.block_ids[i]);
    pool_.unref(block_ids[i]);
  }
  for (size_t i = num_existing; i < num_blocks; ++i) {
    add_child(slot, &token_ids[i * block_size_], block_ids[i]);
    chain.block_ids.push_back(block_ids[i]);
    slot = block_ids[i];
  }
  chain.node = handle(slot);
  return chain;
}

int PrefixTree::evict(int num_blocks) {
  FS_CHECK(num_blocks >= 0, "evict: num_blocks must be >= 0, got " << num_blocks);
  int num_evicted = 0;
  while (num_evicted < num_blocks) {
    const int oldest = pool_.oldest_evictable();
    if (oldest < 0) break;
    if (nodes_[oldest].num_children > 0) {
      pool_.set_aside(oldest);  // its last child brings it back
    } else {
      remove_leaf(oldest);
      ++num_evicted;
    }
  }
  return num_evicted;
}

NodeId PrefixTree::discard(NodeId node, int num_blocks) {
  const int last = resolve(node);
  FS_CHECK(num_blocks >= 0 && num_blocks <= nodes_[last].depth,
           "discard: num_blocks must be in [0, " << nodes_[last].depth << "], the depth of the node, got "
                                                 << num_blocks);
  int slot = last;
  for (int i = 0; i < num_blocks; ++i) {
    const int allowed_children = i == 0 ? 0 : 1;  // the one that goes with it
    FS_CHECK(nodes_[slot].num_children == allowed_children,
             "discard: the node of block " << slot << " still has "
                                           << nodes_[slot].num_children - allowed_children
                                           << " children that would lose their parent");
    slot = nodes_[slot].parent;
    FS_CHECK(is_root(slot) || pool_.ref_count(slot) > 0,
             "discard: block " << slot << " is not referenced, but a block below it is");
  }
  const int end = slot;
  for (slot = last; slot != end;) {
    const int parent = nodes_[slot].parent;
    remove_leaf(slot);
    slot = parent;
  }
  return handle(end);
}

NodeId PrefixTree::parent(NodeId node) const {
  const int slot = resolve(node);
  FS_CHECK(!is_root(slot), "parent: node " << node << " is a root");
  return handle(nodes_[slot].parent);
}

int PrefixTree::block_id(NodeId node) const {
  const int slot = resolve(node);
  FS_CHECK(!is_root(slot), "block_id: node " << node << " is a root");
  return slot;
}

uint64_t PrefixTree::hash(int parent, const int32_t* token_ids) const {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  uint64_t h = mix(seed_ ^ static_cast<uint64_t>(parent), kOdd);
  int i = 0;
  for (; i + 2 <= block_size_; i += 2) {
    uint64_t pair;
    std::memcpy(&pair, token_ids + i, sizeof pair);
    h = mix(h ^ pair, seed_ | 1) + kOdd;
  }
  if (i < block_size_) h = mix(h ^ static_cast<uint32_t>(token_ids[i]), seed_ | 1);
  return mix(h, kOdd) & hash_mask_;
}

int PrefixTree::find_child(int parent, const int32_t* token_ids) const {
  if (nodes_[parent].num_children == 0) return -1;
  const uint64_t wanted = hash(parent, token_ids);
  for (int slot = buckets_[wanted & (buckets_.size() - 1)]; slot >= 0; slot = nodes_[slot].next) {
    const Node& node = nodes_[slot];
    if (node.hash == wanted && node.parent == parent &&
        std::memcmp(tokens(slot), token_ids, sizeof(int32_t) * block_size_) == 0) {
      return slot;
    }
  }
  return -1;
}

void PrefixTree::add_child(int parent, const int32_t* token_ids, int block) {
  pool_.cache(block);
  if (is_root(parent) && nodes_[parent].num_children == 0) idle_roots_.erase(root(parent).idle);
  ++nodes_[parent].num_children;
  std::copy_n(token_ids, block_size_, &tokens_[static_cast<size_t>(block) * block_size_]);
  Node& node = nodes_[block];
  node.hash = hash(parent, token_ids);
  node.parent = parent;
  node.num_children = 0;
  node.depth = nodes_[parent].depth + 1;
  node.live = true;
  int32_t& bucket = buckets_[node.hash & (buckets_.size() - 1)];
  node.next = bucket;
  bucket = block;
  ++num_cached_;
}

void PrefixTree::remove_leaf(int slot) {
  Node& node = nodes_[slot];
  int32_t* link = &buckets_[node.hash & (buckets_.size() - 1)];
  while (*link != slot) link = &nodes_[*link].next;
  *link = node.next;
  node.live = false;
  node.generation = (node.generation + 1) & kGenerationMask;
  --num_cached_;
  pool_.uncache(slot);
  if (--nodes_[node.parent].num_children > 0) return;
  if (is_root(node.parent)) {
    rest_root(node.parent);
  } else if (pool_.is_aside(node.parent)) {
    pool_.bring_back(node.parent);
  }
}

int PrefixTree::find_or_add_root(std::string_view salt) {
  const auto [entry, added] = salts_.try_emplace(std::string(salt), -1);
  if (!added) {
    const int slot = entry->second;
    if (nodes_[slot].num_children == 0) idle_roots_.splice(idle_roots_.end(), idle_roots_, root(slot).idle);
    return slot;
  }
  if (free_roots_.empty()) {
    free_roots_.push_back(static_cast<int32_t>(nodes_.size()));
    nodes_.emplace_back();
    roots_.emplace_back();
  }
  const int slot = free_roots_.back();
  free_roots_.pop_back();
  entry->second = slot;
  root(slot).salt = salt;
  nodes_[slot].live = true;
  rest_root(slot);
  return slot;
}

void PrefixTree::rest_root(int slot) {
  root(slot).idle = idle_roots_.insert(idle_roots_.end(), slot);
  if (idle_roots_.size() <= kMaxIdleRoots) return;
  const int oldest = idle_roots_.front();
  idle_roots_.pop_front();
  salts_.erase(root(oldest).salt);
  root(oldest).salt.clear();
  nodes_[oldest].live = false;
  nodes_[oldest].generation = (nodes_[oldest].generation + 1) & kGenerationMask;
  free_roots_.push_back(oldest);
}

NodeId PrefixTree::handle(int slot) const {
  return (tag_ << (kGenerationBits + kSlotBits)) |
         (static_cast<int64_t>(nodes_[slot].generation) << kSlotBits) | slot;
}

int PrefixTree::resolve(NodeId node) const {
  const int64_t slot = node & ((int64_t{1} << kSlotBits) - 1);
  const uint32_t generation = static_cast<uint32_t>(node >> kSlotBits) & kGenerationMask;
  FS_CHECK(node >= 0 && node >> (kGenerationBits + kSlotBits) == tag_ &&
               slot < static_cast<int64_t>(nodes_.size()),
           "node handle " << node << " does not belong to this tree");
  FS_CHECK(nodes_[slot].live && nodes_[slot].generation == generation,
           "node handle " << node << " is stale: its node was evicted, discarded or forgotten");
  FS_CHECK(is_root(static_cast<int>(slot)) || pool_.ref_count(static_cast<int>(slot)) > 0,
           "node handle " << node << " is no longer valid: block " << slot << " is not referenced");
  return static_cast<int>(slot);
}

}  // namespace fs
