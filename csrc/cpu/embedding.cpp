// SPDX-License-Identifier: Apache-2.0
//
// Embedding rows to float32. Bound: memory, one weight row read and one float row written per token.
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/weights.h"
#include "layout/int4.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kRowsPerChunk = 16;

template <class Op>
const int32_t* checked_ids(const Op& op, int64_t vocab) {
  const auto* ids = op.token_ids.template ptr<const int32_t>();
  for (int64_t t = 0; t < op.token_ids.shape[0]; ++t) {
    FS_CHECK(ids[t] >= 0 && ids[t] < vocab, Op::info.name << ": token_ids[" << t << "] is " << ids[t]
                                                          << "; the vocabulary has " << vocab << " tokens");
  }
  return ids;
}

void embedding(const Embedding& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  const int32_t* ids = checked_ids(op, op.weight.shape[0]);
  visit_weights(op.weight.dtype, [&](auto* tag) {
    const auto* weight = op.weight.ptr<std::remove_pointer_t<decltype(tag)>>();
    auto* out = op.out.ptr<float>();
    parallel_rows(num_tokens, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        const auto* row = weight + ids[t] * hidden;
        int64_t h = 0;
        for (; h + kLanes <= hidden; h += kLanes) store(out + t * hidden + h, load(row + h));
        for (; h < hidden; ++h) out[t * hidden + h] = to_float(row[h]);
      }
    });
  });
}

// Exact: a product of 8 and 11 bits.
void embedding_int8(const EmbeddingInt8& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  check_groups(op.info.name, op.scales, hidden, op.group_size);
  const int64_t num_groups = op.scales.shape[1];
  const int32_t* ids = checked_ids(op, op.codes.shape[0]);
  const auto* codes = op.codes.ptr<const int8_t>();
  const auto* scales = op.scales.ptr<const f16>();
  auto* out = op.out.ptr<float>();
  parallel_rows(num_tokens, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t g = 0; g < num_groups; ++g) {
        const float scale = to_float(scales[ids[t] * num_groups + g]);
        const int64_t first = g * op.group_size;
        const int64_t last = hidden - first < op.group_size ? hidden : first + op.group_size;
        const int8_t* code = codes + ids[t] * hidden;
        for (int64_t h = first; h < last; ++h) out[t * hidden + h] = scale * static_cast<float>(code[h]);
      }
    }
  });
}

}  // namespace

FS_REGISTER_CPU(Embedding, embedding, kWeights)
FS_REGISTER_CPU(EmbeddingInt8, embedding_int8, DType::i8)

}  // namespace fs::FS_ISA
