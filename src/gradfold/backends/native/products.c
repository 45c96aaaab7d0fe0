/* From a gradient's terms to stepped rows: one pass over the weight and its states.

   The gradient of rows [R, C] is a sum of products `left.T @ right` (left [T, R], right [T, C]), of rows gathered by their
   numbers, and of a matrix that is there already. A few of its rows at a time are computed into a tile that stays in cache, measured, changed, and
   handed to a generated kernel (emit.py), which steps the same rows of the weight and its states.

   Products are register-blocked: HEIGHT x WIDTH sums over at most DEPTH tokens, operands packed in the order they are
   read and padded with zeros, so that all elements meet the same instructions. No element depends on where rows or
   columns are cut, or on the thread. The tile is as wide as the rows: columns in pieces cost half the time again. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define NOINLINE __attribute__((noinline))
#define BLOCK 128 /* columns in pieces are cut where a codec's blocks begin */
#define HEIGHT 6
#define WIDTH 16
#define LANES 8
#define DEPTH 256
#define TILE_ROWS 48             /* at most, a multiple of HEIGHT */
#define MOST_COLUMNS (128 * 128) /* of a tile */
#define ALIGNED 16               /* floats in a cache line */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define CEIL(a, b) (((a) + (b) - 1) / (b) * (b))

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
#ifdef __has_builtin
#if __has_builtin(__builtin_elementwise_fma) && (defined(__FMA__) || defined(__ARM_FEATURE_FMA))
#define FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
#endif
#endif
#if !defined(FMA) && defined(__FMA__) && defined(__AVX__) && !defined(__clang__)
#define FMA(a, b, c) ((vec)__builtin_ia32_vfmaddps256(a, b, c))
#endif
#ifndef FMA
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

enum kind { FP32, BF16, FP16 };
#define CERTAIN 1e37 /* a gradient bounded by less, give or take rounding errors, has no infinity */
enum mode { STEP, MEASURE, GUARDED };

/* launch.py writes these; every field has eight bytes. */
struct matrix {
  const char *at;
  int64_t stride; /* elements from one row to the next */
  int64_t kind;
};
struct product {
  int64_t tokens;
  struct matrix left, right;
};
struct gather { /* row order[i] of grad is added to row ids[i], which ascend; those that are not there are left out */
  int64_t count;
  const int64_t *ids, *order;
  struct matrix grad;
};
struct call {
  const float *scalars;
  const int32_t *keys;
  float *scratch;
  int64_t scratch_floats; /* of each share */
  int64_t most_packed;    /* floats of `right` packed at a time, unless a block of columns needs more */
  int64_t row, column; /* of the bound matrices: where the gradient begins */
  double scale, clip_value;
  struct matrix grad; /* at == NULL: none */
  int64_t count, gathers; /* of products, and of gathers, which follow them */
  struct product products[];
};
typedef void rows_function(const int64_t *bound, const int32_t *keys, const float *scalars, const float *grad,
                           int64_t grad_stride, int64_t rows_start, int64_t rows_end, int64_t columns_start,
                           int64_t columns_end);

static inline float float_of(uint32_t i) {
  float x;
  memcpy(&x, &i, 4);
  return x;
}
static inline float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
static inline float from_fp16(uint16_t h) {
  uint32_t size = (uint32_t)(h & 0x7fff) << 13;
  float finite = float_of(size) * 0x1p+112f;
  float value = size >= 0x0f800000 ? float_of(size | 0x7f800000) : finite;
  return h & 0x8000 ? -value : value;
}

/* `n` elements from `at`, and zeros up to `padded`. */
static void read_row(const char *at, int64_t kind, int64_t n, int64_t padded, float *restrict out) {
  const uint16_t *half = (const uint16_t *)at;
  if (kind == FP32)
    memcpy(out, at, 4 * n);
  else if (kind == BF16)
    for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
  else
    for (int64_t i = 0; i < n; i++) out[i] = from_fp16(half[i]);
  for (int64_t i = n; i < padded; i++) out[i] = 0;
}

static const char *element(const struct matrix *x, int64_t row, int64_t column) {
  return x->at + (x->kind == FP32 ? 4 : 2) * (row * x->stride + column);
}

/* Tokens [start, start + depth) of columns [first, first + n), as [n / width][depth][width]. */
static void pack(const struct matrix *x, int64_t start, int64_t depth, int64_t first, int64_t n, int width, float *out) {
  const int64_t whole = n / width * width;
  for (int64_t t = 0; t < depth; t++) {
    const char *row = element(x, start + t, first);
    float *to = out + t * width;
    if (x->kind == FP32 && width == WIDTH)
      for (int64_t c = 0; c < whole; c += WIDTH) memcpy(to + c * depth, row + 4 * c, 4 * WIDTH);
    else if (x->kind == FP32)
      for (int64_t c = 0; c < whole; c += HEIGHT) memcpy(to + c * depth, row + 4 * c, 4 * HEIGHT);
    else
      for (int64_t c = 0; c < whole; c += width) read_row(element(x, start + t, first + c), x->kind, width, width, to + c * depth);
    if (whole < n) read_row(element(x, start + t, first + whole), x->kind, n - whole, width, to + whole * depth);
  }
}

