// SPDX-License-Identifier: Apache-2.0
#include "core/recording.h"

#include <chrono>

#include "core/error.h"

namespace fs {

thread_local Recording* Recording::current_ = nullptr;

Recording::~Recording() {
  if (current_ == this) current_ = nullptr;
}

void Recording::begin() {
  FS_CHECK(current_ == nullptr, "recording: this thread records already");
  current_ = this;
}

void Recording::end() {
  FS_CHECK(current_ == this, "recording: this thread does not record");
  current_ = nullptr;
  words_.shrink_to_fit();
  calls_.shrink_to_fit();
  bound_.shrink_to_fit();
}

void Recording::bind(const Tensor& tensor, size_t at) {
  if (!tensor.defined() || tensor.data == nullptr) return;
  FS_CHECK(tensor.device == Device::cpu,
           "recording: an argument is " << describe(tensor) << "; only ops on the CPU are recorded here");
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].data == tensor.data) {
      bound_.push_back({at, i});
      return;
    }
  }
}

void Recording::take_inputs() {
  FS_CHECK(current_ == nullptr, "recording: this thread records; it cannot run one meanwhile");
  auto* bytes = reinterpret_cast<std::byte*>(words_.data());
  for (const Bound& bound : bound_) {
    FS_CHECK(bound.input < inputs_.size(), "recording: an input is missing");
    std::memcpy(bytes + bound.at, &inputs_[bound.input], sizeof(Tensor));
  }
}

void Recording::run() {
  take_inputs();
  for (const Call& call : calls_) call.run(&words_[call.at]);
}

void Recording::run_timed(double* seconds) {
  using Clock = std::chrono::steady_clock;
  take_inputs();
  Clock::time_point before = Clock::now();
  for (const Call& call : calls_) {
    call.run(&words_[call.at]);
    const Clock::time_point now = Clock::now();
    *seconds++ = std::chrono::duration<double>(now - before).count();
    before = now;
  }
}

size_t Recording::num_bytes() const {
  return words_.capacity() * sizeof(uint64_t) + calls_.capacity() * sizeof(Call) +
         bound_.capacity() * sizeof(Bound);
}

}  // namespace fs
