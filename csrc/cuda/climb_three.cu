#include "launches.h"

namespace recontrol::cuda {

void launch_climb_three(const ThreeLayers& given, const Device& device, Stream stream) {
  const int64_t columns = given.network.first.rows > given.network.second.rows ? given.network.first.rows : given.network.second.rows;
  with_weights(given.network.first.dtype, [&](auto kind) {
    using W = decltype(kind);
    const auto kernel = is_measured(given.batch) ? climb_three<W, true> : climb_three<W, false>;
    launch(kernel, "climb_three", together<FewRows>(kernel, device, columns, given.batch.rows), stream, given);
  });
}

}  // namespace recontrol::cuda