/* out [HEIGHT, WIDTH] = or += a.T @ b; a [depth, HEIGHT], b [depth, WIDTH]. */
NOINLINE static void multiply(int64_t depth, const float *restrict a, const float *restrict b, float *restrict out,
                              int64_t stride, int add) {
  vec sums[HEIGHT][WIDTH / LANES] = {0};
  for (int64_t t = 0; t < depth; t++, a += HEIGHT, b += WIDTH) {
    const vec left = *(const vec *)b, right = *(const vec *)(b + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; i++) {
      const vec x = {a[i], a[i], a[i], a[i], a[i], a[i], a[i], a[i]};
      sums[i][0] = FMA(x, left, sums[i][0]);
      sums[i][1] = FMA(x, right, sums[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < HEIGHT; i++) {
    vec *to = (vec *)(out + i * stride);
    if (add) sums[i][0] += to[0], sums[i][1] += to[1];
    to[0] = sums[i][0];
    to[1] = sums[i][1];
  }
}

/* The sum of squares, not finite only if an element is not. */
static double squares_of(const float *x, int64_t n) {
  double sums[LANES] = {0};
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES)
    for (int i = 0; i < LANES; i++) sums[i] += (double)x[c + i] * (double)x[c + i];
  for (int i = 0; c + i < n; i++) sums[i] += (double)x[c + i] * (double)x[c + i];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/* Scale, then clamp; a NaN stays one. */
static void change(float *x, int64_t n, float scale, float most) {
  for (int64_t c = 0; c < n; c++) {
    const float scaled = x[c] * scale, low = scaled < -most ? -most : scaled;
    x[c] = low > most ? most : low;
  }
}

static const struct gather *gathers_of(const struct call *call) {
  return (const struct gather *)(call->products + call->count);
}

/* Add to a tile of some rows and columns what is gathered there. */
static void add_gathered(const struct gather *x, int64_t top, int64_t rows, int64_t first, int64_t columns,
                         float *restrict tile, int64_t stride) {
  int64_t low = 0, high = x->count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (x->ids[middle] < top)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < x->count && x->ids[low] < top + rows; low++) {
    float *restrict to = tile + (x->ids[low] - top) * stride, part[BLOCK];
    for (int64_t c = 0; c < columns; c += BLOCK) {
      const int64_t n = MIN(BLOCK, columns - c);
      read_row(element(&x->grad, x->order[low], first + c), x->grad.kind, n, n, part);
      for (int64_t i = 0; i < n; i++) to[c + i] += part[i];
    }
  }
}

static int64_t tile_columns(int64_t depth, int64_t columns, int64_t most_packed) {
  const int64_t packed = depth ? most_packed / depth / BLOCK * BLOCK : MIN(most_packed, MOST_COLUMNS) / BLOCK * BLOCK;
  return MIN(MIN(packed < BLOCK ? BLOCK : packed, MOST_COLUMNS), CEIL(columns, WIDTH));
}
/* Few rows, so that the tile stays in the second cache with what it is stepped with; but `right` is read once for each
   tile, and of many tokens it is larger than that cache. */
static int64_t tile_rows(int64_t depth) { return depth > DEPTH ? TILE_ROWS : TILE_ROWS / 4; }
/* One more cache line a row: where rows are a multiple of 4 KiB apart, all of them would fall into the same few lines. */
static int64_t tile_stride(int64_t width) { return CEIL(width, ALIGNED) + ALIGNED; }

/* Scratch memory of one share, in floats. */
int64_t gradfold_scratch(int64_t depth, int64_t columns, int64_t most_packed) {
  const int64_t width = tile_columns(depth, columns, most_packed);
  return ALIGNED + depth * width + tile_rows(depth) * (DEPTH + tile_stride(width));
}

double gradfold_bound(const struct call *call, int64_t rows, int64_t columns);

/* Step rows and columns of what is bound, counted from where the gradient begins; returns the gradient's sum of squares.
   GUARDED: -1, and nothing is stepped, where the operands do not tell that all of the gradient is finite. */
double gradfold_step(rows_function *rows_function, const int64_t *bound, const struct call *call, int64_t mode,
                     int64_t share, int64_t rows_start, int64_t rows_end, int64_t columns_start, int64_t columns_end) {
  if (mode == GUARDED) {
    const double scale = fabs(call->scale);
    if (!(gradfold_bound(call, rows_end, columns_end) * (scale > 1 ? scale : 1) < CERTAIN)) return -1;
    mode = STEP;
  }
  const int changed = call->scale != 1 || call->clip_value < INFINITY;
  const int direct = call->grad.at && call->grad.kind == FP32 && !call->count && !call->gathers && !changed;
  const int step = mode == STEP;
  double squares = 0;
  int64_t depth = 0;
  for (int64_t p = 0; p < call->count; p++) depth += call->products[p].tokens;
  const int64_t width = tile_columns(depth, columns_end - columns_start, call->most_packed), stride = tile_stride(width);
  const int64_t height = tile_rows(depth);
  float *const packed = (float *)CEIL((intptr_t)(call->scratch + share * call->scratch_floats), 4 * ALIGNED);
  float *const lefts = packed + depth * width, *const tile = lefts + height * DEPTH;
  if (direct) {
    for (int64_t r = rows_start; r < rows_end; r++)
      squares += squares_of((const float *)element(&call->grad, r, columns_start), columns_end - columns_start);
    if (step)
      rows_function(bound, call->keys, call->scalars, (const float *)element(&call->grad, rows_start, columns_start),
                    call->grad.stride, call->row + rows_start, call->row + rows_end, call->column + columns_start,
                    call->column + columns_end);
    return squares;
  }
  for (int64_t first = columns_start; first < columns_end; first += width) {
    const int64_t columns = MIN(width, columns_end - first);
    float *to = packed;
    for (int64_t p = 0; p < call->count; p++) {
      const struct product *x = &call->products[p];
      for (int64_t t = 0; t < x->tokens; t += DEPTH) {
        const int64_t tokens = MIN(DEPTH, x->tokens - t);
        pack(&x->right, t, tokens, first, columns, WIDTH, to);
        to += tokens * CEIL(columns, WIDTH);
      }
    }
    for (int64_t top = rows_start; top < rows_end; top += height) {
      const int64_t rows = MIN(height, rows_end - top);
      const float *from = packed;
      int add = call->grad.at != NULL;
      for (int64_t r = 0; add && r < rows; r++)
        read_row(element(&call->grad, top + r, first), call->grad.kind, columns, CEIL(columns, WIDTH), tile + r * stride);
      for (int64_t p = 0; p < call->count; p++) {
        const struct product *x = &call->products[p];
        for (int64_t t = 0; t < x->tokens; t += DEPTH) {
          const int64_t tokens = MIN(DEPTH, x->tokens - t);
          pack(&x->left, t, tokens, top, rows, HEIGHT, lefts);
          for (int64_t c = 0; c < columns; c += WIDTH)
            for (int64_t r = 0; r < rows; r += HEIGHT)
              multiply(tokens, lefts + r * tokens, from + c * tokens, tile + r * stride + c, stride, add);
          from += tokens * CEIL(columns, WIDTH);
          add = 1;
        }
      }
      if (!add) memset(tile, 0, 4 * height * stride);
      for (int64_t g = 0; g < call->gathers; g++)
        add_gathered(&gathers_of(call)[g], top, rows, first, columns, tile, stride);
      for (int64_t r = 0; r < rows; r++) {
        squares += squares_of(tile + r * stride, columns);
        if (changed) change(tile + r * stride, columns, (float)call->scale, (float)call->clip_value);
      }
      if (step)
        rows_function(bound, call->keys, call->scalars, tile, stride, call->row + top, call->row + top + rows,
                      call->column + first, call->column + first + columns);
    }
  }
  return squares;
}

static double norm(const struct matrix *x, int64_t rows, int64_t columns) {
  double squares = 0;
  float part[BLOCK];
  for (int64_t r = 0; r < rows; r++) {
    if (x->kind == FP32) {
      squares += squares_of((const float *)element(x, r, 0), columns);
      continue;
    }
    for (int64_t c = 0; c < columns; c += BLOCK) {
      const int64_t n = MIN(BLOCK, columns - c);
      read_row(element(x, r, c), x->kind, n, n, part);
      squares += squares_of(part, n);
    }
  }
  return sqrt(squares);
}

/* No element of the gradient, and no sum on the way to it, is larger than this: by Cauchy-Schwarz the product of its
   operands' norms bounds a product. NaN or infinity if an operand has one. */
double gradfold_bound(const struct call *call, int64_t rows, int64_t columns) {
  double bound = call->grad.at ? norm(&call->grad, rows, columns) : 0;
  for (int64_t p = 0; p < call->count; p++) {
    const struct product *x = &call->products[p];
    bound += norm(&x->left, x->tokens, rows) * norm(&x->right, x->tokens, columns);
  }
  for (int64_t g = 0; g < call->gathers; g++) {
    const struct gather *x = &gathers_of(call)[g];
    bound += (double)x->count * norm(&x->grad, x->count, columns);
  }
  return bound;
}
