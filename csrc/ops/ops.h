// SPDX-License-Identifier: Apache-2.0
//
// Every native op, declared once. Read this first.
//
// Dimension names: T tokens (rows) of the step, H hidden size, V vocabulary, M N K of a matrix product, Nq
// and Nkv query and key-value heads, D head size, S block size, NB number of KV blocks, B requests, MB
// longest block table. On the CPU activations are float32 between ops, or bfloat16 where products alone read
// them and round them to it anyway (AMX); weights are float32, bfloat16 or float16.
#pragma once

#include "core/op.h"

namespace fs {

inline constexpr DTypes kWeights = DType::f32 | DType::bf16 | DType::f16;

struct Embedding {
  Tensor out, token_ids, weight;
  static constexpr OpInfo info{"embedding", "out[t] = weight[token_ids[t]]", "weight"};
  static constexpr auto args() {
    return std::tuple{
        activation(&Embedding::out, "out", "T H", Access::write),
        tensor(&Embedding::token_ids, "token_ids", "T", DType::i32),
        tensor(&Embedding::weight, "weight", "V H", kWeights),
    };
  }
};

struct EmbeddingInt8 {
  Tensor out, token_ids, codes, scales;
  int64_t group_size;
  static constexpr OpInfo info{"embedding_int8",
                               "out[t, h] = scales[id, h / group_size] * codes[id, h] with id = token_ids[t]",
                               "codes"};
  static constexpr auto args() {
    return std::tuple{
        activation(&EmbeddingInt8::out, "out", "T H", Access::write),
        tensor(&EmbeddingInt8::token_ids, "token_ids", "T", DType::i32),
        tensor(&EmbeddingInt8::codes, "codes", "V H", DType::i8),
        tensor(&EmbeddingInt8::scales, "scales", "V G", DType::f16),
        scalar(&EmbeddingInt8::group_size, "group_size"),
    };
  }
};

struct RmsNorm {
  Tensor out, x, residual, weight;
  float eps;
  static constexpr OpInfo info{
      "rms_norm",
      "out = x / sqrt(mean(x^2) + eps) * weight; given a residual: residual += x first, and out is its norm",
      "x"};
  static constexpr auto args() {
    return std::tuple{
        activation(&RmsNorm::out, "out", "T H", Access::write).rows().operand(),
        activation(&RmsNorm::x, "x", "T H").rows(),
        activation(&RmsNorm::residual, "residual", "T H", Access::update).maybe(),
        tensor(&RmsNorm::weight, "weight", "H", kWeights),
        scalar(&RmsNorm::eps, "eps"),
    };
  }
};

struct PackLinear {
  Tensor packed, weight;
  static constexpr OpInfo info{
      "pack_linear",
      "rearrange weight [N, K] into the panels that `linear` reads; packed has packed_linear_shape(N, K)",
      "weight"};
  static constexpr auto args() {
    return std::tuple{
        tensor(&PackLinear::packed, "packed", "P Kp 32", kWeights, Access::write),
        tensor(&PackLinear::weight, "weight", "N K", kWeights).rows(),
    };
  }
};

// `counters` is for CUDA, where the last block to arrive adds the parts of a sum: kLinearCounters zeros,
// which are zeros again when the kernel has ended. They may serve all calls that run one after another.
inline constexpr int64_t kLinearCounters = 16384;

struct Linear {
  Tensor out, x, packed, bias, workspace, counters;
  static constexpr OpInfo info{"linear", "out = x @ weight.T + bias, weight packed by `pack_linear`",
                               "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&Linear::out, "out", "M N", Access::write).rows(),
        activation(&Linear::x, "x", "M K").rows().operand(),
        tensor(&Linear::packed, "packed", "P Kp 32", kWeights),
        tensor(&Linear::bias, "bias", "N", DType::f32).maybe(),
        tensor(&Linear::workspace, "workspace", "W", DType::u8, Access::write),
        tensor(&Linear::counters, "counters", "C", DType::i32, Access::update).maybe(),
    };
  }
};

// The first half of a gated MLP, on the CPU: a weight [2 I, K] whose rows are 16 of the gate, the same 16 of
// up, the next 16 of the gate and so on; I is a multiple of 16. The bits are those of `linear` and
// `silu_mul`.
inline constexpr int64_t kGatedRows = 16;

