// SPDX-License-Identifier: Apache-2.0
//
// Recording: ops written down instead of run, and run later as often as wanted by one call. What a CUDA graph
// is to a GPU: a step's few hundred op calls without what leads to each of them.
//
// The same kernels get the same arguments, so the results are those of the calls. Kernels are looked up when
// they run, so that another instruction set can be chosen meanwhile.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/op.h"

namespace fs {

class Recording {
 public:
  // A tensor argument that lies where one of `inputs` does is taken from there at every run, with the place
  // and shape that it has then. All other arguments stay as they were, and their memory must. `inputs` is
  // borrowed for the recording's life; its tensors have addresses of their own while ops are written down.
  explicit Recording(const std::vector<Tensor>& inputs) : inputs_(inputs) {}
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording();

  // From begin() to end(), ops that this thread calls are added to the recording. Throws fs::Error if the
  // thread records already, or does not.
  void begin();
  void end();
  static Recording* of_this_thread() { return current_; }  // nullptr: ops run

  // Checks the op's arguments as a call does. Throws fs::Error.
  template <class Op>
  void add(const Op& op) {
    static_assert(std::is_trivially_copyable_v<Op> && alignof(Op) <= alignof(uint64_t));
    check(op);
    const size_t at = words_.size();
    words_.resize(at + (sizeof(Op) + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    std::memcpy(&words_[at], &op, sizeof(Op));
    const size_t num_bound = bound_.size();
    for_each_tensor(op, [&](const Tensor& tensor) {
      const auto offset =
          reinterpret_cast<const std::byte*>(&tensor) - reinterpret_cast<const std::byte*>(&op);
      bind(tensor, at * sizeof(uint64_t) + static_cast<size_t>(offset));
    });
    const bool is_bound = bound_.size() > num_bound;
    calls_.push_back({is_bound ? &call<Op, true> : &call<Op, false>, at, Op::info.name, &tensors_in<Op>});
  }

  // Runs all ops in order, one call at a time. Throws what they throw; a part of them has run then.
  void run();
  // The same; seconds[i] is what op i of num_ops() took.
  void run_timed(double* seconds);

  size_t num_ops() const { return calls_.size(); }
  const char* name(size_t op) const { return calls_[op].name; }
  // The op's tensor arguments in declaration order, those of inputs as they were at the last run.
  std::vector<Tensor> tensors(size_t op) const { return calls_[op].tensors(&words_[calls_[op].at]); }
  size_t num_bytes() const;  // what the recording itself takes

 private:
  struct Call {
    void (*run)(const void* op);
    size_t at;  // in words_
    const char* name;
    std::vector<Tensor> (*tensors)(const void* op);
  };
  struct Bound {
    size_t at;  // of a Tensor, in bytes of words_
    size_t input;
  };

  // An op whose arguments have other shapes than when it was written down is checked again.
  template <class Op, bool is_bound>
  static void call(const void* recorded) {
    const Op& op = *static_cast<const Op*>(recorded);
    if constexpr (is_bound) check(op);
    kernel_for(op)(op, OpContext{});
  }

  template <class Op>
  static std::vector<Tensor> tensors_in(const void* recorded) {
    std::vector<Tensor> tensors;
    for_each_tensor(*static_cast<const Op*>(recorded),
                    [&](const Tensor& tensor) { tensors.push_back(tensor); });
    return tensors;
  }

  void bind(const Tensor& tensor, size_t at);
  void take_inputs();

  static thread_local Recording* current_;
  const std::vector<Tensor>& inputs_;
  std::vector<uint64_t> words_;  // the ops, one after another
  std::vector<Call> calls_;
  std::vector<Bound> bound_;
};

}  // namespace fs
