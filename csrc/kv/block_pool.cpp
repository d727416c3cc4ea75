// SPDX-License-Identifier: Apache-2.0
#include "kv/block_pool.h"

#include <limits>
#include <sstream>

namespace fs {

BlockPool::BlockPool(int num_blocks) {
  FS_CHECK(num_blocks > 0, "BlockPool: num_blocks must be > 0, got " << num_blocks);
  blocks_.resize(num_blocks);
  for (int id = 0; id < num_blocks; ++id) push_back(free_, id);
  num_free_ = num_blocks;
}

int BlockPool::allocate() {
  if (num_free_ == 0) {
    std::ostringstream message;
    message << "out of KV blocks: 0 of " << num_blocks() << " are free, " << num_used() << " used, "
            << num_evictable_ << " evictable";
    throw OutOfBlocks(message.str());
  }
  const int id = free_.head;
  remove(free_, id);
  --num_free_;
  blocks_[id].ref_count = 1;
  return id;
}

void BlockPool::ref(int id) {
  Block& block = at(id);
  if (block.ref_count == 0) {
    FS_CHECK(block.cached, "ref of block " << id << ", which is free: allocate() gives out free blocks");
    leave_evictable(id);
  }
  FS_CHECK(block.ref_count < std::numeric_limits<int32_t>::max(),
           "block " << id << ": reference count overflows");
  ++block.ref_count;
}

void BlockPool::unref(int id) {
  Block& block = at(id);
  FS_CHECK(block.ref_count > 0, "unref of block " << id << ", which has no references (it is "
                                                  << (block.cached ? "evictable" : "free") << ")");
  if (--block.ref_count > 0) return;
  if (block.cached) {
    block.released_at = ++clock_;
    push_back(lru_, id);
    ++num_evictable_;
  } else {
    push_front(free_, id);
    ++num_free_;
  }
}

void BlockPool::attach_tree() {
  FS_CHECK(!tree_, "this BlockPool already has a PrefixTree; a pool serves one tree");
  tree_ = true;
}

void BlockPool::cache(int id) {
  Block& block = at(id);
  FS_CHECK(block.ref_count > 0 && !block.cached,
           "cannot cache block " << id << ": ref_count " << block.ref_count << ", cached " << block.cached
                                 << "; must be referenced and not cached");
  block.cached = true;
}

void BlockPool::uncache(int id) {
  Block& block = at(id);
  FS_CHECK(block.cached, "cannot uncache block " << id << ": it is not cached");
  block.cached = false;
  if (block.ref_count > 0) return;
  leave_evictable(id);
  push_front(free_, id);
  ++num_free_;
}

void BlockPool::set_aside(int id) {
  Block& block = at(id);
  FS_CHECK(block.cached && block.ref_count == 0 && !block.aside,
           "cannot set block " << id << " aside: not evictable");
  remove(lru_, id);
  block.aside = true;
  ++num_aside_;
}

void BlockPool::bring_back(int id) {
  Block& block = at(id);
  FS_CHECK(block.aside, "cannot bring block " << id << " back: it was not set aside");
  block.aside = false;
  --num_aside_;
  push_front(lru_, id);
}

void BlockPool::leave_evictable(int id) {
  Block& block = blocks_[id];
  if (block.aside) {
    block.aside = false;
    --num_aside_;
  } else {
    remove(lru_, id);
  }
  --num_evictable_;
}

const BlockPool::Block& BlockPool::at(int id) const {
  FS_CHECK(id >= 0 && id < num_blocks(), "block id must be in [0, " << num_blocks() << "), got " << id);
  return blocks_[id];
}

void BlockPool::push_front(List& list, int id) {
  blocks_[id].prev = -1;
  blocks_[id].next = list.head;
  (list.head < 0 ? list.tail : blocks_[list.head].prev) = id;
  list.head = id;
}

void BlockPool::push_back(List& list, int id) {
  blocks_[id].next = -1;
  blocks_[id].prev = list.tail;
  (list.tail < 0 ? list.head : blocks_[list.tail].next) = id;
  list.tail = id;
}

void BlockPool::remove(List& list, int id) {
  Block& block = blocks_[id];
  (block.prev < 0 ? list.head : blocks_[block.prev].next) = block.next;
  (block.next < 0 ? list.tail : blocks_[block.next].prev) = block.prev;
  block.prev = block.next = -1;
}

void BlockPool::check_list(const List& list, const char* name, int expected_length) const {
  int length = 0;
  int previous = -1;
  for (int id = list.head; id >= 0; id = blocks_[id].next) {
    FS_CHECK(id < num_blocks(), name << " list holds block " << id << " of " << num_blocks());
    FS_CHECK(blocks_[id].prev == previous, name << " list: block " << id << " follows " << previous
                                                << " but points back to " << blocks_[id].prev);
    FS_CHECK(++length <= expected_length,
             name << " list is longer than the " << expected_length << " blocks counted");
    previous = id;
  }
  FS_CHECK(list.tail == previous,
           name << " list ends at block " << previous << " but its tail is " << list.tail);
  FS_CHECK(length == expected_length,
           name << " list has " << length << " blocks, " << expected_length << " counted");
}

void BlockPool::check() const {
  int num_free = 0;
  int num_evictable = 0;
  int num_aside = 0;
  for (int id = 0; id < num_blocks(); ++id) {
    const Block& block = blocks_[id];
    FS_CHECK(block.ref_count >= 0, "block " << id << " has ref_count " << block.ref_count);
    FS_CHECK(
        !block.aside || (block.cached && block.ref_count == 0),
        "block " << id << " is set aside with ref_count " << block.ref_count << ", cached " << block.cached);
    FS_CHECK(!block.cached || tree_, "block " << id << " is cached, but the pool has no tree");
    if (block.ref_count == 0) ++(block.cached ? num_evictable : num_free);
    num_aside += block.aside;
    if (block.ref_count > 0 || block.aside) {
      FS_CHECK(
          block.prev < 0 && block.next < 0 && free_.head != id && lru_.head != id,
          "block " << id << " is in a list with ref_count " << block.ref_count << ", aside " << block.aside);
    }
  }
  FS_CHECK(num_free == num_free_, num_free << " blocks are free, " << num_free_ << " counted");
  FS_CHECK(num_evictable == num_evictable_,
           num_evictable << " blocks are evictable, " << num_evictable_ << " counted");
  FS_CHECK(num_aside == num_aside_, num_aside << " blocks are set aside, " << num_aside_ << " counted");

  // Lengths equal to the counts, members of the right state: so every block is where it belongs, once.
  check_list(free_, "free", num_free_);
  check_list(lru_, "evictable", num_evictable_ - num_aside_);
  for (int id = free_.head; id >= 0; id = blocks_[id].next) {
    FS_CHECK(blocks_[id].ref_count == 0 && !blocks_[id].cached,
             "the free list holds block " << id << ", not free");
  }
  for (int id = lru_.head; id >= 0; id = blocks_[id].next) {
    const Block& block = blocks_[id];
    FS_CHECK(block.ref_count == 0 && block.cached,
             "the evictable list holds block " << id << ", not evictable");
    FS_CHECK(block.next < 0 || block.released_at < blocks_[block.next].released_at,
             "evictable list out of order: block " << id << " released at " << block.released_at
                                                   << " before block " << block.next << " released at "
                                                   << blocks_[block.next].released_at);
  }
}

}  // namespace fs
