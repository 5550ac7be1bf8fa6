// The tensor library meets the kernels here: the schema, checks with messages, nothing else.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>
#include <torch/library.h>

#ifdef RECONTROL_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "recontrol/ascend.h"

namespace {

using at::Tensor;
using std::optional;

recontrol::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return recontrol::DType::kFloat32;
    case at::kBFloat16:
      return recontrol::DType::kBFloat16;
    case at::kHalf:
      return recontrol::DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, found ", tensor.scalar_type());
  }
}

recontrol::Matrix matrix_of(const Tensor& tensor, int64_t rows, int64_t cols, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", found ", tensor.device());
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must have shape (", rows, ", ", cols, "), found ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(cols <= 1 || tensor.stride(1) == 1, name, " must have contiguous rows, found strides ", tensor.strides());
  return {tensor.const_data_ptr(), rows, cols, tensor.stride(0), dtype_of(tensor, name)};
}

template <class T>
const T* vector_of(const Tensor& tensor, int64_t size, at::ScalarType type, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", found ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", found ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), name, " must be contiguous with shape (", size, "), found ",
                    tensor.sizes());
  return tensor.const_data_ptr<T>();
}

// What the operators on both devices are given, as the kernels take it.
struct Ascent {
  recontrol::ValueNetwork network;
  recontrol::AscentBatch batch;
};

Ascent ascent_of(const Tensor& hidden, const Tensor& first, const Tensor& first_bias, const Tensor& gram, const optional<Tensor>& second,
                 const optional<Tensor>& second_transposed, const optional<Tensor>& second_bias, const Tensor& out, const Tensor& step_size,
                 const Tensor& steps, const optional<Tensor>& mask, const optional<Tensor>& radius, const optional<Tensor>& target, Tensor& edited,
                 const optional<Tensor>& trace) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && first.dim() == 2, "hidden and first must have two dimensions, found ", hidden.dim(), " and ", first.dim());
  const at::Device device = hidden.device();
  const int64_t rows = hidden.size(0), width = hidden.size(1), units1 = first.size(0);
  recontrol::ValueNetwork network;
  network.first = matrix_of(first, units1, width, "first", device);
  network.first_bias = vector_of<float>(first_bias, units1, at::kFloat, "first_bias", device);
  network.gram = matrix_of(gram, units1, units1, "gram", device);
  TORCH_CHECK_TYPE(network.gram.dtype == recontrol::DType::kFloat32, "gram must be float32, found ", gram.scalar_type());
  int64_t last_units = units1;
  if (second.has_value()) {
    TORCH_CHECK_VALUE(second_transposed.has_value() && second_bias.has_value() && second->dim() == 2,
                      "a second layer needs a matrix, its transpose and its bias");
    last_units = second->size(0);
    network.second = matrix_of(*second, last_units, units1, "second", device);
    network.second_transposed = matrix_of(*second_transposed, units1, last_units, "second_transposed", device);
    network.second_bias = vector_of<float>(*second_bias, last_units, at::kFloat, "second_bias", device);
    TORCH_CHECK_TYPE(network.second.dtype == network.first.dtype && network.second_transposed.dtype == network.first.dtype,
                     "the weights of both layers must share one dtype");
  }
  network.out = vector_of<float>(out, last_units, at::kFloat, "out", device);

  const recontrol::Matrix from = matrix_of(hidden, rows, width, "hidden", device), into = matrix_of(edited, rows, width, "edited", device);
  TORCH_CHECK_TYPE(from.dtype == into.dtype, "edited must have the dtype of hidden, found ", edited.scalar_type(), " and ", hidden.scalar_type());
  recontrol::AscentBatch batch;
  batch.rows = rows;
  batch.hidden = from.data;
  batch.hidden_stride = from.stride;
  batch.edited = edited.mutable_data_ptr();
  batch.edited_stride = into.stride;
  batch.dtype = from.dtype;
  batch.step_size = vector_of<float>(step_size, rows, at::kFloat, "step_size", device);
  batch.steps = vector_of<int64_t>(steps, rows, at::kLong, "steps", device);
  if (mask.has_value()) batch.mask = vector_of<bool>(*mask, rows, at::kBool, "mask", device);
  if (radius.has_value()) batch.radius = vector_of<float>(*radius, rows, at::kFloat, "radius", device);
  if (target.has_value()) batch.target = vector_of<float>(*target, rows, at::kFloat, "target", device);
  if (trace.has_value()) {
    TORCH_CHECK_VALUE(trace->dim() == 2 && trace->size(0) == rows && trace->is_contiguous() && trace->device() == device && trace->scalar_type() == at::kFloat,
                      "trace must be contiguous float32 on ", device, " with one row for each of ", rows, " rows, found ", trace->sizes());
    if (trace->size(1) > 0) batch.trace = trace->mutable_data_ptr<float>();
    batch.trace_columns = trace->size(1);
  }
  return {network, batch};
}

