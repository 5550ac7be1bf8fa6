// What the kernels ask of the machine beyond CUDA's own names: matrix products of a warp, clusters of blocks, launching.
//
// With RECONTROL_EMULATE the same kernels compile for the host: tests/emulator/emulator.h stands in for all of this, for threadIdx
// and the other built-in names too, and runs every thread of a launch as a fibre.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "recontrol/ascend.h"
#include "recontrol/progress.h"

#if defined(RECONTROL_EMULATE)
#include "emulator.h"
#else

#include <cuda_runtime.h>

namespace recontrol::cuda {

// acc (16 x 8) += A (16 x 16) B (16 x 8) in bfloat16 with float32 sums; the fragments are those of mma.m16n8k16.
__device__ inline void multiply_tile(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // Not volatile: it depends on its operands alone, so loads may be moved across it.
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }

__device__ inline float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ inline uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Whether this code is compiled for a device with clusters of blocks.
#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// The shared memory that the launch asked for.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Place of this block in its cluster; without clusters every block is alone.
__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// All threads of the cluster have arrived, and what they wrote to shared memory before is seen by all.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Write into the same place of another block's shared memory.
__device__ inline void store_in_block(uint32_t* place, unsigned rank, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
#else
  *place = value;
#endif
}

// Let other blocks run while this thread waits for them.
__device__ inline void wait_a_little() { __nanosleep(20); }

using Stream = cudaStream_t;

struct Device {
  int major = 0;
  int processors = 0;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The device that is current in this thread.
inline Device current_device() {
  int index = 0;
  Device device;
  check(cudaGetDevice(&index), "finding the current device");
  check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index), "asking for the compute capability");
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index), "asking for the number of multiprocessors");
  return device;
}

inline void clear(void* memory, size_t bytes, Stream stream) { check(cudaMemsetAsync(memory, 0, bytes, stream), "clearing the workspace"); }

struct Launch {
  unsigned columns = 1, rows = 1;  // blocks
  unsigned threads = 1;            // of a block
  unsigned cluster = 1;            // blocks of a cluster, along the columns
  size_t shared_bytes = 0;
  bool together = false;           // all blocks must run at the same time
};

template <class... Args>
void launch(void (*kernel)(Args...), const char* name, const Launch& shape, Stream stream, Args... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)), name);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.columns, shape.rows);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (shape.together) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

// The compute capability, times ten, that the code of a kernel for the current device was compiled for.
template <class... Args>
int compiled_for(void (*kernel)(Args...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "asking for the code of a kernel");
  return attributes.ptxVersion;
}

// How many blocks of a kernel can run at the same time on the whole device.
template <class... Args>
int blocks_together(void (*kernel)(Args...), const Device& device, int threads, size_t shared_bytes) {
  int each = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), "asking for shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes), "asking for the occupancy");
  return each * device.processors;
}

}  // namespace recontrol::cuda

#endif
