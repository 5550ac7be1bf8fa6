// Products of a matrix with the rows of a batch, on tensor cores.
//
// A sum over the depth of a product is taken in kSlices parts, and the parts are added in order. How the parts are dealt out to warps
// depends on the batch (see Shape); the sum of a row does not, to the bit, nor on the other rows of its tile.
#pragma once

#include "numbers.h"

namespace recontrol::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlices = 8;
// Results of one warp for each row of the batch: two tiles of 16.
constexpr int kColumns = 32;
// Rows of parts in shared memory lie so far apart that the threads of a warp meet few bank conflicts.
constexpr int kPartStride = 36;

__device__ inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The warps of a block: kM along the results, kN along the batch, kK along the depth. Each computes 32 results for 8 kTiles rows.
template <int M, int N, int Tiles>
struct Shape {
  static constexpr int kM = M, kN = N, kK = kWarps / (M * N), kTiles = Tiles;
  static constexpr int kBlockColumns = M * kColumns, kBlockRows = N * Tiles * 8;
  // Loads on their way at the same time; more rows leave fewer registers for them.
  static constexpr int kGroup = Tiles == 1 ? 4 : Tiles <= 4 ? 2 : 1;
  static constexpr size_t kSharedBytes = sizeof(float) * kWarps * 8 * Tiles * kPartStride;
  static_assert(M * N * kK == kWarps && (kK == 1 || kK == kSlices));
};
using FewRows = Shape<1, 1, 1>;
using SomeRows = Shape<1, 1, 8>;
using ManyRows = Shape<2, 4, 4>;

// Where a thread is in its block: its place in the fragments of a tile, and its warp's share of the work.
template <class S>
struct Place {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
  int m = warp % S::kM, n = warp / S::kM % S::kN, k = warp / (S::kM * S::kN);
};

template <class S>
struct Sums {
  float at[2][S::kTiles][4] = {};

  __device__ void add(const Sums& other) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) at[half][tile][i] += other.at[half][tile][i];
  }
};

// Add up the parts and hand each sum to `store(row, column, sum)`, both counted from those of the warp. `column_of(g, half, lower)` is the
// place of a sum among the warp's 32 results. Every thread of the block must come here; shared memory is free again afterwards.
template <class S, class ColumnOf, class Store>
__device__ inline void finish(const Place<S>& place, const Sums<S>& sums, ColumnOf column_of, Store store) {
  constexpr int kRows = 8 * S::kTiles;
  float* const parts = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * tile + 2 * place.t + i % 2, column = column_of(place.g, half, i >= 2);
        parts[(place.warp * kRows + row) * kPartStride + column] = sums.at[half][tile][i];
      }
  __syncthreads();
  if constexpr (S::kK == 1) {
    const int column = threadIdx.x % 32;
    for (int row = 0; row < kRows; ++row) store(row, column, parts[(place.warp * kRows + row) * kPartStride + column]);
  } else {
    for (int index = threadIdx.x; index < kRows * kColumns; index += kThreads) {
      const int row = index / kColumns, column = index % kColumns;
      float sum = 0;
      for (int part = 0; part < kWarps; ++part) sum += parts[(part * kRows + row) * kPartStride + column];
      store(row, column, sum);
    }
  }
  __syncthreads();
}

// The states of a batch, row-major.
struct States {
  const void* data;
  int64_t rows, stride;
  DType dtype;
};

// Eight consecutive entries of a state as fragments of two tiles of depth 16.
template <class X>
struct StateFragments {
  uint32_t at[2][kTerms<X>][2];

  __device__ StateFragments(const States& states, int64_t row, int64_t k, int64_t end) {
    const int64_t valid = row < states.rows && k < end ? end - k : 0;
    Several<float, 8> wide;
    if (states.dtype == DType::kFloat32) {
      take<float>(states, row, k, valid, wide);
    } else if (states.dtype == DType::kFloat16) {
      take<Float16>(states, row, k, valid, wide);
    } else {
      take<BFloat16>(states, row, k, valid, wide);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t terms[kTerms<X>];
      split(wide.at[2 * pair], wide.at[2 * pair + 1], terms);
#pragma unroll
      for (int term = 0; term < kTerms<X>; ++term) at[pair / 2][term][pair % 2] = terms[term];
    }
  }

 private:
  template <class T>
  __device__ static void take(const States& states, int64_t row, int64_t k, int64_t valid, Several<float, 8>& wide) {
    const auto found = load<8>(static_cast<const T*>(states.data) + row * states.stride + k, valid, is_aligned<8, T>(states.data, states.stride));
#pragma unroll
    for (int i = 0; i < 8; ++i) wide.at[i] = widen(found.at[i]);
  }
};

template <>
struct StateFragments<BFloat16> {
  uint32_t at[2][1][2];

