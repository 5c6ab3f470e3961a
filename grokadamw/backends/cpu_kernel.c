/* The native kernel, which cpu.py calls: the sum of squares, and the step from slow_grad to limit_rows. Each processes all
 * tensors of a list in one pass through memory.
 *
 * setup.py compiles this file once for each instruction set; VARIANT is the end of its functions' names. The compiler
 * vectorises the code, except for `step_full`, and must not fuse a multiplication and an addition. So the bits of an
 * element do not depend on its place, the number of threads or the instruction set.
 */

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, VARIANT)

enum { PIECE = 1 << 16, /* elements that a thread takes at a time; there is one sum of squares for each piece */
       CHUNK = 512,     /* elements that are converted at a time, so that they stay in the L1 cache */
       STRIP = 128,     /* limited rows are updated this many elements at a time; then their squares are summed */
       ROW_BYTES = 1 << 18, /* size of the longest row that can be limited, as a thread keeps a copy of it */
       BLOCK = 64,      /* elements of a row that share a scale */
       LANES = 16,      /* partial sums of squares, computed side by side */
       AHEAD = 12 };    /* how many tensors ahead of the current one are prefetched */
enum dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum format { PLAIN, DITHERED, INT8 }; /* of a state: its dtype as it is; bfloat16, rounded by a dither; 8-bit codes */
enum state { EXP_AVG, EXP_AVG_SQ, GROK_EMA, STATES };

/* A list of tensors, and the numbers for them. It must be the same as `Table` in native.py. */
typedef struct {
    int64_t count;                 /* of tensors */
    const int64_t *ends;           /* for each tensor, the elements of all tensors up to and including it */
    char *const *params, *const *grads, *const *exp_avgs, *const *exp_avg_sqs, *const *grok_emas; /* grok_emas may be NULL */
    float *const *steps;
    const double *beta1, *bias_beta1;
    const int64_t *row_widths;     /* elements of a row, 0 if the tensor's rows are not limited; NULL if none are */
    double beta2, lr, eps, weight_decay, alpha, lamb, clip, micro_steps; /* micro_steps: k, 1 for a whole step */
    double max_row_change, max_row_norm, shortest; /* 0: no limit. A row below the norm `shortest` may move as far as that */
    int64_t amplify_after;
    int32_t eps_before_correction, raw_second_moment, decays, moves;
    int32_t param, grad, state;    /* dtypes */
    /* only if something is kept in fewer bits; formats.py defines the formats */
    int32_t coded, rounds, low_bits;        /* low_bits: 0, 8, 16 */
    int32_t formats[STATES];
    float *const *scales[STATES];           /* NULL if a state has none */
    char *const *lows;
    const int64_t *widths;                  /* elements of a row if its last block is shorter, otherwise 0 */
    const uint32_t *keys;                   /* from which each tensor's dithers start */
    const uint32_t *firsts;                 /* for each tensor, its blocks on ranks before this one; NULL if none has any */
    int64_t nth;                            /* the number of the micro-batch in its step */
} table;

typedef struct {
    const table *t;
    double *sums;                  /* of squares, one for each piece; NULL for a step */
    int64_t pieces, next, done;    /* next: the piece to take */
    int64_t users;                 /* threads that may still look at this */
    char *room;                    /* for each thread, `room_bytes` for the rows that it limits; NULL if none are limited */
    int64_t room_bytes, workers;   /* workers: threads that have taken their part of the room */
    fenv_t environment;            /* the caller's, which may flush denormal numbers to zero */
} job;

/* GOMP_parallel of GNU's OpenMP, which others have, too. Compilers turn `#pragma omp parallel` into a call of it. */
typedef void gomp_parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

int64_t NAME(table_size)(void) { return sizeof(table); }
int64_t NAME(row_bytes)(void) { return ROW_BYTES; }
int64_t NAME(piece)(void) { return PIECE; }

/* Conversions without branches, so that the compiler can vectorise them. */

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float from_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

static inline uint16_t to_bfloat16(float x)
{
    const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* ties to even */
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;                /* NaN stays NaN */
}

static inline float from_float16(uint16_t x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
    const uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000); /* to the other exponent bias */
    const uint32_t small = bits_of((float)(int32_t)rest * 0x1p-24f);
    return float_of(sign | (rest < 0x400 ? small : normal));
}

static inline uint16_t to_float16(float x)
{
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    const uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;          /* ties to even */
    const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000;                    /* the addition rounds to the ulp of 0.5 */
    const uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    return sign | (rest < 0x38800000 ? small : rest < 0x47800000 ? normal : large);
}

/* Return n elements as floats: converted from a 16-bit dtype into `room`, or floats where they are. `store` converts back. */

static inline float *load(float *room, const char *at, int64_t i, int64_t n, int32_t dtype)
{
    const uint16_t *x = (const uint16_t *)at + i;
    if (dtype == FLOAT32)
        return (float *)at + i;
    if (dtype == BFLOAT16)
        for (int64_t j = 0; j < n; j++) room[j] = from_bfloat16(x[j]);
    else
        for (int64_t j = 0; j < n; j++) room[j] = from_float16(x[j]);
    return room;
}

static inline void store(const float *restrict room, char *at, int64_t i, int64_t n, int32_t dtype)
{
    uint16_t *restrict x = (uint16_t *)at + i;
    if (dtype == BFLOAT16)
        for (int64_t j = 0; j < n; j++) x[j] = to_bfloat16(room[j]);
    else if (dtype == FLOAT16)
        for (int64_t j = 0; j < n; j++) x[j] = to_float16(room[j]);
}

/* The stages slow_grad to update. The numbers of a tensor, k, are computed in double. */

typedef struct {
    double clip, keep_mu, add_mu, lamb, keep_m, add_m, keep_v, add_v, root, eps, decay, step;
    double t, bias_beta1; /* with which root and step were computed */
    char *room;           /* this thread's, for the rows that it limits */
} numbers;

