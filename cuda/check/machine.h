// A GPU's thread blocks on a CPU: one block at a time, one fiber per thread, an order of execution drawn from a seed.
// Owns barriers, exchanges among the lanes of a warp, shared memory (poisoned, of exactly the size that the launcher
// states) and the scheduler. Bugs of synchronization become results that depend on the seed, or an error: a barrier that
// not all live threads reach, and an exchange whose lanes disagree about what they do, end the launch with a message.
// Cost: two switches per thread and barrier. It cannot show bank conflicts, occupancy or the memory model between blocks.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check/fiber.h"

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace check {

constexpr int warp_lanes = 32;
constexpr int exchange_words = 8;

// An asynchronous copy that has been issued. Whether it lands at once or at the wait is drawn from the seed: a reader
// that does not wait sees poison in one case, a writer that does not wait for readers overwrites them in the other.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;  // 0: sixteen zeros are written
};

struct TransferBarrier {
  uint32_t arrivals = 0;
  uint32_t pending = 0;
  uint32_t phase = 0;
  std::vector<Copy> copies;
  int64_t expected_bytes = 0;
};

enum class Exchange { barrier, shuffle, load_matrices, multiply_accumulate };

struct Thread {
  Fiber fiber;
  bool done = false;
  unsigned linear = 0;
  Index3 index;
  std::vector<Copy> open;                         // copy_async without a commit
  std::vector<std::vector<Copy>> groups;          // committed, oldest first
  std::vector<Copy> open_stores;                  // bulk_store without a commit
  std::vector<std::vector<Copy>> store_groups;
};

struct Warp {
  unsigned arrived = 0;
  unsigned live = 0;
  uint64_t generation = 0;
  Exchange kind = Exchange::barrier;
  uint64_t words[2][warp_lanes][exchange_words] = {};
};

