// V(h) = out . relu(W1 h + b1) + offset. Included by each ascend_<isa>.cpp after tile.h.
//
// With z = W1 h + b1, c = out * [z > 0] and d = G c, one step is z += alpha d. The velocity d changes only where a unit's
// sign does: by +-out_j G[j, :] for each unit j that flipped. The hidden state is needed only at the end:
//   h_n = h_0 + W1^T S,   S_j = out_j * (total step length while unit j was on) = total * c_j + correction_j,
// where a flip at length t adds t * (c_j before - c_j after) to correction_j.

template <class T>
class TwoLayers {
 public:
  TwoLayers(const ValueNetwork& network, const Row* rows, int count, DType dtype)
      : network_(network), rows_(rows), count_(count), dtype_(dtype), units_(network.first.rows), width_(network.first.cols) {
    padded_units_ = round_up(units_, 16);
    h_.dtype = dtype;
    padded_width_ = round_up(width_, 16);
    // A fixed number of parts, so that their sum does not depend on the number of threads.
    part_ = round_up((units_ + kParts - 1) / kParts, kUnitBlock);
    parts_ = static_cast<int>((units_ + part_ - 1) / part_);
    using W = Workspace;
    const size_t row_bytes = W::bytes_for<float>(padded_width_) * (2 + parts_) + W::bytes_for<float>(padded_units_) * 5 +
                             W::bytes_for<double>(padded_units_) + W::bytes_for<int32_t>(padded_units_) * 2 +
                             W::bytes_for<uint8_t>(padded_units_);
    Workspace space(row_bytes * count);
    for (int r = 0; r < count; ++r) {
      h_.wide[r] = space.take<float>(padded_width_);
      edit_[r] = space.take<float>(padded_width_);
      z_[r] = space.take<float>(padded_units_);
      d_[r] = space.take<float>(padded_units_);
      first_c_[r] = space.take<float>(padded_units_);
      c_[r] = space.take<float>(padded_units_);
      by_[r] = space.take<float>(padded_units_);
      correction_[r] = space.take<double>(padded_units_);
      flips_[r] = space.take<int32_t>(padded_units_);
      seen_[r] = space.take<uint8_t>(padded_units_);
      ever_[r] = space.take<int32_t>(padded_units_);
      for (int p = 0; p < parts_; ++p) partial_[r][p] = space.take<float>(padded_width_);
    }
  }

  void run(int threads) {
    const int unit_shares = static_cast<int>(std::clamp<int64_t>(units_ / 256, 1, threads));
    const int width_shares = static_cast<int>(std::clamp<int64_t>(width_ / 256, 1, threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int r = 0; r < count_; ++r) enter(r);
#pragma omp for schedule(dynamic, 1)
      for (int p = 0; p < parts_; ++p) start(p);
#pragma omp for schedule(static)
      for (int s = 0; s < unit_shares; ++s) first_velocity(s, unit_shares);
#pragma omp for schedule(dynamic, 1)
      for (int r = 0; r < count_; ++r) climb(r);
#pragma omp for schedule(static) collapse(2)
      for (int r = 0; r < count_; ++r)
        for (int s = 0; s < width_shares; ++s) leave(r, s, width_shares);
    }
  }

 private:
  static constexpr int kParts = 16;

  // Widen the hidden state and zero what is summed into. Padding units rest at z = d = 0 and never flip.
  void enter(int r) {
    h_.given[r] = rows_[r].hidden;
    widen_hidden(dtype_, rows_[r].hidden, width_, h_.wide[r]);
    std::fill(h_.wide[r] + width_, h_.wide[r] + padded_width_, 0.0f);
    std::fill(z_[r] + units_, z_[r] + padded_units_, 0.0f);
    std::fill(first_c_[r] + units_, first_c_[r] + padded_units_, 0.0f);
    std::fill(c_[r] + units_, c_[r] + padded_units_, 0.0f);
    std::fill(d_[r], d_[r] + padded_units_, 0.0f);
    std::fill(correction_[r], correction_[r] + padded_units_, 0.0);
    std::fill(seen_[r], seen_[r] + padded_units_, uint8_t{0});
  }