#define ROWS(real, square_root)                                                                                       \
    static inline __attribute__((always_inline)) void rows_of_##real(                                                 \
        int64_t n, real *restrict theta, const real *restrict grad, real *restrict m, real *restrict v,               \
        real *restrict mu, real *restrict roots, int raw, numbers k)                                                  \
    {                                                                                                                 \
        const real clip = k.clip, keep_mu = k.keep_mu, add_mu = k.add_mu, lamb = k.lamb, keep_m = k.keep_m,           \
                   add_m = k.add_m, keep_v = k.keep_v, add_v = k.add_v, root = k.root, eps = k.eps, decay = k.decay,  \
                   step = k.step;                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                             \
            const real g = clip * grad[i];                                                                            \
            real g_hat = g;                                                                                           \
            if (mu) {                                                                                                 \
                mu[i] = keep_mu * mu[i] + add_mu * g;                              /* slow_grad */                    \
                g_hat = g + lamb * mu[i];                                          /* amplify */                      \
            }                                                                                                         \
            m[i] = keep_m * m[i] + add_m * g_hat;                                  /* exp_avg */                      \
            v[i] = keep_v * v[i] + add_v * (raw ? g * g : g_hat * g_hat);          /* exp_avg_sq */                   \
            if (roots) roots[i] = square_root(v[i]);                                                                  \
            if (theta)                                                                                                \
                theta[i] = decay * theta[i] - step * (m[i] / (root * square_root(v[i]) + eps)); /* update */          \
        }                                                                                                             \
    }                                                                                                                 \
    static void rows_##real(int64_t n, real *theta, const real *grad, real *m, real *v, real *mu, real *roots,        \
                            int raw, numbers k)                                                                       \
    {   /* one loop for each case, so that the compiler can vectorise it */                                           \
        if (roots && theta && mu && !raw) rows_of_##real(n, theta, grad, m, v, mu, roots, 0, k);                      \
        else if (roots && theta && !mu && !raw) rows_of_##real(n, theta, grad, m, v, NULL, roots, 0, k);              \
        else if (!theta && mu) rows_of_##real(n, NULL, grad, m, v, mu, NULL, 1, k); /* a micro-batch: always raw */    \
        else if (!theta) rows_of_##real(n, NULL, grad, m, v, NULL, NULL, 1, k);                                       \
        else if (mu && raw) rows_of_##real(n, theta, grad, m, v, mu, NULL, 1, k);                                     \
        else if (mu) rows_of_##real(n, theta, grad, m, v, mu, NULL, 0, k);                                            \
        else rows_of_##real(n, theta, grad, m, v, NULL, NULL, 0, k);                                                  \
        if (roots && (raw || !theta)) /* rare */                                                                      \
            for (int64_t i = 0; i < n; i++) roots[i] = square_root(v[i]);                                             \
    }
ROWS(float, sqrtf)
ROWS(double, sqrt)

static void set_numbers(numbers *k, const table *t, int64_t tensor)
{
    const double step = (double)*t->steps[tensor] + 1, beta1 = t->beta1[tensor], bias_beta1 = t->bias_beta1[tensor];
    if (step != k->t) /* powers take longer than the step of a small tensor */
        k->root = 1 / sqrt(1 - pow(t->beta2, step));
    if (step != k->t || bias_beta1 != k->bias_beta1)
        k->step = t->lr / (1 - pow(bias_beta1, step));
    k->t = step, k->bias_beta1 = bias_beta1;
    k->lamb = t->moves && step > t->amplify_after ? t->lamb : 0;
    k->clip = t->clip / t->micro_steps;
    k->keep_mu = t->decays ? t->alpha : 1, k->add_mu = 1 - t->alpha;
    k->keep_m = t->decays ? beta1 : 1, k->add_m = 1 - beta1;
    k->keep_v = t->decays ? t->beta2 : 1, k->add_v = (1 - t->beta2) * t->micro_steps;
    k->eps = t->eps_before_correction ? t->eps * k->root : t->eps, k->decay = 1 - t->lr * t->weight_decay;
}

static void step_part(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to) /* elements of one tensor */
{
    char *theta = t->moves ? t->params[tensor] : NULL, *g = t->grads[tensor], *m = t->exp_avgs[tensor], *v = t->exp_avg_sqs[tensor];
    char *mu = t->grok_emas ? t->grok_emas[tensor] : NULL;
    const int raw = t->raw_second_moment;
    if (t->state == FLOAT64) {
        rows_double(to - from, theta ? (double *)theta + from : NULL, (double *)g + from, (double *)m + from, (double *)v + from,
                    mu ? (double *)mu + from : NULL, NULL, raw, *k);
        return;
    }
    const int64_t chunk = t->param == FLOAT32 && t->grad == FLOAT32 && t->state == FLOAT32 ? to - from : CHUNK;
    float room[5][CHUNK + 80] __attribute__((aligned(64))); /* + 80, as addresses 4 KiB apart look alike to the processor */
    for (int64_t i = from; i < to; i += chunk) {
        const int64_t n = to - i < chunk ? to - i : chunk;
        float *theta_ = theta ? load(room[0], theta, i, n, t->param) : NULL, *g_ = load(room[1], g, i, n, t->grad);
        float *m_ = load(room[2], m, i, n, t->state), *v_ = load(room[3], v, i, n, t->state);
        float *mu_ = mu ? load(room[4], mu, i, n, t->state) : NULL;
        rows_float(n, theta_, g_, m_, v_, mu_, NULL, raw, *k);
        if (theta) store(room[0], theta, i, n, t->param);
        store(room[2], m, i, n, t->state);
        store(room[3], v, i, n, t->state);
        if (mu) store(room[4], mu, i, n, t->state);
    }
}

/* Tensors that are kept in fewer bits than a step computes with: decode, step, encode. formats.py gives the same bits. */

#define STEP 0x9e3779b9u /* added to a dither from step to step */
enum { TURN_V = 22, TURN_MU = 11, TURN_PARAM = 5 }; /* by how many bits each rotates a hash; m does not */
#define LANE 0xc13fa9a9u /* added to a dither from element to element of a block */
#define PARTS 65536.0f   /* of a code */
#define LARGEST 0x71800000 /* the bits of 2^100, the largest value to scale */
#define UNIT (float)(65536.0 / (127 * 65536.0 - 64)) /* a block's scale for a largest value of 1: no code exceeds 127 */
#define V_UNIT (float)(65536.0 / (255 * 65536.0 - 128))

static inline uint32_t mixed(uint32_t word) /* MurmurHash3's finalizer */
{
    word = (word ^ word >> 16) * 0x85ebca6bu, word = (word ^ word >> 13) * 0xc2b2ae35u;
    return word ^ word >> 16;
}

static inline uint32_t turned(uint32_t word, int turn) { return word << turn | word >> (-turn & 31); }
static inline int32_t larger(int32_t x, int32_t y) { return x > y ? x : y; }
static inline int32_t smaller(int32_t x, int32_t y) { return x < y ? x : y; }

static inline int32_t in_bfloat16(float x, uint32_t dither, int is_v) /* in the upper half of the word */
{
    const int32_t bits = bits_of(x), word = (int32_t)((uint32_t)bits + (dither >> 16));
    return is_v ? larger(word, smaller(bits, 1) << 23) : word; /* a v above 0 never becomes 0 */
}

static inline int32_t in_codes(float x, float parts, uint32_t dither)
{
    return (int32_t)((uint32_t)(int32_t)(x * parts) + (dither >> 16)) >> 16;
}

/* Find the largest size, as bits, in each of `count` full blocks. Each loop shrinks all blocks together, so that a vector may
 * span several. */
