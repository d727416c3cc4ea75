// SPDX-License-Identifier: Apache-2.0
//
// Every native op, declared once. Read this first.
//
// Dimension names: T tokens (rows) of the step, H hidden size, V vocabulary, M N K of a matrix product, Nq
// and Nkv query and key-value heads, D head size, S block size, NB number of KV blocks, B requests, MB
// longest block table. On the CPU activations are float32 between ops; weights are float32, bfloat16 or
// float16.
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

struct RmsNorm {
  Tensor out, x, residual, weight;
  float eps;
  static constexpr OpInfo info{
      "rms_norm",
      "out = x / sqrt(mean(x^2) + eps) * weight; given a residual: residual += x first, and out is its norm",
      "x"};
  static constexpr auto args() {
    return std::tuple{
        activation(&RmsNorm::out, "out", "T H", Access::write),
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

struct Linear {
  Tensor out, x, packed, bias, workspace;
  static constexpr OpInfo info{"linear", "out = x @ weight.T + bias, weight packed by `pack_linear`",
                               "packed"};
  static constexpr auto args() {
    return std::tuple{
        activation(&Linear::out, "out", "M N", Access::write).rows(),
        activation(&Linear::x, "x", "M K").rows(),
        tensor(&Linear::packed, "packed", "P Kp 32", kWeights),
        tensor(&Linear::bias, "bias", "N", DType::f32).maybe(),
        tensor(&Linear::workspace, "workspace", "W", DType::u8, Access::write),
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

struct Attention {
  Tensor out, q, kv_cache, block_tables, items, merges, parts, workspace;
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
        tensor(&Attention::out, "out", "T Nq D", kActivations, Access::write).rows(),
        tensor(&Attention::q, "q", "T Nq D", kActivations).rows(),
        tensor(&Attention::kv_cache, "kv_cache", "NB 2 Nkv S D", kActivations),
        tensor(&Attention::block_tables, "block_tables", "B MB", DType::i32),
        tensor(&Attention::items, "items", "I 8", DType::i32),
        tensor(&Attention::merges, "merges", "J 4", DType::i32),
        tensor(&Attention::parts, "parts", "P", DType::i32),
        tensor(&Attention::workspace, "workspace", "W", DType::f32, Access::write),
        scalar(&Attention::scale, "scale"),
        scalar(&Attention::span, "span"),
        scalar(&Attention::window, "window"),
    };
  }
};

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

// All ops, in the order of `fastserve doctor --ops` and of the generated table.
using AllOps = std::tuple<Embedding, RmsNorm, PackLinear, Linear, RopeKvWrite, Attention, SiluMul>;

}  // namespace fs
