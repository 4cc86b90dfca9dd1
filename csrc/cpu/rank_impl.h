// The ranking of one row, written once over a few vector operations. Each rank_<isa>.cpp includes it inside a namespace
// of its own, after defining there:
//   kWidth                                               lanes of 32 bits
//   Mask key_mask(deviation, is_error, threshold, keys)  keys of kWidth columns; the lanes that are errors above it
//   Mask above(keys, threshold), Mask equal(keys, value)
//   compress(out, in, mask)                              packs the chosen lanes; may write kWidth lanes at out
//   compress_columns(out, first, mask)                   the same for the numbers first, first + 1, ...
//
// How it works: a key is the float's bits, flipped so that signed integers compare as the floats do. Errors whose key
// is above the threshold are appended to a buffer in column order. A full buffer is cut back to its n best, which
// raises the threshold, so that in a long row only few columns ever reach the buffer. The cut finds the n-th largest key
// by fixing its bits from the top, each by one vectorised count; no element moves. What is left is ordered by counting,
// for each element, how many precede it.

// Room beyond n before the buffer is cut: little for small n, where an early threshold spares most columns the buffer.
constexpr int64_t kLeastRoom = 64, kMostRoom = 1024, kRoomPerSlot = 8;
constexpr int64_t kCountingLimit = 512;  // above it, sorting beats counting
constexpr int32_t kBottom = INT32_MIN;  // below the key of -inf

typedef int32_t Lanes __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

static inline float key_to_float(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline int64_t sum(const Lanes& lanes) {
  int64_t total = 0;
  for (int64_t i = 0; i < kWidth; ++i) total += lanes[i];
  return total;
}

// Entries past size are padded with kBottom by the caller, up to a multiple of kWidth.
static inline int64_t count_not_below(const int32_t* key, int64_t size, int32_t threshold) {
  Lanes count{};
  for (int64_t i = 0; i < size; i += kWidth) {
    count -= *reinterpret_cast<const Lanes*>(key + i) >= threshold;
  }
  return sum(count);
}

static inline int lowest_bits(int mask, int64_t keep) {
  int kept = 0;
  for (; keep > 0 && mask; --keep) {
    kept |= mask & -mask;
    mask &= mask - 1;
  }
  return kept;
}

// Cuts the buffer down to its n best, in column order, and returns the threshold that later columns must exceed.
static int32_t cut(int32_t* key, int32_t* column, int64_t& size, int64_t n) {
  std::fill(key + size, key + size + kWidth, kBottom);
  int32_t low = key[0], high = key[0];
  for (int64_t i = 1; i < size; ++i) {
    low = std::min(low, key[i]);
    high = std::max(high, key[i]);
  }
  constexpr uint32_t kSign = 0x80000000u;
  uint32_t prefix = static_cast<uint32_t>(high) ^ kSign;
  bool exact = false;
  if (low != high) {
    int bit = 31 - __builtin_clz(static_cast<uint32_t>(low ^ high));
    prefix = bit == 31 ? 0 : prefix & ~((2u << bit) - 1);
    for (; bit >= 0 && !exact; --bit) {
      const uint32_t candidate = prefix | (1u << bit);
      const int64_t count = count_not_below(key, size, static_cast<int32_t>(candidate ^ kSign));
      if (count >= n) {
        prefix = candidate;
        exact = count == n;
      }
    }
  }
  int32_t threshold = static_cast<int32_t>(prefix ^ kSign);
  if (exact) --threshold;  // all n lie above it; otherwise threshold is the n-th key, and its equals fill up in order
  int64_t ties = exact ? 0 : n - count_not_below(key, size, threshold + 1);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i += kWidth) {
    int mask = above(key + i, threshold);
    if (ties > 0) {
      const int chosen = lowest_bits(equal(key + i, threshold), ties);
      ties -= __builtin_popcount(chosen);
      mask |= chosen;
    }
    compress(key + kept, key + i, mask);
    compress(column + kept, column + i, mask);
    kept += __builtin_popcount(mask);
  }
  size = kept;
  return threshold;
}

