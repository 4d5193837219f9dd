/* The k keys of largest product with each token, several sets of keys at a time.
 *
 * A product in bfloat16 screens, then each key that may be among the k is scored again in float64,
 * rounded to float32. With x' and v' rounded to bfloat16 and s the screened product,
 *
 *   |s - <x, v>| <= |x - x'| |v| + |x'| |v - v'| + g |x'| |v'|,
 *
 * by Cauchy and Schwarz, the norms measured and not estimated; g covers the float32 sums of the
 * screen (n additions, each off by 2^-24 of the sum so far, twice that for processors that cut).
 * A key whose upper bound is under the k-th largest lower bound is not among the k: k others are
 * larger for sure. Every other key is scored again, so the screen decides nothing.
 *
 * Keys lie in memory once: of each number the upper half, which is v', and the lower, which the
 * score in float64 puts back under it.
 */

#define MOST 64 /* largest k */

typedef struct { float rank[MOST], score[MOST]; int64_t index[MOST]; } Best;

INLINE int ahead(float one, float other) { /* NaN is the largest, as torch.topk has it */
    return one > other || (one != one && other == other);
}

/* Puts a score among the k best; of equal ones the first to come stays ahead. */
INLINE void offer(Best *best, int64_t k, int64_t *held, float score, int64_t index, int absolute) {
    float rank = absolute ? fabsf(score) : score;
    int64_t place = k - 1;
    if (*held < k) place = (*held)++;
    else if (!ahead(rank, best->rank[place])) return;
    for (; place > 0 && ahead(rank, best->rank[place - 1]); place--) {
        best->rank[place] = best->rank[place - 1];
        best->score[place] = best->score[place - 1];
        best->index[place] = best->index[place - 1];
    }
    best->rank[place] = rank;
    best->score[place] = score;
    best->index[place] = index;
}

INLINE void keep(const Best *best, int64_t k, int64_t *index, float *score) {
    memcpy(index, best->index, sizeof(int64_t) * (size_t)k);
    memcpy(score, best->score, sizeof(float) * (size_t)k);
}

/* The k largest of each row of scores (t, e): index and score (t, k), the largest first. */
void mttl_select(const float *scores, int64_t step, int64_t t, int64_t e, int64_t k, int absolute,
                 int64_t *index, float *score, int threads) {
    (void)threads;
    PARALLEL(if (t * e > 32768))
    {
        SHARED_FOR
        for (int64_t block = 0; block < t; block += 64)
            for (int64_t token = block; token < MIN(block + 64, t); token++) {
                const float *row = scores + token * step;
                Best best;
                int64_t held = 0, c = 0;
                for (; held < k; c++) offer(&best, k, &held, row[c], c, absolute);
                for (; c < e; c++) {
                    float rank = absolute ? fabsf(row[c]) : row[c];
                    if (!(rank <= best.rank[k - 1])) offer(&best, k, &held, row[c], c, absolute);
                }
                keep(&best, k, index + token * k, score + token * k);
            }
    }
}

/* Whether mttl_top_k was compiled for this processor. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_SCREEN 1
#else
#define HAS_SCREEN 0
#endif
int mttl_has_screen(void) { return HAS_SCREEN; }

#if HAS_SCREEN

#define KEYS 4 /* of a register block, */
#define TOKENS 6 /* and tokens: 24 accumulators */
#define WIDE 32 /* numbers that one instruction multiplies, which rows are padded to */

/* Which of the 16 numbers from c on are there, of n. */
#define REAL(c, n) (__mmask16)((n) - (c) >= 16 ? 0xffff : (1 << ((n) > (c) ? (n) - (c) : 0)) - 1)

/* Two vectors of 8 from one of 16. */
#define HALF(value, h)                                                                             \
    _mm512_cvtps_pd((h) ? _mm512_extractf32x8_ps(value, 1) : _mm512_castps512_ps256(value))

/* Adds the squares of 16 numbers, and of what their rounded ones, back in float32, leave out. */
INLINE void measure(__m512 value, __m512i back, __m512d *all, __m512d *off) {
    __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(back));
    for (int h = 0; h < 2; h++) {
        all[h] = _mm512_fmadd_pd(HALF(value, h), HALF(value, h), all[h]);
        off[h] = _mm512_fmadd_pd(HALF(rest, h), HALF(rest, h), off[h]);
    }
}

