/* What a bank of experts costs most on a CPU, compiled once on the machine that runs it.
 *
 * Plain C with the vector types of GCC and Clang, so that it builds for any processor, and
 * intrinsics where a processor has more (AVX-512 and its bfloat16 dot product). It knows nothing of
 * Python: cpu.py passes sizes and pointers, and threads as many as torch has. No function here
 * keeps anything between two calls, so any number of threads may be inside.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#define ROWS 6 /* tokens of a register block, */
#define RANKS 4 /* and ranks: 24 accumulators in 32 registers */
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define ROWS 4
#define RANKS 2
#else
#define VECTOR_BYTES 16
#define ROWS 4
#define RANKS 2
#endif

#if defined(_OPENMP)
#define PARALLEL(clauses) _Pragma_(omp parallel num_threads(threads) clauses)
#define SHARED_FOR _Pragma_(omp for schedule(dynamic, 1))
#define _Pragma_(x) _Pragma(#x)
#else
#define PARALLEL(clauses)
#define SHARED_FOR
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* What numbers a caller's tensor holds; cpu.py has the same list. */
enum { FLOAT32, BFLOAT16, FLOAT64 };

/* Rows of one expert's factors: A is (rank, i), and B is kept as (rank, o). */
typedef struct {
    const void *a, *b;
    int64_t rank;
    int64_t used; /* tick of the last call that read it */
    double scaling;
} Expert;

typedef uint16_t bf16;

INLINE float from_bf16(bf16 value) {
    union { uint32_t bits; float number; } u = {.bits = (uint32_t)value << 16};
    return u.number;
}

INLINE bf16 to_bf16(float value) { /* to nearest, ties to even, as torch rounds */
    union { float number; uint32_t bits; } u = {.number = value};
    if (value != value) return 0x7fc0;
    return (bf16)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}

#define REAL float
#define NAME(x) x##_f32
#include "blocks.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "halves.h"
#define HALVES
#endif
#include "grouped.h"
#undef HALVES
#undef REAL
#undef NAME

#define REAL double
#define NAME(x) x##_f64
#include "blocks.h"
#include "grouped.h"
#undef REAL
#undef NAME

#include "scores.h"