class Machine {
 public:
  // Runs `body` once per thread. Returns an empty string, or what went wrong.
  std::string launch(Index3 grid, Index3 block, size_t shared_bytes, unsigned seed, std::function<void()> body) {
    grid_ = grid;
    block_ = block;
    body_ = std::move(body);
    generator_.seed(seed);
    shuffled_ = seed != 0;
    failure_.clear();
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) return "a block has " + std::to_string(threads) + " threads, 1 to 1024 are legal";
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) return "no memory for shared memory";
    shared_.reset(static_cast<unsigned char*>(memory));
    shared_bytes_ = shared_bytes;
    std::vector<Index3> order;
    for (unsigned z = 0; z < grid.z; z++)
      for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) order.push_back({x, y, z});
    if (shuffled_) std::shuffle(order.begin(), order.end(), generator_);
    for (const Index3& index : order) {
      block_index_ = index;
      run_block(static_cast<unsigned>(threads));
      if (!failure_.empty()) break;
    }
    shared_.reset();
    return failure_;
  }

  unsigned char* shared() { return shared_.get(); }
  Thread& thread() { return *current_; }
  unsigned lane() const { return current_->linear % warp_lanes; }
  Index3 grid() const { return grid_; }
  Index3 block() const { return block_; }
  Index3 block_index() const { return block_index_; }
  std::map<const void*, TransferBarrier>& transfer_barriers() { return transfer_barriers_; }
  void progress() { progress_++; }
  void yield() { current_->fiber.yield(); }

  // Ends the launch: no thread runs again.
  [[noreturn]] void fail(const std::string& what) {
    if (failure_.empty()) {
      failure_ = what + " in block " + std::to_string(block_index_.x) + "," + std::to_string(block_index_.y) + "," +
                 std::to_string(block_index_.z) + ", thread " + std::to_string(current_->linear);
    }
    current_->fiber.finish();
  }

  // Half of the copies land when they are issued, the others when they are waited for; with seed 0 all wait.
  bool lands_early() { return shuffled_ && (generator_() & 1) != 0; }

  void block_barrier() {
    const uint64_t generation = barrier_generation_;
    progress_++;
    if (++barrier_arrived_ == live_) {
      barrier_arrived_ = 0;
      barrier_generation_++;
      return;
    }
    while (barrier_generation_ == generation) yield();
  }

  // Deposits `count` words, waits for all lanes of the warp, and returns what each has deposited.
  const uint64_t (*exchange(Exchange kind, const uint64_t* words, int count))[exchange_words] {
    Warp& warp = warps_[current_->linear / warp_lanes];
    if (warp.arrived != 0 && warp.kind != kind) fail("lanes of a warp meet in different instructions");
    warp.kind = kind;
    const uint64_t generation = warp.generation;
    uint64_t(*bank)[exchange_words] = warp.words[generation % 2];
    for (int i = 0; i < count; i++) bank[lane()][i] = words[i];
    warp.arrived++;
    progress_++;
    if (warp.arrived == warp_lanes) {
      warp.arrived = 0;
      warp.generation++;
    }
    while (warp.generation == generation) yield();
    return bank;
  }

 private:
  void run_block(unsigned threads) {
    warps_.assign((threads + warp_lanes - 1) / warp_lanes, Warp{});
    transfer_barriers_.clear();
    barrier_arrived_ = 0;
    live_ = threads;
    memset(shared_.get(), 0xFF, shared_bytes_);  // a NaN in float32 and bfloat16, a negative index
    for (unsigned i = 0; i < threads; i++) {
      Thread& thread = *threads_[i];
      thread.done = false;
      thread.linear = i;
      thread.index = {i % block_.x, i / block_.x % block_.y, i / (block_.x * block_.y)};
      thread.open.clear();
      thread.groups.clear();
      thread.open_stores.clear();
      thread.store_groups.clear();
      thread.fiber.prepare(&Machine::enter);
      warps_[i / warp_lanes].live++;
    }
    schedule();
  }

  // One warp runs for a burst, often until nothing of it can go on, so that warps drift apart as far as barriers let
  // them: a missing barrier is seen only where one warp is far ahead. Lanes run in random order.
  void schedule() {
    std::vector<bool> stalled(warps_.size(), false);
    while (live_ > 0 && failure_.empty()) {
      std::vector<unsigned> ready;
      for (unsigned w = 0; w < warps_.size(); w++) {
        if (warps_[w].live > 0 && !stalled[w]) ready.push_back(w);
      }
      if (ready.empty()) {
        current_ = threads_[0].get();
        failure_ = "deadlock: a barrier or exchange that not all threads reach, in block " + std::to_string(block_index_.x);
        return;
      }
      const unsigned chosen = ready[shuffled_ ? generator_() % ready.size() : 0];
      const unsigned max_passes = shuffled_ && generator_() % 4 == 0 ? 1 + generator_() % 4 : ~0u;
      for (unsigned pass = 0; pass < max_passes && failure_.empty(); pass++) {
        const uint64_t before = progress_;
        run_warp(chosen);
        if (progress_ == before) {
          stalled[chosen] = true;
          break;
        }
        std::fill(stalled.begin(), stalled.end(), false);
      }
    }
  }

  void run_warp(unsigned warp) {
    unsigned lanes[warp_lanes];
    unsigned count = 0;
    for (unsigned i = warp * warp_lanes; i < (warp + 1) * warp_lanes; i++) {
      if (i < threads_.size() && i < size_t{block_.x} * block_.y * block_.z && !threads_[i]->done) lanes[count++] = i;
    }
    if (shuffled_) std::shuffle(lanes, lanes + count, generator_);
    for (unsigned i = 0; i < count && failure_.empty(); i++) {
      current_ = threads_[lanes[i]].get();
      current_->fiber.resume();
    }
  }

  static void enter();

  void leave() {
    Thread& thread = *current_;
    for (auto* groups : {&thread.groups, &thread.store_groups}) {
      for (auto& group : *groups) land(group);  // the hardware completes them too
    }
    thread.done = true;
    warps_[thread.linear / warp_lanes].live--;
    live_--;
    progress_++;
    if (barrier_arrived_ > 0 && barrier_arrived_ == live_) {
      barrier_arrived_ = 0;
      barrier_generation_++;
    }
    thread.fiber.finish();
  }

 public:
  static void land(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
      if (copy.bytes == 0) {
        memset(copy.to, 0, 16);
      } else {
        memcpy(copy.to, copy.from, copy.bytes);
      }
    }
    copies.clear();
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { free(memory); }
  };

  Index3 grid_, block_, block_index_;
  std::function<void()> body_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::map<const void*, TransferBarrier> transfer_barriers_;
  std::unique_ptr<unsigned char, Free> shared_;
  size_t shared_bytes_ = 0;
  Thread* current_ = nullptr;
  unsigned live_ = 0;
  unsigned barrier_arrived_ = 0;
  uint64_t barrier_generation_ = 0;
  uint64_t progress_ = 0;
  std::mt19937 generator_;
  bool shuffled_ = false;
  std::string failure_;
};

inline Machine& machine() {
  static Machine only;
  return only;
}

inline void Machine::enter() {
  Machine& self = machine();
  self.current_->fiber.arrive();
  self.body_();
  self.leave();
}

}  // namespace check