void ascend_cpu(const Tensor& hidden, const Tensor& first, const Tensor& first_bias, const Tensor& gram, const optional<Tensor>& second,
                const optional<Tensor>& second_transposed, const optional<Tensor>& second_bias, const Tensor& out, double offset, const Tensor& step_size,
                const Tensor& steps, const optional<Tensor>& mask, const optional<Tensor>& radius, const optional<Tensor>& target, Tensor& edited,
                const optional<Tensor>& trace) {
  Ascent ascent = ascent_of(hidden, first, first_bias, gram, second, second_transposed, second_bias, out, step_size, steps, mask, radius, target, edited, trace);
  ascent.network.offset = static_cast<float>(offset);
  recontrol::ascend_cpu(ascent.network, ascent.batch, at::get_num_threads());
}

#ifdef RECONTROL_WITH_CUDA
void ascend_cuda(const Tensor& hidden, const Tensor& first, const Tensor& first_bias, const Tensor& gram, const optional<Tensor>& second,
                 const optional<Tensor>& second_transposed, const optional<Tensor>& second_bias, const Tensor& out, const Tensor& offset,
                 const Tensor& step_size, const Tensor& steps, const optional<Tensor>& mask, const optional<Tensor>& radius, const optional<Tensor>& target,
                 Tensor& edited, const optional<Tensor>& trace) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const Ascent ascent =
      ascent_of(hidden, first, first_bias, gram, second, second_transposed, second_bias, out, step_size, steps, mask, radius, target, edited, trace);
  TORCH_CHECK_VALUE(offset.device() == hidden.device() && offset.scalar_type() == at::kFloat && offset.numel() == 1, "offset must be one float32 number on ",
                    hidden.device(), ", found ", offset.sizes(), " on ", offset.device());
  const auto bytes = static_cast<int64_t>(recontrol::cuda_workspace_bytes(ascent.network, ascent.batch.rows));
  // From the caching allocator: in a graph, from the graph's own pool.
  const Tensor workspace = at::empty({bytes}, hidden.options().dtype(at::kByte));
  recontrol::ascend_cuda(ascent.network, offset.const_data_ptr<float>(), ascent.batch, workspace.mutable_data_ptr(),
                         c10::cuda::getCurrentCUDAStream(hidden.device().index()).stream());
}
#endif

bool all_finite(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float x) { return std::isfinite(x); });
}

