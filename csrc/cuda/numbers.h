// Numbers as sums of bfloat16 numbers, so that one tensor-core instruction serves every dtype with float32 accuracy.
//
// A float32 number is the exact sum of three bfloat16 numbers, a float16 number of two. A product of two such sums leaves out the
// terms below 2^-24 of it.
#pragma once

#include "platform.h"

namespace recontrol::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr int kTerms = 3;
template <>
constexpr int kTerms<BFloat16> = 1;
template <>
constexpr int kTerms<Float16> = 2;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return half_to_float(x.bits); }

__device__ inline void narrow(float x, float* into) { *into = x; }
__device__ inline void narrow(float x, Float16* into) { into->bits = float_to_half(x); }
// To the nearest, ties to even, by the bits; a NaN stays one.
__device__ inline void narrow(float x, BFloat16* into) {
  const uint32_t bits = float_to_bits(x);
  into->bits = static_cast<uint16_t>(x != x ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Two numbers as `Terms` pairs of bfloat16 numbers; each term is cut off, so none can overflow.
template <int Terms>
__device__ inline void split(float low, float high, uint32_t (&pairs)[Terms]) {
#pragma unroll
  for (int term = 0; term < Terms; ++term) {
    const uint32_t low_bits = float_to_bits(low) & 0xFFFF0000u, high_bits = float_to_bits(high) & 0xFFFF0000u;
    pairs[term] = low_bits >> 16 | high_bits;
    low -= bits_to_float(low_bits);
    high -= bits_to_float(high_bits);
  }
}

template <class T>
__device__ inline void split_pair(T low, T high, uint32_t (&pairs)[kTerms<T>]) {
  split(widen(low), widen(high), pairs);
}
__device__ inline void split_pair(BFloat16 low, BFloat16 high, uint32_t (&pairs)[1]) {
  pairs[0] = static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

// acc += A B for operands of several terms, the smallest products first.
template <int TermsA, int TermsB>
__device__ inline void multiply_sums(float (&acc)[4], const uint32_t (&a)[TermsA][4], const uint32_t (&b)[TermsB][2]) {
#pragma unroll
  for (int order = 2; order >= 0; --order)
#pragma unroll
    for (int i = 0; i <= order; ++i)
      if (i < TermsA && order - i < TermsB) multiply_tile(acc, a[i], b[order - i]);
}

// N consecutive numbers. Aligned like one load, so that it is one.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Several {
  T at[N];
};

// The first `valid` of N numbers from memory, zeros behind them; `aligned` says that whole loads are allowed.
template <int N, class T>
__device__ inline Several<T, N> load(const T* from, int64_t valid, bool aligned) {
  if (valid >= N && aligned) return *reinterpret_cast<const Several<T, N>*>(from);
  Several<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.at[i] = i < valid ? from[i] : T{};
  return values;
}

// Whether rows of N-element pieces can be loaded whole.
template <int N, class T>
__device__ inline bool is_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Several<T, N>) == 0 && stride * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(alignof(Several<T, N>)) == 0;
}

// Hidden states of a dtype that is known at run time, as float32.
struct AnyFloat {};
template <>
constexpr int kTerms<AnyFloat> = 3;

__device__ inline float widen_at(DType dtype, const void* data, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kBFloat16) return widen(static_cast<const BFloat16*>(data)[index]);
  return widen(static_cast<const Float16*>(data)[index]);
}

}  // namespace recontrol::cuda
