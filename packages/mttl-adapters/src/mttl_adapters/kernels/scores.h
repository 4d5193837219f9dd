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
 */

#define MOST 64 /* largest k */

/* <x, v> in float64, always in the same order. */
INLINE float exact(const float *x, const float *v, int64_t n) {
    typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef double doubles __attribute__((vector_size(64)));
    doubles sum = {0}, other = {0};
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
        sum += __builtin_convertvector(*(const floats *)(x + c), doubles) *
               __builtin_convertvector(*(const floats *)(v + c), doubles);
        other += __builtin_convertvector(*(const floats *)(x + c + 8), doubles) *
                 __builtin_convertvector(*(const floats *)(v + c + 8), doubles);
    }
    sum += other;
    double all = 0;
    for (int l = 0; l < 8; l++) all += sum[l];
    for (; c < n; c++) all += (double)x[c] * v[c];
    return (float)all;
}

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

#define PANEL 4 /* vectors of 16 keys in a register block, */
#define TOKENS 6 /* and tokens: 24 accumulators */

/* Rounds a row of n numbers to 2 * half of bfloat16, and measures it and what was lost. The norms
 * are summed in float64, where no square of a float32 is lost, and end up a little too large. */
INLINE void rounded_row(const float *x, int64_t n, int64_t half, bf16 *to, float *norm,
                        float *lost) {
    __m512d all[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, off[2] = {all[0], all[0]};
    for (int64_t c = 0; c < 2 * half; c += 16) {
        __mmask16 there = n - c >= 16 ? 0xffff : (__mmask16)((1 << (n > c ? n - c : 0)) - 1);
        __mmask16 wanted = 2 * half - c >= 16 ? 0xffff : (__mmask16)((1 << (2 * half - c)) - 1);
        __m512 value = _mm512_maskz_loadu_ps(there, x + c);
        /* To nearest; what the dot product would take for 0 becomes 0 here. */
        __m256i near = (__m256i)_mm512_cvtneps_pbh(value);
        __m512i back = _mm512_slli_epi32(_mm512_cvtepu16_epi32(near), 16);
        __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(back));
        _mm256_mask_storeu_epi16(to + c, wanted, near);
        for (int h = 0; h < 2; h++) {
            __m512d part = _mm512_cvtps_pd(h ? _mm512_extractf32x8_ps(value, 1)
                                             : _mm512_castps512_ps256(value));
            all[h] = _mm512_fmadd_pd(part, part, all[h]);
            part = _mm512_cvtps_pd(h ? _mm512_extractf32x8_ps(rest, 1)
                                     : _mm512_castps512_ps256(rest));
            off[h] = _mm512_fmadd_pd(part, part, off[h]);
        }
    }
    *norm = (float)sqrt(_mm512_reduce_add_pd(_mm512_add_pd(all[0], all[1]))) * (1 + 1e-6f);
    *lost = (float)sqrt(_mm512_reduce_add_pd(_mm512_add_pd(off[0], off[1]))) * (1 + 1e-6f);
}

/* Keys (e, i) as the screen reads them: panels of 64 keys, each (i / 2, keys, 2) in bfloat16, and
 * the norm of each key and of what rounding took, (2, padded e). */
void mttl_pack_keys(const float *keys, int64_t e, int64_t i, bf16 *packed, float *norms,
                    int threads) {
    int64_t half = (i + 1) / 2, padded = (e + 15) / 16 * 16;
    (void)threads;
    memset(norms, 0, sizeof(float) * 2 * (size_t)padded);
    PARALLEL(if (e * i > 32768))
    {
        SHARED_FOR
        for (int64_t panel = 0; panel < padded; panel += 16 * PANEL) {
            int64_t width = MIN(16 * PANEL, padded - panel);
            bf16 *to = packed + panel * half * 2;
            memset(to, 0, sizeof(bf16) * (size_t)(width * half * 2));
            bf16 *row = malloc(sizeof(bf16) * 2 * (size_t)half);
            if (!row) { /* no bound holds, so that every key is scored again */
                for (int64_t key = panel; key < panel + width; key++) norms[key] = INFINITY;
                continue;
            }
            for (int64_t key = 0; key < width && panel + key < e; key++) {
                rounded_row(keys + (panel + key) * i, i, half, row, norms + panel + key,
                            norms + padded + panel + key);
                for (int64_t c = 0; c < half; c++)
                    memcpy(to + (c * width + key) * 2, row + 2 * c, 2 * sizeof(bf16));
            }
            free(row);
        }
    }
}

INLINE void screened(const bf16 *x, const bf16 *panel, int64_t half, int m_n, int v_n, float *to,
                     int64_t step) {
    __m512 sum[TOKENS][PANEL];
    for (int m = 0; m < m_n; m++)
        for (int v = 0; v < v_n; v++) sum[m][v] = _mm512_setzero_ps();
    for (int64_t c = 0; c < half; c++) {
        __m512bh keys[PANEL];
        for (int v = 0; v < v_n; v++)
            keys[v] = (__m512bh)_mm512_loadu_si512(panel + (c * v_n + v) * 32);
        for (int m = 0; m < m_n; m++) {
            int pair;
            memcpy(&pair, x + (m * half + c) * 2, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < v_n; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, keys[v]);
        }
    }
    for (int m = 0; m < m_n; m++)
        for (int v = 0; v < v_n; v++) _mm512_storeu_ps(to + m * step + v * 16, sum[m][v]);
}

INLINE void screened_panel(const bf16 *x, const bf16 *panel, int64_t half, int m_n, int v_n,
                           float *to, int64_t step) {
    switch (v_n) {
    case 4: screened(x, panel, half, m_n, 4, to, step); break;
    case 3: screened(x, panel, half, m_n, 3, to, step); break;
    case 2: screened(x, panel, half, m_n, 2, to, step); break;
    default: screened(x, panel, half, m_n, 1, to, step);
    }
}

