// SPDX-License-Identifier: Apache-2.0
// A fixture that starts every test with a clean device, and small helpers.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim_test {

class Device : public ::testing::Test {
 protected:
  void SetUp() override {
    ptxsim_get_config(&saved_);
    ptxsim_clear_report();
    ptxsim_reset_counters();
  }
  void TearDown() override {
    cudaDeviceSynchronize();
    ptxsim_clear_report();
    ptxsim_set_config(&saved_);
  }
  static void configure(const std::function<void(ptxsim_config&)>& change) {
    ptxsim_config c;
    ptxsim_get_config(&c);
    change(c);
    ptxsim_set_config(&c);
  }

 private:
  ptxsim_config saved_{};
};

template <class T>
class Buffer {  // device memory that goes away with its owner
 public:
  explicit Buffer(size_t n) : n_(n) {
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&p_), n * sizeof(T)), cudaSuccess);
  }
  explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) {
    EXPECT_EQ(cudaMemcpy(p_, v.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(p_); }
  operator T*() const { return p_; }
  std::vector<T> host() const {
    std::vector<T> v(n_);
    EXPECT_EQ(cudaMemcpy(v.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return v;
  }

 private:
  T* p_ = nullptr;
  size_t n_;
};

inline std::string report() {
  return ptxsim_last_report();
}
// Number behind `"key": ` after the first `section` of the counters.
inline long long counter(const std::string& section, const std::string& key) {
  const std::string json = ptxsim_counters_json();
  size_t at = json.find("\"" + section + "\"");
  if (at == std::string::npos) return -1;
  at = json.find("\"" + key + "\": ", at);
  return at == std::string::npos ? -1 : std::stoll(json.substr(at + key.size() + 4));
}

}  // namespace ptxsim_test
