// The two products that everything else is made of. Included by each ascend_<isa>.cpp after simd.h.
//
// Both are exact about order: a result is summed over its own terms in ascending order, whatever is computed beside it.
// That is what makes a row independent, to the bit, of its neighbours, of the batch size and of the number of threads.

// sums[u * R + r] = w[u] . h[r] over n elements; lane i of the running sum takes the elements i, i + kWidth, ...
// h[r] is padded with zeros to a multiple of kWidth; w[u] is not.
template <int U, int R, class T>
inline void dots(const T* const* w, const float* const* h, int64_t n, float* sums) {
  Vec running[U * R] = {};
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    Vec state[R];
    for (int r = 0; r < R; ++r) state[r] = load(h[r] + k);
    for (int u = 0; u < U; ++u) {
      const Vec weight = load(w[u] + k);
      for (int r = 0; r < R; ++r) running[u * R + r] = fma(weight, state[r], running[u * R + r]);
    }
  }
  if (k < n)
    for (int u = 0; u < U; ++u) {
      const Vec weight = load_some(w[u] + k, n - k);
      for (int r = 0; r < R; ++r) running[u * R + r] = fma(weight, load(h[r] + k), running[u * R + r]);
    }
  for (int i = 0; i < U * R; ++i) sums[i] = sum(running[i]);
}

#if RECONTROL_BF16_DOT
// The same for a hidden state that is bfloat16 too, not padded: pairs of products in one instruction, so that lane i of the
// running sum takes the elements 2i, 2i + 1, 2i + 32, 2i + 33, ...
template <int U, int R>
inline void dots_bf16(const BFloat16* const* w, const BFloat16* const* h, int64_t n, float* sums) {
  __m512 running[U * R];
  for (int i = 0; i < U * R; ++i) running[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k += 32) {
    const __mmask32 inside = n - k >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - k)) - 1;
    __m512bh state[R];
    for (int r = 0; r < R; ++r) state[r] = (__m512bh)_mm512_maskz_loadu_epi16(inside, h[r] + k);
    for (int u = 0; u < U; ++u) {
      const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(inside, w[u] + k);
      for (int r = 0; r < R; ++r) running[u * R + r] = _mm512_dpbf16_ps(running[u * R + r], weight, state[r]);
    }
  }
  for (int i = 0; i < U * R; ++i) sums[i] = sum((Vec)running[i]);
}
#endif

// into[c] += (sum over i of by[i] * rows[i][c]) for begin <= c < end, i ascending. `into` is padded to a multiple of kWidth;
// the rows end at `end` or later, and begin is a multiple of kWidth. The sum is rounded on its own before it is added:
// that keeps the error of thousands of terms near that of the few that come here together.
template <class T>
inline void accumulate(float* into, const T* const* rows, const float* by, int count, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + 4 * kWidth <= end; c += 4 * kWidth) {
    Vec a0 = zero(), a1 = zero(), a2 = zero(), a3 = zero();
    for (int i = 0; i < count; ++i) {
      const T* row = rows[i] + c;
      const Vec factor = spread(by[i]);
      a0 = fma(factor, load(row), a0);
      a1 = fma(factor, load(row + kWidth), a1);
      a2 = fma(factor, load(row + 2 * kWidth), a2);
      a3 = fma(factor, load(row + 3 * kWidth), a3);
    }
    store(into + c, load(into + c) + a0);
    store(into + c + kWidth, load(into + c + kWidth) + a1);
    store(into + c + 2 * kWidth, load(into + c + 2 * kWidth) + a2);
    store(into + c + 3 * kWidth, load(into + c + 3 * kWidth) + a3);
  }
  for (; c < end; c += kWidth) {
    Vec a = zero();
    for (int i = 0; i < count; ++i)
      a = fma(spread(by[i]), end - c >= kWidth ? load(rows[i] + c) : load_some(rows[i] + c, end - c), a);
    store(into + c, load(into + c) + a);
  }
}
