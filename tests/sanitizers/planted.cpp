// Faults for the sanitizers to find: a run that lets them pass would let those of csrc pass as well.
#include <cstdint>
#include <vector>

extern "C" int32_t planted_write(int64_t index) {
  std::vector<int32_t> four(4);
  four.data()[index] = 1;
  return four.data()[0];
}

extern "C" int32_t planted_overflow(int32_t a, int32_t b) { return a + b; }