static inline __attribute__((always_inline)) void tops_of(int32_t *restrict tops, const float *restrict x, int count)
{
    int32_t a[CHUNK / 4], b[CHUNK / 8];
    for (int q = 0; q < count; q++)
        for (int l = 0; l < BLOCK / 4; l++) {
            const float *y = x + q * BLOCK + l;
            const int32_t one = larger(bits_of(y[0]) & 0x7fffffff, bits_of(y[16]) & 0x7fffffff);
            a[q * BLOCK / 4 + l] = larger(one, larger(bits_of(y[32]) & 0x7fffffff, bits_of(y[48]) & 0x7fffffff));
        }
    for (int l = 0; l < 8 * count; l++) b[l] = larger(a[2 * l], a[2 * l + 1]);
    for (int l = 0; l < 4 * count; l++) a[l] = larger(b[2 * l], b[2 * l + 1]);
    for (int l = 0; l < 2 * count; l++) b[l] = larger(a[2 * l], a[2 * l + 1]);
    for (int l = 0; l < count; l++) tops[l] = larger(b[2 * l], b[2 * l + 1]);
}

/* The blocks of some elements of a tensor. Scales of consecutive blocks are adjacent. */
typedef struct {
    int64_t i, first;          /* the first element, and the first block, in the tensor */
    int n, count;              /* of elements and blocks */
    int starts[CHUNK + 1];     /* where each block starts, and the end */
    uint32_t hashes[CHUNK], turns;
} blocks;

static void find_blocks(blocks *b, const table *t, const numbers *k, int64_t tensor, int64_t i, int n)
{
    const int64_t width = t->widths[tensor];
    b->i = i, b->n = n, b->count = 0;
    b->first = width ? i / width * ((width + BLOCK - 1) / BLOCK) + i % width / BLOCK : i / BLOCK;
    for (int64_t j = 0, column = width ? i % width : 0; j < n; b->count++) {
        const int64_t rest = width && width - column < BLOCK ? width - column : BLOCK;
        b->starts[b->count] = j;
        j += rest, column = width && column + rest == width ? 0 : column + rest;
    }
    b->starts[b->count] = n;
    const uint32_t first = (uint32_t)b->first + (t->firsts ? t->firsts[tensor] : 0);
    for (int q = 0; q < b->count; q++) b->hashes[q] = mixed((first + (uint32_t)q) ^ t->keys[tensor]);
    b->turns = (uint32_t)(int64_t)((k->t - 1) * t->micro_steps + t->nth) * STEP;
}

/* Do something for each element of block q: j is its index among all elements, l its index in the block. The first branch
 * tells the compiler the length of a full block. */
#define EACH(b, q, j, l, something)                                                                                   \
    if ((b)->starts[q + 1] - (b)->starts[q] == BLOCK)                                                                 \
        for (int l = 0; l < BLOCK; l++) {                                                                               \
            const int64_t j = (int64_t)(b)->starts[q] + l;                                                                                \
            something;                                                                                                \
        }                                                                                                             \
    else                                                                                                              \
        for (int l = 0, size = (b)->starts[q + 1] - (b)->starts[q]; l < size; l++) {                                     \
            const int64_t j = (int64_t)(b)->starts[q] + l;                                                                                \
            something;                                                                                                \
        }

#define STATE(name, is_v, turn, byte)                                                                                 \
    static __attribute__((noinline)) float *load_##name(const table *t, float *restrict room, const char *state,      \
                                                        const float *scales, const blocks *b, int which)              \
    {                                                                                                                 \
        if (t->formats[which] != INT8)                                                                                \
            return load(room, state, b->i, b->n, t->formats[which] == DITHERED ? BFLOAT16 : t->state);                \
        const byte *restrict codes = (const byte *)state + b->i;                                                      \
        for (int q = 0; q < b->count; q++) {                                                                          \
            const float scale = scales[b->first + q];                                                                 \
            EACH(b, q, j, l, const float x = codes[j] * scale; room[j] = is_v ? x * x : x)                            \
        }                                                                                                             \
        return room;                                                                                                  \
    }                                                                                                                 \
    static __attribute__((noinline)) void store_##name(const table *t, const float *restrict room, char *state,       \
                                                       float *scales, const blocks *b, int which)                     \
    {                                                                                                                 \
        const int n = b->n, all_full = n == CHUNK && b->count == CHUNK / BLOCK;                                       \
        int32_t words[CHUNK] __attribute__((aligned(64))), tops[CHUNK];                                               \
        if (t->formats[which] == DITHERED) {                                                                          \
            uint16_t *restrict x = (uint16_t *)state + b->i;                                                          \
            for (int q = 0; q < b->count; q++) {                                                                      \
                const uint32_t dither = turned(b->hashes[q], turn) + b->turns;                                        \
                EACH(b, q, j, l, words[j] = in_bfloat16(room[j], dither + l * LANE, is_v))                            \
            }                                                                                                         \
            for (int j = 0; j < n; j++) x[j] = (uint32_t)words[j] >> 16;                                              \
        } else if (t->formats[which] == INT8) {                                                                       \
            byte *restrict codes = (byte *)state + b->i;                                                              \
            if (all_full) tops_of(tops, room, CHUNK / BLOCK);                                                         \
            for (int q = 0; !all_full && q < b->count; q++) {                                                         \
                int32_t top = 0;                                                                                      \
                EACH(b, q, j, l, top = larger(top, bits_of(room[j]) & 0x7fffffff))                                    \
                tops[q] = top;                                                                                        \
            }                                                                                                         \
            for (int q = 0; q < b->count; q++) {                                                                      \
                const float top = float_of(smaller(tops[q], LARGEST)), unit = top * (is_v ? V_UNIT : UNIT);           \
                const float scale = unit < 0x1p-100f ? 0x1p-100f : unit, parts = PARTS / scale;                       \
                const uint32_t dither = turned(b->hashes[q], turn) + b->turns;                                        \
                scales[b->first + q] = scale;                                                                         \
                EACH(b, q, j, l, const int32_t code = in_codes(room[j], parts, dither + l * LANE);                    \
                     words[j] = is_v ? larger(code, room[j] > 0) : code)                                              \
            }                                                                                                         \
            for (int j = 0; j < n; j++) codes[j] = words[j];                                                          \
        } else store(room, state, b->i, n, t->state);                                                                 \
    }
STATE(m, 0, 0, int8_t)
STATE(v, 1, TURN_V, uint8_t)
STATE(mu, 0, TURN_MU, int8_t)

#define TINY 0x387fe000 /* bits of the smallest number that float16 rounds to a normal number */
#define INF 0x7f800000
#define NAN_BITS 0x7fc00000 /* of the only NaN that is stored: adding to others' bits may make them numbers */

/* Return what the low bits add to a parameter with these bits. In a parameter that was set to 0, low bits below 0 count as
 * 0, because they would make it NaN. */
static inline int32_t rest_of(uint32_t bits, int32_t low) { return bits & 0x7fffffff ? low : larger(low, 0); }

