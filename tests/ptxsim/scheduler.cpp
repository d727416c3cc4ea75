// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a launch. A block runs to its end before the next begins, unless all its warps do
// nothing but poll memory: then others get a turn, as many at once as the simulated device holds. With a
// seed, several blocks are resident from the start, and the order of blocks and warps and the lengths of
// their time slices are shuffled.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "block.h"
#include "global_race.h"
#include "groups.h"
#include "race_detector.h"

namespace ptxsim {
namespace {

constexpr uint32_t kSlice = 20000;  // instructions
constexpr uint64_t kFruitlessTurns =
    20000;  // of all blocks, with nothing but polling, before it is called a deadlock

uint32_t special_value(const Launch& launch, const Block& block, const Warp& warp, SpecialRegister s,
                       int lane) {
  const uint32_t thread = warp.index * kLanes + static_cast<uint32_t>(lane);
  switch (s) {
    case SpecialRegister::CtaidX:
      return block.id.x;
    case SpecialRegister::CtaidY:
      return block.id.y;
    case SpecialRegister::CtaidZ:
      return block.id.z;
    case SpecialRegister::Smid:
      return block.sm;
    case SpecialRegister::TidX:
      return thread % launch.block.x;
    case SpecialRegister::TidY:
      return thread / launch.block.x % launch.block.y;
    case SpecialRegister::TidZ:
      return thread / launch.block.x / launch.block.y;
    default:
      return warp.index;
  }
}

class Grid {
 public:
  explicit Grid(Launch& launch) : launch_(launch), total_(static_cast<uint32_t>(launch.grid.count())) {}

  void run() {
    order_.resize(total_);
    std::iota(order_.begin(), order_.end(), 0u);
    seeded_ = config().seed != 0;
    if (seeded_)
      for (uint32_t i = total_; i > 1; --i) std::swap(order_[i - 1], order_[launch_.random.below(i)]);
    const uint64_t limit = std::max<uint64_t>(
        1, std::min<uint64_t>(total_, resident_blocks(launch_.block, launch_.shared_bytes)));
    const uint64_t eager = launch_.cooperative ? limit : seeded_ ? std::min<uint64_t>(limit, 4) : 1;
    uint64_t fruitless = 0;
    while (next_ < total_ || !resident_.empty()) {
      while (next_ < total_ && resident_.size() < eager) start();
      const size_t turn =
          seeded_ ? static_cast<size_t>(launch_.random.below(resident_.size())) : turn_ % resident_.size();
      Block& block = *resident_[turn];
      const uint64_t before = progress();
      run_block(block);
      if (block.finished()) {
        finish(turn);
        fruitless = 0;
        continue;
      }
      fruitless = progress() == before ? fruitless + 1 : 0;
      if (next_ < total_ && resident_.size() < limit)
        start();
      else if (fruitless > kFruitlessTurns * resident_.size() / 8 + kFruitlessTurns / 8)
        livelock();
      turn_ = turn + 1;
    }
  }

 private:
  uint64_t progress() const {
    const auto& c = launch_.counters.classes;
    return c[static_cast<size_t>(InstClass::StoreGlobal)] + c[static_cast<size_t>(InstClass::StoreShared)] +
           launch_.memory_changes;
  }

  void start() {
    std::unique_ptr<Block> block;
    if (!spare_.empty()) {
      block = std::move(spare_.back());
      spare_.pop_back();
    } else {
      block = std::make_unique<Block>();
    }
    prepare(*block, order_[next_++]);
    resident_.push_back(std::move(block));
  }

  void finish(size_t turn) {
    Block& block = *resident_[turn];
    if (config().weak_memory) block.weak.publish_all();
    for (const PendingBulk& b : block.async.bulk)
      if (b.to_shared)
        throw_fault(block.warps[b.thread / kLanes], FaultKind::Other,
                    "the block ended while a bulk copy into its shared memory was under way");
    while (advance_bulk(block)) {
    }
    spare_.push_back(std::move(resident_[turn]));
    resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(turn));
  }

  void throw_fault(Warp& w, FaultKind kind, const std::string& what) { fault(w, 0, kind, what); }

