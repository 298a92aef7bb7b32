// CUDA's execution model on one host thread: every CUDA thread is a fiber, and a fiber runs until it must wait.
//
// A warp runs as far as it can before the next one moves, a block before the next block, a lane before the next lane,
// and whoever comes first goes on as soon as others let it: the most unequal progress that the model allows, so that a
// missing barrier changes the answer. Who arrives at a barrier in shared memory lets all others go first, unless copies
// are late. `order` reverses who comes first. Shared memory starts as garbage, is followed by a guard that must stay
// whole, and is out of other blocks' reach once its block has ended.
#pragma once
#include <cstdint>
#include <functional>

namespace hk_emulation {

struct Index {
  unsigned x, y, z;
};

enum Order : unsigned { warps_reversed = 1, lanes_reversed = 2, blocks_reversed = 4, copies_late = 8 };

// What a warp instruction does once all lanes of its mask are there: lane l's operands and results are at payload[l],
// null for lanes that do not take part.
using Combine = void (*)(void* const (&payload)[32], unsigned mask);

extern Index threadIdx, blockIdx, blockDim, gridDim;  // those of the fiber that runs
unsigned lane();
unsigned warp();  // in its block
unsigned cluster_rank();
unsigned cluster_size();

unsigned char* shared_memory();
int64_t shared_memory_bytes();
unsigned char* shared_memory_of(const void* mine, unsigned rank);
int rank_of(const void* address);  // of the block in whose shared memory it is, or -1

void warp_instruction(unsigned mask, void* payload, Combine combine);
void block_barrier();
void cluster_barrier();

// Asynchronous copies: done at once or when they are waited for, whichever `order` says.
void copy_later(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_for_copies(int pending);

// Barriers in shared memory. A store to another block's memory, counted at its barrier, is done at once or when nobody
// can go on without it.
struct Barrier {
  uint16_t count, missing : 15, phase : 1;
  int32_t bytes;  // expected and not yet stored
};
void barrier_init(Barrier* barrier, unsigned count);
void barrier_arrive(Barrier* barrier, int expected_bytes);
void barrier_wait(const Barrier* barrier, int parity);
void store_later(void* shared, const void* value, int bytes, Barrier* barrier, unsigned rank);

[[noreturn]] void fail(const char* what);  // ends the launch with an error

// A kernel of ptx.py's, and the one of those that stands for the kernel at this address, if there is one.
using Translated = void (*)(const unsigned char* parameters);
Translated translated(const void* kernel);

// Runs all blocks; false if a barrier could never be passed or something else went wrong, which stderr then names.
bool launch(Index grid, Index block, unsigned cluster, int64_t shared_bytes, const std::function<void()>& body);

}  // namespace hk_emulation
