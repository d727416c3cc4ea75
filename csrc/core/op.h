// SPDX-License-Identifier: Apache-2.0
//
// How an op is declared, checked and dispatched.
//
// An op is a plain struct whose fields are its arguments, plus
//   static constexpr OpInfo info        name, one-line meaning, the argument whose dtype selects the kernel
//   static constexpr auto args()        a tuple of tensor(...) and scalar(...), in call order
// From that alone come the shape/dtype/device checks, the Python binding, the help text and the support
// table. A kernel is `void kernel(const TheOp&, const OpContext&)`, registered into the op's slot for a
// device (and, on the CPU, an instruction set). Kernels never allocate and never synchronise.
//
// Shapes are written as dimension names: "T H", "T 2*I", "P Kp 32". A name binds to the first extent it meets
// and must agree everywhere after that.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace fs {

struct OpInfo {
  const char* name;
  const char* meaning;
  const char* variant;  // the tensor argument whose dtype selects among the kernels of a device
};

struct OpContext {
  void* stream = nullptr;  // the CUDA stream to launch on; unused on the CPU
};

enum class Access : uint8_t { read, write, update };

struct ArgSpec {
  const char* name;
  const char* shape;  // nullptr for a scalar
  DTypes dtypes;
  Access access = Access::read;
  bool optional = false;
  bool strided = false;     // the first dimension may have any stride (rows of a wider matrix)
  bool activation = false;  // passes between ops: float32 on the CPU, one dtype for all of a call elsewhere
  bool operand = false;     // an activation that products alone read: on the CPU it may be bfloat16
};

template <class Op, class Field>
struct Arg {
  ArgSpec spec;
  Field Op::* member;

  constexpr Arg maybe() const {
    Arg copy = *this;
    copy.spec.optional = true;
    return copy;
  }
  constexpr Arg rows() const {
    Arg copy = *this;
    copy.spec.strided = true;
    return copy;
  }
  constexpr Arg operand() const {
    Arg copy = *this;
    copy.spec.operand = true;
    return copy;
  }
};

template <class Op>
constexpr Arg<Op, Tensor> tensor(Tensor Op::* member, const char* name, const char* shape, DTypes dtypes,
                                 Access access = Access::read) {
  return {{name, shape, dtypes, access, false, false, false, false}, member};
}

inline constexpr DTypes kActivations = DType::f32 | DType::bf16 | DType::f16;

template <class Op>
constexpr Arg<Op, Tensor> activation(Tensor Op::* member, const char* name, const char* shape,
                                     Access access = Access::read) {
  return {{name, shape, kActivations, access, false, false, true, false}, member};
}

template <class Op, class Field>
  requires(std::is_same_v<Field, float> || std::is_same_v<Field, int64_t>)
constexpr Arg<Op, Field> scalar(Field Op::* member, const char* name) {
  return {{name, nullptr, {}, Access::read, false, false, false, false}, member};
}

// The shape patterns of one op's tensors, parsed once.
class ShapeRules {
 public:
  explicit ShapeRules(const char* op_name, std::span<const ArgSpec> specs);

  // Throws fs::Error naming the op, the argument, what was given and what is expected.
  // `tensors` holds the tensor arguments in declaration order.
  void check(std::span<const Tensor* const> tensors) const;

 private:
  struct Dim {
    int symbol;      // index of the name, or -1 for a literal
    int64_t factor;  // literal value, or multiplier of the name
  };
  struct Rule {
    ArgSpec spec;
    std::vector<Dim> dims;
  };
  [[noreturn]] void fail(size_t index, const Tensor& given, const std::string& why) const;

  std::string op_name_;
  std::vector<std::string> symbols_;
  std::vector<Rule> rules_;
};

template <class Op>
struct OpTraits {
  using Args = decltype(Op::args());
  static constexpr size_t kNumArgs = std::tuple_size_v<Args>;

  static std::array<ArgSpec, kNumArgs> specs() {
    return std::apply([](const auto&... arg) { return std::array<ArgSpec, kNumArgs>{arg.spec...}; },
                      Op::args());
  }

