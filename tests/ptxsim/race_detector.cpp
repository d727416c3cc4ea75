// SPDX-License-Identifier: Apache-2.0
#include "race_detector.h"

#include <algorithm>

#include "block.h"

namespace ptxsim {

RaceDetector::RaceDetector(uint32_t num_threads, uint64_t shared_bytes)
    : num_threads_(num_threads),
      clock_((num_threads + kLanes - 1) / kLanes, 1),
      words_(shared_bytes / 4 + 1),
      split_(shared_bytes / 4 + 1, -1),
      agent_clock_(kNumAgents, 0) {
  const Clocks nothing = std::make_shared<std::vector<uint32_t>>(num_threads + kNumAgents, 0u);
  knowledge_.resize(clock_.size() * kLanes);
  for (Knowledge& k : knowledge_) k.others = nothing;
}

bool RaceDetector::ordered(uint32_t thread, uint32_t writer, uint32_t clock) const {
  if (clock == kPending) return false;
  if (writer == thread) return true;
  const Knowledge& k = knowledge_[thread];
  if (writer < num_threads_ && writer / kLanes == thread / kLanes)
    return clock <= k.mates[writer % kLanes] || clock <= (*k.others)[writer];
  return clock <= (*k.others)[writer];
}
bool RaceDetector::knows(uint32_t thread, uint32_t other, uint32_t clock) const {
  return ordered(thread, other, clock);
}

RaceDetector::Cell& RaceDetector::split(uint64_t word, uint32_t byte) {
  if (split_[word] < 0) {
    split_[word] = static_cast<int32_t>(bytes_.size());
    bytes_.resize(bytes_.size() + 4, words_[word]);
  }
  return bytes_[static_cast<size_t>(split_[word]) + byte];
}

template <class F>
void RaceDetector::each_cell(uint64_t offset, uint32_t bytes, F f) {
  for (uint64_t at = offset; at < offset + bytes;) {
    const uint64_t word = at / 4;
    if (at % 4 == 0 && at + 4 <= offset + bytes && split_[word] < 0) {
      f(words_[word]);
      at += 4;
    } else {
      f(split(word, static_cast<uint32_t>(at % 4)));
      ++at;
    }
  }
}

void RaceDetector::report(Warp& w, int lane, const Cell& c, const char* now, const char* before,
                          uint32_t other, uint32_t pc, uint64_t offset) {
  const Program& p = *w.launch->program;
  const std::string here = p.where(w.pc), there = p.where(pc);
  for (const std::string& text : race_suppressions())
    if (here.find(text) != std::string::npos || there.find(text) != std::string::npos) return;
  std::string who;
  if (other < num_threads_) {
    const Dim3 t = thread_of(w.block->warps[other / kLanes], static_cast<int>(other % kLanes));
    who = "thread (" + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) + ")";
  } else {
    who = "an asynchronous copy";
  }
  if (c.clock == kPending && before == std::string("written"))
    who = "an asynchronous copy that " + who + " has not waited for";
  report_race(w, lane,
              "race on shared memory: " + std::string(now) + " at offset " + std::to_string(offset) + ", " +
                  before + " by " + who + " with nothing in between that orders the two\n    now:    " +
                  here + "\n    before: " + there);
}

void RaceDetector::check_write(Warp& w, int lane, Cell& c, const char* what, uint64_t offset) {
  const uint32_t thread = thread_index(w, lane);
  if (c.writer != kNobody && !ordered(thread, c.writer, c.clock))
    return report(w, lane, c, what, "written", c.writer, c.pc, offset);
  const auto check = [&](const Readers& r) {
    for (uint32_t m = r.lanes; m != 0; m &= m - 1) {
      const uint32_t reader = r.warp * kLanes + static_cast<uint32_t>(__builtin_ctz(m));
      if (ordered(thread, reader, r.clock)) continue;
      report(w, lane, c, what, "read", reader, r.pc, offset);
      return false;
    }
    return true;
  };
  for (int k = 0; k < c.num_readers; ++k)
    if (!check(c.readers[k])) return;
  for (const Readers& r : c.more)
    if (!check(r)) return;
}