// Writes to order[i] the place of element i. The buffer is in column order, so among equals the earlier precedes.
static void count_places(const int32_t* key, int64_t size, int32_t* order) {
  Lanes lane;
  for (int64_t i = 0; i < kWidth; ++i) lane[i] = static_cast<int32_t>(i);
  for (int64_t first = 0; first < size; first += kWidth) {
    const Lanes own = *reinterpret_cast<const Lanes*>(key + first);
    Lanes place{};
    const int64_t last = std::min(first + kWidth, size);
    for (int64_t j = 0; j < first; ++j) place -= key[j] >= own;
    for (int64_t j = last; j < size; ++j) place -= key[j] > own;
    for (int64_t j = first; j < last; ++j) {
      place -= (key[j] > own) | ((key[j] == own) & (lane > static_cast<int32_t>(j - first)));
    }
    *reinterpret_cast<Lanes*>(order + first) = place;
  }
}

// Stable radix sort, descending, of (key, column) pairs held as key << 32 | column.
static void radix_sort(const int32_t* key, const int32_t* column, int64_t size, std::vector<uint64_t>& pairs) {
  constexpr int kBits = 11, kBins = 1 << kBits;
  pairs.resize(2 * size);
  uint64_t *from = pairs.data(), *to = from + size;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t descending = ~(static_cast<uint32_t>(key[i]) ^ 0x80000000u);
    from[i] = static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(column[i]);
  }
  int64_t place[kBins];
  for (int shift = 32; shift < 64; shift += kBits) {
    std::fill(place, place + kBins, 0);
    for (int64_t i = 0; i < size; ++i) ++place[from[i] >> shift & (kBins - 1)];
    int64_t total = 0;
    for (int64_t& bin : place) total += std::exchange(bin, total);
    for (int64_t i = 0; i < size; ++i) to[place[from[i] >> shift & (kBins - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != pairs.data()) std::copy(from, from + size, pairs.data());
}

int64_t rank_row(
    const float* deviation,
    const uint8_t* is_error,
    int64_t length,
    int64_t n,
    Scratch& scratch,
    float* value,
    int32_t* index) {
  if (n <= 0) return 0;
  n = std::min(n, length);
  const int64_t room = std::clamp(kRoomPerSlot * n, kLeastRoom, kMostRoom);
  const int64_t capacity = std::min(n + room, length + kWidth);
  if (static_cast<int64_t>(scratch.key.size()) < capacity + 2 * kWidth) {
    scratch.key.resize(capacity + 2 * kWidth);
    scratch.column.resize(capacity + 2 * kWidth);
    scratch.order.resize(capacity + 2 * kWidth);
  }
  int32_t *key = scratch.key.data(), *column = scratch.column.data(), *order = scratch.order.data();
  int64_t size = 0;
  int32_t threshold = kBottom;
  int32_t keys[kWidth];
  float last_deviation[kWidth] = {};
  uint8_t last_error[kWidth] = {};
  for (int64_t start = 0; start < length; start += kWidth) {
    const float* block = deviation + start;
    const uint8_t* errors = is_error + start;
    if (start + kWidth > length) {
      std::copy(block, deviation + length, last_deviation);
      std::copy(errors, is_error + length, last_error);
      block = last_deviation;
      errors = last_error;
    }
    const int mask = key_mask(block, errors, threshold, keys);
    if (mask == 0) continue;
    compress(key + size, keys, mask);
    compress_columns(column + size, static_cast<int32_t>(start), mask);
    size += __builtin_popcount(mask);
    if (size > capacity) threshold = cut(key, column, size, n);
  }
  if (size > n) cut(key, column, size, n);
  if (size <= kCountingLimit) {
    count_places(key, size, order);
    for (int64_t i = 0; i < size; ++i) {
      value[order[i]] = key_to_float(key[i]);
      index[order[i]] = column[i];
    }
  } else {
    radix_sort(key, column, size, scratch.pairs);
    for (int64_t i = 0; i < size; ++i) {
      const uint64_t pair = scratch.pairs[i];
      value[i] = key_to_float(static_cast<int32_t>(~static_cast<uint32_t>(pair >> 32) ^ 0x80000000u));
      index[i] = static_cast<int32_t>(static_cast<uint32_t>(pair));
    }
  }
  return size;
}
