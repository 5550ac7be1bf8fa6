// All steps of the ascent for three linear layers, V(h) = out . relu(W2 relu(W1 h + b1) + b2) + offset: one launch for the whole batch.
//
// With z1 = W1 h + b1, z2 = W2 relu(z1) + b2, s = W2^T c2, c2 = out * [z2 > 0], c = s * [z1 > 0] and d = G c, one step is
//   z1 += alpha d,   z2 += W2 (change of relu(z1)).
// A flip in the second layer changes all of d, so a step needs whole matrices, more than the few blocks of a cluster can read in
// time. All blocks of the device share every product instead, and wait for each other between two of them. What did not change is not
// multiplied: s moves by the rows of W2 whose unit flipped, and d by the rows of G whose entry of c changed.
#pragma once

#include "together.h"

namespace recontrol::cuda {

// Signs that changed in steps with an even and with an odd number.
struct Flips {
  int first[2], second[2];
};

struct ThreeLayers {
  ValueNetwork network;
  const float* offset;
  AscentBatch batch;
  Numbers z1, s, c, d, total;  // (rows, units1)
  Numbers turn1, move1;        // (rows, units1), the last change of c and of relu(z1)
  Numbers z2, c2;              // (rows, units2)
  Numbers turn2, move2;        // (rows, units2), the last change of c2 and of z2
  Flips* flips;
  RowState* rows;
  BatchState* state;
};

// The whole batch. `Measured`: the length of a step depends on V or on |u|, or V is traced.
template <class W, bool Measured>
class ThreeLayersTogether : Together<Measured> {
  using Base = Together<Measured>;
  using Base::barrier, Base::each, Base::all_closed, Base::rows_;

 public:
  __device__ explicit ThreeLayersTogether(const ThreeLayers& given)
      : Base(given.batch, given.rows, given.state), p_(given), units1_(given.network.first.rows), units2_(given.network.second.rows) {}

  __device__ void run() {
    const int64_t most = begin();
    for (step_ = 0; Measured || step_ < most; ++step_) {
      slope();
      barrier();
      velocity();
      barrier();
      if constexpr (Measured) {
        for (int64_t row = blockIdx.x; row < rows_; row += gridDim.x) measure(row);
        barrier();
        each(units1_, [&](int64_t row, int64_t j) { advance(row, j); });
        barrier();
        if (all_closed()) return;
      } else if (step_ + 1 == most) {
        return;
      }
      second_layer();
      barrier();
    }
  }

 private:
  // z2 and c2 at the start, and the state of each row; returns the largest number of steps of any row.
  __device__ int64_t begin() {
    const int64_t most = Base::open_rows();
    if (blockIdx.x == 0)
      for (int64_t row = threadIdx.x; row < rows_; row += kThreads) p_.flips[row] = Flips{};
    Base::template product<W, FewRows>(
        p_.network.second_transposed,
        [&](int64_t row, int64_t j, int64_t valid) {
          Several<float, 4> z = p_.z1.four(row, j, valid);
#pragma unroll
          for (int k = 0; k < 4; ++k) z.at[k] = positive_part(z.at[k]);
          return z;
        },
        [&](int64_t row, int64_t i, float sum) {
          const float z = sum + p_.network.second_bias[i];
          p_.z2(row, i) = z;
          p_.c2(row, i) = p_.turn2(row, i) = z > 0 ? p_.network.out[i] : 0.0f;
        },
        [](int64_t) { return true; });
    each(units1_, [&](int64_t row, int64_t j) { p_.total(row, j) = 0; });
    barrier();
    return most;
  }

  // s += W2^T (change of c2), c = s * [z1 > 0], and by what c changes.
  __device__ void slope() {
    Base::template product<W, FewRows>(
        p_.network.second, [&](int64_t row, int64_t i, int64_t valid) { return p_.turn2.four(row, i, valid); },
        [&](int64_t row, int64_t j, float sum) {
          if (idle(row)) return;
          const float s = step_ == 0 ? sum : p_.s(row, j) + sum, before = step_ == 0 ? 0.0f : p_.c(row, j), after = p_.z1(row, j) > 0 ? s : 0.0f;
          p_.s(row, j) = s;
          p_.c(row, j) = after;
          p_.turn1(row, j) = anew(row) ? after : after - before;
        },
        // Where no sign of the second layer changed, there is nothing to add.
        [&](int64_t row) { return !idle(row) && anew(row); });
    // What was counted two steps ago has been read by all.
    if (blockIdx.x == 0)
      for (int64_t row = threadIdx.x; row < rows_; row += kThreads) p_.flips[row].first[step_ % 2] = p_.flips[row].second[step_ % 2] = 0;
  }