void RaceDetector::read(Warp& w, int lane, uint32_t lanes, Cell& c, uint64_t offset, bool atomic) {
  const uint32_t thread = thread_index(w, lane);
  if (c.writer != kNobody && !(atomic && c.atomic) && !ordered(thread, c.writer, c.clock))
    report(w, lane, c, atomic ? "updated" : "read", "written", c.writer, c.pc, offset);
  // A thread's newest read stands for all its earlier ones.
  const uint16_t warp = static_cast<uint16_t>(w.index);
  const uint32_t clock = clock_[warp];
  bool added = false;
  const auto merge = [&](Readers& r) {
    if (r.warp != warp) return;
    if (r.clock != clock) {
      r.lanes &= ~lanes;
      return;
    }
    r.lanes |= lanes;
    r.pc = w.pc;
    added = true;
  };
  for (int k = 0; k < c.num_readers; ++k) {
    merge(c.readers[k]);
    if (c.readers[k].lanes == 0) c.readers[k--] = c.readers[--c.num_readers];
  }
  if (!c.more.empty()) {
    for (Readers& r : c.more) merge(r);
    std::erase_if(c.more, [](const Readers& r) { return r.lanes == 0; });
  }
  if (added) return;
  const Readers fresh{clock, lanes, w.pc, warp};
  if (c.num_readers < 2)
    c.readers[c.num_readers++] = fresh;
  else
    c.more.push_back(fresh);
}

void RaceDetector::access(Warp& w, uint32_t lanes, const uint64_t* offsets, uint32_t bytes, Access kind) {
  const Inst& inst = w.launch->program->code[w.pc];
  const bool strong =
      kind == Access::Atomic || ((inst.cls == InstClass::LoadShared || inst.cls == InstClass::StoreShared) &&
                                 (inst.aux & kStrong) != 0);
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    each_cell(offsets[l], bytes, [&](Cell& c) {
      if (kind == Access::Read) return read(w, l, 1u << l, c, offsets[l], strong);
      if (!(strong && c.atomic))
        check_write(w, l, c, kind == Access::Atomic ? "updated" : "written", offsets[l]);
      c.clock = clock_[w.index];
      c.writer = static_cast<uint16_t>(thread_index(w, l));
      c.pc = w.pc;
      c.atomic = strong;
      c.num_readers = 0;
      c.more.clear();
    });
  }
}

void RaceDetector::read_rows(Warp& w, uint32_t rows, const uint64_t* offsets) {
  for (uint32_t m = rows; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m), receiver = 4 * (l & 7);
    for (int k = 0; k < 4; ++k)
      each_cell(offsets[l] + static_cast<uint64_t>(4 * k), 4,
                [&](Cell& c) { read(w, receiver + k, 1u << (receiver + k), c, offsets[l], false); });
  }
}

void RaceDetector::copy_issued(Warp& w, int lane, uint64_t offset, uint32_t bytes) {
  each_cell(offset, bytes, [&](Cell& c) {
    check_write(w, lane, c, "written by an asynchronous copy", offset);
    c.clock = kPending;
    c.writer = static_cast<uint16_t>(thread_index(w, lane));
    c.pc = w.pc;
    c.atomic = false;
    c.num_readers = 0;
    c.more.clear();
  });
}
void RaceDetector::copy_completed(Warp& w, uint32_t thread, uint64_t offset, uint32_t bytes) {
  each_cell(offset, bytes, [&](Cell& c) {
    if (c.clock == kPending && c.writer == thread) c.clock = clock_[w.index];
  });
}

uint32_t RaceDetector::agent(uint64_t barrier) {
  const auto [it, fresh] = agents_.try_emplace(barrier, static_cast<uint32_t>(agents_.size() % kNumAgents));
  return it->second;
}
void RaceDetector::copy_signals(uint32_t, uint32_t thread, uint64_t offset, uint32_t bytes,
                                uint64_t barrier) {
  const uint32_t a = agent(barrier), clock = ++agent_clock_[a];
  each_cell(offset, bytes, [&](Cell& c) {
    if (c.clock != kPending || c.writer != thread) return;
    c.clock = clock;
    c.writer = static_cast<uint16_t>(num_threads_ + a);
  });
  auto& known = objects_[barrier];
  known.resize(num_threads_ + kNumAgents, 0);
  known[num_threads_ + a] = clock;
}
void RaceDetector::bulk_signals(uint64_t offset, uint32_t bytes, uint64_t barrier) {
  const uint32_t a = agent(barrier), clock = ++agent_clock_[a];
  each_cell(offset, bytes, [&](Cell& c) {
    if (c.clock != kPending) return;
    c.clock = clock;
    c.writer = static_cast<uint16_t>(num_threads_ + a);
  });
  auto& known = objects_[barrier];
  known.resize(num_threads_ + kNumAgents, 0);
  known[num_threads_ + a] = clock;
}

void RaceDetector::object_initialised(const Warp& w, int lane, uint64_t object) {
  objects_.erase(object);
  Cell& c = initialised_[object];
  c.clock = clock_[w.index];
  c.writer = static_cast<uint16_t>(thread_index(w, lane));
  c.pc = w.pc;
}
void RaceDetector::object_used(Warp& w, int lane, uint64_t object) {
  const auto it = initialised_.find(object);
  if (it == initialised_.end() || ordered(thread_index(w, lane), it->second.writer, it->second.clock)) return;
  const Cell c = it->second;
  initialised_.erase(it);  // once is enough: the next poll would say the same
  report(w, lane, c, "an mbarrier is used", "initialised", c.writer, c.pc, object);
}

