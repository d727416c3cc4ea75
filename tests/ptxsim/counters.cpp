// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <algorithm>
#include <cstdio>

namespace ptxsim {
namespace {

const char* const kClassNames[] = {
    "integer",      "f32",         "f16",          "f64",        "special",     "convert",
    "move",         "compare",     "control",      "barrier",    "warp_vote",   "load_global",
    "store_global", "load_shared", "store_shared", "load_local", "store_local", "load_param",
    "atomic",       "async_copy",  "load_matrix",  "mma",        "fence",       "other"};
static_assert(sizeof(kClassNames) / sizeof(kClassNames[0]) == static_cast<size_t>(InstClass::Count));

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}
std::string field(const char* name, uint64_t value) {
  return "\"" + std::string(name) + "\": " + std::to_string(value);
}
std::string json(const char* name, const MemoryCounts& c) {
  return "\"" + std::string(name) + "\": {" + field("requests", c.requests) + ", " + field("bytes", c.bytes) +
         ", " + field("sectors", c.sectors) + ", " + field("ideal_sectors", c.ideal_sectors) + "}";
}
std::string json(const char* name, const SharedCounts& c) {
  return "\"" + std::string(name) + "\": {" + field("requests", c.requests) + ", " +
         field("wavefronts", c.wavefronts) + ", " + field("ideal", c.ideal) + "}";
}

}  // namespace

void LaunchCounters::global(MemoryCounts& counts, const uint64_t* a, uint32_t mask, uint32_t bytes) {
  ++counts.requests;
  counts.bytes += static_cast<uint64_t>(__builtin_popcount(mask)) * bytes;
  uint64_t different = 0;
  for (int l = 0; l < kLanes; ++l) different |= a[l] ^ (a[0] + static_cast<uint64_t>(l) * bytes);
  if (mask == kAllLanes && different == 0) {
    counts.sectors += (a[31] + bytes - 1) / 32 - a[0] / 32 + 1;
    counts.ideal_sectors += bytes;  // 32 lanes x bytes / 32
    return;
  }
  uint64_t sectors[kLanes * 2], starts[kLanes];
  int n = 0, lanes = 0;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const uint64_t at = a[__builtin_ctz(m)];
    starts[lanes++] = at;
    for (uint64_t s = at / 32; s <= (at + bytes - 1) / 32; ++s) sectors[n++] = s;
  }
  std::sort(sectors, sectors + n);
  std::sort(starts, starts + lanes);
  counts.sectors += static_cast<uint64_t>(std::unique(sectors, sectors + n) - sectors);
  const uint64_t distinct = static_cast<uint64_t>(std::unique(starts, starts + lanes) - starts);
  counts.ideal_sectors += (distinct * bytes + 31) / 32;
}

// Shared memory has 32 banks of 4 bytes. A request of 8 bytes a lane is served in two halves of the warp, one
// of 16 bytes in four quarters; each part takes as many wavefronts as the busiest bank has different words.
void LaunchCounters::shared(SharedCounts& counts, const uint64_t* offsets, uint32_t mask, uint32_t bytes) {
  ++counts.requests;
  const int parts = bytes >= 16 ? 4 : bytes == 8 ? 2 : 1, lanes = kLanes / parts;
  const uint32_t words = bytes <= 4 ? 1 : bytes / 4;
  uint64_t different = 0;
  const uint64_t stride = words * 4;
  for (int l = 0; l < kLanes; ++l) different |= offsets[l] ^ (offsets[0] + static_cast<uint64_t>(l) * stride);
  if (mask == kAllLanes && different == 0 && offsets[0] % 4 == 0) {
    counts.wavefronts += static_cast<uint64_t>(parts);
    counts.ideal += static_cast<uint64_t>(parts);
    return;
  }
  for (int p = 0; p < parts; ++p) {
    uint32_t in_bank[32] = {};
    uint64_t seen[32][32];
    uint32_t worst = 0, total = 0;
    for (int l = p * lanes; l < (p + 1) * lanes; ++l) {
      if (((mask >> l) & 1) == 0) continue;
      for (uint32_t k = 0; k < words; ++k) {
        const uint64_t word = offsets[l] / 4 + k;
        const uint32_t bank = static_cast<uint32_t>(word & 31);
        bool known = false;
        for (uint32_t s = 0; s < in_bank[bank] && !known; ++s) known = seen[bank][s] == word;
        if (known) continue;
        seen[bank][in_bank[bank]++] = word;
        ++total;
        worst = std::max(worst, in_bank[bank]);
      }
    }
    counts.wavefronts += worst;
    counts.ideal += (total + 31) / 32;
  }
}

std::string to_json(const LaunchRecord& r) {
  const LaunchCounters& c = r.counters;
  std::string out = "{\"kernel\": " + quoted(r.kernel);
  const auto dims = [](const uint32_t* d) {
    return "[" + std::to_string(d[0]) + ", " + std::to_string(d[1]) + ", " + std::to_string(d[2]) + "]";
  };
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.6f", r.seconds);
  out += ", \"grid\": " + dims(r.grid) + ", \"block\": " + dims(r.block) + ", \"seconds\": " + seconds +
         ", " + field("dynamic_shared", r.dynamic_shared) + ", " +
         field("warp_instructions", r.warp_instructions);
  out += ", \"by_class\": {";
  bool first = true;
  for (size_t i = 0; i < c.classes.size(); ++i) {
    if (c.classes[i] == 0) continue;
    out += (first ? "" : ", ") + field(kClassNames[i], c.classes[i]);
    first = false;
  }
  out += "}, " + field("mma", c.classes[static_cast<size_t>(InstClass::Mma)]) + ", " +
         field("divergent_barriers", c.divergent_barriers);
  out += ", \"global\": {" + json("load", c.global_load) + ", " + json("store", c.global_store) + ", " +
         json("async", c.global_async) + ", " + json("atomic", c.global_atomic) + "}";
  out += ", \"shared\": {" + json("load", c.shared_load) + ", " + json("store", c.shared_store) + ", " +
         json("ldmatrix", c.ldmatrix) + ", " + json("async", c.shared_async) + "}";
  out += ", \"buffers\": {";
  first = true;
  for (const auto& [name, bytes] : r.buffers) {
    out += (first ? "" : ", ") + quoted(name) + ": {" + field("read", bytes.first) + ", " +
           field("written", bytes.second) + "}";
    first = false;
  }
  return out + "}}";
}

}  // namespace ptxsim