  __device__ StateFragments(const States& states, int64_t row, int64_t k, int64_t end) {
    const auto found = load<8>(static_cast<const BFloat16*>(states.data) + row * states.stride + k, row < states.rows && k < end ? end - k : 0,
                               is_aligned<8, BFloat16>(states.data, states.stride));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t terms[1];
      split_pair(found.at[2 * pair], found.at[2 * pair + 1], terms);
      at[pair / 2][0][pair % 2] = terms[0];
    }
  }
};

// store(row, column, w[column] . x[row]) for the block's share of a matrix of type W.
template <class W, class X, class S, class Store>
__device__ inline void dot_products(const Matrix& matrix, const States& states, int64_t first_column, int64_t first_row, Store store) {
  const Place<S> place;
  first_column += place.m * kColumns;
  first_row += place.n * 8 * S::kTiles;
  const int tiles = static_cast<int>(round_up(states.rows - first_row, 8) / 8);
  const bool aligned = is_aligned<8, W>(matrix.data, matrix.stride);
  const int64_t span = round_up((matrix.cols + kSlices - 1) / kSlices, 32);
  Sums<S> total;
  for (int slice = place.k; slice < kSlices; slice += S::kK) {
    Sums<S> part;
    const int64_t end = matrix.cols < (slice + 1) * span ? matrix.cols : (slice + 1) * span;
    for (int64_t begin = slice * span; begin < end; begin += 32 * S::kGroup) {
      // Thread t of a row's four holds entries 8t to 8t + 7 of every 32; which entry is which does not matter to the sum.
      Several<W, 8> weights[S::kGroup][4];
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i)
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
          const int64_t column = first_column + 8 * eight + place.g, k = begin + 32 * i + 8 * place.t;
          weights[i][eight] = load<8>(static_cast<const W*>(matrix.data) + column * matrix.stride + k, column < matrix.rows && k < end ? end - k : 0, aligned);
        }
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i) {
        uint32_t a[2][2][kTerms<W>][4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
#pragma unroll
          for (int eight = 0; eight < 4; ++eight) {
            uint32_t terms[kTerms<W>];
            split_pair(weights[i][eight].at[2 * pair], weights[i][eight].at[2 * pair + 1], terms);
#pragma unroll
            for (int term = 0; term < kTerms<W>; ++term) a[pair / 2][eight / 2][term][eight % 2 + 2 * (pair % 2)] = terms[term];
          }
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile)
          if (tile < tiles) {
            const StateFragments<X> b(states, first_row + 8 * tile + place.g, begin + 32 * i + 8 * place.t, end);
#pragma unroll
            for (int depth = 0; depth < 2; ++depth)
#pragma unroll
              for (int half = 0; half < 2; ++half) multiply_sums(part.at[half][tile], a[depth][half], b.at[depth]);
          }
      }
    }
    total.add(part);
  }
  finish(place, total, [](int g, int half, bool lower) { return 16 * half + 8 * lower + g; }, [&](int row, int column, float sum) {
    if (first_row + row < states.rows && first_column + column < matrix.rows) store(first_row + row, first_column + column, sum);
  });
}

// store(row, column, sum over j of factors(row, j) matrix[j, column]) for the block's share of the columns. `factors(row, j, valid)` gives
// four factors; matrix rows whose factors are zero for all rows of a tile are not read. Rows that are not `wanted` have factors of zero.
template <class M, class S, class Factors, class Store, class Wanted>
__device__ inline void sum_of_rows(const Matrix& matrix, int64_t rows, const Factors& factors, int64_t first_column, int64_t first_row, Store store,
                                   const Wanted& wanted) {
  const Place<S> place;
  first_column += place.m * kColumns;
  first_row += place.n * 8 * S::kTiles;
  const int tiles = static_cast<int>(round_up(rows - first_row, 8) / 8);
  const bool aligned = is_aligned<4, M>(matrix.data, matrix.stride);
  const int64_t span = round_up((matrix.rows + kSlices - 1) / kSlices, 16);
  const int64_t column = first_column + 4 * place.g, columns = column < matrix.cols ? matrix.cols - column : 0;
  // A bit for each row whose factors this thread fetches.
  uint32_t fetched = 0;
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    const int64_t row = first_row + 8 * tile + place.g;
    fetched |= static_cast<uint32_t>(row < rows && wanted(row)) << tile;
  }
  Sums<S> total;
  for (int slice = place.k; slice < kSlices; slice += S::kK) {
    Sums<S> part;
    const int64_t end = matrix.rows < (slice + 1) * span ? matrix.rows : (slice + 1) * span;
    for (int64_t begin = slice * span; begin < end; begin += 16 * S::kGroup) {
      Several<float, 4> by[S::kGroup][S::kTiles];
      uint32_t needed[S::kGroup];
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i) {
        needed[i] = 0;
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile) {
          const int64_t row = first_row + 8 * tile + place.g, j = begin + 16 * i + 4 * place.t;
          by[i][tile] = Several<float, 4>{};
          if (fetched >> tile & 1u && j < end) by[i][tile] = factors(row, j, end - j);
#pragma unroll
          for (int k = 0; k < 4; ++k) needed[i] |= static_cast<uint32_t>(by[i][tile].at[k] != 0) << k;
        }
        // Threads with the same t hold factors of the same four matrix rows.
#pragma unroll
        for (int other = 4; other < 32; other *= 2) needed[i] |= __shfl_xor_sync(0xFFFFFFFFu, needed[i], other);
      }
      Several<M, 4> values[S::kGroup][4];
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t j = begin + 16 * i + 4 * place.t + k;
          values[i][k] = load<4>(static_cast<const M*>(matrix.data) + j * matrix.stride + column, needed[i] >> k & 1u ? columns : 0, aligned);
        }
