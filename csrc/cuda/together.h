// What ascents share whose rows step together: one launch for the whole batch, in which all blocks of the device take part in every product
// and wait for each other in between.
#pragma once

#include "products.h"

namespace recontrol::cuda {

// What blocks tell each other about one row.
struct RowState {
  Progress progress;
  float scale;  // length of the present step
  bool closed;  // nothing more is computed for it
};

// What blocks tell each other about the batch; zero before the launch.
struct BatchState {
  unsigned long long arrived;
  int open;  // rows that are not closed
};

// A NaN shows.
__device__ inline float positive_part(float x) { return x <= 0 ? 0.0f : x; }

// `Measured`: the length of a step depends on V or on |u|, or V is traced.
template <bool Measured>
class Together {
 protected:
  __device__ Together(const AscentBatch& batch, RowState* states, BatchState* state) : rows_(batch.rows), batch_(batch), states_(states), state_(state) {}

  // Sets the state of each row; returns the largest number of steps of any row, at most 2^32 - 1. A barrier must follow.
  __device__ int64_t open_rows() {
    unsigned most = 0;
    for (int64_t row = threadIdx.x; row < rows_; row += kThreads) {
      const int64_t steps = steps_of(row);
      const unsigned capped = steps < 0xFFFFFFFFll ? static_cast<unsigned>(steps) : 0xFFFFFFFFu;
      most = capped > most ? capped : most;
      if (blockIdx.x == 0) {
        const bool closed = steps == 0 && batch_.trace == nullptr;
        states_[row] = RowState{Progress{}, batch_.step_size[row], closed};
        if (!closed) atomicAdd(&state_->open, 1);
      }
    }
    unsigned* const of_warps = reinterpret_cast<unsigned*>(shared_memory());
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) most = of_warps[warp] > most ? of_warps[warp] : most;
    __syncthreads();
    return most;
  }

  __device__ int64_t steps_of(int64_t row) const {
    const Limits limits = limits_of(batch_, row);
    return Measured || limits.step_size > 0 ? limits.steps : 0;
  }

  // Whether the row takes no part in this step.
  __device__ bool idle(int64_t row, int64_t step) const { return Measured ? states_[row].closed : step >= steps_of(row); }

  // To be asked behind a barrier.
  __device__ bool all_closed() const { return *static_cast<volatile int*>(&state_->open) == 0; }

  // From this thread's shares of V (without offset), |grad V|^2 and u.grad V of a row: the length of its next step, by one whole block.
  __device__ void begin_step(int64_t row, float value, float offset, float slope_square, float edit_slope) {
    value = block_sum(value) + offset;
    slope_square = block_sum(slope_square);
    edit_slope = block_sum(edit_slope);
    if (threadIdx.x != 0) return;
    RowState& state = states_[row];
    if (state.closed) {
      state.scale = 0;
      return;
    }
    const Limits limits = limits_of(batch_, row);
    float* const trace = batch_.trace == nullptr ? nullptr : batch_.trace + row * batch_.trace_columns;
    if (trace != nullptr && state.progress.taken < batch_.trace_columns) trace[state.progress.taken] = value;
    const bool done = state.progress.done(limits);
    // A row that ended early keeps its last value.
    if (trace != nullptr && done)
      for (int64_t column = state.progress.taken; column < batch_.trace_columns; ++column) trace[column] = value;
    state.scale = done ? 0.0f : state.progress.begin_step(limits, value, slope_square, edit_slope);
    // Without a trace nothing of the last point is needed but the edit. The last step itself is taken all the same: by its length.
    if (done || (trace == nullptr && state.progress.done(limits))) {
      state.closed = true;
      atomicAdd(&state_->open, -1);
    }
  }

  // store(row, column, sum over j of factors(row, j) matrix[j, column]) for all rows and columns, 0 for rows that are not wanted.
  template <class M, class S, class Factors, class Store, class Wanted>
  __device__ void product(const Matrix& matrix, const Factors& factors, const Store& store, const Wanted& wanted) {
    const int64_t across = (matrix.cols + S::kBlockColumns - 1) / S::kBlockColumns, tiles = across * ((rows_ + S::kBlockRows - 1) / S::kBlockRows);
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t first_column = tile % across * S::kBlockColumns, first_row = tile / across * S::kBlockRows;
      bool any = false;
      for (int64_t row = first_row + threadIdx.x % 32; row < rows_ && row < first_row + S::kBlockRows; row += 32) any = any || wanted(row);
      if (__any_sync(0xFFFFFFFFu, any)) {
        sum_of_rows<M, S>(matrix, rows_, factors, first_column, first_row, store, wanted);
        continue;
      }
      for (int index = threadIdx.x; index < S::kBlockRows * S::kBlockColumns; index += kThreads) {
        const int64_t row = first_row + index / S::kBlockColumns, column = first_column + index % S::kBlockColumns;
        if (row < rows_ && column < matrix.cols) store(row, column, 0.0f);
      }
    }
  }

  // f(row, unit) for all rows and units.
  template <class F>
  __device__ void each(int64_t units, const F& f) {
    for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < rows_ * units; index += gridDim.x * int64_t{kThreads}) f(index / units, index % units);
  }

  __device__ static float block_sum(float x) {
    float* const of_warps = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, other);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < kWarps; ++warp) x += of_warps[warp];
    __syncthreads();
    return x;
  }

  // All blocks have arrived, and what they wrote before is seen by all. They run at the same time, or this would wait forever.
  __device__ void barrier() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      awaited_ += gridDim.x;
      atomicAdd(&state_->arrived, 1ull);
      while (*static_cast<volatile unsigned long long*>(&state_->arrived) < awaited_) wait_a_little();
      __threadfence();
    }
    __syncthreads();
  }

  const int64_t rows_;

 private:
  const AscentBatch& batch_;
  RowState* const states_;
  BatchState* const state_;
  unsigned long long awaited_ = 0;
};

}  // namespace recontrol::cuda
