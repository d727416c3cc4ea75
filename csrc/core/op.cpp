// SPDX-License-Identifier: Apache-2.0
#include "core/op.h"

#include <algorithm>
#include <charconv>
#include <string_view>

namespace fs {

namespace {

inline constexpr int kMaxSymbols = 16;

std::vector<std::string_view> split_words(std::string_view text) {
  std::vector<std::string_view> words;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    if (end > 0) words.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return words;
}

bool parse_integer(std::string_view word, int64_t* value) {
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), *value);
  return error == std::errc() && end == word.data() + word.size();
}

}  // namespace

ShapeRules::ShapeRules(const char* op_name, std::span<const ArgSpec> specs) : op_name_(op_name) {
  for (const ArgSpec& spec : specs) {
    if (spec.shape == nullptr) continue;
    Rule rule{spec, {}};
    for (std::string_view word : split_words(spec.shape)) {
      Dim dim{-1, 1};
      if (!parse_integer(word, &dim.factor)) {
        if (const size_t star = word.find('*'); star != std::string_view::npos) {
          FS_CHECK(parse_integer(word.substr(0, star), &dim.factor),
                   op_name << ": bad dimension " << std::string(word));
          word.remove_prefix(star + 1);
        }
        const auto known = std::find(symbols_.begin(), symbols_.end(), word);
        dim.symbol = static_cast<int>(known - symbols_.begin());
        if (known == symbols_.end()) symbols_.emplace_back(word);
      }
      rule.dims.push_back(dim);
    }
    rules_.push_back(std::move(rule));
  }
  FS_CHECK(symbols_.size() <= kMaxSymbols, op_name << ": more than " << kMaxSymbols << " dimension names");
}

void ShapeRules::check(std::span<const Tensor* const> tensors) const {
  int64_t bound[kMaxSymbols];
  std::fill_n(bound, symbols_.size(), -1);
  const Tensor* first = nullptr;
  const Tensor* activation = nullptr;

  for (size_t i = 0; i < rules_.size(); ++i) {
    const Rule& rule = rules_[i];
    const Tensor& t = *tensors[i];
    if (!t.defined()) {
      if (!rule.spec.optional) fail(i, t, "is required");
      continue;
    }
    if (first == nullptr) first = &t;
    if (t.device != first->device || t.device_index != first->device_index) {
      fail(i, t, "is on another device than " + describe(*first));
    }
    if (!rule.spec.dtypes.contains(t.dtype)) fail(i, t, "has the wrong dtype");
    if (rule.spec.activation) {
      const bool is_cpu = t.device == Device::cpu;
      if (is_cpu && t.dtype != DType::f32 && !(rule.spec.operand && t.dtype == DType::bf16)) {
        fail(i, t,
             rule.spec.operand ? "must be float32 or bfloat16 on the CPU" : "must be float32 on the CPU");
      }
      if (activation == nullptr) activation = &t;
      if (!is_cpu && t.dtype != activation->dtype) {
        fail(i, t,
             std::string("has another dtype than the other activations: ") + name_of(activation->dtype));
      }
    }
    if (t.ndim != static_cast<int>(rule.dims.size())) fail(i, t, "has the wrong number of dimensions");

    for (int d = 0; d < t.ndim; ++d) {
      const Dim& dim = rule.dims[static_cast<size_t>(d)];
      if (dim.symbol < 0) {
        if (t.shape[d] != dim.factor) fail(i, t, "has the wrong extent in dimension " + std::to_string(d));
        continue;
      }
      int64_t& value = bound[dim.symbol];
      if (value < 0 && t.shape[d] % dim.factor == 0) value = t.shape[d] / dim.factor;
      if (t.shape[d] != value * dim.factor) {
        fail(i, t,
             "disagrees in dimension " + std::to_string(d) + ": " +
                 symbols_[static_cast<size_t>(dim.symbol)] + " is " + std::to_string(value) +
                 " in the arguments before it");
      }
    }

    if (t.numel() == 0) continue;  // an empty tensor may have any strides
    // Contiguous, but for the first dimension where the op takes rows of a wider matrix.
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
      const bool free_stride = d == 0 && rule.spec.strided && t.stride[0] >= expected;
      if (t.shape[d] > 1 && t.stride[d] != expected && !free_stride) {
        fail(i, t, rule.spec.strided ? "is not contiguous within a row" : "is not contiguous");
      }
      expected *= t.shape[d];
    }
  }
}

void ShapeRules::fail(size_t index, const Tensor& given, const std::string& why) const {
  const ArgSpec& spec = rules_[index].spec;
  std::string expected = "[";
  for (const char* c = spec.shape; *c != '\0'; ++c)
    expected += *c == ' ' ? std::string(", ") : std::string(1, *c);
  throw Error(op_name_ + ": argument '" + spec.name + "' " + why + ": given " + describe(given) +
              "; expected " + expected + "] " + to_string(spec.dtypes) +
              (spec.strided ? ", rows may be strided" : "") + (spec.optional ? ", or None" : ""));
}

}  // namespace fs
