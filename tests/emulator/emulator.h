// CUDA's built-in names and what csrc/cuda/platform.h adds to them, for kernels that are compiled for the host with RECONTROL_EMULATE.
//
// Every thread of a launch is a fibre with a stack of its own. A fibre runs until it has to wait for others: at a barrier, in an exchange
// within its warp, or polling memory. Threads of a warp that meet in different exchanges, barriers that are never reached by all, and
// writes beyond the shared memory that was asked for are reported as errors. Races show when results depend on `order`.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x = 0, y = 0;
};

// What the threads of a warp, a block or a cluster wait for together.
struct Meeting {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  int operation = 0;
  unsigned char given[32][64], seen[32][64];
};

struct Block;

struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
};

struct Block {
  Index index;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Fibre {
  Index thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  jmp_buf place;
  void* stack = nullptr;
  bool started = false, finished = false;
};

extern Fibre* running;
extern Index grid;
enum Order { kForward, kBackward, kShuffled };

// Let the other fibres run.
void yield();
// Something happened that others may be waiting for.
void note_progress();
// Give up the launch; does not return.
[[noreturn]] void fail(const std::string& why);
// Wait until all have come.
void meet(Meeting& meeting);

// Runs body() in every thread of the blocks, those of a cluster (or all, if they go together) at the same time. Throws std::runtime_error.
void run(unsigned columns, unsigned rows, unsigned threads, unsigned cluster, size_t shared_bytes, bool together, const std::function<void()>& body);

inline int lane() { return static_cast<int>(running->thread.x % 32); }

// What every lane of the warp has given.
template <class T>
struct Given {
  const Warp& warp;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, warp.seen[lane], sizeof value);
    return value;
  }
};

template <class T>
Given<T> exchange(int operation, uint32_t mask, const T& value) {
  static_assert(sizeof(T) <= 64);
  if (mask != 0xFFFFFFFFu) fail("only whole warps are emulated");
  Warp& warp = *running->warp;
  if (warp.meeting.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail("threads of a warp meet in different exchanges");
  std::memcpy(warp.given[lane()], &value, sizeof value);
  if (warp.meeting.arrived + 1 == warp.meeting.size) std::memcpy(warp.seen, warp.given, sizeof warp.seen);
  meet(warp.meeting);
  return {warp};
}

enum Operation { kShuffleXor = 1, kShuffleUp, kShuffle, kBallot, kReduceMin, kReduceMax, kMultiply };

}  // namespace emulator

#define threadIdx (emulator::running->thread)
#define blockIdx (emulator::running->block->index)
#define gridDim (emulator::grid)

inline void __syncthreads() { emulator::meet(emulator::running->block->meeting); }
inline void __threadfence() {}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return emulator::exchange(emulator::kShuffleXor, mask, value)[emulator::lane() ^ other];
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
  const int lane = emulator::lane();
  return emulator::exchange(emulator::kShuffleUp, mask, value)[lane >= distance ? lane - distance : lane];
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return emulator::exchange(emulator::kShuffle, mask, value)[from];
}
inline uint32_t __ballot_sync(uint32_t mask, bool set) {
  const auto given = emulator::exchange(emulator::kBallot, mask, set);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(given[lane]) << lane;
  return bits;
}
inline bool __any_sync(uint32_t mask, bool set) { return __ballot_sync(mask, set) != 0; }
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  const auto given = emulator::exchange(emulator::kReduceMin, mask, value);
  for (int lane = 0; lane < 32; ++lane) value = std::min(value, given[lane]);
  return value;
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  const auto given = emulator::exchange(emulator::kReduceMax, mask, value);
  for (int lane = 0; lane < 32; ++lane) value = std::max(value, given[lane]);
  return value;
}
template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  emulator::note_progress();
  return before;
}

namespace recontrol::cuda {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
inline uint16_t float_to_half(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

// Which entries of the matrices a lane's registers hold is written here from the description of mma.m16n8k16, not from the kernels.
inline void multiply_tile(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  const auto given = emulator::exchange(emulator::kMultiply, 0xFFFFFFFFu, own);
  const int lane = emulator::lane();
  auto half_of = [](uint32_t pair, int high) { return bits_to_float(high ? pair & 0xFFFF0000u : pair << 16); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    double sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, far = k / 8, high = k % 2;
      const uint32_t of_a = given[row % 8 * 4 + holder].a[row / 8 + 2 * far], of_b = given[column * 4 + holder].b[far];
      sum += static_cast<double>(half_of(of_a, high)) * half_of(of_b, high);
    }
    acc[i] = static_cast<float>(sum);
  }
}

#define kHasClusters S::kClusters  // one build stands for every device

inline unsigned char* shared_memory() { return emulator::running->block->shared.data(); }
inline unsigned cluster_rank() { return emulator::running->block->rank; }
inline void cluster_barrier() { emulator::meet(emulator::running->block->cluster->meeting); }
inline void store_in_block(uint32_t* place, unsigned rank, uint32_t value) {
  emulator::Block& own = *emulator::running->block;
  const auto offset = reinterpret_cast<unsigned char*>(place) - own.shared.data();
  if (rank >= own.cluster->blocks.size()) emulator::fail("there is no such block in the cluster");
  std::memcpy(own.cluster->blocks[rank]->shared.data() + offset, &value, sizeof value);
}
inline void wait_a_little() { emulator::yield(); }

using Stream = void*;

struct Device {
  int major = 9;
  int processors = 3;
};
extern Device emulated_device;
inline Device current_device() { return emulated_device; }
inline void clear(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

struct Launch {
  unsigned columns = 1, rows = 1;
  unsigned threads = 1;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool together = false;
};

template <class... Args>
void launch(void (*kernel)(Args...), const char*, const Launch& shape, Stream, Args... args) {
  emulator::run(shape.columns, shape.rows, shape.threads, shape.cluster, shape.shared_bytes, shape.together, [&] { kernel(args...); });
}

template <class... Args>
int compiled_for(void (*)(Args...)) {
  return 10 * emulated_device.major;
}

template <class... Args>
int blocks_together(void (*)(Args...), const Device& device, int, size_t) {
  return device.processors;
}

}  // namespace recontrol::cuda
