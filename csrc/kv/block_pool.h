// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "core/error.h"

namespace fs {

// allocate() found no free block. Evict cached blocks or preempt a request, then try again.
class OutOfBlocks : public Error {
 public:
  using Error::Error;
};

// Who owns which block of the KV cache. Blocks are ids 0 .. num_blocks-1; the memory behind them is not its
// business.
//
// A block is in exactly one state:
//   used       ref_count > 0, some request reads or writes it (the prefix tree may cache it as well)
//   evictable  ref_count == 0, but the prefix tree caches it: its content is valid and may be referenced
//   again free       ref_count == 0 and not cached: its content is meaningless
//
// Every operation is O(1); check() is O(num_blocks). Not thread-safe.
class BlockPool {
 public:
  explicit BlockPool(int num_blocks);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Takes a free block and gives it ref_count 1. Throws OutOfBlocks if there is none (evictable blocks are
  // not taken: PrefixTree::evict decides which of those may go).
  int allocate();

  // One more reference to a used or an evictable block. Throws on a bad id and on a free block.
  void ref(int id);

  // One reference less. The last one makes the block evictable if the tree caches it, free if not. Throws on
  // a bad id and on a block without references.
  void unref(int id);

  int ref_count(int id) const { return at(id).ref_count; }
  bool is_cached(int id) const { return at(id).cached; }

  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  int num_free() const { return num_free_; }
  int num_evictable() const { return num_evictable_; }
  int num_used() const { return num_blocks() - num_free_ - num_evictable_; }

  // Proves every invariant of the pool, or throws with the values that break it.
  void check() const;

 private:
  // Index-linked list of blocks; a block is in at most one list.
  struct List {
    int32_t head = -1;
    int32_t tail = -1;
  };
  struct Block {
    int32_t ref_count = 0;
    int32_t prev = -1;
    int32_t next = -1;
    bool cached = false;
    bool aside = false;        // evictable, but out of the LRU list: see set_aside
    uint64_t released_at = 0;  // when it last became unreferenced; lets check() prove the LRU order
  };

  // What the one tree of this pool tells it. Cached is a property of the block, not a reference: the tree
  // keeps content findable, requests keep it alive.
  friend class PrefixTree;
  void attach_tree();                    // throws if another tree already caches blocks of this pool
  void detach_tree() { tree_ = false; }  // after all blocks were uncached
  void cache(int id);                    // a used block becomes cached
  void uncache(int id);  // no longer findable: an evictable block becomes free, a used one stays used
  int oldest_evictable() const { return lru_.head; }  // unreferenced for longest, or -1
  // An evictable block cannot go before its cached children. When eviction meets one it leaves the LRU list,
  // so that it is stepped over once and not in every search; after its last child went it comes back as the
  // oldest, which it is: all older blocks were evicted or set aside before it.
  void set_aside(int id);
  void bring_back(int id);
  bool is_aside(int id) const { return blocks_[id].aside; }

  void leave_evictable(int id);
  const Block& at(int id) const;
  Block& at(int id) { return const_cast<Block&>(static_cast<const BlockPool&>(*this).at(id)); }
  void push_front(List& list, int id);
  void push_back(List& list, int id);
  void remove(List& list, int id);
  void check_list(const List& list, const char* name, int expected_length) const;

  std::vector<Block> blocks_;
  List free_;  // last freed first: its memory is the likeliest to be warm
  List lru_;   // evictable blocks that are not set aside, longest unreferenced first
  int num_free_ = 0;
  int num_evictable_ = 0;
  int num_aside_ = 0;
  uint64_t clock_ = 0;
  bool tree_ = false;
};

}  // namespace fs