/* Best k of one token among the keys that the screen leaves; may holds padded e indices. */
INLINE int64_t settle(const float *x, const float *keys, const float *screen, const float *norms,
                      int64_t e, int64_t i, int64_t k, int absolute, float norm, float lost,
                      int64_t *may, Best *best) {
    int64_t padded = (e + 15) / 16 * 16, n_may = 0, held = 0;
    float sums = (float)(2 * i + 32) * 0x1p-24f, near = norm + lost;
    __m512 by_key = _mm512_set1_ps((lost + near * sums) * (1 + 1e-5f));
    __m512 by_loss = _mm512_set1_ps(near * (1 + sums) * (1 + 1e-5f));
    __m512 tiny = _mm512_set1_ps((float)(4 * i + 4) * 0x1p-126f), top, off, size;
    float lower[MOST];
    for (int64_t n = 0; n < k; n++) lower[n] = -INFINITY;
#define BOUND(c)                                                                                   \
    size = _mm512_loadu_ps(screen + (c));                                                          \
    if (absolute) size = _mm512_abs_ps(size);                                                      \
    off = _mm512_fmadd_ps(by_key, _mm512_loadu_ps(norms + (c)),                                    \
                          _mm512_fmadd_ps(by_loss, _mm512_loadu_ps(norms + padded + (c)), tiny));
#define REAL_KEYS(c) (__mmask16)(e - (c) >= 16 ? 0xffff : (1 << (e - (c))) - 1)
    for (int64_t c = 0; c < e; c += 16) {
        BOUND(c)
        size = _mm512_sub_ps(size, off);
        top = _mm512_set1_ps(lower[k - 1]);
        __mmask16 above = _mm512_mask_cmp_ps_mask(REAL_KEYS(c), size, top, _CMP_GT_OQ);
        if (!above) continue;
        float lanes[16];
        _mm512_storeu_ps(lanes, size);
        for (; above; above &= (__mmask16)(above - 1)) {
            float value = lanes[__builtin_ctz(above)];
            int64_t place = k - 1;
            if (!(value > lower[place])) continue;
            for (; place > 0 && value > lower[place - 1]; place--) lower[place] = lower[place - 1];
            lower[place] = value;
        }
    }
    top = _mm512_set1_ps(lower[k - 1]);
    for (int64_t c = 0; c < e; c += 16) {
        BOUND(c)
        size = _mm512_add_ps(size, off); /* NaN is not less than anything, so it is scored again */
        __mmask16 above = _mm512_mask_cmp_ps_mask(REAL_KEYS(c), size, top, _CMP_NLT_UQ);
        for (; above; above &= (__mmask16)(above - 1)) may[n_may++] = c + __builtin_ctz(above);
    }
#undef BOUND
#undef REAL_KEYS
    for (int64_t n = 0; n < n_may; n++)
        offer(best, k, &held, exact(x, keys + may[n] * i, i), may[n], absolute);
    return n_may;
}

/* For each of n_sets key sets (sizes[s], i), packed as above: index and score (t, ks[s]) of the
 * largest. Returns how many scores were computed again, or -1 without memory. */
int64_t mttl_top_k(const void *x, int x_type, int64_t x_step, int64_t t, int64_t i, int64_t n_sets,
                   const int64_t *sizes, const int64_t *ks, const float *const *keys,
                   const bf16 *const *packed, const float *const *norms, int absolute,
                   int64_t *const *index, float *const *score, int threads) {
    int64_t half = (i + 1) / 2, widest = 0, total = 0, again = 0, failed = 0;
    for (int64_t s = 0; s < n_sets; s++) {
        total += sizes[s];
        if (sizes[s] > widest) widest = sizes[s];
    }
    widest = (widest + 15) / 16 * 16;
    int64_t size = (t + threads - 1) / threads;
    size = size >= TOKENS ? TOKENS : size > 4 ? 4 : size; /* tokens of one block */
    if (size == 3) size = 4;
    PARALLEL(if (t * total * i > 131072) reduction(+ : again))
    {
        size_t bytes = (size_t)TOKENS * (4 * (size_t)(i + half + widest)) + 8 * (size_t)widest;
        char *own = malloc(bytes + 64);
        int64_t *may = (int64_t *)own;
        float *rows = (float *)(may + (own ? widest : 0)), *screen = rows + TOKENS * i;
        bf16 *near = (bf16 *)(screen + TOKENS * widest);
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
                rounded_row(x32[m], i, half, near + m * half * 2, norm + m, lost + m);
            }
            for (int64_t s = 0; s < n_sets; s++) {
                int64_t padded = (sizes[s] + 15) / 16 * 16;
                for (int64_t panel = 0; panel < padded; panel += 16 * PANEL) {
                    int v_n = (int)(MIN(16 * PANEL, padded - panel) / 16);
                    const bf16 *first = packed[s] + panel * half * 2;
                    float *to = screen + panel;
                    if (m_n == 6) screened_panel(near, first, half, 6, v_n, to, widest);
                    else if (m_n == 4) screened_panel(near, first, half, 4, v_n, to, widest);
                    else for (int m = 0; m < m_n; m++)
                        screened_panel(near + m * half * 2, first, half, 1, v_n, to + m * widest,
                                       widest);
                }
                for (int m = 0; m < m_n; m++) {
                    Best best;
                    again += settle(x32[m], keys[s], screen + m * widest, norms[s], sizes[s], i,
                                    ks[s], absolute, norm[m], lost[m], may, &best);
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
