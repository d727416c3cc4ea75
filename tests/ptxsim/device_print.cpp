// SPDX-License-Identifier: Apache-2.0
// printf and assert of kernels.
#include <cstdio>
#include <cstring>
#include <string>

#include "block.h"
#include "warp_operations.h"

namespace ptxsim {
namespace {

template <class T>
T local_value(const Warp& w, int lane, uint64_t offset) {
  T v;
  std::memcpy(&v, w.local + static_cast<uint64_t>(lane) * w.local_bytes + offset, sizeof(T));
  return v;
}

// A generic pointer as a host pointer, with at least one readable byte.
const char* readable(Warp& w, int lane, uint64_t address, uint32_t bytes) {
  Inst i;
  i.aux = static_cast<uint32_t>(Space::Generic);
  const uint32_t saved = w.mask;
  w.mask = 1u << lane;
  uint64_t a[kLanes] = {};
  for (uint32_t k = 0; k < bytes; ++k) {
    a[lane] = address + k;
    slow_addresses(w, i, a, 1, Access::Read);
  }
  w.mask = saved;
  return reinterpret_cast<const char*>(a[lane] - (bytes - 1));
}
std::string text_at(Warp& w, int lane, uint64_t address) {
  std::string s;
  for (; s.size() < 65536; ++address) {
    const char c = *readable(w, lane, address, 1);
    if (c == '\0') break;
    s += c;
  }
  return s;
}

// Arguments lie in a buffer, each aligned to its own size: int as 4 bytes, long long, double and pointers
// as 8.
std::string format_text(Warp& w, int lane, const std::string& format, uint64_t buffer) {
  std::string out;
  uint64_t at = 0;
  const auto next = [&](uint32_t bytes) {
    at = (at + bytes - 1) / bytes * bytes;
    uint64_t v = 0;
    std::memcpy(&v, readable(w, lane, buffer + at, bytes), bytes);
    at += bytes;
    return v;
  };
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    std::string spec = "%";
    bool wide = false;
    for (++i; i < format.size(); ++i) {
      const char c = format[i];
      if (c == '*') {
        spec += std::to_string(static_cast<int>(next(4)));
      } else if (std::strchr("-+ #0123456789.", c) != nullptr) {
        spec += c;
      } else if (c == 'l' || c == 'z' || c == 'j' || c == 't') {
        wide = true;
      } else if (c != 'h') {
        break;
      }
    }
    if (i >= format.size()) break;
    const char kind = format[i];
    char piece[512];
    if (kind == '%') {
      out += '%';
    } else if (std::strchr("di", kind) != nullptr) {
      const int64_t v = wide ? static_cast<int64_t>(next(8)) : static_cast<int32_t>(next(4));
      std::snprintf(piece, sizeof(piece), (spec + "lld").c_str(), static_cast<long long>(v));
      out += piece;
    } else if (std::strchr("uxXoc", kind) != nullptr) {
      const uint64_t v = next(wide ? 8 : 4);
      if (kind == 'c')
        std::snprintf(piece, sizeof(piece), (spec + "c").c_str(), static_cast<int>(v));
      else
        std::snprintf(piece, sizeof(piece), (spec + "ll" + kind).c_str(), static_cast<unsigned long long>(v));
      out += piece;
    } else if (std::strchr("eEfFgGaA", kind) != nullptr) {
      const uint64_t bits = next(8);
      double v;
      std::memcpy(&v, &bits, 8);
      std::snprintf(piece, sizeof(piece), (spec + kind).c_str(), v);
      out += piece;
    } else if (kind == 's') {
      const std::string s = text_at(w, lane, next(8));
      std::snprintf(piece, sizeof(piece), (spec + "s").c_str(), s.c_str());
      out += spec == "%" ? s : piece;
    } else if (kind == 'p') {
      std::snprintf(piece, sizeof(piece), "0x%llx", static_cast<unsigned long long>(next(8)));
      out += piece;
    } else {
      out += spec + kind;
    }
  }
  return out;
}

void print(Warp& w, const Inst& i) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const uint64_t format = local_value<uint64_t>(w, l, i.r[0]), buffer = local_value<uint64_t>(w, l, i.r[1]);
    const std::string text = format_text(w, l, text_at(w, l, format), buffer);
    std::fwrite(text.data(), 1, text.size(), stdout);
    const int32_t printed = static_cast<int32_t>(text.size());
    if (i.aux != 0xffffffffu)
      std::memcpy(w.local + static_cast<uint64_t>(l) * w.local_bytes + i.aux, &printed, 4);
  }
}
void assert_fail(Warp& w, const Inst& i) {
  const int l = __builtin_ctz(w.mask);
  const auto text = [&](int k) {
    const uint64_t address = local_value<uint64_t>(w, l, i.r[k]);
    return address == 0 ? std::string("?") : text_at(w, l, address);
  };
  fault(w, l, FaultKind::Assert,
        "assertion failed: " + text(0) + ", " + text(1) + ":" +
            std::to_string(local_value<uint32_t>(w, l, i.r[2])) + ", " + text(3));
}

const HandlerEntry kEntries[] = {{"printf", print}, {"assertfail", assert_fail}};

}  // namespace

const HandlerTable print_operations = {kEntries, std::size(kEntries)};

}  // namespace ptxsim