  // z_0 and, while the weights of a block are still in cache, this part's share of g_0 = W1^T c_0.
  void start(int p) {
    float* into[kTileRows];
    for (int r = 0; r < count_; ++r) {
      into[r] = partial_[r][p];
      std::fill(into[r], into[r] + padded_width_, 0.0f);
    }
    const int64_t end = std::min(units_, (p + 1) * part_);
    for (int64_t block = p * part_; block < end; block += kUnitBlock) {
      const int64_t stop = std::min(end, block + kUnitBlock);
      enter_units<T>(network_.first, network_.first_bias, block, stop, h_, count_, z_);
      for (int r = 0; r < count_; ++r)
        for (int64_t j = block; j < stop; ++j) c_[r][j] = first_c_[r][j] = z_[r][j] > 0 ? network_.out[j] : 0.0f;
      accumulate_rows<T>(network_.first, c_, count_, block, stop, 0, width_, into);
    }
  }

  // d_0 = G c_0 over one share of the columns.
  void first_velocity(int share, int shares) {
    int64_t begin, end;
    columns_of(share, shares, units_, &begin, &end);
    accumulate_rows<float>(network_.gram, c_, count_, 0, units_, begin, end, d_);
  }

  void climb(int r) {
    const Row& row = rows_[r];
    total_[r] = 0;
    ever_count_[r] = 0;
    if (row.measured())
      climb_measured(r);
    else
      climb_freely(r);
    prepare_leave(r);
  }

  // Steps of one length. After a step without a flip, as many as are safe are taken at once.
  void climb_freely(int r) {
    const Row& row = rows_[r];
    const float alpha = row.step_size;
    int64_t left = row.steps;
    bool quiet = false;
    while (left > 0) {
      int64_t taken = 1;
      if (quiet && left > 1) taken = quiet_steps(shortest_to_flip(r), alpha, left);
      const int flips = advance(r, alpha * static_cast<float>(taken));
      left -= taken;
      total_[r] += static_cast<double>(alpha) * static_cast<double>(taken);
      if (left > 0 && flips > 0) turn(r, flips);
      quiet = flips == 0;
    }
  }

  // Steps whose length depends on V, on |u| or that are traced.
  void climb_measured(int r) {
    const Row& row = rows_[r];
    Progress progress;
    for (;;) {
      const float value = value_at(r);
      if (progress.taken < row.trace_columns) row.trace[progress.taken] = value;
      if (progress.done(row)) {
        hold_trace(row, progress.taken, value);
        return;
      }
      const double slope_square = dot(c_[r], d_[r], padded_units_);
      double edit_slope = total_[r] * slope_square;
      for (int i = 0; i < ever_count_[r]; ++i) edit_slope += correction_[r][ever_[r][i]] * d_[r][ever_[r][i]];
      const float scale = progress.begin_step(row, value, slope_square, edit_slope);
      const int flips = advance(r, scale);
      total_[r] += scale;
      if (!progress.done(row) && flips > 0) turn(r, flips);
    }
  }

  // z += scale * d; lists the units whose sign changed and returns how many there are.
  int advance(int r, float scale) {
    float* z = z_[r];
    const float* d = d_[r];
    int32_t* flips = flips_[r];
    const Vec by = spread(scale);
    int count = 0;
    for (int64_t j = 0; j < padded_units_; j += kWidth) {
      const Vec before = load(z + j);
      const Vec after = fma(by, load(d + j), before);
      store(z + j, after);
      list_bits(bits((before > zero()) ^ (after > zero())), j, flips, &count);
    }
    return count;
  }

  // Bring c, d and the correction in line with the signs after a step.
  void turn(int r, int flips) {
    for (int i = 0; i < flips; ++i) {
      const int32_t j = flips_[r][i];
      const float before = c_[r][j], after = z_[r][j] > 0 ? network_.out[j] : 0.0f;
      if (!seen_[r][j]) {
        seen_[r][j] = 1;
        ever_[r][ever_count_[r]++] = j;
      }
      correction_[r][j] += total_[r] * (static_cast<double>(before) - after);
      c_[r][j] = after;
      by_[r][i] = after - before;
    }
    if (2 * static_cast<int64_t>(flips) > units_) {
      // Adding up the active units anew is then the shorter sum, and it starts without old rounding.
      std::fill(d_[r], d_[r] + padded_units_, 0.0f);
      accumulate_rows<float>(network_.gram, &c_[r], 1, 0, units_, 0, units_, &d_[r]);
      return;
    }
    const float* gram = static_cast<const float*>(network_.gram.data);
    for (int first = 0; first < flips; first += kUnitBlock) {
      const float* rows[kUnitBlock];
      const int count = std::min(kUnitBlock, flips - first);
      for (int i = 0; i < count; ++i) rows[i] = gram + flips_[r][first + i] * network_.gram.stride;
      accumulate(d_[r], rows, by_[r] + first, count, 0, units_);
    }
  }

