/* Sum of the chosen experts of each token, in arithmetic of type REAL.
 *
 * The pairs of token and expert are sorted by expert. Then two passes: all h = A_e x, where threads
 * share the experts, and all out += w s B_e h, where they share columns of the output, so that no
 * two write to one place, each slab is read by one thread, and the order of every sum is fixed.
 */

#define GROUP 64 /* pairs of one task of the first pass */

/* Adds to out (t, o) what the chosen experts make of x (t, i); returns how many experts were not
 * marked as used before, -1 without memory, or
 * -2 for an index beyond the experts.
 *
 * chosen (t, k) holds indices of `experts`, or -1 for none; weights (t, k) is REAL. `swapped` takes
 * B for A and A for B, which is what a gradient goes through. hidden, (pairs, rank) in the order of
 * the sorted pairs, comes back without weight and scaling.
 */
int64_t NAME(mttl_apply)(Expert *experts, int64_t n_experts, int factor_type, int swapped,
                     const void *x, int x_type, int64_t x_step, int64_t i, int64_t o,
                     const int64_t *chosen, const REAL *weights, int64_t t, int64_t k, void *out,
                     int out_type, int64_t out_step, REAL *hidden, int64_t tick, int64_t block,
                     int threads) {
    int64_t n_pairs = t * k, widest = 0, n_tasks = 0, fresh = 0, failed = 0;
    int64_t *room = malloc(sizeof(int64_t) * (size_t)(3 * (n_experts + 1) + 4 * n_pairs));
    if (!room) return -1;
    int64_t *start = room, *at = start + n_experts + 1, *first = at + n_experts + 1;
    int64_t *order = first + n_experts + 1, *tasks = order + n_pairs;
    memset(start, 0, sizeof(int64_t) * (size_t)(n_experts + 1));
    for (int64_t p = 0; p < n_pairs; p++) {
        if (chosen[p] >= n_experts) {
            free(room);
            return -2;
        }
        if (chosen[p] >= 0) start[chosen[p] + 1]++;
    }
    for (int64_t e = 0, h = 0; e < n_experts; e++) {
        int64_t pairs = start[e + 1];
        start[e + 1] += start[e];
        at[e] = start[e];
        first[e] = h;
        if (!pairs || !experts[e].rank) continue;
        h += pairs * experts[e].rank;
        fresh += !experts[e].used;
        experts[e].used = tick;
        if (experts[e].rank > widest) widest = experts[e].rank;
        for (int64_t p = 0; p < pairs; p += GROUP, n_tasks++) {
            tasks[3 * n_tasks] = e;
            tasks[3 * n_tasks + 1] = start[e] + p;
            tasks[3 * n_tasks + 2] = start[e] + MIN(p + GROUP, pairs);
        }
    }
    for (int64_t p = 0; p < n_pairs; p++)
        if (chosen[p] >= 0) order[at[chosen[p]]++] = p;

    int64_t n_blocks = (o + block - 1) / block, split = 1;
    /* Few columns and many threads: share the tokens as well. */
    while (n_blocks * split < threads && t / (2 * split) >= 64) split *= 2;
    int direct = (out_type == FLOAT64) == (sizeof(REAL) == 8) && out_type != BFLOAT16;
    int copied = factor_type == BFLOAT16 || (factor_type == FLOAT64) != (sizeof(REAL) == 8);
#ifdef HALVES
    int halves = factor_type == BFLOAT16 && x_type == BFLOAT16;
#else
    int halves = 0;
#endif
    int64_t chunk = (t + split - 1) / split, n_kept = start[n_experts];
    int64_t x_size = x_type == BFLOAT16 ? 2 : x_type == FLOAT64 ? 8 : 4;
    PARALLEL(if (n_pairs * widest * (i + o) > 32768))
    {
        size_t numbers = (size_t)(widest * (copied ? (i > block ? i : block) : 0) + ROWS * i +
                                  ROWS * widest + (direct ? 0 : chunk * block));
        REAL *own = malloc(sizeof(REAL) * (numbers + 1));
        REAL *factors = own, *xs = own;
        if (own) xs += copied ? widest * (i > block ? i : block) : 0;
        REAL *scaled = xs + ROWS * i, *sums = scaled + ROWS * widest;
        if (!own) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
            failed = 1;
        }
        SHARED_FOR
        for (int64_t task = 0; task < n_tasks; task++) {
            if (!own) continue;
            const Expert *expert = experts + tasks[3 * task];
            int64_t rank = expert->rank, from = tasks[3 * task + 1], to = tasks[3 * task + 2];
            const void *slab = swapped ? expert->b : expert->a;
            const REAL *a = halves ? NULL : NAME(row)(slab, factor_type, 0, rank * i, factors);
            REAL *h = hidden + first[tasks[3 * task]] + (from - start[tasks[3 * task]]) * rank;
            for (int64_t p = from, m_n; p < to; p += m_n, h += m_n * rank) {
                const REAL *rows[ROWS];
                const void *ahead[ROWS];
                m_n = NAME(rows_of)(to - p);
                for (int64_t m = 0; m < m_n; m++) {
                    int64_t later = MIN(p + m_n + m, n_kept - 1);
                    ahead[m] = (const char *)x + order[later] / k * x_step * x_size;
                }
#ifdef HALVES
                if (halves) {
                    const bf16 *as_kept[ROWS];
                    for (int64_t m = 0; m < m_n; m++)
                        as_kept[m] = (const bf16 *)x + order[p + m] / k * x_step;
#define HIDDEN(n) hidden_bf16(as_kept, slab, i, rank, n, h, ahead)
                    FOR_ROWS(m_n, HIDDEN)
#undef HIDDEN
                    continue;
                }
#endif
                for (int64_t m = 0; m < m_n; m++)
                    rows[m] = NAME(row)(x, x_type, order[p + m] / k * x_step, i, xs + m * i);
#define HIDDEN(n) NAME(hidden)(rows, a, i, rank, n, h, ahead)
                FOR_ROWS(m_n, HIDDEN)
#undef HIDDEN
            }
        }
        SHARED_FOR
        for (int64_t part = 0; part < n_blocks * split; part++) {
            if (!own) continue;
            int64_t column = part % n_blocks * block, width = MIN(block, o - column);
            int64_t low = part / n_blocks * chunk, high = MIN(low + chunk, t);
            REAL *base = direct ? (REAL *)out + column : sums - low * block;
            int64_t base_step = direct ? out_step : block;
            if (!direct) memset(sums, 0, sizeof(REAL) * (size_t)(chunk * block));
            for (int64_t task = 0; task < n_tasks; task++) {
                const Expert *expert = experts + tasks[3 * task];
                int64_t rank = expert->rank, from = tasks[3 * task + 1], to = tasks[3 * task + 2];
                REAL *h = hidden + first[tasks[3 * task]] + (from - start[tasks[3 * task]]) * rank;
                while (from < to && order[from] / k < low) from++, h += rank;
                while (to > from && order[to - 1] / k >= high) to--;
                if (from == to) continue;
                const void *slab = swapped ? expert->a : expert->b;
                const REAL *b = (const REAL *)slab + column;
                if (copied) {
                    for (int64_t q = 0; q < rank; q++)
                        NAME(row)(slab, factor_type, q * o + column, width, factors + q * block);
                    b = factors;
                }
                for (int64_t p = from, m_n; p < to; p += m_n, h += m_n * rank) {
                    REAL *rows[ROWS], *ahead[ROWS];
                    m_n = NAME(rows_of)(to - p);
                    for (int64_t m = 0; m < m_n; m++) {
                        int64_t pair = order[p + m], later = order[MIN(p + m_n + m, to - 1)] / k;
                        REAL weight = weights[pair] * (REAL)expert->scaling;
                        for (int64_t q = 0; q < rank; q++)
                            scaled[m * rank + q] = weight * h[m * rank + q];
                        rows[m] = base + (pair / k) * base_step;
                        ahead[m] = base + later * base_step;
                    }
                    /* One expert may be named twice for a token: then its rows must take turns. */
                    int apart = 1;
                    for (int64_t m = 1; m < m_n; m++) apart &= rows[m] != rows[m - 1];
                    int64_t step = copied ? block : o;
                    if (!apart) {
                        for (int64_t m = 0; m < m_n; m++)
                            NAME(columns)(rows + m, b, step, scaled + m * rank, rank, 1, width,
                                          NULL);
                        continue;
                    }
#define COLUMNS(n) NAME(columns)(rows, b, step, scaled, rank, n, width, ahead)
                    FOR_ROWS(m_n, COLUMNS)
#undef COLUMNS
                }
            }
            if (direct) continue;
            for (int64_t token = low; token < high; token++)
                for (int64_t c = 0; c < width; c++) {
                    int64_t place = token * out_step + column + c;
                    REAL sum = sums[(token - low) * block + c];
                    if (out_type == BFLOAT16) {
                        bf16 *to = (bf16 *)out + place;
                        *to = to_bf16((float)(from_bf16(*to) + sum));
                    } else if (out_type == FLOAT32) {
                        ((float *)out)[place] = (float)(((float *)out)[place] + sum);
                    } else {
                        ((double *)out)[place] += (double)sum;
                    }
                }
        }
        free(own);
    }
    free(room);
    return failed ? -1 : fresh;
}

#undef LANES
#undef WIDTH
#undef GROUP
#undef VEC