struct LinearGated {
  Tensor out, x, packed, workspace;
  static constexpr OpInfo info{"linear_gated",
                               "out = silu(x @ gate.T) * (x @ up.T), rows of gate and up in turns of 16 in a "
                               "weight packed by `pack_linear`",
                               "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&LinearGated::out, "out", "M I", Access::write).rows().operand(),
        activation(&LinearGated::x, "x", "M K").rows().operand(),
        tensor(&LinearGated::packed, "packed", "P Kp 32", kWeights),
        tensor(&LinearGated::workspace, "workspace", "W", DType::u8, Access::write),
    };
  }
};

// Weights of 4 bits: codes 0 to 15 in groups of group_size along K that share a scale, G = ceil(K /
// group_size). group_size is a multiple of 32, or K or more: one group per row. With g = k / group_size, by
// what is given:
//   neither       weight[n, k] = scales[n, g] * (codes[n, k] - 8)
//   zero_points   weight[n, k] = scales[n, g] * (codes[n, k] - zero_points[n, g]), zero points 0 to 16
//   minimums      weight[n, k] = scales[n, g] * codes[n, k] + minimums[n, g]
struct PackInt4 {
  Tensor packed, codes, scales, zero_points, minimums;
  int64_t group_size;
  static constexpr OpInfo info{
      "pack_int4",
      "arrange 4-bit codes [N, K], one per byte, with their scales and zero points or "
      "minimums as `linear_int4` reads them",
      "codes"};
  static constexpr auto args() {
    return std::tuple{
        tensor(&PackInt4::packed, "packed", "P B", DType::u8, Access::write),
        tensor(&PackInt4::codes, "codes", "N K", DType::u8).rows(),
        tensor(&PackInt4::scales, "scales", "N G", DType::f16),
        tensor(&PackInt4::zero_points, "zero_points", "N G", DType::u8).maybe(),
        tensor(&PackInt4::minimums, "minimums", "N G", DType::f16).maybe(),
        scalar(&PackInt4::group_size, "group_size"),
    };
  }
};

// form: 0 neither, 1 zero points, 2 minimums, as packed. Column k of the codes multiplies input
// input_order[k]. activation_bits says what is multiplied:
//   16   the activations as they are (rounded to bfloat16 where the instruction set multiplies in bfloat16)
//   8    on the CPU: activations rounded to 8 bits in groups of 32 inputs, x ~ s * q with s = max|x| / 127
//        and integers q in [-127, 127] to nearest even; a row with NaN or infinity is NaN throughout
//   12   the same with 2047 for 127. On CUDA both are as 16
// `counters` as for `linear`.
struct LinearInt4 {
  Tensor out, x, packed, bias, input_order, workspace, counters;
  int64_t group_size, form, activation_bits;
  static constexpr OpInfo info{
      "linear_int4", "out = x @ weight.T + bias, weight packed by `pack_int4` with the same group_size",
      "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&LinearInt4::out, "out", "M N", Access::write).rows(),
        activation(&LinearInt4::x, "x", "M K").rows().operand(),
        tensor(&LinearInt4::packed, "packed", "P B", DType::u8),
        tensor(&LinearInt4::bias, "bias", "N", DType::f32).maybe(),
        tensor(&LinearInt4::input_order, "input_order", "K", DType::i32).maybe(),
        tensor(&LinearInt4::workspace, "workspace", "W", DType::u8, Access::write),
        scalar(&LinearInt4::group_size, "group_size"),
        scalar(&LinearInt4::form, "form"),
        scalar(&LinearInt4::activation_bits, "activation_bits"),
        tensor(&LinearInt4::counters, "counters", "C", DType::i32, Access::update).maybe(),
    };
  }
};

struct LinearInt4Gated {
  Tensor out, x, packed, input_order, workspace;
  int64_t group_size, form, activation_bits;
  static constexpr OpInfo info{"linear_int4_gated",
                               "`linear_gated` over a weight packed by `pack_int4`, activations as for "
                               "`linear_int4`",
                               "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&LinearInt4Gated::out, "out", "M I", Access::write).rows().operand(),
        activation(&LinearInt4Gated::x, "x", "M K").rows().operand(),
        tensor(&LinearInt4Gated::packed, "packed", "P B", DType::u8),
        tensor(&LinearInt4Gated::input_order, "input_order", "K", DType::i32).maybe(),
        tensor(&LinearInt4Gated::workspace, "workspace", "W", DType::u8, Access::write),
        scalar(&LinearInt4Gated::group_size, "group_size"),
        scalar(&LinearInt4Gated::form, "form"),
        scalar(&LinearInt4Gated::activation_bits, "activation_bits"),
    };
  }
};

