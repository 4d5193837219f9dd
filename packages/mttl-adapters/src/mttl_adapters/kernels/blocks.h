/* Products of a few rows at a time, held in registers, in arithmetic of type REAL. */

#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))
#define WIDTH 4 /* vectors of a block of output columns */

typedef REAL NAME(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define VEC NAME(vec)

INLINE VEC NAME(load)(const REAL *from) { return *(const VEC *)from; }

INLINE REAL NAME(total)(VEC v) {
    REAL lanes[VECTOR_BYTES / sizeof(REAL)];
    memcpy(lanes, &v, sizeof lanes);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* Sums of each of n vectors. */
INLINE void NAME(totals)(const VEC *v, int n, REAL *to) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    if (n == 4 && sizeof(REAL) == 4) { /* transposed while added: 13 operations for the four */
        __m512 w[2];
        for (int p = 0; p < 2; p++) {
            __m512 one = (__m512)v[2 * p], other = (__m512)v[2 * p + 1];
            w[p] = _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
        }
        __m512d one = _mm512_castps_pd(w[0]), other = _mm512_castps_pd(w[1]);
        __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps((float *)to, four);
        return;
    }
#endif
    for (int q = 0; q < n; q++) to[q] = NAME(total)(v[q]);
}

/* Row of `n` numbers of any type as REAL: itself, or its copy in `room`. */
INLINE const REAL *NAME(row)(const void *base, int type, int64_t start, int64_t n, REAL *room) {
    if (type == BFLOAT16) {
        const bf16 *from = (const bf16 *)base + start;
        for (int64_t c = 0; c < n; c++) room[c] = from_bf16(from[c]);
        return room;
    }
    if ((type == FLOAT64) == (sizeof(REAL) == 8)) return (const REAL *)base + start;
    for (int64_t c = 0; c < n; c++)
        room[c] = type == FLOAT64 ? (REAL)((const double *)base)[start + c]
                                  : (REAL)((const float *)base)[start + c];
    return room;
}

/* h[m][q] = <x[m], a[q]> for one register block; `ahead` is what x will be in the next one. */
INLINE void NAME(dots)(const REAL *const *x, const REAL *a, int64_t i, int m_n, int q_n, REAL *h,
                       int64_t rank, const void *const *ahead) {
    VEC sum[ROWS][RANKS] = {0};
    int64_t c = 0;
    for (; c + LANES <= i; c += LANES) {
        VEC from_a[RANKS];
        for (int q = 0; q < q_n; q++) from_a[q] = NAME(load)(a + q * i + c);
        for (int m = 0; m < m_n; m++) {
            VEC from_x = NAME(load)(x[m] + c);
            if (ahead) __builtin_prefetch((const char *)ahead[m] + c * (int64_t)sizeof(REAL));
            for (int q = 0; q < q_n; q++) sum[m][q] += from_x * from_a[q];
        }
    }
    for (int m = 0; m < m_n; m++) {
        REAL *to = h + m * rank;
        NAME(totals)(sum[m], q_n, to);
        for (int64_t d = c; d < i; d++)
            for (int q = 0; q < q_n; q++) to[q] += x[m][d] * a[q * i + d];
    }
}

INLINE void NAME(hidden)(const REAL *const *x, const REAL *a, int64_t i, int64_t rank, int m_n,
                         REAL *h, const void *const *ahead) {
    int64_t q = 0;
    for (; q + RANKS <= rank; q += RANKS) {
        if (!q) NAME(dots)(x, a + q * i, i, m_n, RANKS, h + q, rank, ahead);
        else NAME(dots)(x, a + q * i, i, m_n, RANKS, h + q, rank, NULL);
    }
    for (; q < rank; q++) NAME(dots)(x, a + q * i, i, m_n, 1, h + q, rank, NULL);
}

/* out[m][0..width) += sum over q of h[m][q] b[q][0..width), for one register block. */
INLINE void NAME(spread)(REAL *const *out, const REAL *b, int64_t b_step, const REAL *h,
                         int64_t rank, int m_n, int v_n) {
    VEC sum[ROWS][WIDTH];
    for (int m = 0; m < m_n; m++)
        for (int v = 0; v < v_n; v++) sum[m][v] = NAME(load)(out[m] + v * LANES);
    for (int64_t q = 0; q < rank; q++) {
        VEC from_b[WIDTH];
        for (int v = 0; v < v_n; v++) from_b[v] = NAME(load)(b + q * b_step + v * LANES);
        for (int m = 0; m < m_n; m++) {
            REAL one = h[m * rank + q];
            for (int v = 0; v < v_n; v++) sum[m][v] += one * from_b[v];
        }
    }
    for (int m = 0; m < m_n; m++)
        for (int v = 0; v < v_n; v++) *(VEC *)(out[m] + v * LANES) = sum[m][v];
}

INLINE void NAME(columns)(REAL *const *out, const REAL *b, int64_t b_step, const REAL *h,
                          int64_t rank, int m_n, int64_t width, REAL *const *ahead) {
    REAL *at[ROWS];
    int64_t c = 0;
    for (; c + WIDTH * LANES <= width; c += WIDTH * LANES) {
        for (int m = 0; m < m_n; m++) {
            at[m] = out[m] + c;
            if (ahead)
                for (int v = 0; v < WIDTH; v++) __builtin_prefetch(ahead[m] + c + v * LANES, 1);
        }
        NAME(spread)(at, b + c, b_step, h, rank, m_n, WIDTH);
    }
    for (; c + LANES <= width; c += LANES) {
        for (int m = 0; m < m_n; m++) at[m] = out[m] + c;
        NAME(spread)(at, b + c, b_step, h, rank, m_n, 1);
    }
    for (; c < width; c++)
        for (int m = 0; m < m_n; m++) {
            REAL one = out[m][c];
            for (int64_t q = 0; q < rank; q++) one += h[m * rank + q] * b[q * b_step + c];
            out[m][c] = one;
        }
}

/* The largest block of rows that is compiled, of those that are left. */
INLINE int NAME(rows_of)(int64_t left) {
    return left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* CALL(n) with n a constant, the number of rows that rows_of gave. */
#ifndef FOR_ROWS
#if ROWS > 4
#define FOR_ROWS(n, CALL)                                                                          \
    switch (n) {                                                                                   \
    case ROWS: CALL(ROWS); break;                                                                  \
    case 4: CALL(4); break;                                                                        \
    case 2: CALL(2); break;                                                                        \
    default: CALL(1);                                                                              \
    }
#else
#define FOR_ROWS(n, CALL)                                                                          \
    switch (n) {                                                                                   \
    case ROWS: CALL(ROWS); break;                                                                  \
    case 2: CALL(2); break;                                                                        \
    default: CALL(1);                                                                              \
    }
#endif
#endif