/* The square roots of both sums, a little too large. */
INLINE void measured(const __m512d *all, const __m512d *off, float *norm, float *lost) {
    *norm = (float)sqrt(_mm512_reduce_add_pd(_mm512_add_pd(all[0], all[1]))) * (1 + 1e-6f);
    *lost = (float)sqrt(_mm512_reduce_add_pd(_mm512_add_pd(off[0], off[1]))) * (1 + 1e-6f);
}

/* Rounds a row of n numbers to width of bfloat16, and measures it and what was lost. The norms
 * are summed in float64, where no square of a float32 is lost, and end up a little too large. */
INLINE void rounded_row(const float *x, int64_t n, int64_t width, bf16 *to, float *norm,
                        float *lost) {
    __m512d all[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, off[2] = {all[0], all[0]};
    for (int64_t c = 0; c < width; c += 16) {
        __m512 value = _mm512_maskz_loadu_ps(REAL(c, n), x + c);
        /* To nearest; what the dot product would take for 0 becomes 0 here. */
        __m256i near = (__m256i)_mm512_cvtneps_pbh(value);
        _mm256_storeu_si256((__m256i *)(to + c), near);
        measure(value, _mm512_slli_epi32(_mm512_cvtepu16_epi32(near), 16), all, off);
    }
    measured(all, off, norm, lost);
}

/* Keys (e, i) as halves, each (e, width): upper is the number rounded to bfloat16, and lower what
 * is to be added to its bits, with a sign, for all of it. And the norm of each key and of what
 * rounding took, (2, padded e). */
void mttl_split_keys(const float *keys, int64_t e, int64_t i, bf16 *upper, int16_t *lower,
                     float *norms, int threads) {
    int64_t width = (i + WIDE - 1) / WIDE * WIDE, padded = (e + 15) / 16 * 16;
    (void)threads;
    memset(norms, 0, sizeof(float) * 2 * (size_t)padded);
    PARALLEL(if (e * i > 32768))
    {
        SHARED_FOR
        for (int64_t key = 0; key < e; key++) {
            __m512d all[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, off[2] = {all[0], all[0]};
            for (int64_t c = 0; c < width; c += 16) {
                __m512i bits = _mm512_maskz_loadu_epi32(REAL(c, i), keys + key * i + c);
                __m512i near = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
                near = _mm512_and_si512(near, _mm512_set1_epi32((int)0xffff0000));
                _mm256_storeu_si256((__m256i *)(upper + key * width + c),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
                _mm256_storeu_si256((__m256i *)(lower + key * width + c),
                                    _mm512_cvtepi32_epi16(bits));
                /* What is below the normal numbers the dot product takes for 0. */
                __mmask16 normal = _mm512_test_epi32_mask(near, _mm512_set1_epi32(0x7f800000));
                measure(_mm512_castsi512_ps(bits), _mm512_maskz_mov_epi32(normal, near), all, off);
            }
            measured(all, off, norms + key, norms + padded + key);
        }
    }
}

/* 16 numbers from their halves. */
INLINE __m512i whole(const bf16 *upper, const int16_t *lower) {
    __m256i up = _mm256_loadu_si256((const __m256i *)upper);
    __m256i low = _mm256_loadu_si256((const __m256i *)lower);
    return _mm512_add_epi32(_mm512_slli_epi32(_mm512_cvtepu16_epi32(up), 16),
                            _mm512_cvtepi16_epi32(low));
}

/* The keys (e, i) that mttl_split_keys was given, bit for bit. */
void mttl_join_keys(const bf16 *upper, const int16_t *lower, int64_t e, int64_t i, float *keys,
                    int threads) {
    int64_t width = (i + WIDE - 1) / WIDE * WIDE;
    (void)threads;
    PARALLEL(if (e * i > 32768))
    {
        SHARED_FOR
        for (int64_t key = 0; key < e; key++)
            for (int64_t c = 0; c < i; c += 16)
                _mm512_mask_storeu_epi32(keys + key * i + c, REAL(c, i),
                                         whole(upper + key * width + c, lower + key * width + c));
    }
}

/* <x, v> in float64, always in the same order. */
INLINE float exact(const float *x, const bf16 *upper, const int16_t *lower, int64_t n) {
    __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int64_t c = 0; c < n; c += 16) {
        __m512 value = _mm512_maskz_loadu_ps(REAL(c, n), x + c);
        __m512 key = _mm512_castsi512_ps(whole(upper + c, lower + c));
        for (int h = 0; h < 2; h++)
            sum[h] = _mm512_fmadd_pd(HALF(value, h), HALF(key, h), sum[h]);
    }
    return (float)_mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
}

/* Products of m_n tokens with v_n keys; each sum of 16 is folded to one at the end. */
INLINE void screened(const bf16 *x, const bf16 *keys, int64_t width, int m_n, int v_n, float *to,
                     int64_t step) {
    __m512 sum[TOKENS][KEYS];
    for (int m = 0; m < m_n; m++)
        for (int v = 0; v < KEYS; v++) sum[m][v] = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += WIDE) {
        __m512bh of_key[KEYS];
        for (int v = 0; v < v_n; v++) {
            of_key[v] = (__m512bh)_mm512_loadu_si512(keys + v * width + c);
            __builtin_prefetch(keys + (v + v_n) * width + c); /* of the next call */
        }
        for (int m = 0; m < m_n; m++) {
            __m512bh of_x = (__m512bh)_mm512_loadu_si512(x + m * width + c);
            for (int v = 0; v < v_n; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], of_x, of_key[v]);
        }
    }
    for (int m = 0; m < m_n; m++) {
        __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(sum[m][0], sum[m][1]),
                                   _mm512_unpackhi_ps(sum[m][0], sum[m][1]));
        __m512 two = _mm512_add_ps(_mm512_unpacklo_ps(sum[m][2], sum[m][3]),
                                   _mm512_unpackhi_ps(sum[m][2], sum[m][3]));
        __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(one), _mm512_castps_pd(two));
        __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(one), _mm512_castps_pd(two));
        __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(to + m * step, all); /* rows are padded to more than KEYS */
    }
}