/* Return n elements of a parameter, with their low bits, as floats: in `room`, or in place if they are floats already. */
static float *load_param(const table *t, float *room, int64_t tensor, int64_t i, int64_t n)
{
    float *x = load(room, t->params[tensor], i, n, t->param);
    const int16_t *restrict lows16 = t->low_bits == 16 ? (const int16_t *)t->lows[tensor] + i : NULL;
    const int8_t *restrict lows8 = t->low_bits == 8 ? (const int8_t *)t->lows[tensor] + i : NULL;
    if (t->low_bits && t->param == FLOAT16)
        for (int64_t j = 0; j < n; j++) {
            const uint32_t half = ((const uint16_t *)t->params[tensor])[i + j], size = half & 0x7fff;
            const int32_t rest = rest_of(size, lows16 ? lows16[j] : lows8[j] * (1 << 8));
            const uint32_t tiny = (half & 0x8000) << 16 | bits_of((float)(int32_t)((size << 16) + rest) * 0x1p-40f);
            x[j] = float_of(size < 0x400 ? tiny : bits_of(x[j]) + rest);
        }
    else if (lows16)
        for (int64_t j = 0; j < n; j++) x[j] = float_of(bits_of(x[j]) + rest_of(bits_of(x[j]), lows16[j]));
    else if (lows8)
        for (int64_t j = 0; j < n; j++) x[j] = float_of(bits_of(x[j]) + rest_of(bits_of(x[j]), lows8[j] * (1 << 8)));
    return x;
}

static void store_param(const table *t, const float *restrict x, int64_t tensor, const blocks *b)
{
    const int dropped = t->low_bits == 16 ? 0 : t->low_bits == 8 ? 8 : t->param == BFLOAT16 ? 16 : 13;
    const int64_t i = b->i;
    const int n = b->n, has_tiny = t->low_bits && t->param == FLOAT16;
    uint32_t words[CHUNK] __attribute__((aligned(64)));
    float room[CHUNK];
    if (t->param == FLOAT32) {
        if ((float *)t->params[tensor] + i != x) memcpy((float *)t->params[tensor] + i, x, n * sizeof(float));
        return;
    }
    if (!t->low_bits && !t->rounds) {
        store(x, t->params[tensor], i, n, t->param);
        return;
    }
    for (int j = 0; j < n; j++) {
        const uint32_t size = bits_of(x[j]) & 0x7fffffff;
        words[j] = size > INF ? NAN_BITS : bits_of(x[j]);
    }
    for (int j = 0; has_tiny && j < n; j++) {
        const uint32_t size = words[j] & 0x7fffffff;
        words[j] = size < TINY ? (uint32_t)(int32_t)(float_of(size < TINY ? size : 0) * 0x1p40f) : words[j];
    }
    for (int q = 0; dropped && q < b->count; q++) {
        const uint32_t dither = turned(b->hashes[q], TURN_PARAM) + b->turns;
        EACH(b, q, j, l, words[j] = (words[j] + ((dither + l * LANE) >> (32 - dropped))) & -(1u << dropped))
    }
    uint16_t *restrict out = (uint16_t *)t->params[tensor] + i;
    if (t->low_bits && t->param == BFLOAT16) /* ties go up: the low bits are in [-2¹⁵, 2¹⁵) */
        for (int j = 0; j < n; j++) out[j] = (words[j] + 0x8000) >> 16;
    else store(memcpy(room, words, n * sizeof(float)), t->params[tensor], i, n, t->param);
    for (int j = 0; has_tiny && j < n; j++) {
        const uint32_t bits = bits_of(x[j]), word = smaller(words[j], 0x3ff7fff), tiny = (bits & 0x7fffffff) < TINY;
        const uint32_t half = tiny ? (bits >> 16 & 0x8000) | (word + 0x8000) >> 16 : out[j];
        words[j] = tiny ? word : (half & 0x7c00) == 0x7c00 ? 0 : words[j] - bits_of(from_float16(half));
        out[j] = half;
    }
    int16_t *restrict lows16 = t->low_bits == 16 ? (int16_t *)t->lows[tensor] + i : NULL;
    int8_t *restrict lows8 = t->low_bits == 8 ? (int8_t *)t->lows[tensor] + i : NULL;
    if (lows16)
        for (int j = 0; j < n; j++) lows16[j] = words[j];
    else if (lows8)
        for (int j = 0; j < n; j++) lows8[j] = words[j] >> 8;
}

#ifdef __AVX512F__
#include <immintrin.h>

/* Update full blocks, from decoding to encoding, with sixteen elements at a time: while the processor divides for one vector,
 * it works on the next. This handles the usual formats; `step_coded` handles all others, with the same bits. */

#define INLINE static inline __attribute__((always_inline))
typedef __m512 floats;
typedef __m512i words;

INLINE floats times(float x, floats y) { return _mm512_mul_ps(_mm512_set1_ps(x), y); }
INLINE floats sum(floats x, floats y) { return _mm512_add_ps(x, y); }
INLINE words plus(words x, words y) { return _mm512_add_epi32(x, y); }
INLINE words all(uint32_t x) { return _mm512_set1_epi32(x); }
INLINE words bits(floats x) { return _mm512_castps_si512(x); }

INLINE floats floats_at(const char *at, int64_t i, int dtype)
{
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)at + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)(at + 2 * i))), 16));
}

INLINE floats state_at(const char *state, int64_t i, int format, float scale, int is_v)
{
    if (format != INT8) return floats_at(state, i, format == DITHERED ? BFLOAT16 : FLOAT32);
    const __m128i codes = _mm_loadu_si128((void *)(state + i));
    const floats x = times(scale, _mm512_cvtepi32_ps(is_v ? _mm512_cvtepu8_epi32(codes) : _mm512_cvtepi8_epi32(codes)));
    return is_v ? _mm512_mul_ps(x, x) : x;
}

INLINE void store_floats(char *state, int64_t i, floats x, int format, words dithers, int is_v)
{
    if (format == DITHERED) {
        words word = plus(bits(x), _mm512_srli_epi32(dithers, 16));
        if (is_v) word = _mm512_max_epi32(word, _mm512_slli_epi32(_mm512_min_epi32(bits(x), all(1)), 23));
        _mm256_storeu_si256((void *)(state + 2 * i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
    } else _mm512_storeu_ps((float *)state + i, x);
}

INLINE float scale_of(const floats *x, int is_v) /* of a block */
{
    words tops = all(0);
    for (int part = 0; part < BLOCK / 16; part++) tops = _mm512_max_epi32(tops, _mm512_and_si512(bits(x[part]), all(0x7fffffff)));
    const float top = float_of(smaller(_mm512_reduce_max_epi32(tops), LARGEST)), unit = top * (is_v ? V_UNIT : UNIT);
    return unit < 0x1p-100f ? 0x1p-100f : unit;
}

INLINE void store_codes(char *codes, float scale, const floats *x, words dithers, int is_v)
{
    const floats parts = _mm512_set1_ps(PARTS / scale);
    for (int part = 0; part < BLOCK / 16; part++) {
        const words shares = _mm512_srli_epi32(plus(dithers, all(part * 16 * LANE)), 16);
        words code = _mm512_srai_epi32(plus(_mm512_cvttps_epi32(_mm512_mul_ps(parts, x[part])), shares), 16);
        if (is_v)
            code = _mm512_max_epi32(code, _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x[part], _mm512_setzero_ps(), _CMP_GT_OQ), 1));
        _mm_storeu_si128((void *)(codes + 16 * part), _mm512_cvtepi32_epi8(code));
    }
}