  void prepare(Block& b, uint32_t index) {
    const Program& p = *launch_.program;
    const uint32_t threads = static_cast<uint32_t>(launch_.block.count()),
                   warps = (threads + kLanes - 1) / kLanes;
    b.launch = &launch_;
    b.index = index;
    b.id = {index % launch_.grid.x, index / launch_.grid.x % launch_.grid.y,
            index / launch_.grid.x / launch_.grid.y};
    b.sm = index % static_cast<uint32_t>(config().multiprocessors);
    b.live_threads = threads;
    b.barrier_phase = 0;
    for (auto& barrier : b.barriers) barrier = NamedBarrier();
    b.warps.resize(warps);
    const size_t file = static_cast<size_t>(p.num_units) * 64;
    b.registers.resize(file * warps + 64);
    b.predicates.assign(static_cast<size_t>(p.num_predicates) * warps, 0);
    b.shared_bytes = launch_.shared_bytes;
    b.shared_storage.resize(launch_.shared_bytes + 64);
    b.shared = aligned(b.shared_storage.data());
    std::memset(b.shared, 0xff, b.shared_bytes);
    b.local.assign(p.local_bytes * warps * kLanes + 64, 0xff);
    if (config().check_uninit) b.shared_written.assign(b.shared_bytes / 64 + 2, 0);
    b.async.reset(warps);
    b.weak.stores.clear();
    const bool races = config().check_race || config().check_global_race;
    b.race = races ? std::make_unique<RaceDetector>(threads, b.shared_bytes) : nullptr;
    uint32_t watch = 0;
    if (config().counters) watch |= kWatchCounters;
    if (config().check_uninit) watch |= kWatchUninit;
    if (config().check_race) watch |= kWatchSharedRace;
    if (config().check_global_race) watch |= kWatchGlobalRace;
    if (config().weak_memory) watch |= kWatchWeak;
    for (uint32_t i = 0; i < warps; ++i) {
      Warp& w = b.warps[i];
      w = Warp();
      w.base[0] = aligned(b.registers.data()) + file * i;
      w.base[1] = aligned(launch_.constants.data());
      w.pred = b.predicates.data() + static_cast<size_t>(p.num_predicates) * i;
      w.index = i;
      const uint32_t lanes = std::min(threads - i * kLanes, static_cast<uint32_t>(kLanes));
      w.live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
      w.others[0] = {0, w.live, Wait::None, 0};
      w.num_others = 1;
      w.watch = watch;
      w.cache = launch_.cache.data();
      w.shared = b.shared;
      w.shared_bytes = b.shared_bytes;
      w.params = launch_.params.data();
      w.params_bytes = launch_.params.size();
      w.local = aligned(b.local.data()) + p.local_bytes * kLanes * i;
      w.local_bytes = p.local_bytes;
      w.class_counts = launch_.counters.classes.data();
      w.block = &b;
      w.launch = &launch_;
      for (const WarpSpecial& s : p.warp_specials)
        for (int l = 0; l < kLanes; ++l)
          reg<uint32_t>(w, static_cast<uint16_t>(s.unit))[l] = special_value(launch_, b, w, s.special, l);
    }
  }
  static uint8_t* aligned(uint8_t* p) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
  }

  // The block waits for copies: all of them land, or with a seed some. False if none is under way.
  bool land_copies(Block& b) {
    if (!advance_bulk(b)) return false;
    while ((!seeded_ || launch_.random.below(16) != 0) && advance_bulk(b)) {
    }
    return true;
  }

