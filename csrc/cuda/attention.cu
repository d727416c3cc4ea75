// SPDX-License-Identifier: Apache-2.0
//
// Attention over the paged KV cache by the items of an AttentionPlan, in one launch: chunks, decodes, pieces
// of long contexts and shared prefixes.
//
// The unit of arithmetic is a tile of 16 packed rows (row = token * group + head of the group) on a warp. It
// walks the tokens of a span in tiles of 64 from a partial of nothing; partials fold as AttentionPlan says.
// How warps share out rows and loads never shows in a result:
//   more than 64 rows   a block of four warps has 128 rows, two tiles on each warp, so that what a warp reads
//                       of keys and values from shared memory serves 32 rows. Queries lie there too. Only on
//                       devices that have the shared memory for two such blocks
//   17 to 64 rows       a block has 64 rows. As above, all of them read each tile of keys and values from one
//                       ring of stages in shared memory, 64 keys or 64 values per stage
//   up to 16 rows       a warp works for itself, with a quarter of the ring, 16 keys or values per stage
//
// The grid is as large as the device holds at once. Blocks draw units (item x KV head) from a queue; the plan
// has put the large items first, so that a block takes those together and then its warps go on alone. Whoever
// stores the last of the partials that a merge needs does the merge, in the order of its parts.
//
// Bytes at least: K and V of each item once per 128 rows, queries and outputs once, partials twice. Bound:
// memory up to some 100 rows for each key read, then tensor cores.
//
// 128 rows on four warps leave no register over; without the option, ptxas moves loads ahead that spill some.
//
// ptxas: attention_kernel <= 255 registers, 128 threads
// ptxas options: --register-usage-level=2
// shared: attention_kernel <T, kDim> 49152 + 256 * kDim if is_wide else 49152
#include <type_traits>

#include "cuda/attention_merge.cuh"
#include "cuda/launch.cuh"

namespace fs::cuda {

namespace {

constexpr int kThreads = kAttentionThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kRingBytes = 48 << 10;
template <int kDim>
constexpr int kQueryBytes = kWarps * kMaxRowTiles * kGroupBytes<kDim>;

// Where multiprocessors have 100 KB of shared memory, 64 rows are all that two blocks have room for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr bool kCanBeWide = false;
#else
constexpr bool kCanBeWide = true;
#endif

// The slots of a ring, one after another.
template <int kSlotBytes, int kSlots>
struct RingSlot {
  uint32_t begin, at;