INLINE floats param_at(const char *param, const char *low, int64_t i, int dtype, int low_bits)
{
    const words word = bits(floats_at(param, i, dtype));
    words rest = all(0);
    if (low_bits == 16) rest = _mm512_cvtepi16_epi32(_mm256_loadu_si256((void *)(low + 2 * i)));
    if (low_bits == 8) rest = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((void *)(low + i))), 8);
    rest = _mm512_mask_max_epi32(rest, _mm512_testn_epi32_mask(word, all(0x7fffffff)), rest, all(0)); /* like rest_of */
    return _mm512_castsi512_ps(low_bits ? plus(word, rest) : word);
}

INLINE void store_param_at(char *param, char *low, int64_t i, floats x, int dtype, int low_bits, words dithers)
{
    const int dropped = 16 - low_bits;
    words word = bits(x);
    if (dtype == FLOAT32) {
        _mm512_storeu_ps((float *)param + i, x);
        return;
    }
    word = _mm512_mask_mov_epi32(word, _mm512_cmpgt_epi32_mask(_mm512_and_si512(word, all(0x7fffffff)), all(INF)), all(NAN_BITS));
    if (dropped) word = plus(word, _mm512_srli_epi32(dithers, 32 - dropped)); /* the dropped bits are below the stored ones */
    const words half = _mm512_srli_epi32(low_bits ? plus(word, all(0x8000)) : word, 16);
    _mm256_storeu_si256((void *)(param + 2 * i), _mm512_cvtepi32_epi16(half));
    if (low_bits == 16) _mm256_storeu_si256((void *)(low + 2 * i), _mm512_cvtepi32_epi16(word));
    if (low_bits == 8) _mm_storeu_si128((void *)(low + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(word, 8)));
}

INLINE void step_full(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to, float *x, float *y, int format,
                      int dtype, int low_bits)
{
    char *const param = t->params[tensor], *const low = low_bits ? t->lows[tensor] : NULL, *const grad = t->grads[tensor];
    char *const m = t->exp_avgs[tensor], *const v = t->exp_avg_sqs[tensor], *const mu = t->grok_emas ? t->grok_emas[tensor] : NULL;
    float *scales[STATES] = {NULL}, unused[STATES] = {0};
    for (int i = 0; format == INT8 && i < STATES; i++) scales[i] = t->scales[i] ? t->scales[i][tensor] : NULL;
    const float clip = k->clip, keep_mu = k->keep_mu, add_mu = k->add_mu, lamb = k->lamb, keep_m = k->keep_m, add_m = k->add_m,
                keep_v = k->keep_v, add_v = k->add_v, root = k->root, eps = k->eps, decay = k->decay, step = k->step;
    const words lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), all(LANE));
    for (int64_t i = from, block = from / BLOCK; i < to; i += BLOCK, block++) {
        const uint32_t hash = mixed(((uint32_t)block + (t->firsts ? t->firsts[tensor] : 0)) ^ t->keys[tensor]);
        const uint32_t turns = (uint32_t)(int64_t)((k->t - 1) * t->micro_steps + t->nth) * STEP;
        const words m_dithers = plus(all(hash + turns), lanes), v_dithers = plus(all(turned(hash, TURN_V) + turns), lanes);
        const words mu_dithers = plus(all(turned(hash, TURN_MU) + turns), lanes);
        const words dithers = plus(all(turned(hash, TURN_PARAM) + turns), lanes);
        float *scale[STATES];
        for (int s = 0; s < STATES; s++) scale[s] = scales[s] ? scales[s] + block : unused + s;
        floats ms[BLOCK / 16], roots[BLOCK / 16], mus[BLOCK / 16];
        for (int part = 0; part < BLOCK / 16; part++) {
            const int64_t j = i + 16 * part;
            const words turn = all(part * 16 * LANE);
            const floats g = times(clip, floats_at(grad, j, dtype));
            floats g_hat = g;
            if (mu) {
                mus[part] = sum(times(keep_mu, state_at(mu, j, format, *scale[2], 0)), times(add_mu, g));
                g_hat = sum(g, times(lamb, mus[part]));
            }
            ms[part] = sum(times(keep_m, state_at(m, j, format, *scale[0], 0)), times(add_m, g_hat));
            const floats seen = t->raw_second_moment ? g : g_hat;
            const floats now_v = sum(times(keep_v, state_at(v, j, format, *scale[1], 1)), times(add_v, _mm512_mul_ps(seen, seen)));
            roots[part] = _mm512_sqrt_ps(now_v);
            const floats old = param_at(param, low, j, dtype, low_bits);
            const floats way = _mm512_div_ps(ms[part], sum(times(root, roots[part]), _mm512_set1_ps(eps)));
            const floats now = _mm512_sub_ps(times(decay, old), times(step, way));
            if (x) {
                _mm512_storeu_ps(x + (j - from), now);
                _mm512_storeu_ps(y + (j - from), old);
            } else store_param_at(param, low, j, now, dtype, low_bits, plus(dithers, turn));
            if (format == INT8) continue;
            store_floats(m, j, ms[part], format, plus(m_dithers, turn), 0);
            store_floats(v, j, now_v, format, plus(v_dithers, turn), 1);
            if (mu) store_floats(mu, j, mus[part], format, plus(mu_dithers, turn), 0);
        }
        if (format != INT8) continue;
        *scale[0] = scale_of(ms, 0), *scale[1] = scale_of(roots, 1);
        if (mu) *scale[2] = scale_of(mus, 0);
        store_codes(m + i, *scale[0], ms, m_dithers, 0);
        store_codes(v + i, *scale[1], roots, v_dithers, 1);
        if (mu) store_codes(mu + i, *scale[2], mus, mu_dithers, 0);
    }
}

/* Do what `step_coded` does for the full blocks, if their format is a usual one. Return the end of the blocks that are done. */
static int64_t step_full_blocks(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to, float *x, float *y)
{
    const int64_t end = to - (to - from) % BLOCK;
    const int32_t *f = t->formats, mu = t->grok_emas ? f[GROK_EMA] : f[EXP_AVG];
    if (t->widths[tensor] || !t->moves || f[EXP_AVG_SQ] != f[EXP_AVG] || mu != f[EXP_AVG] || t->grad != t->param || t->state != FLOAT32)
        return from;
#define USUAL(format, dtype, bits)                                                                                      \
    if (f[EXP_AVG] == format && t->param == dtype && t->low_bits == bits && (dtype == FLOAT32 || bits || t->rounds)) {  \
        step_full(t, k, tensor, from, end, x, y, format, dtype, bits);                                                  \
        return end;                                                                                                     \
    }
    USUAL(DITHERED, FLOAT32, 0) USUAL(DITHERED, BFLOAT16, 0) USUAL(DITHERED, BFLOAT16, 8) USUAL(DITHERED, BFLOAT16, 16)
    USUAL(INT8, FLOAT32, 0) USUAL(INT8, BFLOAT16, 0) USUAL(INT8, BFLOAT16, 8) USUAL(INT8, BFLOAT16, 16)
    USUAL(PLAIN, BFLOAT16, 0) USUAL(PLAIN, BFLOAT16, 8) USUAL(PLAIN, BFLOAT16, 16)
    return from;
}
#else
#define step_full_blocks(t, k, tensor, from, to, x, y) (from)
#endif

