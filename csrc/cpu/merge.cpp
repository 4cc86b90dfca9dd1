#include "merge.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>
#include <tuple>

namespace ntpseg {
namespace {

class Locked {
 public:
  explicit Locked(int32_t* lock) : lock_(lock) {
    while (__atomic_exchange_n(lock_, 1, __ATOMIC_ACQUIRE)) std::this_thread::yield();
  }
  ~Locked() { __atomic_store_n(lock_, 0, __ATOMIC_RELEASE); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  int32_t* lock_;
};

// One row of the memory: deviation bits, positions and tokens, n of each.
void write(int32_t* row, int64_t n, const Entries& entries) {
  const int64_t size = std::min(entries.size, n);
  std::memcpy(row, entries.deviation.data(), size * sizeof(float));
  std::copy_n(entries.position.data(), size, row + n);
  std::copy_n(entries.token.data(), size, row + 2 * n);
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int64_t i = size; i < n; ++i) {
    std::memcpy(row + i, &nothing, sizeof nothing);
    row[n + i] = row[2 * n + i] = -1;
  }
}

Entries merge(const Entries& a, const Entries& b, int64_t n) {
  const auto rank = [](const Entries& e, int64_t i) { return std::tuple(-e.deviation[i], e.position[i], e.token[i]); };
  Entries merged(n);
  int64_t i = 0, j = 0;
  while (merged.size < n && (i < a.size || j < b.size)) {
    const bool first = j == b.size || (i < a.size && rank(a, i) <= rank(b, j));
    const Entries& from = first ? a : b;
    const int64_t slot = first ? i++ : j++;
    bool held = false;  // what was taken before has the larger deviation
    for (int64_t k = 0; k < merged.size; ++k) {
      held |= (merged.position[k] == from.position[slot]) & (merged.token[k] == from.token[slot]);
    }
    if (held) continue;
    merged.deviation[merged.size] = from.deviation[slot];
    merged.position[merged.size] = from.position[slot];
    merged.token[merged.size++] = from.token[slot];
  }
  return merged;
}

}  // namespace

Entries read_entries(const int32_t* row, int64_t n) {
  Entries entries(n);
  std::memcpy(entries.deviation.data(), row, n * sizeof(float));
  std::copy_n(row + n, n, entries.position.data());
  std::copy_n(row + 2 * n, n, entries.token.data());
  entries.size = std::find(row + n, row + 2 * n, -1) - (row + n);
  return entries;
}

void merge_into(const MemoryView& memory, int64_t sample, const Entries& fresh) {
  if (sample < 0 || sample >= memory.samples) {
    __atomic_fetch_add(memory.control, 1, __ATOMIC_RELAXED);
    return;
  }
  const Locked lock(memory.control + 1 + sample % memory.locks);
  const int64_t buffer = (memory.epoch & 1) * memory.samples + sample;
  int32_t* row = memory.rows + buffer * 3 * memory.n;
  if (memory.stamp[buffer] == memory.epoch) {
    write(row, memory.n, merge(read_entries(row, memory.n), fresh, memory.n));
  } else {
    write(row, memory.n, fresh);
    memory.stamp[buffer] = static_cast<int32_t>(memory.epoch);
  }
}

}  // namespace ntpseg
