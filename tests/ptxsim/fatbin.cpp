// SPDX-License-Identifier: Apache-2.0
#include "fatbin.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace ptxsim {
namespace {

struct Wrapper {
  uint32_t magic, version;
  const uint8_t* data;
  void* unused;
};

struct Header {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;  // of all entries
};

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kHeaderMagic = 0xba55ed50;
constexpr uint16_t kPtxKind = 1;
constexpr uint64_t kLz4Flag = 0x2000, kZstdFlag = 0x8000;

template <class T>
T field(const uint8_t* entry, size_t offset) {
  T value;
  std::memcpy(&value, entry + offset, sizeof(T));
  return value;
}

std::string entry_text(const uint8_t* entry, uint32_t header_size, uint64_t padded_size) {
  const uint64_t flags = field<uint64_t>(entry, 40);
  const uint64_t raw_size = field<uint64_t>(entry, 56);
  const uint32_t compressed_size = field<uint32_t>(entry, 16);
  const uint8_t* payload = entry + header_size;
  std::string text;
  if (flags & kZstdFlag)
    text = decompress_zstd(payload, compressed_size, raw_size);
  else if (flags & kLz4Flag)
    text = decompress_lz4(payload, compressed_size, raw_size);
  else
    text.assign(reinterpret_cast<const char*>(payload), padded_size);
  if (const size_t end = text.find('\0'); end != std::string::npos) text.resize(end);
  return text;
}

}  // namespace

std::string decompress_zstd(const void* data, size_t size, size_t raw_size) {
  using Decompress = size_t (*)(void*, size_t, const void*, size_t);
  using IsError = unsigned (*)(size_t);
  static void* library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw std::runtime_error(
        "the PTX in this program is compressed with zstd and libzstd.so.1 cannot be loaded: install it, or "
        "compile with "
        "`nvcc -no-compress`");
  const auto decompress = reinterpret_cast<Decompress>(dlsym(library, "ZSTD_decompress"));
  const auto is_error = reinterpret_cast<IsError>(dlsym(library, "ZSTD_isError"));
  if (decompress == nullptr || is_error == nullptr)
    throw std::runtime_error("libzstd.so.1 lacks ZSTD_decompress");
  std::string out(raw_size, '\0');
  const size_t got = decompress(out.data(), out.size(), data, size);
  if (is_error(got)) throw std::runtime_error("a zstd-compressed PTX image is damaged");
  out.resize(got);
  return out;
}

std::string decompress_lz4(const void* data, size_t size, size_t raw_size) {
  const auto* in = static_cast<const uint8_t*>(data);
  const uint8_t* const end = in + size;
  std::string out;
  out.reserve(raw_size);
  const auto damaged = [] { return std::runtime_error("an LZ4-compressed PTX image is damaged"); };
  const auto extended = [&](size_t n) {
    if (n != 15) return n;
    while (true) {
      if (in == end) throw damaged();
      const uint8_t byte = *in++;
      n += byte;
      if (byte != 255) return n;
    }
  };
  while (in < end && out.size() < raw_size) {
    const uint8_t token = *in++;
    const size_t literals = extended(token >> 4);
    if (static_cast<size_t>(end - in) < literals) throw damaged();
    out.append(reinterpret_cast<const char*>(in), literals);
    in += literals;
    if (in == end || out.size() >= raw_size) break;
    if (end - in < 2) throw damaged();
    const size_t distance = static_cast<size_t>(in[0]) | static_cast<size_t>(in[1]) << 8;
    in += 2;
    const size_t length = extended(token & 15) + 4;
    if (distance == 0 || distance > out.size()) throw damaged();
    for (size_t i = 0; i < length; ++i) out.push_back(out[out.size() - distance]);
  }
  return out;
}

std::vector<PtxImage> ptx_images(const void* wrapper) {
  Wrapper w;
  std::memcpy(&w, wrapper, sizeof(w));
  if (w.magic != kWrapperMagic) throw std::runtime_error("this is not a fat binary wrapper");
  Header header;
  std::memcpy(&header, w.data, sizeof(header));
  if (header.magic != kHeaderMagic) throw std::runtime_error("this is not a fat binary");
  std::vector<PtxImage> images;
  const uint8_t* entry = w.data + header.header_size;
  const uint8_t* const end = entry + header.size;
  while (entry < end) {
    const uint32_t header_size = field<uint32_t>(entry, 4);
    const uint64_t padded_size = field<uint64_t>(entry, 8);
    if (header_size == 0 || padded_size > static_cast<uint64_t>(end - entry))
      throw std::runtime_error("a fat binary entry has an impossible size");
    if (field<uint16_t>(entry, 0) == kPtxKind)
      images.push_back({entry_text(entry, header_size, padded_size), field<uint32_t>(entry, 28)});
    entry += header_size + padded_size;
  }
  return images;
}

}  // namespace ptxsim