/* Step elements of one tensor, from the start of a block. If x is not NULL, write the new parameter to x and the old one to
 * y, and leave the parameter itself as it is. */
static void step_coded(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to, float *x, float *y)
{
    char *m = t->exp_avgs[tensor], *v = t->exp_avg_sqs[tensor], *mu = t->grok_emas ? t->grok_emas[tensor] : NULL;
    float *scales[STATES];
    for (int i = 0; i < STATES; i++) scales[i] = t->scales[i] ? t->scales[i][tensor] : NULL;
    const int64_t width = t->widths[tensor];
    float room[6][CHUNK + 80] __attribute__((aligned(64))); /* + 80, as addresses 4 KiB apart look alike to the processor */
    blocks b;
    for (int64_t i = step_full_blocks(t, k, tensor, from, to, x, y), n; i < to; i += n) {
        n = to - i < CHUNK ? to - i : CHUNK;
        if (width && n == CHUNK) n -= (i + n) % width % BLOCK; /* end where a block ends */
        find_blocks(&b, t, k, tensor, i, n);
        float *theta = t->moves ? load_param(t, room[0], tensor, i, n) : NULL;
        if (x) {
            memcpy(y + (i - from), theta, n * sizeof(float));
            theta = memcpy(x + (i - from), theta, n * sizeof(float));
        }
        const float *g = load(room[1], t->grads[tensor], i, n, t->grad);
        float *m_ = load_m(t, room[2], m, scales[0], &b, 0), *v_ = load_v(t, room[3], v, scales[1], &b, 1);
        float *mu_ = mu ? load_mu(t, room[4], mu, scales[2], &b, 2) : NULL;
        float *const roots = t->formats[EXP_AVG_SQ] == INT8 ? room[5] : NULL; /* int8 codes are of √v */
        rows_float(n, theta, g, m_, v_, mu_, roots, t->raw_second_moment, *k);
        if (theta && !x) store_param(t, theta, tensor, &b);
        store_m(t, m_, m, scales[0], &b, 0);
        store_v(t, roots ? roots : v_, v, scales[1], &b, 1);
        if (mu) store_mu(t, mu_, mu, scales[2], &b, 2);
    }
}

/* The norm's sum of squares. */

#define SQUARES(real)                                                                                                 \
    static double squares_##real(int64_t n, const real *x)                                                            \
    {                                                                                                                 \
        double lanes[LANES] = {0}, sum = 0;                                                                           \
        int64_t i = 0;                                                                                                \
        for (; i + LANES <= n; i += LANES)                                                                            \
            for (int j = 0; j < LANES; j++) lanes[j] += (double)x[i + j] * (double)x[i + j];                          \
        for (int j = 0; i < n; i++, j++) lanes[j] += (double)x[i] * (double)x[i];                                     \
        for (int j = 0; j < LANES; j++) sum += lanes[j];                                                              \
        return sum;                                                                                                   \
    }
SQUARES(float)
SQUARES(double)

static double squares_part(const table *t, int64_t tensor, int64_t from, int64_t to)
{
    const char *g = t->grads[tensor];
    if (t->grad == FLOAT64)
        return squares_double(to - from, (const double *)g + from);
    if (t->grad == FLOAT32)
        return squares_float(to - from, (const float *)g + from);
    float room[CHUNK];
    double sum = 0;
    for (int64_t i = from; i < to; i += CHUNK) {
        const int64_t n = to - i < CHUNK ? to - i : CHUNK;
        sum += squares_float(n, load(room, g, i, n, t->grad));
    }
    return sum;
}

/* limit_rows. A row is updated in short strips: the processor sums the squares of one strip while it waits for the quotients
 * of the next. A complete row is still in the cache, and can be scaled there. Squares are summed in double, in an order that
 * does not depend on where the row lies. */