// Weights of 8 bits: weight[n, k] = scales[n, g] * codes[n, k] with codes -128 to 127, groups as above.
struct PackInt8 {
  Tensor packed, codes, scales;
  int64_t group_size;
  static constexpr OpInfo info{
      "pack_int8", "arrange 8-bit codes [N, K] with their scales as `linear_int8` reads them", "codes"};
  static constexpr auto args() {
    return std::tuple{
        tensor(&PackInt8::packed, "packed", "P B", DType::u8, Access::write),
        tensor(&PackInt8::codes, "codes", "N K", DType::i8).rows(),
        tensor(&PackInt8::scales, "scales", "N G", DType::f16),
        scalar(&PackInt8::group_size, "group_size"),
    };
  }
};

struct LinearInt8 {
  Tensor out, x, packed, bias, workspace, counters;
  int64_t group_size, activation_bits;
  static constexpr OpInfo info{
      "linear_int8",
      "out = x @ weight.T + bias, weight packed by `pack_int8` with the same group_size; activation_bits and "
      "counters as for `linear_int4`",
      "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&LinearInt8::out, "out", "M N", Access::write).rows(),
        activation(&LinearInt8::x, "x", "M K").rows().operand(),
        tensor(&LinearInt8::packed, "packed", "P B", DType::u8),
        tensor(&LinearInt8::bias, "bias", "N", DType::f32).maybe(),
        tensor(&LinearInt8::workspace, "workspace", "W", DType::u8, Access::write),
        scalar(&LinearInt8::group_size, "group_size"),
        scalar(&LinearInt8::activation_bits, "activation_bits"),
        tensor(&LinearInt8::counters, "counters", "C", DType::i32, Access::update).maybe(),
    };
  }
};

struct LinearInt8Gated {
  Tensor out, x, packed, workspace;
  int64_t group_size, activation_bits;
  static constexpr OpInfo info{"linear_int8_gated",
                               "`linear_gated` over a weight packed by `pack_int8`, activations as for "
                               "`linear_int4`",
                               "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&LinearInt8Gated::out, "out", "M I", Access::write).rows().operand(),
        activation(&LinearInt8Gated::x, "x", "M K").rows().operand(),
        tensor(&LinearInt8Gated::packed, "packed", "P B", DType::u8),
        tensor(&LinearInt8Gated::workspace, "workspace", "W", DType::u8, Access::write),
        scalar(&LinearInt8Gated::group_size, "group_size"),
        scalar(&LinearInt8Gated::activation_bits, "activation_bits"),
    };
  }
};

struct RopeKvWrite {
  Tensor q, k, v, positions, slot_mapping, cos_sin, kv_cache, q_norm, k_norm;
  float eps;
  static constexpr OpInfo info{"rope_kv_write",
                               "per head: RMS norm of q and k if weights are given, rotate both by their "
                               "positions (q in place), write k and v "
                               "to the KV cache at slot = block * S + offset",
                               "kv_cache"};
  static constexpr auto args() {
    return std::tuple{
        activation(&RopeKvWrite::q, "q", "T Nq D", Access::update).rows(),
        activation(&RopeKvWrite::k, "k", "T Nkv D").rows(),
        activation(&RopeKvWrite::v, "v", "T Nkv D").rows(),
        tensor(&RopeKvWrite::positions, "positions", "T", DType::i32),
        tensor(&RopeKvWrite::slot_mapping, "slot_mapping", "T", DType::i32),
        tensor(&RopeKvWrite::cos_sin, "cos_sin", "MaxPos D", DType::f32),
        tensor(&RopeKvWrite::kv_cache, "kv_cache", "NB 2 Nkv S D", kActivations, Access::update),
        tensor(&RopeKvWrite::q_norm, "q_norm", "D", kWeights).maybe(),
        tensor(&RopeKvWrite::k_norm, "k_norm", "D", kWeights).maybe(),
        scalar(&RopeKvWrite::eps, "eps"),
    };
  }
};

