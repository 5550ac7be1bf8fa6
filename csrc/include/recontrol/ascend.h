// The ascent on a value function, as plain pointers, sizes and strides in elements. No tensor library below this line.
#pragma once

#include <cstddef>
#include <cstdint>

namespace recontrol {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// A row-major matrix; row i begins at data + i * stride elements.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
};

// V(h) = out . relu(W1 h + b1) + offset                      (two linear layers)
// V(h) = out . relu(W2 relu(W1 h + b1) + b2) + offset        (three linear layers)
struct ValueNetwork {
  Matrix first;                      // W1: (units1, hidden_size)
  const float* first_bias = nullptr;
  Matrix gram;                       // G = W1 W1^T: (units1, units1), float32
  Matrix second;                     // W2: (units2, units1); rows == 0 with two layers
  Matrix second_transposed;          // W2^T: (units1, units2)
  const float* second_bias = nullptr;
  const float* out = nullptr;        // (units of the last hidden layer,), the heads already weighted
  float offset = 0;

  bool three_layers() const { return second.rows > 0; }
};

// One ascent over many rows. Optional arrays are null when not given.
struct AscentBatch {
  int64_t rows = 0;
  const void* hidden = nullptr;      // (rows, hidden_size)
  int64_t hidden_stride = 0;
  void* edited = nullptr;            // (rows, hidden_size), same dtype
  int64_t edited_stride = 0;
  DType dtype = DType::kFloat32;
  const float* step_size = nullptr;  // (rows,)
  const int64_t* steps = nullptr;    // (rows,)
  const bool* mask = nullptr;        // (rows,), true where live
  const float* radius = nullptr;     // (rows,)
  const float* target = nullptr;     // (rows,)
  float* trace = nullptr;            // (rows, trace_columns), V after 0, 1, ... steps
  int64_t trace_columns = 0;
};

// Runs the ascent on the CPU, on `threads` threads. Safe to call from any number of threads at once. Throws std::bad_alloc only.
void ascend_cpu(const ValueNetwork& network, const AscentBatch& batch, int threads);

// Memory that one ascent on a GPU needs beside its results, in bytes; its content is lost.
size_t cuda_workspace_bytes(const ValueNetwork& network, int64_t rows);

// Why an ascent cannot run on the current GPU, or null when it can.
const char* cuda_why_not(const ValueNetwork& network);

// Queues the ascent on a stream of the current GPU, where all pointers lie; `network.offset` is read from `offset` there instead. Does not
// wait for the GPU and allocates nothing, and its launches depend on sizes alone, so it can be captured in a CUDA graph.
// Throws std::runtime_error when the driver refuses a launch.
void ascend_cuda(const ValueNetwork& network, const float* offset, const AscentBatch& batch, void* workspace, void* stream);

// Whether a row of a matrix holds neither NaN nor infinity.
bool row_is_finite(const Matrix& matrix, int64_t row);

// The instruction set in use ("avx512_bf16", "avx512", "avx2", "baseline"), and a way to choose a lesser one for tests.
const char* cpu_capability();
// Returns false, and changes nothing, when this processor or build lacks it.
bool use_cpu_capability(const char* name);

}  // namespace recontrol
