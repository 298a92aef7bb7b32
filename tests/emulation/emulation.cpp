// The scheduler of emulation.h, and what the bindings ask of a GPU's PyTorch.
#include "emulation.h"

#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime_api.h"

namespace hk_emulation {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int64_t kStack = 128 << 10, kGuard = 256, kAlignment = 128;
constexpr unsigned char kGarbage[] = {0xcd, 0x00}, kGuardByte = 0xa5;  // the second looks like valid numbers

enum class State { runs, at_warp, at_barrier, at_block, at_cluster, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Store {
  unsigned rank;  // of the block that it comes to
  void* to;
  unsigned char value[8];
  int bytes;
  Barrier* barrier;
};

struct Block {
  Index index;
  unsigned rank;
  std::vector<unsigned char> storage;
  unsigned char* shared;  // in storage, with a guard on both sides
};

struct Fiber {
  jmp_buf here;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  State state;
  Index thread;
  unsigned number;  // in its block
  Block* block;
  unsigned mask;
  void* payload;
  Combine combine;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  const Barrier* barrier;  // waited for, until `parity` is not that of its phase
  int parity;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* kernel;
unsigned blocks_in_cluster, threads_per_block, order;
bool changing = true;
std::vector<Block> cluster;
std::deque<Store> stores;
int64_t shared_size;
bool arrived;  // a thread just did, at a barrier: those before it go on first
const char* failure;

void suspend(State state) {
  current->state = state;
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*kernel)();
    suspend(State::done);
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread, blockIdx = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.here, 1);
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

void do_copy(const Copy& c) {
  std::memset(c.to, 0, c.bytes);
  std::memcpy(c.to, c.from, c.valid);
}

Fiber& fiber_of(unsigned block, unsigned thread) { return *fibers[block * threads_per_block + thread]; }

// Whether all threads of a block are done, and its shared memory with them.
bool ended(const Block& block) {
  for (unsigned t = 0; t < threads_per_block; ++t) {
    if (fiber_of(block.rank, t).state != State::done) return false;
  }
  return true;
}

bool ends_phase(Barrier& barrier) {
  const bool complete = barrier.missing == 0 && barrier.bytes == 0;
  if (complete) barrier.phase ^= 1, barrier.missing = barrier.count;
  return complete;
}

bool do_store(const Store& s) {
  if (ended(cluster[s.rank])) failure = "an asynchronous store comes to a block that has ended";
  std::memcpy(s.to, s.value, s.bytes);
  s.barrier->bytes -= s.bytes;
  return ends_phase(*s.barrier);
}

unsigned in_order(unsigned i, unsigned n, unsigned reversed) { return order & reversed ? n - 1 - i : i; }

// Runs one warp until each of its lanes waits for more than a warp. Whether any ran.
bool run_warp(unsigned block, unsigned first) {
  const unsigned lanes = std::min(32u, threads_per_block - first);
  bool ran = false;
  for (bool moved = true; moved && !failure && !arrived;) {
    moved = false;
    for (unsigned i = 0; i < lanes && !failure && !arrived; ++i) {
      Fiber& fiber = fiber_of(block, first + in_order(i, lanes, lanes_reversed));
      if (fiber.state == State::at_barrier && fiber.barrier->phase != fiber.parity) fiber.state = State::runs;
      if (fiber.state != State::runs) continue;
      resume(fiber);
      moved = ran = true;
    }
  }
  return ran;
}

// Runs parts 0 to n - 1, always the first that can run, until none can or a thread arrived at a barrier: the last waits
// for all that others can do. Whether any ran.
template <class Run>
bool run_first_that_can(unsigned n, unsigned reversed, Run run) {
  bool ran = false;
  for (unsigned i = 0; i < n && !failure && !arrived;) {
    const bool moved = run(in_order(i, n, reversed));
    ran = ran || moved;
    i = moved && i > 0 ? 0 : i + 1;
  }
  return ran;
}

// Runs one block until each of its threads is done or waits for another block. Whether any ran.
bool run_block(unsigned block) {
  const unsigned warps = (threads_per_block + 31) / 32;
  for (bool ran = false; !failure;) {
    ran |= run_first_that_can(warps, warps_reversed, [&](unsigned w) { return run_warp(block, 32 * w); });
    if (arrived) return true;
    unsigned at_block = 0, beyond = 0;
    for (unsigned t = 0; t < threads_per_block; ++t) {
      const State state = fiber_of(block, t).state;
      at_block += state == State::at_block;
      beyond += state == State::done;
    }
    if (at_block == 0 || at_block + beyond < threads_per_block) return ran;
    for (unsigned t = 0; t < threads_per_block; ++t) {
      if (fiber_of(block, t).state == State::at_block) fiber_of(block, t).state = State::runs;
    }
  }
  return false;
}

void run_cluster() {
  while (!failure) {
    do {
      arrived = false;
      run_first_that_can(blocks_in_cluster, blocks_reversed, run_block);
    } while (arrived);
    unsigned done = 0, waiting = 0;
    const unsigned all = blocks_in_cluster * threads_per_block;
    for (unsigned f = 0; f < all; ++f) {
      const Fiber& fiber = *fibers[f];
      done += fiber.state == State::done;
      waiting += fiber.state == State::at_cluster;
    }
    if ((done == all && stores.empty()) || failure) return;
    if (!stores.empty()) {
      for (bool ended = false; !ended && !stores.empty(); stores.pop_front()) ended = do_store(stores.front());
      continue;
    }
    if (done > 0 && waiting > 0) {
      failure = "a thread ended while others of its cluster wait at a cluster barrier";
    } else if (waiting < all) {
      failure = "threads wait for each other at different places";
    } else {
      for (unsigned f = 0; f < all; ++f) fibers[f]->state = State::runs;
    }
  }
}

}  // namespace

unsigned lane() { return current->number & 31; }
unsigned warp() { return current->number / 32; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return blocks_in_cluster; }
unsigned char* shared_memory() { return current->block->shared; }
int64_t shared_memory_bytes() { return shared_size; }

unsigned char* shared_memory_of(const void* mine, unsigned rank) {
  const int64_t offset = static_cast<const unsigned char*>(mine) - shared_memory();
  if (rank >= blocks_in_cluster) fail("in_block() names a block outside the cluster");
  if (offset < 0 || offset >= shared_size) fail("in_block() takes an address in shared memory");
  if (ended(cluster[rank])) fail("in_block() names a block that has ended");
  return cluster[rank].shared + offset;
}

int rank_of(const void* address) {
  const auto mine = [=](const Block& block) {
    const int64_t offset = static_cast<const unsigned char*>(address) - block.shared;
    return offset >= 0 && offset < shared_size;
  };
  const auto found = std::find_if(cluster.begin(), cluster.end(), mine);
  return found == cluster.end() ? -1 : static_cast<int>(found->rank);
}

void fail(const char* what) {
  failure = what;
  suspend(State::done);
  std::abort();  // nobody resumes a fiber of a failed launch
}

// What -fsanitize=alignment calls, by the name that its compilers know.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { fail("a load or store is not aligned to its type"); }

void warp_instruction(unsigned mask, void* payload, Combine combine) {
  if (!(mask >> lane() & 1)) fail("a warp instruction's mask lacks its own lane");
  current->mask = mask, current->payload = payload, current->combine = combine;
  const unsigned block = current->block->rank, first = current->number & ~31u;
  void* payloads[32] = {};
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    // A last warp that is not whole: its absent lanes cannot be waited for.
    if (first + l >= threads_per_block) fail("a warp instruction's mask names a lane that the block does not have");
    Fiber& other = fiber_of(block, first + l);
    if (other.state == State::done) fail("a warp instruction's mask names a lane that has ended");
    if (&other != current && other.state != State::at_warp) return suspend(State::at_warp);
    if (other.mask != mask || other.combine != combine) fail("lanes of a warp meet at different instructions");
    payloads[l] = other.payload;
  }
  combine(payloads, mask);
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1) fiber_of(block, first + l).state = State::runs;
  }
}

