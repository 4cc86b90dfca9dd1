// The emulated launchers under names that ctypes can find.
#include <cuda_runtime.h>

#include "topn.cu"

extern "C" int emulate_topn(const ntpseg::TopnArguments* arguments, unsigned seed) {
  emulator::random.seed(seed);
  return ntpseg::launch_topn(*arguments, nullptr);
}

extern "C" int emulate_record(const ntpseg::RecordArguments* arguments, unsigned seed) {
  emulator::random.seed(seed);
  return ntpseg::launch_record(*arguments, nullptr);
}