static double sum_of_lanes(const double *lanes)
{
    double a[LANES / 2], b[LANES / 4];
    for (int j = 0; j < LANES / 2; j++) a[j] = lanes[j] + lanes[j + LANES / 2];
    for (int j = 0; j < LANES / 4; j++) b[j] = a[j] + a[j + LANES / 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

static double *load_double(double *room, const char *at, int64_t i, int64_t n, int32_t dtype)
{
    return (double *)at + i;
}
static void store_double(const double *room, char *at, int64_t i, int64_t n, int32_t dtype) {}

#define LIMIT(real, load, store)                                                                                      \
    static inline real moved_##real(real now, real before) /* 0 if it is not finite */                                \
    {                                                                                                                 \
        const real way = now - before;                                                                                \
        return way - way == 0 ? way : 0;                                                                              \
    }                                                                                                                 \
    static inline __attribute__((always_inline)) void add_squares_##real(                                             \
        const table *t, int64_t n, const char *theta, const char *before, double *restrict ways, double *restrict olds) \
    {                                                                                                                 \
        real rooms[2][STRIP];                                                                                         \
        const real *restrict x = load(rooms[0], theta, 0, n, t->param);                                               \
        const real *restrict y = load(rooms[1], before, 0, n, t->param);                                              \
        int64_t i = 0;                                                                                                \
        for (; i + LANES <= n; i += LANES)                                                                            \
            for (int j = 0; j < LANES; j++) {                                                                         \
                const double way = moved_##real(x[i + j], y[i + j]), old = y[i + j];                                  \
                ways[j] += way * way, olds[j] += old * old;                                                           \
            }                                                                                                         \
        for (int j = 0; i < n; i++, j++) {                                                                            \
            const double way = moved_##real(x[i], y[i]), old = y[i];                                                  \
            ways[j] += way * way, olds[j] += old * old;                                                               \
        }                                                                                                             \
    }                                                                                                                 \
    static void limit_change_##real(const table *t, int64_t width, char *theta, const char *before,                   \
                                    const double *ways, const double *olds)                                           \
    {                                                                                                                 \
        const double way = sum_of_lanes(ways), old = sum_of_lanes(olds), limit = t->max_row_change;                   \
        const double least = t->shortest * t->shortest, length = old < least ? least : old;                           \
        if (!(way > limit * limit * length && way < INFINITY)) return;                                                \
        const real less = limit * sqrt(length / way) - 1;                                                             \
        real rooms[2][CHUNK];                                                                                         \
        for (int64_t i = 0, n; i < width; i += n) {                                                                   \
            n = width - i < CHUNK ? width - i : CHUNK;                                                                \
            real *x = load(rooms[0], theta, i, n, t->param);                                                          \
            const real *y = load(rooms[1], before, i, n, t->param);                                                   \
            for (int64_t j = 0; j < n; j++) x[j] += moved_##real(x[j], y[j]) * less;                                  \
            store(rooms[0], theta, i, n, t->param);                                                                   \
        }                                                                                                             \
    }                                                                                                                 \
    static void limit_norm_##real(const table *t, int64_t width, char *theta)                                         \
    {                                                                                                                 \
        real room[CHUNK];                                                                                             \
        double sum = 0;                                                                                               \
        for (int64_t i = 0, n; i < width; i += n) {                                                                   \
            n = width - i < CHUNK ? width - i : CHUNK;                                                                \
            sum += squares_##real(n, load(room, theta, i, n, t->param));                                              \
        }                                                                                                             \
        if (!(sum > t->max_row_norm * t->max_row_norm && sum < INFINITY)) return;                                     \
        const real share = t->max_row_norm / sqrt(sum);                                                               \
        for (int64_t i = 0, n; i < width; i += n) {                                                                   \
            n = width - i < CHUNK ? width - i : CHUNK;                                                                \
            real *x = load(room, theta, i, n, t->param);                                                              \
            for (int64_t j = 0; j < n; j++) x[j] *= share;                                                            \
            store(room, theta, i, n, t->param);                                                                       \
        }                                                                                                             \
    }                                                                                                                 \
    static void step_rows_##real(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to,          \
                                 int64_t size)                                                                        \
    {                                                                                                                 \
        const int64_t width = t->row_widths[tensor], rows = width < STRIP ? STRIP / width : 1; /* at a time */        \
        char *const before = k->room;                                                                                 \
        for (int64_t start = from, n; start < to; start += n) {                                                       \
            char *theta = t->params[tensor] + start * size;                                                           \
            double ways[LANES] = {0}, olds[LANES] = {0};                                                              \
            n = to - start < rows * width ? to - start : rows * width;                                                \
            for (int64_t i = 0, strip; i < n; i += strip) {                                                           \
                strip = n - i < STRIP ? n - i : STRIP;                                                                \
                memcpy(before + i * size, theta + i * size, strip * size);                                            \
                step_part(t, k, tensor, start + i, start + i + strip);                                                \
                if (rows == 1) add_squares_##real(t, strip, theta + i * size, before + i * size, ways, olds);         \
            }                                                                                                         \
            for (int64_t i = 0; i < n; i += width) {                                                                  \
                char *x = theta + i * size, *y = before + i * size;                                                   \
                if (rows > 1) {                                                                                       \
                    memset(ways, 0, sizeof ways), memset(olds, 0, sizeof olds);                                       \
                    add_squares_##real(t, width, x, y, ways, olds);                                                   \
                }                                                                                                     \
                if (t->max_row_change) limit_change_##real(t, width, x, y, ways, olds);                               \
                if (t->max_row_norm) limit_norm_##real(t, width, x);                                                  \
            }                                                                                                         \
        }                                                                                                             \
    }
LIMIT(float, load, store)
LIMIT(double, load_double, store_double)

static void step_rows(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to) /* rows that begin there */
{
    const int64_t width = t->row_widths[tensor], first = (from + width - 1) / width, end = (to + width - 1) / width;
    const int64_t size = t->param == FLOAT64 ? 8 : t->param == FLOAT32 ? 4 : 2;
    (t->param == FLOAT64 ? step_rows_double : step_rows_float)(t, k, tensor, first * width, end * width, size);
}

static int64_t padded(int64_t width) { return (width + 15) / 16 * 16; } /* to 64 bytes of floats */

static void step_coded_rows(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to)
{
    const int64_t width = t->row_widths[tensor], rows = width < CHUNK ? CHUNK / width : 1; /* at a time */
    float *const x = (float *)k->room, *const y = x + padded(width < CHUNK ? CHUNK : width);
    table of_floats = *t;
    of_floats.param = FLOAT32; /* is read in place, as add_squares has no room for a whole row */
    for (int64_t start = from, n; start < to; start += n) {
        n = to - start < rows * width ? to - start : rows * width;
        step_coded(t, k, tensor, start, start + n, x, y);
        for (int64_t i = 0; i < n; i += width) {
            char *new = (char *)(x + i), *old = (char *)(y + i);
            double ways[LANES] = {0}, olds[LANES] = {0};
            add_squares_float(&of_floats, width, new, old, ways, olds);
            if (t->max_row_change) limit_change_float(&of_floats, width, new, old, ways, olds);
            if (t->max_row_norm) limit_norm_float(&of_floats, width, new);
        }
        for (int64_t i = 0, m; i < n; i += m) {
            blocks b;
            m = n - i < CHUNK ? n - i : CHUNK;
            if (t->widths[tensor] && m == CHUNK) m -= (i + m) % width % BLOCK; /* end where a block ends */
            find_blocks(&b, t, k, tensor, start + i, m);
            store_param(t, x + i, tensor, &b);
        }
    }
}

static void step_coded_part(const table *t, const numbers *k, int64_t tensor, int64_t from, int64_t to)
{
    const int limited = t->row_widths && t->row_widths[tensor];
    const int64_t width = limited ? t->row_widths[tensor] : t->widths[tensor] ? t->widths[tensor] : BLOCK;
    const int64_t size = t->ends[tensor] - (tensor ? t->ends[tensor - 1] : 0);
    const int64_t first = (from + width - 1) / width * width, end = (to + width - 1) / width * width;
    if (limited) step_coded_rows(t, k, tensor, first, end);
    else step_coded(t, k, tensor, first, end < size ? end : size, NULL, NULL);
}

/* Return the bytes that a thread needs for the rows that it limits: a copy of some rows, or of a long one; and for coded
 * tensors also what they become. */
static int64_t room_for_rows(const table *t)
{
    int64_t widest = 0;
    for (int64_t i = 0; t->row_widths && i < t->count; i++)
        if (t->row_widths[i] > widest) widest = t->row_widths[i];
    if (!widest) return 0;
    if (t->coded) return 2 * sizeof(float) * padded(widest < CHUNK ? CHUNK : widest);
    return sizeof(double) * padded(widest < STRIP ? STRIP : widest);
}

/* The elements of all tensors, one tensor after the other, are cut into pieces. A free thread takes the next piece. A row that
 * is limited belongs to the piece in which it begins. */