void RaceDetector::warp_sync(const Warp& w, uint32_t lanes) {
  if ((lanes & (lanes - 1)) == 0) return;
  const uint32_t clock = clock_[w.index]++;
  uint32_t joined[kLanes] = {};
  Clocks others = knowledge_[w.index * kLanes + static_cast<uint32_t>(__builtin_ctz(lanes))].others;
  std::shared_ptr<std::vector<uint32_t>> merged;
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const Knowledge& k = knowledge_[w.index * kLanes + static_cast<uint32_t>(l)];
    for (int x = 0; x < kLanes; ++x) joined[x] = std::max(joined[x], k.mates[x]);
    joined[l] = clock;
    if (k.others == others) continue;
    if (!merged) merged = std::make_shared<std::vector<uint32_t>>(*others);
    for (size_t t = 0; t < merged->size(); ++t) (*merged)[t] = std::max((*merged)[t], (*k.others)[t]);
  }
  if (merged) others = merged;
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    Knowledge& k = knowledge_[w.index * kLanes + static_cast<uint32_t>(__builtin_ctz(m))];
    k.others = others;
    std::copy(joined, joined + kLanes, k.mates);
  }
}

std::vector<uint32_t> RaceDetector::flat(uint32_t thread) const {
  const Knowledge& k = knowledge_[thread];
  std::vector<uint32_t> v = *k.others;
  const uint32_t first = thread / kLanes * kLanes;
  for (uint32_t l = 0; l < kLanes && first + l < num_threads_; ++l)
    v[first + l] = std::max(v[first + l], k.mates[l]);
  v[thread] = std::max(v[thread], clock_[thread / kLanes]);
  return v;
}
std::vector<uint32_t> RaceDetector::knowledge(uint32_t thread) const {
  return flat(thread);
}

void RaceDetector::barrier(const std::vector<uint16_t>& arrived, const std::vector<uint16_t>& waiting) {
  auto all = std::make_shared<std::vector<uint32_t>>(num_threads_ + kNumAgents, 0u);
  const std::vector<uint32_t>* last = nullptr;
  std::vector<bool> warps(clock_.size(), false);
  for (uint16_t t : arrived) {
    const Knowledge& k = knowledge_[t];
    if (k.others.get() != last)
      for (size_t x = 0; x < all->size(); ++x) (*all)[x] = std::max((*all)[x], (*k.others)[x]);
    last = k.others.get();
    const uint32_t first = t / kLanes * static_cast<uint32_t>(kLanes);
    for (uint32_t l = 0; l < kLanes && first + l < num_threads_; ++l)
      (*all)[first + l] = std::max((*all)[first + l], k.mates[l]);
    (*all)[t] = std::max((*all)[t], clock_[t / kLanes]);
    warps[t / kLanes] = true;
  }
  const Clocks shared = all;
  for (uint16_t t : waiting) {
    Knowledge& k = knowledge_[t];
    // What it knew from elsewhere and did not tell, because it arrived only through this barrier, is in `all`
    // already.
    k.others = shared;
    const uint32_t first = t / kLanes * static_cast<uint32_t>(kLanes);
    for (uint32_t l = 0; l < kLanes; ++l)
      k.mates[l] = first + l < num_threads_ ? std::max(k.mates[l], (*all)[first + l]) : 0;
  }
  for (size_t x = 0; x < warps.size(); ++x)
    if (warps[x]) ++clock_[x];
}

void RaceDetector::learn(uint32_t thread, const std::vector<uint32_t>& known) {
  Knowledge& k = knowledge_[thread];
  bool news = false;
  for (size_t t = 0; t < known.size(); ++t) news = news || known[t] > (*k.others)[t];
  if (!news) return;
  auto merged = std::make_shared<std::vector<uint32_t>>(*k.others);
  for (size_t t = 0; t < known.size(); ++t) (*merged)[t] = std::max((*merged)[t], known[t]);
  k.others = merged;
}
void RaceDetector::release(uint32_t thread, uint64_t object) {
  std::vector<uint32_t> known = flat(thread);
  auto& there = objects_[object];
  there.resize(known.size(), 0);
  for (size_t t = 0; t < known.size(); ++t) there[t] = std::max(there[t], known[t]);
  ++clock_[thread / kLanes];
}
void RaceDetector::acquire(uint32_t thread, uint64_t object) {
  if (const auto it = objects_.find(object); it != objects_.end()) learn(thread, it->second);
}

}  // namespace ptxsim