INLINE void screened_keys(const bf16 *x, const bf16 *keys, int64_t e, int64_t width, int m_n,
                          float *to, int64_t step) {
    int64_t key = 0;
    for (; key + KEYS <= e; key += KEYS)
        screened(x, keys + key * width, width, m_n, KEYS, to + key, step);
    for (; key < e; key++) screened(x, keys + key * width, width, m_n, 1, to + key, step);
}

/* The k-th largest of the numbers in four vectors, which lose the larger ones. */
INLINE float kth_of(__m512 *v, int64_t k) {
    for (;; k--) {
        __m512 all = _mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3]));
        float top = _mm512_reduce_max_ps(all);
        if (k == 1) return top;
        for (int q = 0; q < 4; q++) {
            unsigned equal = _mm512_cmp_ps_mask(v[q], _mm512_set1_ps(top), _CMP_EQ_OQ);
            if (!equal) continue;
            v[q] = _mm512_mask_mov_ps(v[q], (__mmask16)(equal & -equal), _mm512_set1_ps(-INFINITY));
            break;
        }
    }
}

/* Best k of one token among the keys that the screen leaves, whose products become upper bounds.
 *
 * What a key must reach is the k-th largest among the best lower bounds of 64 lots of keys: k keys
 * reach that, and no branch depends on a key. may holds padded e + 16 indices. */
