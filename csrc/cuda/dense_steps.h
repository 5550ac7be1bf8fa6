// The ascent for two linear layers with a whole product d = G c at every step, on tensor cores and for all rows together: for steps at which
// so many units flip that adding their rows of G one by one (two_layers.h) reads more.
#pragma once

#include "together.h"

namespace recontrol::cuda {

struct DenseSteps {
  Matrix gram;
  const float* out;
  const float* offset;
  AscentBatch batch;
  Numbers z, d, total, lost;  // lost: what the sum `total` has rounded away (Kahan 1965)
  Numbers c[2];               // of steps with an even and with an odd number
  int* flips;                 // (rows, 3), signs that changed in this, the last and the next step
  RowState* rows;
  BatchState* state;
};

template <class S, bool Measured>
class DenseStepsTogether : Together<Measured> {
  using Base = Together<Measured>;
  using Base::barrier, Base::each, Base::all_closed, Base::rows_;

 public:
  __device__ explicit DenseStepsTogether(const DenseSteps& given) : Base(given.batch, given.rows, given.state), p_(given), units_(given.gram.rows) {}

  __device__ void run() {
    const int64_t most = Base::open_rows();
    if (blockIdx.x == 0)
      for (int64_t index = threadIdx.x; index < 3 * rows_; index += kThreads) p_.flips[index] = 0;
    each(units_, [&](int64_t row, int64_t j) {
      p_.c[0](row, j) = p_.z(row, j) > 0 ? p_.out[j] : 0.0f;
      p_.total(row, j) = p_.lost(row, j) = 0;
    });
    barrier();
    for (step_ = 0; Measured || step_ < most; ++step_) {
      velocity();
      barrier();
      if constexpr (Measured) {
        for (int64_t row = blockIdx.x; row < rows_; row += gridDim.x) measure(row);
        barrier();
        each(units_, [&](int64_t row, int64_t j) { advance(row, j, p_.d(row, j)); });
        barrier();
        if (all_closed()) return;
      }
    }
  }

 private:
  // d = G c, for rows of which a sign changed.
  __device__ void velocity() {
    const Numbers c = p_.c[step_ % 2];
    Base::template product<float, S>(
        p_.gram, [&](int64_t row, int64_t j, int64_t valid) { return c.four(row, j, valid); },
        [&](int64_t row, int64_t j, float sum) {
          if (Base::idle(row, step_)) return;
          const float d = turned(row) ? sum : p_.d(row, j);
          p_.d(row, j) = d;
          if constexpr (!Measured) advance(row, j, d);
        },
        [&](int64_t row) { return !Base::idle(row, step_) && turned(row); });
    // What the next step will count into was read for the last time in the last one.
    if (blockIdx.x == 0)
      for (int64_t row = threadIdx.x; row < rows_; row += kThreads) p_.flips[3 * row + (step_ + 1) % 3] = 0;
  }

  // Whether a sign changed in the last step.
  __device__ bool turned(int64_t row) const { return step_ == 0 || p_.flips[3 * row + (step_ + 2) % 3] > 0; }

  // V, |grad V|^2 and u.grad V of one row, by one block, and the length of its next step.
  __device__ void measure(int64_t row) {
    const Numbers c = p_.c[step_ % 2];
    float value = 0, slope_square = 0, edit_slope = 0;
    if (!p_.rows[row].closed)
      for (int64_t j = threadIdx.x; j < units_; j += kThreads) {
        value += p_.out[j] * positive_part(p_.z(row, j));
        slope_square += c(row, j) * p_.d(row, j);
        edit_slope += p_.total(row, j) * p_.d(row, j);
      }
    Base::begin_step(row, value, *p_.offset, slope_square, edit_slope);
  }

  // z += scale d, S += scale c, and the c of the next step, at one unit.
  __device__ void advance(int64_t row, int64_t j, float d) {
    const float scale = p_.rows[row].scale, c = p_.c[step_ % 2](row, j);
    float& next = p_.c[(step_ + 1) % 2](row, j);
    if (scale == 0) {
      next = c;
      return;
    }
    const float before = p_.z(row, j), after = fmaf(scale, d, before);
    const float total = p_.total(row, j), term = fmaf(scale, c, -p_.lost(row, j)), grown = total + term;
    p_.z(row, j) = after;
    p_.lost(row, j) = (grown - total) - term;
    p_.total(row, j) = grown;
    next = after > 0 ? p_.out[j] : 0.0f;
    if ((before > 0) != (after > 0)) atomicAdd(&p_.flips[3 * row + step_ % 3], 1);
  }

  const DenseSteps& p_;
  const int64_t units_;
  int64_t step_ = 0;
};

template <class S, bool Measured>
__global__ void __launch_bounds__(kThreads, 1) climb_dense(DenseSteps given) {
  DenseStepsTogether<S, Measured>(given).run();
}

}  // namespace recontrol::cuda