  // Gives every warp slices until the block ends or only polls.
  void run_block(Block& b) {
    std::vector<uint32_t> order(b.warps.size());
    std::iota(order.begin(), order.end(), 0u);
    for (uint64_t round = 0; !b.finished(); ++round) {
      if (seeded_)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[launch_.random.below(i)]);
      bool ran = false, worked = false;
      for (uint32_t index : order) {
        Warp& w = b.warps[index];
        if (w.live == 0) continue;
        w.polls = 0;
        const uint64_t used =
            slice(w, seeded_ ? static_cast<uint32_t>(1 + launch_.random.below(400)) : kSlice);
        ran = ran || used != 0;
        worked = worked || (used != 0 && w.polls < 32);
      }
      if (b.finished()) return;
      if (!ran && !land_copies(b)) deadlock(b);
      if (ran && !worked) {  // every warp that could run only polled
        land_copies(b);
        return;
      }
      if (seeded_ && resident_.size() > 1 && launch_.random.below(8) == 0) return;
    }
  }

  // Runs one warp for up to `budget` instructions; returns how many it executed.
  uint64_t slice(Warp& w, uint32_t budget) {
    if (!choose_group(w)) return 0;
    const Inst* const code = launch_.program->code.data();
    uint64_t* const counts = w.class_counts;
    uint32_t left = budget;
    while (left != 0) {
      if (w.pc >= w.stop_pc) {
        if (w.polls >= 32 || !choose_group(w)) break;
      }
      const Inst& i = code[w.pc];
      uint32_t mask = w.active;
      if (i.guard != 0) {
        const uint32_t p = w.pred[(i.guard & 0x7fff) - 1];
        mask &= i.guard & 0x8000 ? ~p : p;
      }
      w.next = w.pc + 1;
      if (mask != 0) {
        w.mask = mask;
        ++counts[static_cast<size_t>(i.cls)];
        i.fn(w, i);
        --left;
      } else if (left > 1) {
        --left;  // a skipped instruction is issued all the same
      } else {
        left = 0;
      }
      w.pc = w.next;
    }
    const bool diverged = w.active != 0 && w.num_others != 0;
    w.run_last = diverged && !w.run_last;  // a lock held by a lane that is behind must be released some day
    suspend(w);
    launch_.executed += budget - left;
    return budget - left;
  }

  static std::string describe_waits(const Block& b) {
    std::string text;
    int lines = 0;
    for (const Warp& w : b.warps)
      for (uint32_t g = 0; g < w.num_others && lines < 12; ++g, ++lines) {
        const Group& group = w.others[g];
        char lanes[16];
        std::snprintf(lanes, sizeof(lanes), "%08x", group.mask);
        text += "\n      warp " + std::to_string(w.index) + ", lanes " + lanes + ": ";
        uint32_t pc = group.pc;
        switch (group.wait) {
          case Wait::Barrier:
            text += "waits at barrier " + std::to_string(group.argument), --pc;
            break;
          case Wait::WarpSync:
            text += "waits at a __syncwarp", --pc;
            break;
          case Wait::Collective:
            text += "waits for the other lanes of a warp-wide instruction";
            break;
          default:
            text += "polls";
            break;
        }
        text += ", " + b.launch->program->where(pc);
      }
    return text;
  }
  [[noreturn]] void deadlock(Block& b) {
    for (Warp& w : b.warps)
      if (w.num_others != 0) {
        const Group& g = w.others[0];
        w.pc = g.pc - (g.wait == Wait::Barrier || g.wait == Wait::WarpSync ? 1 : 0);
        fault(w, __builtin_ctz(g.mask), FaultKind::Deadlock,
              "deadlock: no thread of the block can go on:" + describe_waits(b));
      }
    throw KernelFault("deadlock");
  }
  [[noreturn]] void livelock() {
    Block& b = *resident_.front();
    for (Warp& w : b.warps)
      if (w.num_others != 0) {
        w.pc = w.others[0].pc;
        fault(w, __builtin_ctz(w.others[0].mask), FaultKind::Deadlock,
              "deadlock: all " + std::to_string(resident_.size()) +
                  " resident blocks only poll memory that nobody changes (" + std::to_string(total_ - next_) +
                  " blocks have not started):" + describe_waits(b));
      }
    throw KernelFault("deadlock");
  }

  Launch& launch_;
  uint32_t total_, next_ = 0;
  size_t turn_ = 0;
  bool seeded_ = false;
  std::vector<uint32_t> order_;
  std::vector<std::unique_ptr<Block>> resident_, spare_;
};

std::string coordinates(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

}  // namespace

Dim3 thread_of(const Warp& w, int lane) {
  const Dim3& b = w.launch->block;
  const uint32_t t = thread_index(w, lane);
  return {t % b.x, t / b.x % b.y, t / b.x / b.y};
}

std::string place(const Warp& w, int lane) {
  return "kernel " + w.launch->program->kernel + ", block " + coordinates(w.block->id) + ", thread " +
         coordinates(thread_of(w, lane));
}

void fault(Warp& w, int lane, FaultKind kind, const std::string& what) {
  KernelFault f(place(w, lane) + "\n    " + what + "\n    " + w.launch->program->where(w.pc));
  f.kind = kind;
  throw f;
}
void fault(Warp& w, int lane, const char* what) {
  fault(w, lane, FaultKind::Other, what);
}

void report_race(Warp& w, int lane, const std::string& what) {
  Launch& launch = *w.launch;
  ++launch.race_reports;
  if (static_cast<int>(launch.reports.size()) < config().max_reports)
    launch.reports.push_back(place(w, lane) + "\n    " + what);
}

uint64_t resident_blocks_per_multiprocessor(uint64_t threads, uint64_t shared_bytes) {
  constexpr uint64_t kMaxThreads = 2048, kMaxBlocks = 32, kSharedPerMultiprocessor = 167936,
                     kReservedPerBlock = 1024;
  if (threads == 0 || threads > 1024) return 0;
  const uint64_t warps = (threads + kLanes - 1) / kLanes;
  return std::min({kMaxBlocks, kMaxThreads / (warps * kLanes),
                   kSharedPerMultiprocessor / (shared_bytes + kReservedPerBlock)});
}
uint64_t resident_blocks(const Dim3& block, uint64_t shared_bytes) {
  return resident_blocks_per_multiprocessor(block.count(), shared_bytes) *
         static_cast<uint64_t>(config().multiprocessors);
}

void run_grid(Launch& launch) {
  Grid(launch).run();
}

}  // namespace ptxsim