  // d = G c, or d += G (change of c) where only a few entries of c have changed.
  __device__ void velocity() {
    Base::template product<float, FewRows>(
        p_.network.gram, [&](int64_t row, int64_t j, int64_t valid) { return p_.turn1.four(row, j, valid); },
        [&](int64_t row, int64_t j, float sum) {
          if (idle(row)) return;
          p_.d(row, j) = anew(row) ? sum : p_.d(row, j) + sum;
          if constexpr (!Measured) advance(row, j);
        },
        [&](int64_t row) { return !idle(row) && !quiet(row); });
  }

  // V, |grad V|^2 and u.grad V of one row, by one block, and the length of its next step.
  __device__ void measure(int64_t row) {
    float value = 0, slope_square = 0, edit_slope = 0;
    if (!p_.rows[row].closed) {
      for (int64_t i = threadIdx.x; i < units2_; i += kThreads) value += p_.network.out[i] * positive_part(p_.z2(row, i));
      for (int64_t j = threadIdx.x; j < units1_; j += kThreads) {
        slope_square += p_.c(row, j) * p_.d(row, j);
        edit_slope += p_.total(row, j) * p_.d(row, j);
      }
    }
    Base::begin_step(row, value, *p_.offset, slope_square, edit_slope);
  }

  // z1 += scale d and S += scale c at one unit, and by what relu(z1) changes.
  __device__ void advance(int64_t row, int64_t j) {
    const float scale = p_.rows[row].scale;
    if (scale == 0) {
      p_.move1(row, j) = 0;
      return;
    }
    const float before = p_.z1(row, j), after = fmaf(scale, p_.d(row, j), before);
    p_.z1(row, j) = after;
    p_.total(row, j) = fmaf(scale, p_.c(row, j), p_.total(row, j));
    p_.move1(row, j) = positive_part(after) - positive_part(before);
    if ((before > 0) != (after > 0)) atomicAdd(&p_.flips[row].first[step_ % 2], 1);
  }

  // z2 += W2 (change of relu(z1)), c2 = out * [z2 > 0], and by what c2 changes.
  __device__ void second_layer() {
    Base::template product<W, FewRows>(
        p_.network.second_transposed, [&](int64_t row, int64_t j, int64_t valid) { return p_.move1.four(row, j, valid); },
        [&](int64_t row, int64_t i, float sum) {
          if (idle(row)) return;
          const float move = repeats(row) ? p_.move2(row, i) : sum, z = p_.z2(row, i) + move;
          const float before = p_.c2(row, i), after = z > 0 ? p_.network.out[i] : 0.0f;
          p_.move2(row, i) = move;
          p_.z2(row, i) = z;
          p_.c2(row, i) = after;
          p_.turn2(row, i) = after - before;
          if (after != before) atomicAdd(&p_.flips[row].second[step_ % 2], 1);
        },
        [&](int64_t row) { return !idle(row) && !repeats(row); });
  }

  __device__ bool idle(int64_t row) const { return Base::idle(row, step_); }
  // Whether s and d are of a new set of active units in the second layer.
  __device__ bool anew(int64_t row) const { return step_ == 0 || p_.flips[row].second[(step_ + 1) % 2] > 0; }
  // Whether no sign changed in the last step.
  __device__ bool quiet(int64_t row) const { return !anew(row) && p_.flips[row].first[(step_ + 1) % 2] == 0; }
  // Whether z2 moves as it did in the last step.
  __device__ bool repeats(int64_t row) const {
    return p_.batch.radius == nullptr && p_.batch.target == nullptr && quiet(row) && p_.flips[row].first[step_ % 2] == 0;
  }

  const ThreeLayers& p_;
  const int64_t units1_, units2_;
  int64_t step_ = 0;
};

template <class W, bool Measured>
__global__ void __launch_bounds__(kThreads, 1) climb_three(ThreeLayers given) {
  ThreeLayersTogether<W, Measured>(given).run();
}

}  // namespace recontrol::cuda
