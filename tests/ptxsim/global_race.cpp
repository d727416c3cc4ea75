// SPDX-License-Identifier: Apache-2.0
#include "global_race.h"

#include <algorithm>
#include <cstdio>

#include "block.h"
#include "race_detector.h"

namespace ptxsim {

bool GlobalRaceDetector::ordered(const Warp& w, int lane, const Stamp& before) const {
  const uint32_t thread = thread_index(w, lane);
  if (before.block == w.block->index && w.block->race->knows(thread, before.thread, before.clock))
    return true;
  const auto known = known_.find(id(w.block->index, thread));
  if (known == known_.end()) return false;
  const auto other = known->second->find(before.block);
  return other != known->second->end() && before.clock <= (*other->second)[before.thread];
}

void GlobalRaceDetector::report(Warp& w, int lane, uint64_t address, const char* now, const char* before,
                                const Stamp& other) {
  const Program& p = *w.launch->program;
  const std::string here = p.where(w.pc), there = p.where(other.pc);
  for (const std::string& text : race_suppressions())
    if (here.find(text) != std::string::npos || there.find(text) != std::string::npos) return;
  const Dim3 &g = w.launch->grid, &b = w.launch->block;
  const auto triple = [](uint32_t v, const Dim3& d) {
    return "(" + std::to_string(v % d.x) + "," + std::to_string(v / d.x % d.y) + "," +
           std::to_string(v / d.x / d.y) + ")";
  };
  report_race(w, lane,
              "race on global memory: " + std::string(now) + " " + memory().describe(address) + ", " +
                  before + " by block " + triple(other.block, g) + ", thread " + triple(other.thread, b) +
                  " with nothing in between that orders the two\n    now:    " + here +
                  "\n    before: " + there);
}

void GlobalRaceDetector::check(Warp& w, int lane, uint64_t address, Cell& c, bool writes, bool strong) {
  const uint16_t thread = static_cast<uint16_t>(thread_index(w, lane));
  const bool both_strong = strong && c.atomic;
  const char* now = writes ? (strong ? "updated" : "written") : "read";
  if (c.write.thread != 0xffff && !both_strong && !ordered(w, lane, c.write))
    report(w, lane, address, now, "written", c.write);
  const Stamp stamp{w.block->index, w.block->race->clock(w.index), w.pc, thread};
  if (!writes) {
    for (Stamp& r : c.reads)
      if (r.block == stamp.block && r.thread == stamp.thread) {
        r = stamp;
        return;
      }
    if (!strong) c.reads.push_back(stamp);
    return;
  }
  for (const Stamp& r : c.reads)
    if (!ordered(w, lane, r)) {
      report(w, lane, address, now, "read", r);
      break;
    }
  c.reads.clear();
  c.write = stamp;
  c.atomic = strong;
}

GlobalRaceDetector::Cell& GlobalRaceDetector::byte_cell(uint64_t address) {
  const uint64_t word = address / 4;
  if (split_.insert(word).second)
    if (const auto it = words_.find(word); it != words_.end())
      for (uint64_t k = 0; k < 4; ++k) bytes_[word * 4 + k] = it->second;
  return bytes_[address];
}

void GlobalRaceDetector::access(Warp& w, uint32_t lanes, const uint64_t* addresses, uint32_t bytes,
                                Access kind) {
  const Inst& inst = w.launch->program->code[w.pc];
  const bool memory_class = inst.cls == InstClass::LoadGlobal || inst.cls == InstClass::StoreGlobal ||
                            inst.cls == InstClass::LoadShared || inst.cls == InstClass::StoreShared;
  const bool strong = kind == Access::Atomic || (memory_class && (inst.aux & kStrong) != 0);
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    for (uint64_t at = addresses[l]; at < addresses[l] + bytes;) {
      const bool word = at % 4 == 0 && at + 4 <= addresses[l] + bytes && !split_.count(at / 4);
      check(w, l, at, word ? words_[at / 4] : byte_cell(at), kind != Access::Read, strong);
      at += word ? 4 : 1;
    }
  }
}

void GlobalRaceDetector::join(Known& into, const Known& from) {
  for (const auto& [block, clocks] : from) {
    Clocks& have = into[block];
    if (!have) {
      have = clocks;
    } else if (have != clocks) {
      auto merged = std::make_shared<std::vector<uint32_t>>(*have);
      for (size_t t = 0; t < merged->size(); ++t) (*merged)[t] = std::max((*merged)[t], (*clocks)[t]);
      have = merged;
    }
  }
}

GlobalRaceDetector::Known GlobalRaceDetector::snapshot(Warp& w, int lane) {
  const uint32_t thread = thread_index(w, lane);
  const auto it = known_.find(id(w.block->index, thread));
  Known k = it == known_.end() ? Known() : *it->second;
  join(k, {{w.block->index, std::make_shared<std::vector<uint32_t>>(w.block->race->knowledge(thread))}});
  w.block->race->tick(w.index);
  return k;
}

void GlobalRaceDetector::release(Warp& w, int lane, uint64_t object) {
  join(objects_[object], snapshot(w, lane));
}

void GlobalRaceDetector::acquire(Warp& w, int lane, uint64_t object) {
  const auto from = objects_.find(object);
  if (from == objects_.end()) return;
  auto& slot = known_[id(w.block->index, thread_index(w, lane))];
  auto known = std::make_shared<Known>(slot ? *slot : Known());
  join(*known, from->second);
  slot = known;
}

void GlobalRaceDetector::fence(Warp& w, uint32_t lanes) {
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const Thread me = id(w.block->index, thread_index(w, l));
    if (const auto read = read_objects_.find(me); read != read_objects_.end()) {
      for (uint64_t object : read->second) {
        acquire(w, l, object);
        w.block->race->acquire(thread_index(w, l), object);
      }
      read_objects_.erase(read);
    }
    fenced_[me] = snapshot(w, l);
  }
}

void GlobalRaceDetector::relaxed(Warp& w, int lane, uint64_t object, Access kind) {
  const Thread me = id(w.block->index, thread_index(w, lane));
  if (kind != Access::Read)
    if (const auto fenced = fenced_.find(me); fenced != fenced_.end()) join(objects_[object], fenced->second);
  if (kind != Access::Write) {
    auto& list = read_objects_[me];
    if (std::find(list.begin(), list.end(), object) == list.end()) list.push_back(object);
  }
}

void GlobalRaceDetector::block_barrier(const Block& block, const std::vector<uint16_t>& arrived,
                                       const std::vector<uint16_t>& waiting) {
  auto all = std::make_shared<Known>();
  const Known* last = nullptr;
  for (uint16_t t : arrived) {
    const auto it = known_.find(id(block.index, t));
    if (it == known_.end() || it->second.get() == last) continue;
    last = it->second.get();
    join(*all, *last);
  }
  if (all->empty()) return;
  for (uint16_t t : waiting) known_[id(block.index, t)] = all;
}

void GlobalRaceDetector::warp_sync(const Warp& w, uint32_t lanes) {
  std::vector<uint16_t> threads;
  for (uint32_t m = lanes; m != 0; m &= m - 1)
    threads.push_back(static_cast<uint16_t>(thread_index(w, __builtin_ctz(m))));
  block_barrier(*w.block, threads, threads);
}

}  // namespace ptxsim