  // Position of the variant argument among the tensors.
  static size_t variant_index() {
    size_t index = 0;
    for (const ArgSpec& spec : specs()) {
      if (spec.shape == nullptr) continue;
      if (std::string_view(spec.name) == Op::info.variant) return index;
      ++index;
    }
    throw Error(std::string(Op::info.name) + ": declared variant '" + Op::info.variant +
                "' is not a tensor argument");
  }

  static constexpr size_t num_tensors() {
    return std::apply(
        [](const auto&... arg) { return (size_t{0} + ... + (arg.spec.shape != nullptr ? 1u : 0u)); },
        Op::args());
  }
};

// Where the kernels of an op are kept.
template <class Op>
struct Slot {
  using Kernel = void (*)(const Op&, const OpContext&);
  struct Entry {
    Kernel kernel = nullptr;
    DTypes variants;
  };
  static inline Entry cpu[kNumIsas];
  static inline Entry cuda;

  static const Entry& find(Device device) {
    if (device == Device::cuda) return cuda;
    for (int isa = static_cast<int>(active_isa()); isa > 0; --isa) {
      if (cpu[isa].kernel != nullptr && isa_runs(static_cast<Isa>(isa))) return cpu[isa];
    }
    return cpu[0];
  }
};

template <class Op>
struct RegisterKernel {
  RegisterKernel(typename Slot<Op>::Entry& entry, typename Slot<Op>::Kernel kernel, DTypes variants) {
    entry.kernel = kernel;
    entry.variants = variants;
  }
};

// Calls f(tensor) for every tensor argument in declaration order, absent ones included.
template <class Op, class F>
void for_each_tensor(const Op& op, const F& f) {
  std::apply(
      [&](const auto&... arg) {
        const auto visit = [&](const auto& a) {
          if constexpr (std::is_same_v<std::remove_cvref_t<decltype(op.*(a.member))>, Tensor>)
            f(op.*(a.member));
        };
        (visit(arg), ...);
      },
      Op::args());
}

template <class Op>
std::array<const Tensor*, OpTraits<Op>::num_tensors()> tensors_of(const Op& op) {
  std::array<const Tensor*, OpTraits<Op>::num_tensors()> tensors;
  size_t next = 0;
  for_each_tensor(op, [&](const Tensor& tensor) { tensors[next++] = &tensor; });
  return tensors;
}

// Throws fs::Error unless shapes, dtypes and devices of the arguments are as declared.
template <class Op>
void check(const Op& op) {
  static const auto specs = OpTraits<Op>::specs();
  static const ShapeRules rules(Op::info.name, specs);
  rules.check(tensors_of(op));
}

// The kernel for arguments that have passed `check`. Throws fs::Error if there is none.
template <class Op>
typename Slot<Op>::Kernel kernel_for(const Op& op) {
  static const size_t variant_index = OpTraits<Op>::variant_index();
  const Tensor& variant = *tensors_of(op)[variant_index];
  const auto& entry = Slot<Op>::find(variant.device);
  FS_CHECK(entry.kernel != nullptr, Op::info.name << ": no kernel for " << name_of(variant.device)
                                                  << " in this build (see `fastserve doctor`)");
  FS_CHECK(entry.variants.contains(variant.dtype),
           Op::info.name << ": " << Op::info.variant << " is " << name_of(variant.dtype) << "; the "
                         << name_of(variant.device) << " kernel takes " << to_string(entry.variants));
  return entry.kernel;
}

// Check the arguments, find the kernel, run it.
template <class Op>
void run(const Op& op, const OpContext& context = {}) {
  check(op);
  kernel_for(op)(op, context);
}

}  // namespace fs

// In a kernel file compiled once per instruction set, inside namespace fs::FS_ISA.
#define FS_REGISTER_CPU(Op, kernel, variants)                                                            \
  namespace {                                                                                            \
  const ::fs::RegisterKernel<Op> register_##Op(::fs::Slot<Op>::cpu[static_cast<int>(::fs::Isa::FS_ISA)], \
                                               kernel, (variants));                                      \
  }
