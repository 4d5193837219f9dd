/* h = A x where both are bfloat16, by the processor's own dot product: pairs of products that are
 * exact, summed in float32. Numbers under 2^-126 count as 0.
 */

INLINE void dots_bf16(const bf16 *const *x, const bf16 *a, int64_t i, int m_n, int q_n, float *h,
                      int64_t rank, const void *const *ahead) {
    __m512 sum[ROWS][RANKS];
    for (int m = 0; m < m_n; m++)
        for (int q = 0; q < q_n; q++) sum[m][q] = _mm512_setzero_ps();
    for (int64_t c = 0; c < i; c += 32) {
        __mmask32 there = i - c >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (i - c)) - 1;
        __m512bh from_a[RANKS];
        for (int q = 0; q < q_n; q++)
            from_a[q] = (__m512bh)_mm512_maskz_loadu_epi16(there, a + q * i + c);
        for (int m = 0; m < m_n; m++) {
            __m512bh from_x = (__m512bh)_mm512_maskz_loadu_epi16(there, x[m] + c);
            if (ahead) __builtin_prefetch((const char *)ahead[m] + 2 * c);
            for (int q = 0; q < q_n; q++)
                sum[m][q] = _mm512_dpbf16_ps(sum[m][q], from_x, from_a[q]);
        }
    }
    for (int m = 0; m < m_n; m++) totals_f32((const vec_f32 *)sum[m], q_n, h + m * rank);
}

INLINE void hidden_bf16(const bf16 *const *x, const bf16 *a, int64_t i, int64_t rank, int m_n,
                        float *h, const void *const *ahead) {
    int64_t q = 0;
    for (; q + RANKS <= rank; q += RANKS) {
        if (!q) dots_bf16(x, a + q * i, i, m_n, RANKS, h + q, rank, ahead);
        else dots_bf16(x, a + q * i, i, m_n, RANKS, h + q, rank, NULL);
    }
    for (; q < rank; q++) dots_bf16(x, a + q * i, i, m_n, 1, h + q, rank, NULL);
}