  explicit __device__ __forceinline__ RingSlot(uint32_t ring) : begin(ring), at(ring) {}
  __device__ __forceinline__ void advance() {
    at += kSlotBytes;
    if (at == begin + kSlots * kSlotBytes) at = begin;
  }
  // The slot before, which is the next one to fill.
  __device__ __forceinline__ uint32_t before() const {
    return (at == begin ? at + kSlots * kSlotBytes : at) - kSlotBytes;
  }
};

// The end of the span at `at`, or of the tokens.
__device__ __forceinline__ int span_end(int at, int span, int end) {
  return min((at / span + 1) * span, end);
}

// All warps: up to 64 kTiles packed rows of hands[0] from its first_row on.
template <class T, int kDim, int kTiles>
__device__ __forceinline__ void attend_block(const AttentionOperands<T>& op, ItemAtHand* hands,
                                             uint32_t ring) {
  const ItemAtHand& hand = hands[0];
  constexpr int kStageBytes = kTileGroups * kGroupBytes<kDim>;
  constexpr int kAhead = (kRingBytes / kStageBytes - 1) / 2;  // tiles on their way, while one is worked on
  constexpr int kWarpRows = kTiles * kTileRows, kBlockRows = kWarps * kWarpRows;
  WarpRows<T, kDim, kTiles, true> rows(op, hand);
  if (lane_id() == 0) {
    const int first = rows.first_row();
    if (warp_id() == 0) hands[0].range = visible(op, hand.item, first, first + kBlockRows);
    // A warp without rows only loads.
    hands[warp_id()].seen_end =
        first < hand.item.num_rows * op.group ? visible(op, hand.item, first, first + kWarpRows).end : 0;
  }
  __syncthreads();
  // With two tiles, for want of registers, these stay in shared memory.
  std::conditional_t<kTiles == 1, const Range, const Range&> range = hand.range;
  std::conditional_t<kTiles == 1, const int, const int&> seen_end = hands[warp_id()].seen_end;

  std::conditional_t<kTiles == 1, HeldQueries<kDim>, SharedQueries<kDim, kTiles>> queries;
  if constexpr (kTiles == 1) {
    rows.load_queries(queries);
  } else {
    queries.begin = ring + kRingBytes;
    rows.copy_queries(queries.of_warp());  // they come with the first stage
  }
  TileLoader<T, kDim, (kTiles > 1)> loader(op.kv, hand.item.request, hand.kv_head, range,
                                           hands[warp_id()].blocks);
  const auto load_keys = [&](int tile, uint32_t stage, auto is_later) {
    const int warp = warp_id();
    if (tile < range.end)
      loader.template load_keys<is_later>(tile, warp,
                                          stage + static_cast<uint32_t>(warp * kGroupBytes<kDim>));
    commit_copies();
  };
  const auto load_values = [&](int tile, uint32_t stage, auto is_later) {
    const int warp = warp_id();
    if (tile < range.end)
      loader.template load_values<is_later>(tile, warp,
                                            stage + static_cast<uint32_t>(warp * kGroupBytes<kDim>));
    commit_copies();
  };
  int at = range.begin / kTileKeys * kTileKeys;
#pragma unroll
  for (int tile = 0; tile < kAhead; ++tile) {
    load_keys(at + tile * kTileKeys, ring + static_cast<uint32_t>(2 * tile * kStageBytes), std::false_type());
    load_values(at + tile * kTileKeys, ring + static_cast<uint32_t>((2 * tile + 1) * kStageBytes),
                std::false_type());
    loader.keep(loader.look_up(at + (tile + 1) * kTileKeys));
  }
  RingSlot<kStageBytes, 2 * kAhead + 1> slot(ring);
  const auto next_stage = [&] {
    wait_for_copies<2 * kAhead - 1>();
    __syncthreads();  // the stage is there for all, and all have left the one that is filled next
  };

  while (at < range.end) {
    const int end = span_end(at, op.span, range.end);
    for (; at < end; at += kTileKeys) {
      WeightFragments weights[kTiles];
      next_stage();
      load_keys(at + kAhead * kTileKeys, slot.before(), std::true_type());
      if (at < seen_end) {
        ScoreFragments scores[kTiles];
        multiply_keys<T, kDim, kTiles, kTileGroups>(scores, queries, slot.at, 0);
        rows.weigh(scores, weights, at, has_whole(range, at, kBlockRows));
      } else {
        clear(weights);  // or their registers would be kept from one tile to the next
      }
      slot.advance();
      next_stage();
      load_values(at + kAhead * kTileKeys, slot.before(), std::true_type());
      const int blocks = loader.look_up(at + (kAhead + 1) * kTileKeys);
      if (at < seen_end) {
        multiply_values<T, kDim, kTiles, kTileGroups>(rows.current, weights, slot.at, 0);
      }
      loader.keep(blocks);
      slot.advance();
    }
    rows.end_span((end - 1) / op.span, range.begin / op.span, end == range.end);
  }
  rows.finish();
}

// One warp: an item of at most 16 packed rows.
template <class T, int kDim>
__device__ __forceinline__ void attend_warp(const AttentionOperands<T>& op, ItemAtHand& hand, uint32_t ring) {
  constexpr int kSlots = kRingBytes / kWarps / kGroupBytes<kDim>;
  constexpr int kAhead = kSlots - 1;            // stages on their way
  constexpr int kTileStages = 2 * kTileGroups;  // four groups of keys, then those of values
  const Range range = visible(op, hand.item, 0, kTileRows);
  TileLoader<T, kDim, false> loader(op.kv, hand.item.request, hand.kv_head, range, hand.blocks);
  RingSlot<kGroupBytes<kDim>, kSlots> slot(ring);
  const auto load = [&](int tile, int stage, uint32_t to) {
    if (stage >= kTileStages) tile += kTileKeys;
    const int group = stage % kTileGroups;
    if (tile < range.end) {
      if (stage % kTileStages < kTileGroups) {
        loader.load_keys(tile, group, to);
      } else {
        loader.load_values(tile, group, to);
      }
    }
    commit_copies();
    if (stage % kTileStages == kTileStages - 1) loader.keep(loader.look_up(tile + kTileKeys));
  };
  const auto next_stage = [&](int at, int stage) {
    wait_for_copies<kAhead - 1>();
    __syncwarp();
    load(at, stage + kAhead, slot.before());
  };

  int at = range.begin / kTileKeys * kTileKeys;
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    load(at, stage, ring + static_cast<uint32_t>(stage * kGroupBytes<kDim>));
  }
  WarpRows<T, kDim, 1, false> rows(op, hand);
  HeldQueries<kDim> queries;
  rows.load_queries(queries);
  while (at < range.end) {
    const int end = span_end(at, op.span, range.end);
    for (; at < end; at += kTileKeys) {
      ScoreFragments scores[1];
      WeightFragments weights[1];
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        next_stage(at, group);
        multiply_keys<T, kDim, 1, 1>(scores, queries, slot.at, group);
        slot.advance();
      }
      rows.weigh(scores, weights, at, has_whole(range, at, kTileRows));
#pragma unroll
      for (int group = 0; group < kTileGroups; ++group) {
        next_stage(at, kTileGroups + group);
        multiply_values<T, kDim, 1, 1>(rows.current, weights, slot.at, group);
        slot.advance();
      }
    }
    rows.end_span((end - 1) / op.span, 0, false);
  }
  rows.finish();
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_kernel(const AttentionOperands<T> op) {
  extern __shared__ __align__(256) uint8_t shared[];  // the ring, then queries
  __shared__ ItemAtHand hands[kWarps];                // the first one is the block's, too
  uint32_t ring;  // opaque, or it is computed anew wherever it is used, with registers that there are not
  asm volatile("mov.u32 %0, %1;" : "=r"(ring) : "r"(shared_address(shared)));
  const auto is_for_warp = [&](const ItemAtHand& hand) { return hand.item.num_rows * op.group <= kTileRows; };
  // One thread.
  const auto draw = [&](ItemAtHand& hand) {
    hand.unit = atomicAdd(op.next_unit, 1);
    if (hand.unit >= op.num_units) return;
    hand.item = op.items[hand.unit / op.kv.num_kv_heads];
    hand.kv_head = hand.unit % op.kv.num_kv_heads;
    hand.first_row = 0;
  };

  ItemAtHand& ours = hands[0];
  while (true) {
    __syncthreads();
    if (thread_id() == 0) draw(ours);
    __syncthreads();
    if (ours.unit >= op.num_units || is_for_warp(ours)) break;
    constexpr int kRows = kWarps * kTileRows;
    while (ours.first_row < ours.item.num_rows * op.group) {
      bool wide = false;
      if constexpr (kCanBeWide) {
        wide = op.wide && ours.item.num_rows * op.group - ours.first_row > kRows;
        if (wide) attend_block<T, kDim, kMaxRowTiles>(op, hands, ring);
      }
      if (!wide) attend_block<T, kDim, 1>(op, hands, ring);
      __syncthreads();
      if (thread_id() == 0) ours.first_row += wide ? kMaxRowTiles * kRows : kRows;
      __syncthreads();
    }
    merge_by_block<T, kDim>(op, ours.item, ours.kv_head, reinterpret_cast<int*>(shared));
  }

  // The unit at hand is the first warp's; the others draw their own.
  const int warp = warp_id();
  ItemAtHand& mine = hands[warp];
  const bool any = ours.unit < op.num_units;
  __syncthreads();  // the first warp goes on to write where the others have read
  if (warp > 0) {
    if (lane_id() == 0) {
      mine.unit = op.num_units;
      if (any) draw(mine);
    }
    __syncwarp();
  }
  while (mine.unit < op.num_units) {
    if (mine.item.num_rows == 0) break;  // padding, which comes last
    if (!is_for_warp(mine)) __trap();    // the plan was made with other rows_per_warp
    attend_warp<T, kDim>(op, mine, ring + static_cast<uint32_t>(warp * (kRingBytes / kWarps)));
    merge_by_warp<T, kDim>(op, mine.item, mine.kv_head);
    __syncwarp();
    if (lane_id() == 0) draw(mine);
    __syncwarp();
  }

  // The last block to leave makes the queue ready for the next launch.
  __syncthreads();
  if (thread_id() != 0 || add_and_synchronise(op.num_left, 1) != static_cast<int>(gridDim.x) - 1) return;
  *op.next_unit = 0;
  *op.num_left = 0;
}

// What a launch depends on of the current device.
struct DeviceLimits {
  int multiprocessors = 0, shared_bytes = 0;  // of a multiprocessor
};
DeviceLimits current_limits() {
  constexpr int kMaxDevices = 64;
  static DeviceLimits known[kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  FS_CHECK(error == cudaSuccess && device < kMaxDevices,
           "attention: CUDA device " << device << ": " << cudaGetErrorString(error));
  DeviceLimits& limits = known[device];
  if (limits.multiprocessors == 0) {
    error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    FS_CHECK(error == cudaSuccess, "attention: CUDA device " << device << ": " << cudaGetErrorString(error));
  }
  return limits;
}

template <class T, int kDim>
void launch(AttentionOperands<T> op, int64_t num_blocks, int shared_of_multiprocessor, cudaStream_t stream) {
  constexpr int kReserved = 2 << 10;  // by the system, of each block's, and static
  constexpr int kWide = kRingBytes + kQueryBytes<kDim>;
  op.wide = kBlocksPerMultiprocessor * (kWide + kReserved) <= shared_of_multiprocessor;
  const int bytes = op.wide ? kWide : kRingBytes;
  const auto kernel = attention_kernel<T, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  FS_CHECK(error == cudaSuccess, "attention: the device refuses "
                                     << bytes << " bytes of shared memory: " << cudaGetErrorString(error));
  kernel<<<static_cast<unsigned>(num_blocks), kThreads, static_cast<size_t>(bytes), stream>>>(op);
}

template <class T>
void attention_of(const Attention& op, cudaStream_t stream) {
  AttentionOperands<T> o{};
  const int64_t num_heads = op.q.shape[1], head_dim = op.q.shape[2], num_kv_heads = op.kv_cache.shape[2];
  o.out = op.out.ptr<T>();
  o.q = op.q.ptr<const T>();
  o.kv.cache = op.kv_cache.ptr<const uint8_t>();
  o.kv.tables = op.block_tables.ptr<const int32_t>();
  o.kv.block_bytes = static_cast<uint32_t>(op.kv_cache.stride[0] * 2);
  o.kv.value_offset = static_cast<uint32_t>(op.kv_cache.stride[1] * 2);
  o.kv.table_stride = static_cast<int>(op.block_tables.shape[1]);
  o.kv.num_kv_heads = static_cast<int>(num_kv_heads);
  while ((int64_t{1} << o.kv.block_shift) < op.kv_cache.shape[3]) ++o.kv.block_shift;
  o.items = op.items.ptr<const AttentionItem>();
  o.merges = op.merges.ptr<const AttentionMerge>();
  o.parts = op.parts.ptr<const int32_t>();
  // Blocks of a launch: as many as the device holds at once.
  const DeviceLimits limits = current_limits();
  const int64_t blocks = kBlocksPerMultiprocessor * limits.multiprocessors;
  const int64_t parked = blocks * (kFoldLevels + 1) * kMaxRowTiles * kThreads * 4 * (head_dim / 8 + 1);
  FS_CHECK(op.workspace.shape[0] >= parked, "attention: the cuda kernel needs a workspace of "
                                                << parked << " floats and those of the plan; given "
                                                << op.workspace.shape[0]);
  const int64_t num_slots = (op.workspace.shape[0] - parked) / (num_heads * (head_dim + 2));
  o.parked = op.workspace.ptr<float4>();
  o.partials = op.workspace.ptr<float>() + parked;
  o.stats = reinterpret_cast<float2*>(o.partials + num_slots * num_heads * head_dim);
  o.next_unit = op.counters.ptr<int32_t>();
  o.num_left = o.next_unit + 1;
  o.num_stored = o.next_unit + kAttentionQueueCounters;
  o.out_stride = op.out.stride[0];
  o.q_stride = op.q.stride[0];
  o.scale = op.scale * 1.44269504f;
  o.num_units = static_cast<int>(op.items.shape[0] * num_kv_heads);
  o.group = static_cast<int>(num_heads / num_kv_heads);
  o.span = static_cast<int>(op.span);
  o.window = static_cast<int>(op.window);
  const int64_t num_blocks = o.num_units < blocks ? o.num_units : blocks;
  if (head_dim == 64) return launch<T, 64>(o, num_blocks, limits.shared_bytes, stream);
  launch<T, 128>(o, num_blocks, limits.shared_bytes, stream);
}

void check_attention(const Attention& op) {
  const int64_t num_heads = op.q.shape[1], head_dim = op.q.shape[2];
  const int64_t num_kv_heads = op.kv_cache.shape[2], block_size = op.kv_cache.shape[3];
  FS_CHECK(op.q.dtype == op.kv_cache.dtype, "attention: q is " << name_of(op.q.dtype) << " and kv_cache is "
                                                               << name_of(op.kv_cache.dtype)
                                                               << "; the cuda kernel takes equal formats");
  FS_CHECK(head_dim == 64 || head_dim == 128,
           "attention: head_dim is " << head_dim << "; the cuda kernel takes 64 and 128");
  FS_CHECK(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
           "attention: " << num_heads << " query heads and " << num_kv_heads
                         << " KV heads; must be a whole multiple");
  FS_CHECK(block_size >= kGroupKeys && (block_size & (block_size - 1)) == 0,
           "attention: the block size is " << block_size << "; the cuda kernel takes powers of two from "
                                           << kGroupKeys);
  FS_CHECK(op.span >= block_size && op.span % block_size == 0 && op.span % kTileKeys == 0,
           "attention: span is " << op.span << "; must be a multiple of the block size " << block_size
                                 << " and, for the cuda kernel, of " << kTileKeys);
  FS_CHECK(op.window >= 0, "attention: window is " << op.window << "; must not be negative");
  FS_CHECK(op.scale > 0.0f, "attention: scale is " << op.scale << "; must be above 0");
  FS_CHECK(
      is_aligned(op.q, head_dim, 8) && is_aligned(op.out, head_dim, 8) &&
          reinterpret_cast<uintptr_t>(op.kv_cache.data) % 16 == 0,
      "attention: rows of q and out, and kv_cache, must start at multiples of 16 bytes for the cuda kernel");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.workspace.data) % 16 == 0,
           "attention: workspace must start at a multiple of 16 bytes for the cuda kernel");
  const int64_t counters = attention_counters(op.merges.shape[0], num_kv_heads);
  FS_CHECK(op.counters.defined() && op.counters.shape[0] >= counters,
           "attention: the cuda kernel needs " << counters << " counters, zeros at first; given "
                                               << (op.counters.defined() ? op.counters.shape[0] : 0));
  FS_CHECK(op.kv_cache.stride[0] < int64_t{1} << 31,
           "attention: a block of the KV cache has " << op.kv_cache.stride[0]
                                                     << " elements; the cuda kernel takes fewer than 2^31");
  FS_CHECK(op.items.shape[0] * num_kv_heads <= 0x3fffffff &&
               op.block_tables.shape[1] <= 0x7fffffff / block_size && op.span <= 0x3fffffff &&
               op.window <= 0x7fffffff,
           "attention: " << op.items.shape[0] << " items of " << num_kv_heads << " KV heads, block tables of "
                         << op.block_tables.shape[1] << ", span " << op.span << " or window " << op.window
                         << " is too large");
}

void attention(const Attention& op, const OpContext& context) {
  check_attention(op);
  if (op.items.shape[0] == 0) return;
  if (op.q.dtype == DType::f16) {
    attention_of<f16>(op, stream_of(context));
  } else {
    attention_of<bf16>(op, stream_of(context));
  }
  check_launch("attention");
}

}  // namespace

FS_REGISTER_CUDA(Attention, attention, DType::f16 | DType::bf16)

}  // namespace fs::cuda