static void do_pieces(job *j)
{
    int64_t tensor = 0, piece;
    numbers k = {0};
    if (j->room) k.room = j->room + j->room_bytes * __atomic_fetch_add(&j->workers, 1, __ATOMIC_RELAXED);
    while ((piece = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->pieces) {
        const table *t = j->t;
        const int64_t total = t->ends[t->count - 1], end = (piece + 1) * PIECE < total ? (piece + 1) * PIECE : total;
        double sum = 0;
        for (int64_t at = piece * PIECE; at < end;) {
            while (t->ends[tensor] <= at) tensor++;
            const int64_t start = tensor ? t->ends[tensor - 1] : 0;
            const int64_t stop = t->ends[tensor] < end ? t->ends[tensor] : end;
            if (j->sums) sum += squares_part(t, tensor, at - start, stop - start);
            else {
                set_numbers(&k, t, tensor);
                (t->coded ? step_coded_part : t->row_widths && t->row_widths[tensor] ? step_rows : step_part)(
                    t, &k, tensor, at - start, stop - start);
            }
            at = stop;
        }
        if (j->sums) j->sums[piece] = sum;
        __atomic_fetch_add(&j->done, 1, __ATOMIC_RELEASE);
    }
}

static void work(job *j)
{
    fenv_t before;
    fegetenv(&before);
    fesetenv(&j->environment);
    do_pieces(j);
    fesetenv(&before);
}

static void work_as_one_of_a_team(void *j) { work(j); }

static void leave(job *j, int64_t users)
{
    if (__atomic_sub_fetch(&j->users, users, __ATOMIC_ACQ_REL) == 0) free(j);
}

static void *help(void *j)
{
    work(j);
    leave(j, 1);
    return NULL;
}

/* Do all pieces. If the caller found the function that starts torch's own OpenMP threads, use them: they exist and are awake.
 * Otherwise start threads for this call. Starting one takes 20 µs, and its core may be busy with the waiting threads of
 * another library. So the call ends with the last piece, and a thread that starts later finds nothing to do. */
static void work_on(job alone, int64_t threads, gomp_parallel *parallel)
{
    const int64_t pieces = alone.pieces;
    job *j = NULL;
    fegetenv(&alone.environment);
    if (threads > pieces) threads = pieces;
    if (threads > 1 && parallel)
        parallel(work_as_one_of_a_team, &alone, threads, 0);
    else if (threads > 1)
        j = malloc(sizeof(job));
    if (!j) {
        work(&alone); /* all pieces, or none if the team has done them */
        return;
    }
    *j = alone;
    j->users = threads;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int64_t started = 1;
    for (pthread_t thread; started < threads && !pthread_create(&thread, &detached, help, j);) started++;
    pthread_attr_destroy(&detached);
    work(j); /* if no thread could be started, this does all pieces */
    while (__atomic_load_n(&j->done, __ATOMIC_ACQUIRE) < pieces) sched_yield();
    leave(j, threads - started + 1);
}

static int64_t pieces_of(const table *t) { return t->count ? (t->ends[t->count - 1] + PIECE - 1) / PIECE : 0; }

/* Return 1 if there is no memory for it: then nothing was written. */
int NAME(update)(const table *t, int64_t threads, gomp_parallel *parallel)
{
    const int64_t room_bytes = room_for_rows(t), pieces = pieces_of(t);
    if (threads > pieces) threads = pieces;
    char *const memory = room_bytes ? malloc(threads * room_bytes + 64) : NULL;
    if (room_bytes && !memory) return 1;
    char *const room = memory ? memory + 64 - (uintptr_t)memory % 64 : NULL; /* aligned for wide loads */
    work_on((job){.t = t, .pieces = pieces, .room = room, .room_bytes = room_bytes}, threads, parallel);
    free(memory); /* all pieces are done, so threads that still look at the job do not use it */
    for (int64_t i = 0; t->moves && i < t->count; i++) *t->steps[i] += 1;
    return 0;
}

/* `sums` has room for one sum per piece. */
double NAME(sum_of_squares)(const table *t, double *sums, int64_t threads, gomp_parallel *parallel)
{
    const int64_t pieces = pieces_of(t);
    work_on((job){.t = t, .sums = sums, .pieces = pieces}, threads, parallel);
    double sum = 0;
    for (int64_t i = 0; i < pieces; i++) sum += sums[i];
    return sum;
}

/* Return 1 if any of `count` tensors, at these addresses and of these sizes, overlaps one of the ranges, which are sorted and
 * disjoint. */
int NAME(meet)(int64_t ranges, const uint64_t *starts, const uint64_t *ends, int64_t count, const uint64_t *at,
               const int64_t *bytes)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t low = 0, high = ranges; /* find the ranges that begin before the tensor ends */
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (starts[middle] < at[i] + bytes[i]) low = middle + 1;
            else high = middle;
        }
        if (bytes[i] && low && ends[low - 1] > at[i]) return 1;
    }
    return 0;
}

/* Read the looks of tensors through DLPack's table of C functions (version 1.3, `DLPackExchangeAPI`), in a tenth of the time
 * that it takes in Python. */

typedef struct {
    char *data;
    int32_t device_type, device, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset; /* in bytes */
} dl_tensor;

typedef struct {
    void *(*item)(void *list, intptr_t i);      /* PyList_GetItem */
    void *(*type)(void *object);                /* PyObject_Type */
    void (*release)(void *object);              /* Py_DecRef */
    int (*look)(void *object, dl_tensor *);     /* torch's `dltensor_from_py_object_no_sync` */
} python;

#define NO_MEMORY (1 << 16) /* more than any number of dimensions */

/* Describe `count` torch.Tensors of a list: three words for each, two words for each of its dimensions, and its address. With
 * `compare`, do not write the words and the addresses of the first `fixed` tensors, but compare them, and return 0 at the
 * first difference, before looking into an object of another type. Between steps all of this leaves the caches: `hints` say
 * where the last call found the shapes, so that they can be prefetched. Return -1 if a Python exception is set, else 1. */
int NAME(signature)(const python *python, void *list, int64_t count, int64_t fixed, const char **hints, int64_t *words,
                    char **addresses, int compare)
{
    for (int64_t i = 0; i < count; i++) {
        dl_tensor x;
        if (i + AHEAD < count) {
            __builtin_prefetch(python->item(list, i + AHEAD));
            for (int line = -2; line < 2; line++) __builtin_prefetch(hints[i + AHEAD] + 64 * line);
        }
        void *const object = python->item(list, i), *const type = python->type(object);
        python->release(type); /* its objects keep it alive */
        if (compare && *words != (int64_t)(intptr_t)type) return 0;
        if (python->look(object, &x)) return -1;
        hints[i] = (const char *)x.shape;
        const int64_t code = (int64_t)x.code << 56 | (int64_t)x.bits << 48 | (int64_t)x.lanes << 32 | x.dimensions;
        const int64_t kind[] = {(intptr_t)type, (int64_t)x.device_type << 32 | (uint32_t)x.device,
                                code | (x.data ? 0 : NO_MEMORY)};
        const int64_t *parts[] = {kind, x.shape, x.strides};
        for (int part = 0; part < 3; part++) {
            const int64_t length = part ? x.dimensions : 3;
            for (int64_t j = 0; j < length; j++, words++)
                if (!compare) *words = parts[part][j];
                else if (*words != parts[part][j]) return 0;
        }
        char *const address = x.data + x.offset;
        if (!compare || i >= fixed) addresses[i] = address;
        else if (addresses[i] != address) return 0;
    }
    return 1;
}
