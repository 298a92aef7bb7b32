// Memory, as of ptx_memory.h, and launches of PTX.
#include "ptx_machine.h"

namespace ptx {

namespace {

struct Range {
  uint64_t begin, end;
};
const Range everything{0, ~uint64_t{0}};
const Range* ranges = &everything;  // what kernels may read and write of global memory
int64_t range_count = 1;

}  // namespace

unsigned char* global(Bits address, int64_t bytes) {
  if (address % bytes != 0) fail("a load or store is not aligned to its size");
  const auto within = [=](const Range& range) { return range.begin <= address && address + bytes <= range.end; };
  if (std::none_of(ranges, ranges + range_count, within)) fail("a load or store is outside all tensors");
  return reinterpret_cast<unsigned char*>(address);
}

unsigned char* shared(Bits address, int64_t bytes) {
  const auto rank = static_cast<unsigned>(address >> kRankShift & 0xff);
  const auto offset = static_cast<int64_t>(address & kOffsetMask);
  if (offset % bytes != 0) fail("an access to shared memory is not aligned to its size");
  if (offset + bytes > hk_emulation::shared_memory_bytes()) fail("an access is outside shared memory");
  unsigned char* mine = hk_emulation::shared_memory() + offset;
  return rank == 0 ? mine : hk_emulation::shared_memory_of(mine, rank - 1);
}

unsigned char* generic(Bits address, int64_t bytes) {
  const int rank = hk_emulation::rank_of(reinterpret_cast<const void*>(address));
  if (rank < 0) return global(address, bytes);
  // As long as no block has ended, this one's own memory, too, is found by its rank.
  const Bits begin = reinterpret_cast<Bits>(hk_emulation::shared_memory_of(hk_emulation::shared_memory(), rank));
  return shared(mapa_shared_cluster<u32>(address - begin, rank), bytes);
}

}  // namespace ptx

extern "C" bool hk_ptx_launch(hk_emulation::Translated kernel, const unsigned char* parameters, unsigned blocks,
                              unsigned threads, int64_t shared_bytes, const ptx::Range* ranges, int64_t range_count) {
  ptx::ranges = ranges, ptx::range_count = range_count;
  return hk_emulation::launch({blocks, 1, 1}, {threads, 1, 1}, 1, shared_bytes, [=] { kernel(parameters); });
}