// `counters` is for CUDA, where blocks take their work from a queue and the last one to store a partial
// merges: attention_counters(J, Nkv) zeros, which are zeros again when the kernel has ended.
struct Attention {
  Tensor out, q, kv_cache, block_tables, items, merges, parts, workspace, counters;
  float scale;
  int64_t span, window;
  static constexpr OpInfo info{
      "attention",
      "out = softmax(scale * q k^T) v over each row's own KV tokens, the last `window` of them (0: all), by "
      "the "
      "items of an AttentionPlan made with the same span; rows that no item has are left alone",
      "kv_cache"};
  static constexpr auto args() {
    return std::tuple{
        activation(&Attention::out, "out", "T Nq D", Access::write).rows().operand(),
        activation(&Attention::q, "q", "T Nq D").rows(),
        tensor(&Attention::kv_cache, "kv_cache", "NB 2 Nkv S D", kActivations),
        tensor(&Attention::block_tables, "block_tables", "B MB", DType::i32),
        tensor(&Attention::items, "items", "I 10", DType::i32),
        tensor(&Attention::merges, "merges", "J 5", DType::i32),
        tensor(&Attention::parts, "parts", "P", DType::i32),
        tensor(&Attention::workspace, "workspace", "W", DType::f32, Access::write),
        tensor(&Attention::counters, "counters", "C", DType::i32, Access::update).maybe(),
        scalar(&Attention::scale, "scale"),
        scalar(&Attention::span, "span"),
        scalar(&Attention::window, "window"),
    };
  }
};

inline constexpr int64_t kAttentionQueueCounters = 2;
inline constexpr int64_t attention_counters(int64_t num_merges, int64_t num_kv_heads) {
  return kAttentionQueueCounters + num_merges * num_kv_heads;
}

struct SiluMul {
  Tensor out, gate_up;
  static constexpr OpInfo info{"silu_mul", "out = silu(gate) * up, where gate_up = [gate | up]", "gate_up"};
  static constexpr auto args() {
    return std::tuple{
        activation(&SiluMul::out, "out", "T I", Access::write),
        activation(&SiluMul::gate_up, "gate_up", "T 2*I").rows(),
    };
  }
};