// Whether the values can be meant; the caller finds the words for what is wrong.
bool sound(const Tensor& hidden, const Tensor& step_size, const Tensor& steps, const optional<Tensor>& mask, const optional<Tensor>& radius,
           const optional<Tensor>& target, const Tensor& head_weights) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must have two dimensions, found ", hidden.dim());
  const int64_t rows = hidden.size(0);
  const recontrol::Matrix states = matrix_of(hidden, rows, hidden.size(1), "hidden", at::kCPU);
  const float* alpha = vector_of<float>(step_size, rows, at::kFloat, "step_size", at::kCPU);
  const int64_t* n = vector_of<int64_t>(steps, rows, at::kLong, "steps", at::kCPU);
  const bool* live = mask.has_value() ? vector_of<bool>(*mask, rows, at::kBool, "mask", at::kCPU) : nullptr;
  if (!all_finite(alpha, rows) || std::any_of(alpha, alpha + rows, [](float x) { return x < 0; })) return false;
  if (std::any_of(n, n + rows, [](int64_t x) { return x < 0; })) return false;
  if (!all_finite(vector_of<float>(head_weights, head_weights.numel(), at::kFloat, "head_weights", at::kCPU), head_weights.numel())) return false;
  if (radius.has_value()) {
    const float* rho = vector_of<float>(*radius, rows, at::kFloat, "radius", at::kCPU);
    if (!all_finite(rho, rows) || std::any_of(rho, rho + rows, [](float x) { return x < 0; })) return false;
  }
  if (target.has_value() && !all_finite(vector_of<float>(*target, rows, at::kFloat, "target", at::kCPU), rows)) return false;
  for (int64_t row = 0; row < rows; ++row)
    if (n[row] > 0 && (live == nullptr || live[row]) && !recontrol::row_is_finite(states, row)) return false;
  return true;
}

}  // namespace

TORCH_LIBRARY(recontrol_cpu, library) {
  library.def("sound(Tensor hidden, Tensor step_size, Tensor steps, Tensor? mask, Tensor? radius, Tensor? target, Tensor head_weights) -> bool");
  library.def(
      "ascend(Tensor hidden, Tensor first, Tensor first_bias, Tensor gram, Tensor? second, Tensor? second_transposed, Tensor? second_bias, Tensor out, "
      "float offset, Tensor step_size, Tensor steps, Tensor? mask, Tensor? radius, Tensor? target, Tensor(a!) edited, Tensor(b!)? trace) -> ()");
}

TORCH_LIBRARY_IMPL(recontrol_cpu, CPU, library) {
  library.impl("sound", sound);
  library.impl("ascend", ascend_cpu);
}

#ifdef RECONTROL_WITH_CUDA
TORCH_LIBRARY(recontrol_cuda, library) {
  library.def(
      "ascend(Tensor hidden, Tensor first, Tensor first_bias, Tensor gram, Tensor? second, Tensor? second_transposed, Tensor? second_bias, Tensor out, "
      "Tensor offset, Tensor step_size, Tensor steps, Tensor? mask, Tensor? radius, Tensor? target, Tensor(a!) edited, Tensor(b!)? trace) -> ()");
}

TORCH_LIBRARY_IMPL(recontrol_cuda, CUDA, library) { library.impl("ascend", ascend_cuda); }
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of recontrol; the operators are under torch.ops.recontrol_cpu.";
  module.def("cpu_capability", &recontrol::cpu_capability, "The instruction set in use.");
  module.def(
      "use_cpu_capability",
      [](const std::string& name) {
        if (!recontrol::use_cpu_capability(name.c_str()))
          throw pybind11::value_error("this processor or build has no instruction set '" + name + "'");
      },
      pybind11::arg("name"), "Use a lesser instruction set, for tests.");
  module.attr("compiler") = __VERSION__;
#ifdef RECONTROL_WITH_CUDA
  module.attr("cuda") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  module.def(
      "cuda_why_not",
      [](int64_t device, int64_t units, int64_t second_units) -> std::optional<std::string> {
        const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        recontrol::ValueNetwork network;
        network.first.rows = units;
        network.second.rows = second_units;
        const char* reason = recontrol::cuda_why_not(network);
        return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
      },
      pybind11::arg("device"), pybind11::arg("units"), pybind11::arg("second_units"),
      "Why an ascent cannot run on this GPU, or None; second_units is 0 with two layers.");
#else
  module.attr("cuda") = pybind11::none();
#endif
}
