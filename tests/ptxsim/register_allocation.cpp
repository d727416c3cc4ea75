// SPDX-License-Identifier: Apache-2.0
#include "register_allocation.h"

#include <algorithm>
#include <map>
#include <string>

namespace ptxsim {
namespace {

bool has_result(const Instruction& in) {
  static const char* const none[] = {
      "st",        "red",     "bra",      "brx",      "bar",       "barrier",       "ret",
      "exit",      "trap",    "call",     "prefetch", "prefetchu", "membar",        "fence",
      "nanosleep", "discard", "stmatrix", "brkpt",    "pmevent",   "applypriority", "griddepcontrol",
      "setmaxnreg"};
  for (const char* op : none)
    if (in.op == op)
      return in.op == std::string("bar") || in.op == std::string("barrier") ? in.has("red") : false;
  if (in.op == "cp") return false;
  if (in.op == "mbarrier")
    return !in.has("init") && !in.has("inval") && !in.has("expect_tx") ? true : in.has("arrive");
  return true;
}

void collect(const Operand& o, std::vector<int>& out) {
  if (o.reg >= 0) out.push_back(o.reg);
  for (const Operand& part : o.parts) collect(part, out);
}

using Bits = std::vector<uint64_t>;
void set(Bits& b, int i) {
  b[static_cast<size_t>(i) / 64] |= 1ull << (i % 64);
}
void clear(Bits& b, int i) {
  b[static_cast<size_t>(i) / 64] &= ~(1ull << (i % 64));
}

struct BasicBlock {
  size_t begin, end;
  std::vector<size_t> next;
  Bits live_in, live_out;
};

std::vector<BasicBlock> basic_blocks(const FlatKernel& k) {
  const size_t n = k.code.size();
  std::vector<bool> leader(n + 1, false);
  leader[0] = true;
  for (size_t i = 0; i < n; ++i) {
    const auto& op = k.code[i].in.op;
    for (size_t t : k.code[i].targets) leader[t] = true;
    if (op == "bra" || op == "brx" || op == "ret" || op == "exit" || op == "trap") leader[i + 1] = true;
  }
  std::vector<BasicBlock> blocks;
  std::vector<size_t> block_at(n + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    if (leader[i]) blocks.push_back({i, i, {}, {}, {}});
    blocks.back().end = i + 1;
    block_at[i] = blocks.size() - 1;
  }
  for (auto& b : blocks) {
    const auto& last = k.code[b.end - 1];
    for (size_t t : last.targets)
      if (t < n) b.next.push_back(block_at[t]);
    const bool leaves = last.in.op == "bra" || last.in.op == "brx" || last.in.op == "ret" ||
                        last.in.op == "exit" || last.in.op == "trap";
    if ((!leaves || last.in.guard >= 0) && b.end < n) b.next.push_back(block_at[b.end]);
  }
  return blocks;
}

}  // namespace

RegisterUse register_use(const Instruction& in) {
  RegisterUse use;
  size_t first_read = 0;
  const bool to_memory = !in.operands.empty() && in.operands[0].kind == Operand::Kind::Address;
  if (!in.operands.empty() && !to_memory && has_result(in)) {
    collect(in.operands[0], use.writes);
    first_read = 1;
  }
  for (size_t i = first_read; i < in.operands.size(); ++i) collect(in.operands[i], use.reads);
  if (in.guard >= 0) {
    use.reads.push_back(in.guard);
    use.reads.insert(use.reads.end(), use.writes.begin(), use.writes.end());
  }
  return use;
}

RegisterSlots allocate_registers(const FlatKernel& k, const std::vector<bool>& skip) {
  const size_t n = k.code.size(), words = k.registers.size() / 64 + 1;
  std::vector<RegisterUse> use(n);
  for (size_t i = 0; i < n; ++i) use[i] = register_use(k.code[i].in);
  std::vector<BasicBlock> blocks = n > 0 ? basic_blocks(k) : std::vector<BasicBlock>();
  for (auto& b : blocks) b.live_in.assign(words, 0), b.live_out.assign(words, 0);

  for (bool changed = true; changed;) {
    changed = false;
    for (auto b = blocks.rbegin(); b != blocks.rend(); ++b) {
      for (size_t next : b->next)
        for (size_t w = 0; w < words; ++w) b->live_out[w] |= blocks[next].live_in[w];
      Bits live = b->live_out;
      for (size_t i = b->end; i-- > b->begin;) {
        for (int r : use[i].writes) clear(live, r);
        for (int r : use[i].reads) set(live, r);
      }
      if (live != b->live_in) {
        b->live_in = std::move(live);
        changed = true;
      }
    }
  }

  // One interval per register, in instruction numbers, both ends included.
  struct Interval {
    int reg;
    size_t begin, end;
  };
  std::vector<Interval> intervals(k.registers.size());
  for (size_t r = 0; r < intervals.size(); ++r) intervals[r] = {static_cast<int>(r), n, 0};
  auto touch = [&](size_t r, size_t at) {
    intervals[r].begin = std::min(intervals[r].begin, at);
    intervals[r].end = std::max(intervals[r].end, at);
  };
  for (const auto& b : blocks) {
    for (size_t r = 0; r < intervals.size(); ++r) {
      if (b.live_in[r / 64] >> (r % 64) & 1) touch(r, b.begin);
      if (b.live_out[r / 64] >> (r % 64) & 1) touch(r, b.end - 1);
    }
    for (size_t i = b.begin; i < b.end; ++i) {
      for (int r : use[i].writes) touch(static_cast<size_t>(r), i);
      for (int r : use[i].reads) touch(static_cast<size_t>(r), i);
    }
  }
  std::erase_if(intervals,
                [&](const Interval& v) { return v.begin > v.end || skip[static_cast<size_t>(v.reg)]; });
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });

  RegisterSlots out;
  out.slot.assign(k.registers.size(), -1);
  std::map<int, std::vector<int>> free_slots;       // by width
  std::multimap<size_t, std::pair<int, int>> busy;  // end -> (width, slot)
  for (const Interval& v : intervals) {
    while (!busy.empty() && busy.begin()->first < v.begin) {
      free_slots[busy.begin()->second.first].push_back(busy.begin()->second.second);
      busy.erase(busy.begin());
    }
    const int bits = std::max(k.registers[static_cast<size_t>(v.reg)].bits, 1);
    const int width = bits == 1 ? 1 : std::max(bits, 16);
    auto& list = free_slots[width];
    int slot;
    if (!list.empty()) {
      slot = list.back();
      list.pop_back();
    } else if (width == 1) {
      slot = out.num_predicates++;
    } else {
      slot = out.num_units;
      out.num_units += width / 16;
    }
    out.slot[static_cast<size_t>(v.reg)] = slot;
    busy.emplace(v.end, std::make_pair(width, slot));
  }
  return out;
}

}  // namespace ptxsim
