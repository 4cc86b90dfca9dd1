// bfloat16 products on AMX tiles with float32 accumulation: the logits with their exponentials as epilogue, and the two
// products of the gradients. oneDNN rounds a product of bfloat16 to bfloat16; here the epilogue sees the accumulators.
//
// A micro kernel multiplies 32 x 32 blocks: 2 x 2 accumulator tiles, operands packed into tiles of 1 KiB beforehand
// (row strides of 2 V bytes would all fall into the same cache sets). An A tile holds 16 rows of 32 numbers, a B tile 16
// pairs of rows: entry (p, n) is the pair B[2p][n], B[2p + 1][n].
#include "loss.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")

#include "loss_vector.h"

namespace ntpseg {
namespace {

constexpr int64_t kTile = 512;    // numbers in a tile
constexpr int64_t kStep = 1024;   // numbers of one operand in a step of 32 along the inner dimension
constexpr int64_t kChunk = 512;   // inner dimension per visit of an accumulator block: a panel stays in the L1 cache
constexpr int64_t kWide = 4;      // panels of 32 classes taken together: rows of the block are far apart in memory

// Aligned scratch of this thread.
class Scratch {
 public:
  bfloat16* of(int64_t numbers) {
    if (numbers > size_) {
      memory_.reset(static_cast<bfloat16*>(std::aligned_alloc(64, static_cast<size_t>(numbers) * sizeof(bfloat16))));
      size_ = numbers;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(bfloat16* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<bfloat16, Free> memory_;
  int64_t size_ = 0;
};

// Tiles are part of a thread's state: they are set up on entry and let go on exit, as oneDNN does on its side.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// c[32, 32] (+)= a @ b over `steps` steps of 32.
inline void multiply(const bfloat16* a, const bfloat16* b, int64_t steps, float* c, int64_t stride, bool add) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, c + 16 * stride, bytes);
    _tile_loadd(3, c + 16 * stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, c + 16 * stride, bytes);
  _tile_stored(3, c + 16 * stride + 16, bytes);
}

// Transposes 16 x 16 numbers of 32 bits and stores the rows one after another.
inline void store_transposed(__m512i r[16], bfloat16* out) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(out + 32 * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(out + 32 * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_store_si512(out + 32 * (i + 4), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_store_si512(out + 32 * (i + 12), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

inline __mmask32 first(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

// Pairs of two rows of 32 numbers: (x[0], y[0]), (x[1], y[1]), ...; the first 16 pairs, then the others.
inline void pairs(__m512i x, __m512i y, __m512i& low, __m512i& high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kLow);
  low = _mm512_permutex2var_epi16(x, index, y);
  high = _mm512_permutex2var_epi16(x, _mm512_add_epi16(index, _mm512_set1_epi16(16)), y);
}

// One step of an A operand: 32 rows of 32 numbers, of which `rows` and `columns` are there.
inline void pack_a(const bfloat16* source, int64_t stride, int64_t rows, int64_t columns, bfloat16* out) {
  for (int64_t r = 0; r < 32; ++r) {
    const __mmask32 mask = r < rows ? first(columns) : 0;
    _mm512_store_si512(out + 32 * r, _mm512_maskz_loadu_epi16(mask, source + r * stride));
  }
}

// One step of a B operand from rows of the inner dimension: 32 rows of 32 numbers, `rows` and `columns` of them there.
inline void pack_b(const bfloat16* source, int64_t stride, int64_t rows, int64_t columns, bfloat16* out) {
  for (int64_t p = 0; p < 16; ++p) {
    const bfloat16* row = source + 2 * p * stride;
    const __m512i x = _mm512_maskz_loadu_epi16(2 * p < rows ? first(columns) : 0, row);
    const __m512i y = _mm512_maskz_loadu_epi16(2 * p + 1 < rows ? first(columns) : 0, row + stride);
    __m512i low, high;
    pairs(x, y, low, high);
    _mm512_store_si512(out + 32 * p, low);
    _mm512_store_si512(out + kTile + 32 * p, high);
  }
}

// One step of a B operand from its transpose: `columns` rows of 32 numbers along the inner dimension.
inline void pack_b_transposed(const bfloat16* source, int64_t stride, int64_t columns, bfloat16* out) {
  for (int half = 0; half < 2; ++half) {
    __m512i r[16];
    for (int n = 0; n < 16; ++n) {
      const int64_t column = 16 * half + n;
      r[n] = column < columns ? _mm512_loadu_si512(source + column * stride) : _mm512_setzero_si512();
    }
    store_transposed(r, out + half * kTile);
  }
}

// One step of an A operand from its transpose: 32 rows of the inner dimension, 32 numbers of A's rows each.
inline void pack_a_transposed(const bfloat16* source, int64_t stride, int64_t rows, int64_t columns, bfloat16* out) {
  __m512i low[16], high[16];
  for (int64_t p = 0; p < 16; ++p) {
    const bfloat16* row = source + 2 * p * stride;
    const __m512i x = _mm512_maskz_loadu_epi16(2 * p < rows ? first(columns) : 0, row);
    const __m512i y = _mm512_maskz_loadu_epi16(2 * p + 1 < rows ? first(columns) : 0, row + stride);
    pairs(x, y, low[p], high[p]);
  }
  store_transposed(low, out);
  store_transposed(high, out + kTile);
}

}  // namespace

void amx_pack_rows(const bfloat16* hidden, const BlockShape& shape, bfloat16* packed) {
  for (int64_t row = 0; row < shape.rows; row += 32) {
    for (int64_t k = 0; k < shape.width; k += 32, packed += kStep) {
      pack_a(hidden + row * shape.hidden_stride + k, shape.hidden_stride, shape.rows - row, 32, packed);
    }
  }
}

void amx_pack_pairs(const bfloat16* scaled, const BlockShape& shape, bfloat16* packed) {
  // chunk of rows, then block of 32 features, then step: what amx_weight_gradient reads in a row
  for (int64_t chunk = 0; chunk < shape.rows; chunk += kChunk) {
    const int64_t stop = std::min(chunk + kChunk, shape.rows);
    for (int64_t d = 0; d < shape.width; d += 32) {
      for (int64_t row = chunk; row < stop; row += 32, packed += kStep) {
        pack_b(scaled + row * shape.hidden_stride + d, shape.hidden_stride, shape.rows - row, 32, packed);
      }
    }
  }
}

void amx_exponentials(
    int64_t slice,
    const bfloat16* packed_hidden,
    const bfloat16* weight,
    const BlockShape& shape,
    const float* anchor,
    const int64_t* target_column,
    const float* target_logit,
    bfloat16* block,
    float* row_max,
    int64_t* argmax,
    float* row_sum) {
  thread_local Scratch panels, states;
  const int64_t steps = shape.width / 32, count = padded(shape.classes) / 32;
  const int64_t begin = count * slice / kSlices * 32, end = std::min(count * (slice + 1) / kSlices * 32, shape.classes);
  bfloat16* panel = panels.of(kWide * steps * kStep);
  auto* lanes = reinterpret_cast<avx512::Lanes*>(
      states.of(shape.rows * static_cast<int64_t>(sizeof(avx512::Lanes) / sizeof(bfloat16))));
  std::fill_n(lanes, shape.rows, avx512::empty_lanes());
  constexpr int64_t width = 32 * kWide;
  alignas(64) float z[32 * width];
  const Tiles tiles;
  for (int64_t v = begin; v < end; v += width) {
    const int64_t here = std::min(width, end - v);
    for (int64_t w = 0; w < here; w += 32) {
      for (int64_t s = 0; s < steps; ++s) {
        const bfloat16* source = weight + (v + w) * shape.weight_stride + 32 * s;
        pack_b_transposed(source, shape.weight_stride, here - w, panel + (w / 32 * steps + s) * kStep);
      }
    }
    for (int64_t row = 0; row < shape.rows; row += 32) {
      for (int64_t w = 0; w < here; w += 32) {
        multiply(packed_hidden + row * shape.width, panel + w * shape.width, steps, z + w, width, false);
      }
      const int64_t rows = std::min<int64_t>(32, shape.rows - row);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = row + i, own = target_column[r] - v;
        float* gap = z + width * i;
        if (own >= 0 && own < here) gap[own] = target_logit[r];
        const __m512 anchors = _mm512_set1_ps(anchor[r]);
        avx512::Lanes state = lanes[r];
        for (int64_t w = 0; w < here; w += 32) {
          const __mmask32 mask = first(here - w);
          const auto c = static_cast<int32_t>(v + w);
          const __m512 x = _mm512_sub_ps(_mm512_load_ps(gap + w), anchors);
          const __m512 y = _mm512_sub_ps(_mm512_load_ps(gap + w + 16), anchors);
          const __m512 e = avx512::take(state, x, c, static_cast<__mmask16>(mask));
          const __m512 f = avx512::take(state, y, c + 16, static_cast<__mmask16>(mask >> 16));
          if (block == nullptr) continue;
          const auto both = (__m512i)_mm512_cvtne2ps_pbh(f, e);
          _mm512_mask_storeu_epi16(block + r * shape.block_stride + v + w, mask, both);
        }
        lanes[r] = state;
      }
    }
  }
  for (int64_t r = 0; r < shape.rows; ++r) {
    row_max[r] = -std::numeric_limits<float>::infinity();
    argmax[r] = 0;
    row_sum[r] = 0;
    avx512::fold(lanes[r], row_max[r], argmax[r], row_sum[r]);
  }
}

void amx_hidden_gradient(
    int64_t begin,
    int64_t end,
    const bfloat16* block,
    const bfloat16* weight,
    const BlockShape& shape,
    float* d_hidden) {
  thread_local Scratch left, right;
  bfloat16* a = left.of(kChunk / 32 * kStep);
  bfloat16* b = right.of(kChunk * shape.width);
  const Tiles tiles;
  for (int64_t v = 0; v < shape.classes; v += kChunk) {
    const int64_t here = std::min(kChunk, shape.classes - v), steps = padded(here) / 32;
    for (int64_t d = 0; d < shape.width; d += 32) {
      for (int64_t s = 0; s < steps; ++s) {
        const bfloat16* source = weight + (v + 32 * s) * shape.weight_stride + d;
        pack_b(source, shape.weight_stride, here - 32 * s, 32, b + (d / 32 * steps + s) * kStep);
      }
    }
    for (int64_t row = begin; row < end; row += 32) {
      for (int64_t s = 0; s < steps; ++s) {
        const bfloat16* source = block + row * shape.block_stride + v + 32 * s;
        pack_a(source, shape.block_stride, shape.rows - row, here - 32 * s, a + s * kStep);
      }
      for (int64_t d = 0; d < shape.width; d += 32) {
        multiply(a, b + d / 32 * steps * kStep, steps, d_hidden + row * shape.width + d, shape.width, v > 0);
      }
    }
  }
}

void amx_weight_gradient(
    int64_t begin,
    int64_t end,
    const bfloat16* block,
    const bfloat16* packed_scaled,
    const BlockShape& shape,
    float* d_weight,
    bool add) {
  thread_local Scratch left;
  bfloat16* a = left.of(kWide * kChunk / 32 * kStep);
  alignas(64) float edge[32 * 32];
  const Tiles tiles;
  for (int64_t v = 32 * begin; v < 32 * end; v += 32 * kWide) {
    const int64_t stop = std::min(std::min(v + 32 * kWide, 32 * end), shape.classes);
    for (int64_t chunk = 0; chunk < shape.rows; chunk += kChunk) {
      const int64_t steps = padded(std::min(kChunk, shape.rows - chunk)) / 32;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t row = chunk + 32 * s;
        for (int64_t w = v; w < stop; w += 32) {
          const bfloat16* source = block + row * shape.block_stride + w;
          bfloat16* packed = a + ((w - v) / 32 * steps + s) * kStep;
          pack_a_transposed(source, shape.block_stride, shape.rows - row, stop - w, packed);
        }
      }
      for (int64_t d = 0; d < shape.width; d += 32) {
        const bfloat16* b = packed_scaled + chunk * shape.width + d / 32 * steps * kStep;
        for (int64_t w = v; w < stop; w += 32) {
          const bfloat16* panel = a + (w - v) / 32 * steps * kStep;
          float* out = d_weight + w * shape.width + d;
          if (stop - w >= 32) {
            multiply(panel, b, steps, out, shape.width, add || chunk > 0);
            continue;
          }
          multiply(panel, b, steps, edge, 32, false);
          for (int64_t i = 0; i < stop - w; ++i) {
            for (int64_t j = 0; j < 32; ++j) {
              float& sum = out[i * shape.width + j];
              sum = add || chunk > 0 ? sum + edge[32 * i + j] : edge[32 * i + j];
            }
          }
        }
      }
    }
  }
}

}  // namespace ntpseg
#else
namespace ntpseg {
void amx_pack_rows(const bfloat16*, const BlockShape&, bfloat16*) {}
void amx_pack_pairs(const bfloat16*, const BlockShape&, bfloat16*) {}
void amx_exponentials(
    int64_t, const bfloat16*, const bfloat16*, const BlockShape&, const float*, const int64_t*, const float*, bfloat16*,
    float*, int64_t*, float*) {}
void amx_hidden_gradient(int64_t, int64_t, const bfloat16*, const bfloat16*, const BlockShape&, float*) {}
void amx_weight_gradient(int64_t, int64_t, const bfloat16*, const bfloat16*, const BlockShape&, float*, bool) {}
}  // namespace ntpseg
#endif
