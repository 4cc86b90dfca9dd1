// Runs the package's CUDA kernels on a CPU, to test their logic where no GPU is. It stands in for the toolkit's header
// of this name and knows just what csrc/cuda uses.
//
// Every CUDA thread is a fiber. Blocks run one after another; within a block the fibers that may run are resumed in a
// random order, and each runs until it waits for its warp or its block. A barrier that not all can reach, or a warp
// operation whose lanes do not all arrive, ends the process with a message. What it cannot show: races within the
// memory model, contention between blocks, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::isnan;
using std::max;
using std::min;

struct float4 { float x, y, z, w; };
struct uchar4 { unsigned char x, y, z, w; };
struct longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

namespace emulator {

enum class Wait { kNothing, kWarp, kBlock, kEnd };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  Wait wait;
  unsigned mask;
  uint64_t given;
  uint64_t taken[32];  // of the warp's lanes, or the block's sum in the first
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline dim3 block;
inline void (*body)(void*);
inline void* body_arguments;
inline std::mt19937 random;

inline void yield(Wait wait) {
  current->wait = wait;
  swapcontext(&current->context, &scheduler);
}

inline void run_fiber() {
  body(body_arguments);
  yield(Wait::kEnd);
}

inline bool release() {
  bool released = false, all_at_barrier = true;
  uint64_t sum = 0;
  for (Fiber& fiber : fibers) {
    if (fiber.wait == Wait::kEnd) continue;
    all_at_barrier &= fiber.wait == Wait::kBlock;
    sum += fiber.given;
  }
  for (size_t first = 0; first < fibers.size(); first += 32) {
    for (size_t lane = first; lane < first + 32; ++lane) {
      if (fibers[lane].wait != Wait::kWarp) continue;
      const unsigned mask = fibers[lane].mask;
      bool ready = mask >> (lane - first) & 1;
      for (int other = 0; other < 32; ++other) {
        const Fiber& peer = fibers[first + other];
        if (mask >> other & 1) ready &= peer.wait == Wait::kWarp && peer.mask == mask;
      }
      if (!ready) continue;
      uint64_t given[32];
      for (int other = 0; other < 32; ++other) given[other] = fibers[first + other].given;
      for (int other = 0; other < 32; ++other) {
        if (!(mask >> other & 1)) continue;
        std::memcpy(fibers[first + other].taken, given, sizeof given);
        fibers[first + other].wait = Wait::kNothing;
        released = true;
      }
    }
  }
  if (all_at_barrier) {
    for (Fiber& fiber : fibers) {
      if (fiber.wait != Wait::kBlock) continue;
      fiber.taken[0] = sum;
      fiber.wait = Wait::kNothing;
      released = true;
    }
  }
  return released;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    constexpr size_t kStack = 64 * 1024;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.index.x = order[i] = i;
    fiber.index.y = fiber.index.z = 0;
    fiber.wait = Wait::kNothing;
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      if (fibers[i].wait != Wait::kNothing) continue;
      current = &fibers[i];
      swapcontext(&scheduler, &current->context);
    }
    const bool ended = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.wait == Wait::kEnd; });
    if (ended) return;
    if (!release()) {
      std::fprintf(stderr, "emulator: the threads of a block wait for each other for ever\n");
      std::abort();
    }
  }
}

inline const uint64_t* exchange_in_warp(unsigned mask, uint64_t value) {
  current->mask = mask;
  current->given = value;
  yield(Wait::kWarp);
  return current->taken;
}

inline uint64_t exchange_in_block(uint64_t value) {
  current->given = value;
  yield(Wait::kBlock);
  return current->taken[0];
}

inline int lane() { return static_cast<int>(current->index.x % 32); }

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)

inline void __syncthreads() { emulator::exchange_in_block(0); }
inline int __syncthreads_count(int predicate) { return static_cast<int>(emulator::exchange_in_block(predicate != 0)); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) {
  std::fprintf(stderr, "emulator: a lock is held although blocks run one after another\n");
  std::abort();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return static_cast<T>(emulator::exchange_in_warp(mask, static_cast<uint64_t>(value))[from]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  const int from = emulator::lane() - step;
  return static_cast<T>(emulator::exchange_in_warp(mask, static_cast<uint64_t>(value))[from < 0 ? from + step : from]);
}

template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  const uint64_t* given = emulator::exchange_in_warp(mask, static_cast<uint64_t>(value));
  for (int i = 0; i < 32; ++i) value = mask >> i & 1 ? std::max(value, static_cast<T>(given[i])) : value;
  return value;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  const uint64_t* given = emulator::exchange_in_warp(mask, static_cast<uint64_t>(value));
  uint64_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += mask >> i & 1 ? given[i] : 0;
  return static_cast<T>(sum);
}

template <class T>
T atomicAdd(T* at, T value) { return std::exchange(*at, *at + value); }
template <class T>
T atomicOr(T* at, T value) { return std::exchange(*at, *at | value); }
template <class T>
T atomicExch(T* at, T value) { return std::exchange(*at, value); }
template <class T>
T atomicCAS(T* at, T expected, T value) { return std::exchange(*at, *at == expected ? value : *at); }

template <class T>
T __ldcs(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
template <class T>
void __stcg(T* at, T value) { *at = value; }

template <class To, class From>
To reinterpret_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return reinterpret_bits<unsigned>(x); }
inline int __float_as_int(float x) { return reinterpret_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return reinterpret_bits<float>(x); }
inline float __int_as_float(int x) { return reinterpret_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
// As PTX has it: a NaN of either kind gives way to the other operand. The C library's keeps a signalling one.
inline float smaller(float x, float y) { return isnan(x) ? y : isnan(y) ? x : std::min(x, y); }
#define fminf smaller

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
  emulator::body_arguments = &call;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    emulator::block.x = i;
    emulator::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
