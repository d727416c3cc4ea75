// SPDX-License-Identifier: Apache-2.0
//
// Embedding rows to float32. Bound: memory, one weight row read and one float row written per token.
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kRowsPerChunk = 16;

void embedding(const Embedding& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  const int64_t vocab = op.weight.shape[0];
  const auto* ids = op.token_ids.ptr<const int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    FS_CHECK(ids[t] >= 0 && ids[t] < vocab, "embedding: token_ids[" << t << "] is " << ids[t]
                                                                    << "; the vocabulary has " << vocab
                                                                    << " tokens");
  }
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

}  // namespace

FS_REGISTER_CPU(Embedding, embedding, kWeights)

}  // namespace fs::FS_ISA