  // The step length after which the first unit's sign changes.
  float shortest_to_flip(int r) const {
    const float* z = z_[r];
    const float* d = d_[r];
    Vec least = spread(std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < padded_units_; j += kWidth) {
      const Vec here = load(z + j), velocity = load(d + j);
      // Towards zero: on and falling, or off and rising.
      const VecInt nearing = (here > zero()) ? VecInt(velocity < zero()) : VecInt(velocity > zero());
      const Vec length = nearing ? -here / velocity : least;
      least = length < least ? length : least;
    }
    float lanes[RECONTROL_WIDTH], shortest = std::numeric_limits<float>::infinity();
    std::memcpy(lanes, &least, sizeof lanes);
    for (float lane : lanes) shortest = std::min(shortest, lane);
    return shortest;
  }

  float value_at(int r) const {
    Vec running = zero();
    for (int64_t j = 0; j < units_; j += kWidth) {
      const Vec out = units_ - j >= kWidth ? load(network_.out + j) : load_some(network_.out + j, units_ - j);
      running = fma(out, relu(load(z_[r] + j)), running);
    }
    return sum(running) + network_.offset;
  }

  // Leave in `by` what each row of W1 contributes beside total * g_0; or everything, when most units have flipped.
  void prepare_leave(int r) {
    from_first_[r] = 2 * ever_count_[r] <= units_;
    if (from_first_[r]) {
      std::fill(by_[r], by_[r] + units_, 0.0f);
      for (int i = 0; i < ever_count_[r]; ++i) {
        const int32_t j = ever_[r][i];
        by_[r][j] = static_cast<float>(correction_[r][j] + total_[r] * (static_cast<double>(c_[r][j]) - first_c_[r][j]));
      }
    } else {
      for (int64_t j = 0; j < units_; ++j) by_[r][j] = static_cast<float>(correction_[r][j] + total_[r] * c_[r][j]);
    }
  }

  // h_n = h_0 + W1^T S over one share of the columns.
  void leave(int r, int share, int shares) {
    int64_t begin, end;
    columns_of(share, shares, width_, &begin, &end);
    const Row& row = rows_[r];
    if (row.steps == 0) {
      copy_hidden(dtype_, row, begin, end);
      return;
    }
    // Part by part, as g_0 was summed: two short sums round less than a long one.
    float* edit = edit_[r];
    const float total = from_first_[r] ? static_cast<float>(total_[r]) : 0.0f;
    std::fill(edit + begin, edit + end, 0.0f);
    for (int p = 0; p < parts_; ++p) {
      float* part = partial_[r][p];
      for (int64_t k = begin; k < end; ++k) part[k] *= total;
      accumulate_rows<T>(network_.first, &by_[r], 1, p * part_, std::min(units_, (p + 1) * part_), begin, end, &part);
      for (int64_t k = begin; k < end; ++k) edit[k] += part[k];
    }
    write_edited(dtype_, row, edit, begin, end);
  }

  const ValueNetwork& network_;
  const Row* rows_;
  const int count_;
  const DType dtype_;
  const int64_t units_, width_;
  int64_t padded_units_, padded_width_, part_;
  int parts_;

  States h_;
  // Per row of the tile; `padded_units_` or `padded_width_` long.
  float* edit_[kTileRows];         // u = h_n - h_0
  float* z_[kTileRows];            // pre-activations
  float* d_[kTileRows];            // velocity, dz per unit of step length
  float* first_c_[kTileRows];      // c at the start
  float* c_[kTileRows];            // c of the present step
  float* by_[kTileRows];           // factors of the rows that are being added up
  double* correction_[kTileRows];
  int32_t* flips_[kTileRows];      // units whose sign changed in the last step
  int32_t* ever_[kTileRows];       // units that have flipped at all
  uint8_t* seen_[kTileRows];       // whether a unit is in `ever_`
  float* partial_[kTileRows][kParts];
  int ever_count_[kTileRows];
  bool from_first_[kTileRows];
  double total_[kTileRows];        // step length taken so far
};
