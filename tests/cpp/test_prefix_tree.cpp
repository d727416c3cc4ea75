// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kv/prefix_tree.h"

namespace fs {
namespace {

using Ints = std::vector<int32_t>;

template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// Blocks of the tests: four tokens each.
const Ints A = {1, 2, 3, 4};
const Ints B = {5, 6, 7, 8};
const Ints C = {9, 10, 11, 12};

Ints operator+(Ints left, const Ints& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// Every fact holds with a good hash and when all hashes are equal.
class PrefixTreeTest : public testing::TestWithParam<int> {
 protected:
  // A request as the scheduler has it: its tokens' chain and one reference to each block of it.
  struct Holder {
    NodeId node;
    Ints blocks;
  };

  Holder hold(const Ints& tokens, const std::string& salt = "") {
    Chain chain = tree.match(tokens, salt);
    Holder holder{chain.node, chain.block_ids};
    extend(holder, Ints(tokens.begin() + static_cast<long>(chain.block_ids.size()) * 4, tokens.end()));
    return holder;
  }
  void extend(Holder& holder, const Ints& tokens) {
    Ints blocks;
    for (size_t i = 0; i < tokens.size() / 4; ++i) blocks.push_back(pool.allocate());
    const Chain chain = tree.insert(holder.node, tokens, blocks);
    holder.node = chain.node;
    holder.blocks.insert(holder.blocks.end(), chain.block_ids.begin(), chain.block_ids.end());
  }
  void release(const Holder& holder) {
    for (size_t i = holder.blocks.size(); i-- > 0;) pool.unref(holder.blocks[i]);
  }
  void release_first_block_first(const Holder& holder) {
    for (int id : holder.blocks) pool.unref(id);
  }
  bool cached(const Ints& tokens, const std::string& salt = "") {
    const Chain chain = tree.match(tokens, salt);
    release({chain.node, chain.block_ids});  // a real look: it refreshes what it finds
    return chain.block_ids.size() == tokens.size() / 4;
  }
  void TearDown() override { tree.check(); }

  BlockPool pool{4};
  PrefixTree tree{pool, 4, GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Hash, PrefixTreeTest, testing::Values(64, 0), [](const auto& hash_bits) {
  return hash_bits.param == 64 ? "AllBits" : "AlwaysCollides";
});

TEST_P(PrefixTreeTest, MatchesNothingAtFirst) {
  const Chain chain = tree.match(A + B);
  EXPECT_TRUE(chain.block_ids.empty());
  EXPECT_EQ(tree.depth(chain.node), 0);
  EXPECT_EQ(tree.num_tokens(chain.node), 0);
}

TEST_P(PrefixTreeTest, MatchesTheLongestCachedChain) {
  const Holder holder = hold(A + B);
  const Chain chain = tree.match(A + B + C);
  EXPECT_EQ(chain.block_ids, holder.blocks);
  EXPECT_EQ(chain.node, holder.node);
  EXPECT_EQ(tree.num_tokens(chain.node), 8);
}

TEST_P(PrefixTreeTest, MatchReferencesEveryBlockItReturns) {
  const Holder holder = hold(A + B);
  tree.match(A);
  EXPECT_EQ(pool.ref_count(holder.blocks[0]), 2);
  EXPECT_EQ(pool.ref_count(holder.blocks[1]), 1);
}

TEST_P(PrefixTreeTest, MatchesOnlyFullBlocks) {
  const Holder holder = hold(A + B);
  EXPECT_EQ(tree.match(A + Ints{5, 6, 7}).block_ids, Ints{holder.blocks[0]});
  EXPECT_TRUE(tree.match(Ints{1, 2, 3}).block_ids.empty());
  EXPECT_TRUE(tree.match(Ints{}).block_ids.empty());
}

TEST_P(PrefixTreeTest, ABlockMeansItsTokensAfterItsAncestors) {
  hold(A + B);
  EXPECT_TRUE(tree.match(B).block_ids.empty());
  EXPECT_EQ(tree.match(A + A).block_ids.size(), 1u);
}

TEST_P(PrefixTreeTest, EqualBlocksAtDifferentPlacesAreDifferentNodes) {
  const Holder holder = hold(A + A + A);
  EXPECT_EQ(tree.num_cached(), 3);
  EXPECT_EQ(tree.match(A + A + A).block_ids, holder.blocks);
}

TEST_P(PrefixTreeTest, SaltsShareNothing) {
  const Holder alice = hold(A, "alice");
  EXPECT_TRUE(tree.match(A).block_ids.empty());
  EXPECT_TRUE(tree.match(A, "bob").block_ids.empty());
  EXPECT_EQ(tree.match(A, "alice").block_ids, alice.blocks);
}

TEST_P(PrefixTreeTest, InsertKeepsTheCallersReference) {
  const Holder holder = hold(A);
  EXPECT_EQ(pool.ref_count(holder.blocks[0]), 1);
  EXPECT_TRUE(pool.is_cached(holder.blocks[0]));
}

TEST_P(PrefixTreeTest, InsertOfAnEqualChainSwapsInTheExistingBlocks) {
  const NodeId root = tree.match(A).node;  // two requests miss,
  const Ints first = {pool.allocate()};
  const Ints second = {pool.allocate(), pool.allocate()};
  const Chain one = tree.insert(root, A, first);
  const Chain two = tree.insert(root, A + B, second);  // compute the same first block, and one of them more
  EXPECT_EQ(one.block_ids, first);
  EXPECT_EQ(two.block_ids, (Ints{first[0], second[1]}));
  EXPECT_EQ(pool.ref_count(first[0]), 2);
  EXPECT_EQ(pool.ref_count(second[0]), 0);
  EXPECT_EQ(pool.num_free(), 2);
}

TEST_P(PrefixTreeTest, InsertOfABlockAlreadyInItsPlaceChangesNothing) {
  const Holder holder = hold(A);
  const Chain chain = tree.insert(tree.match({}).node, A, holder.blocks);
  EXPECT_EQ(chain.block_ids, holder.blocks);
  EXPECT_EQ(chain.node, holder.node);
  EXPECT_EQ(pool.ref_count(holder.blocks[0]), 1);
}

TEST_P(PrefixTreeTest, InsertOfNothingReturnsTheNode) {
  const Holder holder = hold(A);
  EXPECT_EQ(tree.insert(holder.node, {}, {}).node, holder.node);
}

TEST_P(PrefixTreeTest, InsertRefusesBadBlocksAndChangesNothing) {
  const NodeId root = tree.match({}).node;
  const int used = pool.allocate();
  const Holder other = hold(C);
  const int cached_elsewhere = other.blocks[0];
  EXPECT_EQ(error_of([&] { tree.insert(root, A + B, Ints{used}); }),
            "insert: 1 blocks of 4 tokens need 4 token ids, got 8");
  EXPECT_EQ(error_of([&] { tree.insert(root, A + B, Ints{used, used}); }),
            "insert: block " + std::to_string(used) + " is given twice");
  EXPECT_EQ(error_of([&] { tree.insert(root, A + B, Ints{used, 3}); }),
            "insert: block 3 (at 1) is not referenced");
  EXPECT_EQ(error_of([&] { tree.insert(root, A + B, Ints{used, 9}); }), "block id must be in [0, 4), got 9");
  EXPECT_EQ(
      error_of([&] { tree.insert(root, A + B, Ints{used, cached_elsewhere}); }),
      "insert: block " + std::to_string(cached_elsewhere) + " (at 1) is cached under other tokens already");
  EXPECT_EQ(tree.num_cached(), 1);
  EXPECT_EQ(pool.ref_count(used), 1);
}

TEST_P(PrefixTreeTest, UnreferencedNodesStayFindableUntilEvicted) {
  release(hold(A + B));
  EXPECT_EQ(pool.num_evictable(), 2);
  EXPECT_TRUE(cached(A + B));
  EXPECT_EQ(tree.evict(2), 2);
  EXPECT_FALSE(cached(A));
  EXPECT_EQ(pool.num_free(), 4);
}

TEST_P(PrefixTreeTest, EvictionSparesReferencedBlocks) {
  const Holder holder = hold(A + B);
  EXPECT_EQ(tree.evict(4), 0);
  EXPECT_EQ(tree.num_cached(), 2);
  EXPECT_EQ(pool.num_used(), 2);
  release(holder);
}

TEST_P(PrefixTreeTest, EvictsTheLeastRecentlyReleasedFirst) {
  release(hold(A));
  release(hold(B));
  release(hold(A));  // used again: B is older now
  EXPECT_EQ(tree.evict(1), 1);
  EXPECT_TRUE(cached(A));
  EXPECT_FALSE(cached(B));
}

TEST_P(PrefixTreeTest, EvictsLeavesBeforeParents) {
  release(hold(A + B + C));
  tree.evict(1);
  EXPECT_TRUE(cached(A + B));
  EXPECT_FALSE(cached(A + B + C));
}

TEST_P(PrefixTreeTest, EvictsLeavesBeforeParentsHoweverTheyWereReleased) {
  release_first_block_first(hold(A + B + C));
  tree.evict(1);
  EXPECT_TRUE(cached(A + B));
  EXPECT_FALSE(cached(A + B + C));
}

TEST_P(PrefixTreeTest, AParentOlderThanItsLastChildGoesRightAfterIt) {
  release_first_block_first(hold(A + B));  // A is older than B
  release(hold(C));
  tree.evict(2);
  EXPECT_FALSE(cached(A));
  EXPECT_TRUE(cached(C));
}

TEST_P(PrefixTreeTest, AParentYoungerThanItsChildWaitsItsTurn) {
  release(hold(A + B));
  release(hold(C));
  release(hold(A));  // refreshes A only: order is now B, C, A
  tree.evict(2);
  EXPECT_TRUE(cached(A));
  EXPECT_FALSE(cached(C));
}

TEST_P(PrefixTreeTest, ASkippedParentThatIsUsedAgainIsYoungAgain) {
  release_first_block_first(hold(A + B + C));
  tree.evict(1);         // steps over A and B, takes C
  release(hold(A + B));  // B, then A
  release(hold(C));
  tree.evict(1);
  EXPECT_TRUE(cached(C));
  EXPECT_TRUE(cached(A));
  EXPECT_FALSE(cached(A + B));
}

TEST_P(PrefixTreeTest, EvictsNoMoreThanAsked) {
  release(hold(A + B + C));
  EXPECT_EQ(tree.evict(0), 0);
  EXPECT_EQ(tree.evict(2), 2);
  EXPECT_EQ(tree.num_cached(), 1);
  EXPECT_EQ(tree.evict(5), 1);
  EXPECT_EQ(error_of([&] { tree.evict(-1); }), "evict: num_blocks must be >= 0, got -1");
}

TEST_P(PrefixTreeTest, ClearDropsAllUnreferencedNodes) {
  const Holder kept = hold(A);
  release(hold(A + B + C));
  EXPECT_EQ(tree.clear(), 2);
  EXPECT_EQ(tree.num_cached(), 1);
  EXPECT_TRUE(cached(A));
  release(kept);
  EXPECT_EQ(tree.clear(), 1);
  EXPECT_EQ(pool.num_free(), 4);
}

TEST_P(PrefixTreeTest, DiscardForgetsTheEndOfAChainAndKeepsItsReferences) {
  Holder holder = hold(A + B + C);
  const NodeId end = tree.discard(holder.node, 2);
  EXPECT_EQ(tree.depth(end), 1);
  EXPECT_EQ(tree.num_cached(), 1);
  EXPECT_EQ(pool.num_used(), 3);
  release(holder);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.num_evictable(), 1);
}

TEST_P(PrefixTreeTest, DiscardRefusesToOrphanChildren) {
  const Holder first = hold(A);
  const Holder second = hold(A + B);
  const Holder third = hold(A + C);
  EXPECT_EQ(error_of([&] { tree.discard(first.node, 1); }),
            "discard: the node of block " + std::to_string(first.blocks[0]) +
                " still has 2 children that would lose their parent");
  EXPECT_EQ(error_of([&] { tree.discard(third.node, 2); }),
            "discard: the node of block " + std::to_string(first.blocks[0]) +
                " still has 1 children that would lose their parent");
  EXPECT_EQ(tree.num_cached(), 3);
  tree.discard(third.node, 1);  // the latest insert first
  tree.discard(second.node, 2);
  EXPECT_EQ(tree.num_cached(), 0);
}

TEST_P(PrefixTreeTest, DiscardRefusesMoreThanTheChain) {
  const Holder holder = hold(A + B);
  EXPECT_EQ(error_of([&] { tree.discard(holder.node, 3); }),
            "discard: num_blocks must be in [0, 2], the depth of the node, got 3");
  EXPECT_EQ(error_of([&] { tree.discard(holder.node, -1); }),
            "discard: num_blocks must be in [0, 2], the depth of the node, got -1");
  EXPECT_EQ(tree.discard(holder.node, 0), holder.node);
}

TEST_P(PrefixTreeTest, ParentAndDepthClimbToTheRoot) {
  const Holder holder = hold(A + B);
  const NodeId parent = tree.parent(holder.node);
  EXPECT_EQ(tree.depth(holder.node), 2);
  EXPECT_EQ(tree.block_id(holder.node), holder.blocks[1]);
  EXPECT_EQ(tree.block_id(parent), holder.blocks[0]);
  const NodeId root = tree.parent(parent);
  EXPECT_EQ(root, tree.match({}).node);
  EXPECT_EQ(tree.depth(root), 0);
  EXPECT_NE(error_of([&] { tree.parent(root); }), "no error");
  EXPECT_NE(error_of([&] { tree.block_id(root); }), "no error");
}

TEST_P(PrefixTreeTest, RefusesTheHandleOfAnUnreferencedNode) {
  const Holder holder = hold(A);
  release(holder);
  EXPECT_NE(error_of([&] { tree.depth(holder.node); }).find("is not referenced"), std::string::npos);
}

TEST_P(PrefixTreeTest, RefusesTheHandleOfAnEvictedNodeEvenIfItsBlockHoldsANewOne) {
  const Holder old = hold(A);
  release(old);
  tree.evict(1);
  EXPECT_NE(error_of([&] { tree.insert(old.node, {}, {}); }).find("is stale"), std::string::npos);
  const Holder fresh = hold(A);
  ASSERT_EQ(fresh.blocks, old.blocks);
  EXPECT_NE(fresh.node, old.node);
  EXPECT_NE(error_of([&] { tree.discard(old.node, 1); }).find("is stale"), std::string::npos);
}

TEST_P(PrefixTreeTest, RefusesHandlesOfAnotherTreeAndNonsense) {
  BlockPool other_pool(4);
  PrefixTree other(other_pool, 4);
  const NodeId foreign = other.match({}).node;
  for (NodeId node : {foreign, NodeId{-1}, NodeId{0}, NodeId{3}, tree.match({}).node + 1}) {
    EXPECT_EQ(error_of([&] { tree.depth(node); }),
              "node handle " + std::to_string(node) + " does not belong to this tree");
  }
}

TEST_P(PrefixTreeTest, APoolServesOneTree) {
  EXPECT_EQ(error_of([&] { PrefixTree second(pool, 4); }),
            "this BlockPool already has a PrefixTree; a pool serves one tree");
}

TEST(PrefixTree, RefusesImpossibleSizes) {
  BlockPool pool(4);
  EXPECT_EQ(error_of([&] { PrefixTree tree(pool, 0); }), "PrefixTree: block_size must be > 0, got 0");
  EXPECT_EQ(error_of([&] { PrefixTree tree(pool, 4, 65); }),
            "PrefixTree: hash_bits must be in [0, 64], got 65");
  EXPECT_EQ(error_of([&] { PrefixTree tree(pool, 4); }), "no error");
}

TEST(PrefixTree, GivesItsBlocksBackToThePoolWhenItEnds) {
  BlockPool pool(4);
  const int held = pool.allocate();
  {
    PrefixTree tree(pool, 4);
    tree.insert(tree.match({}).node, A + B, Ints{held, pool.allocate()});
    pool.unref(1);
    EXPECT_EQ(pool.num_evictable(), 1);
  }
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_FALSE(pool.is_cached(held));
  pool.check();
}

TEST(PrefixTree, ForgetsSaltsThatCacheNothingOnceThereAreTooMany) {
  BlockPool pool(4);
  PrefixTree tree(pool, 4);
  const int block = pool.allocate();
  const NodeId busy = tree.match({}, "busy").node;
  tree.insert(busy, A, Ints{block});
  const NodeId idle = tree.match({}, "idle").node;
  for (int i = 0; i < PrefixTree::kMaxIdleRoots - 1; ++i) tree.match(A, std::to_string(i));
  EXPECT_EQ(tree.depth(idle), 0);
  tree.match(A, "one too many");
  EXPECT_NE(error_of([&] { tree.depth(idle); }).find("is stale"), std::string::npos);
  EXPECT_EQ(tree.match(A, "busy").block_ids, Ints{block});
  EXPECT_EQ(tree.depth(busy), 0);
  tree.check();
}

TEST(PrefixTree, HoldsAMillionTokenChain) {
  const int num_blocks = 62500;
  BlockPool pool(num_blocks);
  PrefixTree tree(pool, 16);
  Ints tokens(1'000'000);
  std::iota(tokens.begin(), tokens.end(), 0);
  Ints blocks(num_blocks);
  for (int32_t& id : blocks) id = pool.allocate();
  const Chain inserted = tree.insert(tree.match(tokens).node, tokens, blocks);
  EXPECT_EQ(tree.depth(inserted.node), num_blocks);
  EXPECT_EQ(tree.num_tokens(inserted.node), 1'000'000);
  const Chain matched = tree.match(tokens);
  EXPECT_EQ(matched.node, inserted.node);
  EXPECT_EQ(matched.block_ids, blocks);
  tree.check();
  for (int id : blocks) pool.unref(id);
  for (int id : blocks) pool.unref(id);  // the root's end first: eviction has to step over all parents
  for (int i = 0; i < num_blocks / 2; ++i)
    ASSERT_EQ(tree.evict(1), 1);  // would never end if it did so every time
  EXPECT_EQ(tree.match(tokens).block_ids.size(), 31250u);
  tree.check();
}

// Requests come, grow, leave, fail and get evicted at random; a naive model predicts every result.
class RandomRequests {
 public:
  RandomRequests(unsigned seed, int hash_bits) : random_(seed), tree_(pool_, 2, hash_bits) {}

  void step() {
    switch (pick(8)) {
      case 0:
      case 1:
        admit();
        break;
      case 2:
      case 3:
        extend();
        break;
      case 4:
        release();
        break;
      case 5:
        discard();
        break;
      case 6:
        evict(1 + pick(3));
        break;
      case 7:
        if (pick(8) == 0) evict(pool_.num_evictable());
        break;
    }
    compare();
  }
  void drain() {
    while (!requests_.empty()) release();
    ASSERT_EQ(pool_.num_used(), 0);
    ASSERT_EQ(tree_.clear(), static_cast<int>(entries_.size()));
    ASSERT_EQ(pool_.num_free(), pool_.num_blocks());
    tree_.check();
  }

 private:
  struct Request {
    std::string salt;
    Ints tokens;  // of its full blocks
    Ints blocks;
    NodeId node;
  };
  struct Entry {
    int block;
    long released = 0;
  };
  using Key = std::pair<std::string, Ints>;

  int pick(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }

  void admit() {
    Request request{pick(3) == 0 ? "salt" : "", {}, {}, 0};
    Ints tokens(static_cast<size_t>(pick(9)));
    for (int32_t& token : tokens) token = pick(2);
    const Chain chain = tree_.match(tokens, request.salt);
    for (size_t end = 2; end <= tokens.size(); end += 2) {
      const Ints prefix(tokens.begin(), tokens.begin() + static_cast<long>(end));
      const auto entry = entries_.find({request.salt, prefix});
      if (entry == entries_.end()) break;
      request.tokens = prefix;
      request.blocks.push_back(entry->second.block);
      ++refs_[entry->second.block];
    }
    ASSERT_EQ(chain.block_ids, request.blocks);
    request.node = chain.node;
    requests_.push_back(request);
  }

  void extend() {
    if (requests_.empty()) return;
    Request& request = requests_[static_cast<size_t>(pick(static_cast<int>(requests_.size())))];
    Ints tokens;
    Ints blocks;
    for (int left = 1 + pick(3); left > 0 && pool_.num_free() > 0; --left) {
      tokens.push_back(pick(2));
      tokens.push_back(pick(2));
      blocks.push_back(pool_.allocate());
    }
    Ints expected;
    for (size_t i = 0; i < blocks.size(); ++i) {
      request.tokens.push_back(tokens[2 * i]);
      request.tokens.push_back(tokens[2 * i + 1]);
      const auto [entry, added] = entries_.try_emplace({request.salt, request.tokens}, Entry{blocks[i]});
      expected.push_back(entry->second.block);
      ++refs_[entry->second.block];
    }
    const Chain chain = tree_.insert(request.node, tokens, blocks);
    ASSERT_EQ(chain.block_ids, expected);
    request.node = chain.node;
    request.blocks.insert(request.blocks.end(), expected.begin(), expected.end());
  }

  void release() {
    if (requests_.empty()) return;
    const auto request = requests_.begin() + pick(static_cast<int>(requests_.size()));
    Ints order = request->blocks;
    if (pick(2) == 0) std::reverse(order.begin(), order.end());
    if (pick(4) == 0) std::shuffle(order.begin(), order.end(), random_);
    for (int block : order) unref(block);
    requests_.erase(request);
  }

  void unref(int block) {
    pool_.unref(block);
    if (--refs_[block] > 0) return;
    for (auto& [key, entry] : entries_) {
      if (entry.block == block) entry.released = ++clock_;
    }
  }

  bool has_children(const Key& key) const {
    return std::any_of(entries_.begin(), entries_.end(), [&](const auto& other) {
      const auto& [salt, tokens] = other.first;
      return salt == key.first && tokens.size() == key.second.size() + 2 &&
             std::equal(key.second.begin(), key.second.end(), tokens.begin());
    });
  }

  void discard() {
    if (requests_.empty()) return;
    Request& request = requests_[static_cast<size_t>(pick(static_cast<int>(requests_.size())))];
    if (request.blocks.empty()) return;
    const Key key{request.salt, request.tokens};
    if (has_children(key)) {
      EXPECT_THROW(tree_.discard(request.node, 1), Error);
      return;
    }
    for (const Request& other : requests_) {
      if (&other != &request && other.node == request.node) return;  // its handle would become stale
    }
    request.node = tree_.discard(request.node, 1);
    entries_.erase(key);
    request.tokens.resize(request.tokens.size() - 2);
    unref(request.blocks.back());
    request.blocks.pop_back();
  }

  void evict(int wanted) {
    int evicted = 0;
    for (; evicted < wanted; ++evicted) {
      auto victim = entries_.end();
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        if (refs_[entry->second.block] > 0 || has_children(entry->first)) continue;
        if (victim == entries_.end() || entry->second.released < victim->second.released) victim = entry;
      }
      if (victim == entries_.end()) break;
      entries_.erase(victim);
    }
    ASSERT_EQ(tree_.evict(wanted), evicted);
  }

  void compare() {
    tree_.check();
    ASSERT_EQ(tree_.num_cached(), static_cast<int>(entries_.size()));
    int num_evictable = 0;
    for (const auto& [key, entry] : entries_) {
      ASSERT_TRUE(pool_.is_cached(entry.block));
      num_evictable += refs_[entry.block] == 0;
    }
    ASSERT_EQ(pool_.num_evictable(), num_evictable);
    for (int block = 0; block < pool_.num_blocks(); ++block) ASSERT_EQ(pool_.ref_count(block), refs_[block]);
    for (const Request& request : requests_)
      ASSERT_EQ(tree_.num_tokens(request.node), std::ssize(request.tokens));
  }

  std::mt19937 random_;
  BlockPool pool_{16};
  PrefixTree tree_;
  std::vector<Request> requests_;
  std::map<Key, Entry> entries_;
  std::map<int, int> refs_;
  long clock_ = 0;
};

TEST_P(PrefixTreeTest, AgreesWithANaiveModelOnRandomRequests) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    RandomRequests requests(seed, GetParam());
    for (int step = 0; step < 400 && !HasFatalFailure(); ++step) requests.step();
    requests.drain();
    ASSERT_FALSE(HasFatalFailure());
  }
}

}  // namespace
}  // namespace fs
