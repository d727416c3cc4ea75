// SPDX-License-Identifier: Apache-2.0
//
// What this machine can do, measured when a benchmark program starts: the denominators of "floor_%".
#pragma once

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace fs::bench {

struct Floors {
  double read_bytes_per_s;   // the best plain read of 512 MB in huge pages, by all threads of the pool
  double float_flops_per_s;  // fused multiply-adds of the widest vectors, registers only, all threads
  double bf16_flops_per_s;   // the best bf16 product instruction of the active instruction set; else as above
  double int8_ops_per_s;  // the same of 8-bit vector products, two operations a multiply-add; else as above
};

const Floors& floors();  // measured on first use, with as many threads as the pool has

// Measures the read rate once more and keeps the best for floors(): rates drift where others use the machine
// too.
void measure_read_again();

// Seconds since some moment: of CPU time if the pool has one thread, from which other processes take caches
// and bandwidth but no time; else of a clock on the wall.
double seconds();

// Adds rates, the shares of the read rate and of the peak, and the larger of them to a benchmark that ran
// with UseRealTime or UseManualTime; bytes and flops are those that any implementation needs for one
// iteration.
void report(benchmark::State& state, double bytes, double flops, double peak_flops_per_s);

// Memory in huge pages where it is large and the system has them, as the engine's.
struct FreeMemory {
  void operator()(unsigned char* memory) const;
};
using Memory = std::unique_ptr<unsigned char[], FreeMemory>;
Memory allocate(size_t bytes);

// Memory of a tensor, filled with small values of its dtype.
class Owned {
 public:
  Owned(DType dtype, std::vector<int64_t> shape, float scale = 1.0f);
  operator const Tensor&() const { return tensor_; }
  template <class T>
  T* ptr() const {
    return tensor_.ptr<T>();
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Memory memory_;
  Tensor tensor_;
};

// A view of integers that the caller owns.
Tensor view_of(const int32_t* data, std::vector<int64_t> shape);

// Parses --threads=N, prints the machine's floors, runs the benchmarks.
int run_main(int argc, char** argv);

}  // namespace fs::bench
