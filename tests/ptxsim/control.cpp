// SPDX-License-Identifier: Apache-2.0
// The functions of ptxsim.h, except ptxsim_run_ptx.
#include <cstring>

#include "counters.h"
#include "runtime_state.h"

using namespace ptxsim;
using Lock = std::lock_guard<std::recursive_mutex>;

extern "C" {

void ptxsim_get_config(ptxsim_config* out) {
  const Lock lock(runtime().mutex);
  *out = config();
}
void ptxsim_set_config(const ptxsim_config* c) {
  const Lock lock(runtime().mutex);
  finish_all();
  config() = *c;
  if (config().multiprocessors < 1) config().multiprocessors = 1;
}
const char* ptxsim_last_report() {
  static thread_local std::string text;
  const Lock lock(runtime().mutex);
  text = runtime().report;
  return text.c_str();
}
uint64_t ptxsim_num_faults() {
  const Lock lock(runtime().mutex);
  return runtime().num_faults;
}
void ptxsim_clear_report() {
  const Lock lock(runtime().mutex);
  finish_all();
  Runtime& r = runtime();
  r.report.clear();
  r.num_faults = 0;
  r.fault = r.sticky = r.last_error = cudaSuccess;
}
const char* ptxsim_counters_json() {
  static thread_local std::string text;
  const Lock lock(runtime().mutex);
  text = "[";
  for (const LaunchRecord& record : runtime().records)
    text += (text.size() > 1 ? ",\n " : "") + to_json(record);
  text += "]";
  return text.c_str();
}
void ptxsim_reset_counters() {
  const Lock lock(runtime().mutex);
  runtime().records.clear();
}
int ptxsim_name_buffer(const void* address, const char* name) {
  const Lock lock(runtime().mutex);
  Allocation* a = memory().find(reinterpret_cast<uint64_t>(address));
  if (a == nullptr) return -1;
  a->name = name;
  return 0;
}
uint64_t ptxsim_warp_instructions() {
  const Lock lock(runtime().mutex);
  return runtime().warp_instructions;
}
const char* ptxsim_isa() {
  return isa_name();
}
void ptxsim_suppress_races(const char* text) {
  const Lock lock(runtime().mutex);
  race_suppressions().push_back(text);
}

}  // extern "C"
