/* SPDX-License-Identifier: Apache-2.0 */
/* Controls of the simulated CUDA device. Programs need none of it: without this header the device is
 * configured by environment variables of the same names (PTXSIM_SEED, PTXSIM_ASYNC, ...). Every function is
 * thread-safe. */
#ifndef PTXSIM_H_
#define PTXSIM_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where the bytes of an asynchronous copy land, within what the program allows. */
enum ptxsim_async {
  PTXSIM_ASYNC_LATE = 0,  /* at the wait; until then the destination holds poison */
  PTXSIM_ASYNC_EARLY = 1, /* at the instruction itself */
  PTXSIM_ASYNC_RANDOM = 2 /* each copy one or the other, by seed */
};

typedef struct ptxsim_config {
  uint64_t seed;    /* PTXSIM_SEED          0: blocks and warps in order; else their order and time slices are
                       shuffled */
  int async_mode;   /* PTXSIM_ASYNC         late | early | random */
  int check_uninit; /* PTXSIM_UNINIT        reads of shared memory nobody wrote are faults (default 1) */
  int check_race;   /* PTXSIM_RACE          data races on shared memory are faults (default 0) */
  int check_global_race; /* PTXSIM_GLOBAL_RACE   data races on global memory are faults (default 0) */
  int weak_memory;       /* PTXSIM_WEAK          a block's global stores stay private until a fence or release
                            (default 0) */
  int ignore_order;      /* PTXSIM_IGNORE_ORDER  fences, releases and acquires order nothing, as if the kernel
                            had none: what a test of them must notice (default 0) */
  int random_streams; /* PTXSIM_STREAMS       random: work waits for a synchronisation, then runs in any legal
                         order */
  int counters;       /* PTXSIM_COUNTERS      count bytes, sectors and bank conflicts (default 1) */
  int multiprocessors; /* PTXSIM_SMS           what the device claims to have, and how many blocks are
                          resident (default 8) */
  int verbose;         /* PTXSIM_VERBOSE       one line per launch on stderr */
  int max_reports; /* PTXSIM_MAX_REPORTS   races reported per launch before the rest are only counted (default
                      8) */
} ptxsim_config;

void ptxsim_get_config(ptxsim_config* out);
/* Waits for outstanding work first. */
void ptxsim_set_config(const ptxsim_config* config);

/* Full text of the faults since the last ptxsim_clear_report, "" if none. Valid until the next call on this
 * thread. */
const char* ptxsim_last_report(void);
/* Number of faults (each race counts) since the last ptxsim_clear_report. */
uint64_t ptxsim_num_faults(void);
/* Forgets faults, also the sticky CUDA error, so that the next test starts clean. */
void ptxsim_clear_report(void);

/* Counters of all launches since ptxsim_reset_counters, a JSON array with one object per launch (at most the
 * newest 4096). */
const char* ptxsim_counters_json(void);
void ptxsim_reset_counters(void);
/* Gives the allocation that holds `address` a name for messages and for the counters. Returns 0, or -1 if it
 * is in none. */
int ptxsim_name_buffer(const void* address, const char* name);

/* Total of warp instructions executed since start. */
uint64_t ptxsim_warp_instructions(void);
/* Instruction set the interpreter runs with: "portable", "avx2" or "avx512" (PTXSIM_ISA forces one). */
const char* ptxsim_isa(void);

/* Races at lines whose PTX or source text contains `text` are not reported (PTXSIM_SUPPRESS: several,
 * separated by ';'). */
void ptxsim_suppress_races(const char* text);

/* Loads PTX text and runs one of its kernels. args[i] points to the i-th parameter. Returns a cudaError_t. */
int ptxsim_run_ptx(const char* ptx, const char* kernel, const unsigned grid[3], const unsigned block[3],
                   size_t dynamic_shared, void** args);

#ifdef __cplusplus
}
#endif
#endif