#pragma unroll
      for (int i = 0; i < S::kGroup; ++i) {
        uint32_t a[2][kTerms<M>][4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            uint32_t terms[kTerms<M>];
            split_pair(values[i][2 * pair].at[c], values[i][2 * pair + 1].at[c], terms);
#pragma unroll
            for (int term = 0; term < kTerms<M>; ++term) a[c / 2][term][c % 2 + 2 * pair] = terms[term];
          }
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile)
          if (tile < tiles) {
            uint32_t b[3][2];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              uint32_t terms[3];
              split(by[i][tile].at[2 * pair], by[i][tile].at[2 * pair + 1], terms);
#pragma unroll
              for (int term = 0; term < 3; ++term) b[term][pair] = terms[term];
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) multiply_sums(part.at[half][tile], a[half], b);
          }
      }
    }
    total.add(part);
  }
  finish(place, total, [](int g, int half, bool lower) { return 4 * g + 2 * half + lower; }, [&](int row, int column_of_warp, float sum) {
    if (first_row + row < rows && first_column + column_of_warp < matrix.cols) store(first_row + row, first_column + column_of_warp, sum);
  });
}

// Numbers of the workspace, row-major.
struct Numbers {
  float* data;
  int64_t stride;  // a multiple of 16

  __device__ float& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
  __device__ Several<float, 4> four(int64_t row, int64_t column, int64_t valid) const { return load<4>(data + row * stride + column, valid, true); }
};

// edited = hidden + edit, rounded once to the dtype of the hidden state.
__device__ inline void write_edited(const AscentBatch& batch, int64_t row, int64_t column, float edit) {
  const int64_t from = row * batch.hidden_stride + column, into = row * batch.edited_stride + column;
  const bool live = limits_of(batch, row).steps > 0;
  auto write = [&](auto kind) {
    using T = decltype(kind);
    const T hidden = static_cast<const T*>(batch.hidden)[from];
    T* const edited = static_cast<T*>(batch.edited) + into;
    // The state itself, not its sum with zero: the bits of a NaN and the sign of a zero stay.
    if (live)
      narrow(widen(hidden) + edit, edited);
    else
      *edited = hidden;
  };
  if (batch.dtype == DType::kFloat32) write(float{});
  if (batch.dtype == DType::kBFloat16) write(BFloat16{});
  if (batch.dtype == DType::kFloat16) write(Float16{});
}

// z = W1 h + b1
template <class W, class X, class S>
__global__ void __launch_bounds__(kThreads, 1) enter(Matrix first, const float* bias, States states, Numbers z) {
  dot_products<W, X, S>(first, states, blockIdx.x * int64_t{S::kBlockColumns}, blockIdx.y * int64_t{S::kBlockRows},
                        [&](int64_t row, int64_t unit, float sum) { z(row, unit) = sum + bias[unit]; });
}

// d = G c, c = out * [z > 0]
template <class S>
__global__ void __launch_bounds__(kThreads, 1) first_velocity(Matrix gram, const float* out, Numbers z, Numbers d, int64_t rows) {
  auto slope = [&](int64_t row, int64_t j, int64_t valid) {
    const Several<float, 4> at = z.four(row, j, valid);
    Several<float, 4> c = load<4>(out + j, valid, is_aligned<4, float>(out, 4));
#pragma unroll
    for (int k = 0; k < 4; ++k) c.at[k] = at.at[k] > 0 ? c.at[k] : 0.0f;
    return c;
  };
  sum_of_rows<float, S>(gram, rows, slope, blockIdx.x * int64_t{S::kBlockColumns}, blockIdx.y * int64_t{S::kBlockRows},
                        [&](int64_t row, int64_t unit, float sum) { d(row, unit) = sum; }, [](int64_t) { return true; });
}

// edited = hidden + W1^T S
template <class W, class S>
__global__ void __launch_bounds__(kThreads, 1) leave(Matrix first, Numbers total, AscentBatch batch) {
  sum_of_rows<W, S>(first, batch.rows, [&](int64_t row, int64_t j, int64_t valid) { return total.four(row, j, valid); },
                    blockIdx.x * int64_t{S::kBlockColumns}, blockIdx.y * int64_t{S::kBlockRows},
                    [&](int64_t row, int64_t column, float sum) { write_edited(batch, row, column, sum); }, [](int64_t) { return true; });
}

}  // namespace recontrol::cuda
