// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ptxsim {
namespace {

constexpr size_t kAlignment = 512;  // of cudaMalloc
constexpr size_t kRedZone = 4096;   // never live, before and after each allocation
constexpr size_t kQuarantineBytes = 64u << 20;

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string label(const Allocation& a) {
  return (a.name.empty() ? "an allocation" : "'" + a.name + "'") + " of " + std::to_string(a.end - a.begin) +
         " bytes at " + hex(a.begin);
}

}  // namespace

Memory& memory() {
  static Memory* m = new Memory;  // never destroyed: objects free device memory in static destructors
  return *m;
}

Memory::~Memory() = default;

void* Memory::allocate(size_t bytes, bool host, bool managed) {
  const size_t total = bytes + 2 * kRedZone + kAlignment;
  if (total < bytes) return nullptr;
  void* raw = std::malloc(total);
  if (raw == nullptr) return nullptr;
  const uint64_t begin =
      (reinterpret_cast<uint64_t>(raw) + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
  std::memset(reinterpret_cast<void*>(begin), 0xff, bytes);
  Allocation a;
  a.begin = begin;
  a.end = begin + bytes;
  a.host = host;
  a.managed = managed;
  a.raw = raw;
  table_[begin] = std::move(a);
  used_bytes_ += bytes;
  return reinterpret_cast<void*>(begin);
}

bool Memory::release(void* pointer) {
  const auto it = table_.find(reinterpret_cast<uint64_t>(pointer));
  if (it == table_.end() || !it->second.owned) return false;
  const Allocation& a = it->second;
  ++generation_;
  used_bytes_ -= a.end - a.begin;
  freed_.push_back({a.begin, a.end, a.raw});
  freed_bytes_ += a.end - a.begin;
  table_.erase(it);
  while (freed_bytes_ > kQuarantineBytes || freed_.size() > 4096) {
    freed_bytes_ -= freed_.front().end - freed_.front().begin;
    std::free(freed_.front().raw);
    freed_.pop_front();
  }
  return true;
}

Allocation* Memory::add(const void* pointer, size_t bytes, std::string name, bool host) {
  Allocation a;
  a.begin = reinterpret_cast<uint64_t>(pointer);
  a.end = a.begin + bytes;
  a.name = std::move(name);
  a.host = host;
  a.owned = false;
  return &(table_[a.begin] = std::move(a));
}

bool Memory::remove(const void* pointer) {
  ++generation_;
  return table_.erase(reinterpret_cast<uint64_t>(pointer)) != 0;
}

Allocation* Memory::find(uint64_t address) {
  auto it = table_.upper_bound(address);
  if (it == table_.begin()) return nullptr;
  --it;
  return address < it->second.end || address == it->second.begin ? &it->second : nullptr;
}

std::string Memory::describe(uint64_t address) {
  if (address < 4096) return "a null pointer";
  for (auto it = freed_.rbegin(); it != freed_.rend(); ++it)
    if (address >= it->begin && address < it->end)
      return "memory that was freed (" + std::to_string(address - it->begin) +
             " bytes into a freed allocation of " + std::to_string(it->end - it->begin) + " bytes)";
  auto after = table_.upper_bound(address);
  if (after != table_.begin()) {
    const Allocation& a = std::prev(after)->second;
    if (address < a.end) return std::to_string(address - a.begin) + " bytes into " + label(a);
    if (address - a.end < (1u << 20))
      return std::to_string(address - a.end) + " bytes after the end of " + label(a);
  }
  if (after != table_.end() && after->first - address < (1u << 20))
    return std::to_string(after->first - address) + " bytes before " + label(after->second);
  return "an address in no allocation";
}

}  // namespace ptxsim