// The next token of each row, token_ids[b]; -1 if the row's logits hold NaN or +infinity, -2 if no token is
// allowed, so that only this request fails. Logits are read only. Optional arguments that are not given
// change nothing. In this order, as vLLM does (float32, every operation rounded on its own, identical on all
// devices):
//   allowed      where bit i % 32 of word i / 32 of row allowed_rows[b] of `allowed` is 0, logit i is
//                -infinity; allowed_rows[b] = -1: all tokens are allowed
//   bias         logit += bias for each entry [bias_offsets[b], bias_offsets[b + 1]) of the bias list
//   penalties    for each id in the row's `seen` list (ids of prompt and output, each once; seen_counts: how
//                often in the output): logit = logit > 0 ? logit / repetition : logit * repetition; then, if
//                the count is above 0, logit -= frequency * count, logit -= presence
//   temperature  below 1e-5 (or not given): the largest logit, of equal ones the lowest id, and nothing below
//                applies. Else weight = exp((logit - largest logit) / temperature), which is at most 1
//   min_p        keeps tokens with weight >= min_p; 0: all
//   top_k        of these keeps the first k in the order (logit descending, id ascending); 0: all
//   top_p        of these keeps the shortest prefix in the same order whose weights reach top_p times the sum
//                of all of their weights, rounded to multiples of 2^-30 and so summed exactly; 1: all
//   draw         the kept token with the largest weight / E, of equal ones the lowest id; E is exponentially
//                distributed noise, a function of (seed, position, token id) only: see layout/philox.h and
//                layout/sampling.h. This is argmax(logit / temperature + Gumbel noise)
struct Sample {
  Tensor token_ids, logits, temperature, top_k, top_p, min_p, seeds, positions;
  Tensor repetition_penalty, frequency_penalty, presence_penalty, seen_offsets, seen_ids, seen_counts;
  Tensor bias_offsets, bias_ids, bias, allowed, allowed_rows, workspace;
  static constexpr OpInfo info{"sample",
                               "draw the next token of each row after masks, bias, penalties, temperature, "
                               "min_p, top_k and top_p; -1: NaN in the row, -2: no token allowed",
                               "logits"};
  static constexpr auto args() {
    return std::tuple{
        tensor(&Sample::token_ids, "token_ids", "B", DType::i32, Access::write),
        tensor(&Sample::logits, "logits", "B V", DType::f32).rows(),
        tensor(&Sample::temperature, "temperature", "B", DType::f32).maybe(),
        tensor(&Sample::top_k, "top_k", "B", DType::i32).maybe(),
        tensor(&Sample::top_p, "top_p", "B", DType::f32).maybe(),
        tensor(&Sample::min_p, "min_p", "B", DType::f32).maybe(),
        tensor(&Sample::seeds, "seeds", "B", DType::i64).maybe(),
        tensor(&Sample::positions, "positions", "B", DType::i32).maybe(),
        tensor(&Sample::repetition_penalty, "repetition_penalty", "B", DType::f32).maybe(),
        tensor(&Sample::frequency_penalty, "frequency_penalty", "B", DType::f32).maybe(),
        tensor(&Sample::presence_penalty, "presence_penalty", "B", DType::f32).maybe(),
        tensor(&Sample::seen_offsets, "seen_offsets", "B+1", DType::i32).maybe(),
        tensor(&Sample::seen_ids, "seen_ids", "Seen", DType::i32).maybe(),
        tensor(&Sample::seen_counts, "seen_counts", "Seen", DType::i32).maybe(),
        tensor(&Sample::bias_offsets, "bias_offsets", "B+1", DType::i32).maybe(),
        tensor(&Sample::bias_ids, "bias_ids", "Biased", DType::i32).maybe(),
        tensor(&Sample::bias, "bias", "Biased", DType::f32).maybe(),
        tensor(&Sample::allowed, "allowed", "Masks Words", DType::i32 | DType::u32).maybe(),
        tensor(&Sample::allowed_rows, "allowed_rows", "B", DType::i32).maybe(),
        tensor(&Sample::workspace, "workspace", "Threads 4*V", DType::f32, Access::write),
    };
  }
};

// For a row x of raw logits: logprob(i) = x[i] - log(sum(exp(x))), and rank(i) = 1 + the number of tokens
// before i in the order (logit descending, id ascending). Writes both for token_ids[b], and the first L
// tokens of that order with their logprobs (their ranks are 1 to L). A token id of -1 stands for none. Where
// that is so, or the row holds NaN or +infinity, or no finite logit, the logprob is NaN and the rank 0; in
// the latter cases the top ids are -1 and the top logprobs NaN.
struct TokenLogprobs {
  Tensor logprobs, ranks, top_ids, top_logprobs, logits, token_ids, workspace;
  static constexpr OpInfo info{
      "token_logprobs",
      "log-softmax of the logits and rank at token_ids, and the L largest of each row with their ids",
      "logits"};
  static constexpr auto args() {
    return std::tuple{
        tensor(&TokenLogprobs::logprobs, "logprobs", "B", DType::f32, Access::write),
        tensor(&TokenLogprobs::ranks, "ranks", "B", DType::i32, Access::write),
        tensor(&TokenLogprobs::top_ids, "top_ids", "B L", DType::i32, Access::write),
        tensor(&TokenLogprobs::top_logprobs, "top_logprobs", "B L", DType::f32, Access::write),
        tensor(&TokenLogprobs::logits, "logits", "B V", DType::f32).rows(),
        tensor(&TokenLogprobs::token_ids, "token_ids", "B", DType::i32),
        tensor(&TokenLogprobs::workspace, "workspace", "Threads 4*V", DType::f32, Access::write),
    };
  }
};

// All ops, in the order of `fastserve doctor --ops` and of the generated table.
using AllOps = std::tuple<Embedding, EmbeddingInt8, RmsNorm, PackLinear, Linear, LinearGated, PackInt4,
                          LinearInt4, LinearInt4Gated, PackInt8, LinearInt8, LinearInt8Gated, RopeKvWrite,
                          Attention, SiluMul, Sample, TokenLogprobs>;

}  // namespace fs
