#include "launches.h"

namespace recontrol::cuda {

void launch_climb_dense(const DenseSteps& given, const Device& device, Stream stream) {
  with_shape(given.batch.rows, [&](auto shape) {
    using S = decltype(shape);
    const auto kernel = is_measured(given.batch) ? climb_dense<S, true> : climb_dense<S, false>;
    launch(kernel, "climb_dense", together<S>(kernel, device, given.gram.rows, given.batch.rows), stream, given);
  });
}

}  // namespace recontrol::cuda