void block_barrier() { suspend(State::at_block); }
void cluster_barrier() { suspend(State::at_cluster); }

void barrier_init(Barrier* barrier, unsigned count) {
  if (barrier == nullptr || count == 0) fail("a barrier waits for at least one thread");
  *barrier = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0, 0};
}

void barrier_arrive(Barrier* barrier, int expected_bytes) {
  if (barrier->missing == 0) fail("more threads arrive at a barrier than it was told");
  --barrier->missing, barrier->bytes += expected_bytes;
  ends_phase(*barrier);
  if (order & copies_late) return;
  arrived = true;
  suspend(State::runs);
}

void barrier_wait(const Barrier* barrier, int parity) {
  if (barrier->phase != parity) return;
  current->barrier = barrier, current->parity = parity;
  suspend(State::at_barrier);
}

void store_later(void* shared, const void* value, int bytes, Barrier* barrier, unsigned rank) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) fail("an asynchronous store is not aligned to its size");
  barrier = reinterpret_cast<Barrier*>(shared_memory_of(barrier, rank));
  stores.push_back({rank, shared_memory_of(shared, rank), {}, bytes, barrier});
  std::memcpy(stores.back().value, value, bytes);
  if (order & copies_late) return;
  do_store(stores.back());
  stores.pop_back();
}

void copy_later(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid > 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail("an asynchronous copy is not aligned to its size");
  }
  if (valid < 0 || valid > bytes) fail("an asynchronous copy reads more than it writes");
  current->open.push_back({to, from, bytes, valid});
  if (!(order & copies_late)) do_copy(current->open.back());
}

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = current->groups;
  const int64_t finished = std::max<int64_t>(0, static_cast<int64_t>(groups.size()) - pending);
  if (order & copies_late) {
    for (int64_t g = 0; g < finished; ++g) std::for_each(groups[g].begin(), groups[g].end(), do_copy);
  }
  groups.erase(groups.begin(), groups.begin() + finished);
}