INLINE int64_t settle(const float *x, const bf16 *upper, const int16_t *lower, float *screen,
                      const float *norms, int64_t e, int64_t i, int64_t k, int absolute, float norm,
                      float lost, int32_t *may, Best *best) {
    int64_t padded = (e + 15) / 16 * 16, width = (i + WIDE - 1) / WIDE * WIDE, n_may = 0, held = 0;
    float sums = (float)(2 * i + 32) * 0x1p-24f, near = norm + lost;
    __m512 by_key = _mm512_set1_ps((lost + near * sums) * (1 + 1e-5f));
    __m512 by_loss = _mm512_set1_ps(near * (1 + sums) * (1 + 1e-5f));
    __m512 tiny = _mm512_set1_ps((float)(4 * i + 4) * 0x1p-126f), none = _mm512_set1_ps(-INFINITY);
    __m512 lots[4] = {none, none, none, none};
    for (int64_t c = 0; c < padded; c += 16) {
        __m512 size = _mm512_loadu_ps(screen + c), *lot = lots + c / 16 % 4;
        if (absolute) size = _mm512_abs_ps(size);
        __m512 off = _mm512_fmadd_ps(by_key, _mm512_loadu_ps(norms + c),
                                     _mm512_fmadd_ps(by_loss, _mm512_loadu_ps(norms + padded + c),
                                                     tiny));
        __m512 least = _mm512_sub_ps(size, off);
        __mmask16 number = _mm512_mask_cmp_ps_mask(REAL(c, e), least, none, _CMP_GT_OQ);
        *lot = _mm512_mask_max_ps(*lot, number, *lot, least);
        _mm512_storeu_ps(screen + c, _mm512_add_ps(size, off));
    }
    __m512 top = _mm512_set1_ps(kth_of(lots, k));
    __m512i key = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t c = 0; c < padded; c += 16, key = _mm512_add_epi32(key, _mm512_set1_epi32(16))) {
        /* NaN is not less than anything, so it is scored again. */
        __mmask16 above = _mm512_mask_cmp_ps_mask(REAL(c, e), _mm512_loadu_ps(screen + c), top,
                                                  _CMP_NLT_UQ);
        _mm512_storeu_si512(may + n_may, _mm512_maskz_compress_epi32(above, key));
        n_may += __builtin_popcount(above);
    }
    for (int64_t n = 0; n < n_may; n++) {
        int64_t from = may[n] * width;
        offer(best, k, &held, exact(x, upper + from, lower + from, i), may[n], absolute);
    }
    return n_may;
}

/* For each of n_sets key sets (sizes[s], i), in halves as above: index and score (t, ks[s]) of the
 * largest. Returns how many scores were computed again, or -1 without memory. */
int64_t mttl_top_k(const void *x, int x_type, int64_t x_step, int64_t t, int64_t i, int64_t n_sets,
                   const int64_t *sizes, const int64_t *ks, const bf16 *const *upper,
                   const int16_t *const *lower, const float *const *norms, int absolute,
                   int64_t *const *index, float *const *score, int threads) {
    int64_t width = (i + WIDE - 1) / WIDE * WIDE, widest = 0, total = 0, again = 0, failed = 0;
    for (int64_t s = 0; s < n_sets; s++) {
        total += sizes[s];
        if (sizes[s] > widest) widest = sizes[s];
    }
    widest = (widest + 15) / 16 * 16 + KEYS;
    int64_t size = (t + threads - 1) / threads;
    size = size >= TOKENS ? TOKENS : size > 4 ? 4 : size; /* tokens of one block */
    if (size == 3) size = 4;
    PARALLEL(if (t * total * i > 131072) reduction(+ : again))
    {
        size_t bytes = (size_t)TOKENS * (size_t)(4 * (i + widest) + 2 * width) + 8 * (size_t)widest;
        char *own = malloc(bytes + 128);
        int32_t *may = (int32_t *)own;
        float *rows = (float *)(may + (own ? 2 * widest : 0)), *screen = rows + TOKENS * i;
        bf16 *near = (bf16 *)(((uintptr_t)(screen + TOKENS * widest) + 63) / 64 * 64);
        if (!own) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
            failed = 1;
        }
        SHARED_FOR
        for (int64_t from = 0; from < t; from += size) {
            if (!own) continue;
            int m_n = (int)MIN(size, t - from);
            const float *x32[TOKENS];
            float norm[TOKENS], lost[TOKENS];
            for (int m = 0; m < m_n; m++) {
                x32[m] = row_f32(x, x_type, (from + m) * x_step, i, rows + m * i);
                rounded_row(x32[m], i, width, near + m * width, norm + m, lost + m);
            }
            for (int64_t s = 0; s < n_sets; s++) {
                if (m_n == 6) screened_keys(near, upper[s], sizes[s], width, 6, screen, widest);
                else if (m_n == 4) screened_keys(near, upper[s], sizes[s], width, 4, screen, widest);
                else for (int m = 0; m < m_n; m++)
                    screened_keys(near + m * width, upper[s], sizes[s], width, 1,
                                  screen + m * widest, widest);
                for (int m = 0; m < m_n; m++) {
                    Best best;
                    again += settle(x32[m], upper[s], lower[s], screen + m * widest, norms[s],
                                    sizes[s], i, ks[s], absolute, norm[m], lost[m], may, &best);
                    keep(&best, ks[s], index[s] + (from + m) * ks[s],
                         score[s] + (from + m) * ks[s]);
                }
            }
        }
        free(own);
    }
    return failed ? -1 : again;
}

#endif
