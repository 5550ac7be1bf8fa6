// What two and three layers share: the rows that are computed together, how far each may go, and moving states in and out.
// Included by each ascend_<isa>.cpp after products.h.

// Rows computed together: enough to share one pass over the weights, few enough for their states to stay in cache.
constexpr int kTileRows = 8;
// Consecutive units whose weights are read together.
constexpr int kUnitBlock = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that one call needs, kept by the calling thread for its next call.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (buffer().size() < bytes + 64) buffer().resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(buffer().data());
    next_ = buffer().data() + (64 - address % 64) % 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return taken;
  }
  template <class T>
  static size_t bytes_for(int64_t count) {
    return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }

 private:
  static std::vector<char>& buffer() {
    static thread_local std::vector<char> memory;
    return memory;
  }
  char* next_;
};

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One row of the batch: where it lies and how far it may go.
struct Row : Limits {
  const void* hidden = nullptr;
  void* edited = nullptr;
  float* trace = nullptr;
  int64_t trace_columns = 0;

  // Whether the length of a step depends on where the row is.
  bool measured() const { return has_radius() || has_target() || trace != nullptr; }
};

inline Row row_of(const AscentBatch& batch, int64_t index) {
  Row row{limits_of(batch, index)};
  const auto size = static_cast<int64_t>(size_of(batch.dtype));
  row.hidden = static_cast<const char*>(batch.hidden) + index * batch.hidden_stride * size;
  row.edited = static_cast<char*>(batch.edited) + index * batch.edited_stride * size;
  if (batch.trace != nullptr) row.trace = batch.trace + index * batch.trace_columns;
  row.trace_columns = batch.trace_columns;
  return row;
}

// Fill the trace from column `from` on with its present last value.
inline void hold_trace(const Row& row, int64_t from, float value) {
  for (int64_t k = from; k < row.trace_columns; ++k) row.trace[k] = value;
}

template <class T>
inline void widen_row(const T* from, int64_t count, float* into) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) store(into + k, load(from + k));
  for (; k < count; ++k) into[k] = widen(from[k]);
}

inline void widen_hidden(DType dtype, const void* from, int64_t count, float* into) {
  if (dtype == DType::kFloat32) widen_row(static_cast<const float*>(from), count, into);
  if (dtype == DType::kBFloat16) widen_row(static_cast<const BFloat16*>(from), count, into);
  if (dtype == DType::kFloat16) widen_row(static_cast<const Float16*>(from), count, into);
}

template <class T>
inline void write_row(const Row& row, const float* edit, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(row.hidden);
  T* into = static_cast<T*>(row.edited);
  for (int64_t k = begin; k < end; ++k) into[k] = narrow(widen(from[k]) + edit[k], static_cast<T*>(nullptr));
}

// edited = hidden + edit over the columns [begin, end), rounded once to the dtype of the hidden state.
inline void write_edited(DType dtype, const Row& row, const float* edit, int64_t begin, int64_t end) {
  if (dtype == DType::kFloat32) write_row<float>(row, edit, begin, end);
  if (dtype == DType::kBFloat16) write_row<BFloat16>(row, edit, begin, end);
  if (dtype == DType::kFloat16) write_row<Float16>(row, edit, begin, end);
}

// The bits of the hidden state, unchanged.
inline void copy_hidden(DType dtype, const Row& row, int64_t begin, int64_t end) {
  const size_t size = size_of(dtype);
  std::memcpy(static_cast<char*>(row.edited) + begin * size, static_cast<const char*>(row.hidden) + begin * size, (end - begin) * size);
}

// Append first + i to the list for every bit i that is set.
inline void list_bits(uint32_t set, int64_t first, int32_t* list, int* count) {
  for (; set != 0; set &= set - 1) list[(*count)++] = static_cast<int32_t>(first) + __builtin_ctz(set);
}

// The share-th of `shares` ranges of columns; every range begins at a multiple of 16 columns.
inline void columns_of(int share, int shares, int64_t columns, int64_t* begin, int64_t* end) {
  const int64_t size = round_up((columns + shares - 1) / shares, 16);
  *begin = std::min(columns, share * size);
  *end = std::min(columns, *begin + size);
}

// a . b over n elements, n a multiple of kWidth.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec running = zero();
  for (int64_t k = 0; k < n; k += kWidth) running = fma(load(a + k), load(b + k), running);
  return sum(running);
}

// The hidden states of a tile: as they came, and as float32 padded with zeros to a multiple of kWidth.
struct States {
  DType dtype;
  const void* given[kTileRows];
  float* wide[kTileRows];
};

// z[r][u] = w[u] . h[r] + bias[u] for the units [begin, end) and all rows.
template <class T>
inline void enter_units(const Matrix& weights, const float* bias, int64_t begin, int64_t end, const States& states, int rows, float* const* z) {
  const T* base = static_cast<const T*>(weights.data);
  auto run = [&]<int U, int R>(int64_t unit, int first_row) {
    const T* w[U];
    for (int u = 0; u < U; ++u) w[u] = base + (unit + u) * weights.stride;
    float sums[U * R];
#if RECONTROL_BF16_DOT
    if (std::is_same_v<T, BFloat16> && states.dtype == DType::kBFloat16)
      dots_bf16<U, R>(reinterpret_cast<const BFloat16* const*>(w), reinterpret_cast<const BFloat16* const*>(states.given + first_row), weights.cols, sums);
    else
#endif
      dots<U, R>(w, states.wide + first_row, weights.cols, sums);
    for (int u = 0; u < U; ++u)
      for (int r = 0; r < R; ++r) z[first_row + r][unit + u] = sums[u * R + r] + bias[unit + u];
  };
  int r = 0;
  for (; r + 3 <= rows; r += 3) {
    int64_t unit = begin;
    for (; unit + 4 <= end; unit += 4) run.template operator()<4, 3>(unit, r);
    for (; unit < end; ++unit) run.template operator()<1, 3>(unit, r);
  }
  for (; r < rows; ++r) {
    int64_t unit = begin;
    for (; unit + 8 <= end; unit += 8) run.template operator()<8, 1>(unit, r);
    for (; unit < end; ++unit) run.template operator()<1, 1>(unit, r);
  }
}

// into[r] += sum over j of by[r][j] * matrix row j, over the columns [begin, end), skipping zeros; j ascending in [first, last).
template <class T>
inline void accumulate_rows(const Matrix& matrix, const float* const* by, int rows, int64_t first, int64_t last, int64_t begin, int64_t end, float* const* into) {
  const T* base = static_cast<const T*>(matrix.data);
  for (int64_t block = first; block < last; block += kUnitBlock) {
    const int64_t stop = std::min(last, block + kUnitBlock);
    for (int r = 0; r < rows; ++r) {
      const T* picked[kUnitBlock];
      float factors[kUnitBlock];
      int count = 0;
      for (int64_t j = block; j < stop; ++j)
        if (by[r][j] != 0.0f) {
          picked[count] = base + j * matrix.stride;
          factors[count++] = by[r][j];
        }
      if (count > 0) accumulate(into[r], picked, factors, count, begin, end);
    }
  }
}