bool launch(Index grid, Index block, unsigned cluster_blocks, int64_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = grid, blockDim = block, blocks_in_cluster = cluster_blocks;
  threads_per_block = block.x * block.y * block.z;
  if (changing) order = (order + 1) % 16;
  kernel = &body, failure = nullptr, shared_size = shared_bytes;
  stores.clear();
  cluster.resize(cluster_blocks);
  while (fibers.size() < size_t{cluster_blocks} * threads_per_block) fibers.push_back(std::make_unique<Fiber>());
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, clusters = blocks / cluster_blocks;
  for (uint64_t c = 0; c < clusters && !failure; ++c) {
    const uint64_t first = (order & blocks_reversed ? clusters - 1 - c : c) * cluster_blocks;
    for (unsigned b = 0; b < cluster_blocks; ++b) {
      const uint64_t number = first + b;
      cluster[b].index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                          static_cast<unsigned>(number / grid.x / grid.y)};
      cluster[b].rank = b;
      cluster[b].storage.assign(shared_bytes + 3 * kGuard, kGuardByte);
      const uintptr_t start = reinterpret_cast<uintptr_t>(cluster[b].storage.data()) + kGuard;
      cluster[b].shared = reinterpret_cast<unsigned char*>((start + kAlignment - 1) / kAlignment * kAlignment);
      std::memset(cluster[b].shared, kGarbage[(order & lanes_reversed) != 0], shared_bytes);
      for (unsigned t = 0; t < threads_per_block; ++t) {
        Fiber& fiber = fiber_of(b, t);
        fiber.state = State::runs, fiber.number = t, fiber.block = &cluster[b];
        fiber.thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        fiber.groups.clear(), fiber.open.clear();
      }
    }
    run_cluster();
    for (const Block& done : cluster) {
      const unsigned char *first = done.storage.data(), *last = first + done.storage.size();
      const auto whole = [](unsigned char byte) { return byte == kGuardByte; };
      if (!std::all_of(first, static_cast<const unsigned char*>(done.shared), whole) ||
          !std::all_of(done.shared + shared_bytes, const_cast<unsigned char*>(last), whole)) {
        failure = "the kernel wrote outside its shared memory";
      }
    }
  }
  if (failure == nullptr) return true;
  std::fprintf(stderr, "emulation: %s\n", failure);
  fibers.clear();  // some are in the middle of a kernel
  return false;
}

}  // namespace hk_emulation

namespace {
int capability = 90;
std::vector<std::pair<const void*, int>> raised_shared_memory;
std::vector<const void*> any_cluster_size;
std::map<std::pair<const void*, bool>, hk_emulation::Translated> translations;
}  // namespace

// What tests set: who runs first (-1: another order at every launch), and which GPU this is (90: capability 9.0;
// 0: one whose driver is too old for us).
extern "C" void hk_emulation_set(int order, int compute_capability) {
  hk_emulation::changing = order < 0;
  if (order >= 0) hk_emulation::order = static_cast<unsigned>(order);
  capability = compute_capability;
}

// Lets a kernel's translation for sm_90a, or for sm_80, run wherever that is what the GPU would run.
extern "C" void hk_emulation_translate(const void* kernel, bool for_sm_90a, hk_emulation::Translated translation) {
  translations[{kernel, for_sm_90a}] = translation;
}

namespace hk_emulation {

int compute_capability() { return capability; }

Translated translated(const void* kernel) {
  const auto found = translations.find({kernel, capability / 10 == 9});
  if (found == translations.end() && !translations.empty()) std::abort();  // it would run as compiled for the host
  return found == translations.end() ? nullptr : found->second;
}

int shared_memory_limit(const void* function) {
  for (const auto& [raised, bytes] : raised_shared_memory) {
    if (raised == function) return std::min(bytes, shared_memory_per_block());
  }
  return 48 << 10;
}

cudaError_t raise_shared_memory_limit(const void* function, int bytes) {
  if (bytes > shared_memory_per_block()) return cudaErrorInvalidValue;
  std::erase_if(raised_shared_memory, [&](const auto& known) { return known.first == function; });
  raised_shared_memory.emplace_back(function, bytes);
  return cudaSuccess;
}

// The tables of compute capabilities in CUDA's programming guide.
int shared_memory_per_block() {
  const bool large = capability / 10 == 9 || capability / 10 == 10;
  return large ? 227 << 10 : capability == 80 ? 163 << 10 : 99 << 10;
}

bool allows_cluster(const void* function, unsigned blocks) {
  const bool any = std::find(any_cluster_size.begin(), any_cluster_size.end(), function) != any_cluster_size.end();
  return blocks == 1 || (capability >= 90 && blocks <= (any ? 16u : 8u));
}

void allow_any_cluster(const void* function) { any_cluster_size.push_back(function); }

}  // namespace hk_emulation

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}
