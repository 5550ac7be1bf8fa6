// Fibres and their scheduler, and the doors through which the tests come in.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "recontrol/ascend.h"

namespace emulator {

Fibre* running = nullptr;
Index grid;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // as float32 it is NaN

jmp_buf scheduler;
ucontext_t scheduler_context;
const std::function<void()>* body_of_all = nullptr;
uint64_t progress = 0;
std::string failure;
Order order = kForward;

// Stacks are used again by the next group.
std::vector<void*> stacks;

void begin_fibre() {
  (*body_of_all)();
  running->finished = true;
  note_progress();
  _longjmp(scheduler, 1);
}

// The first switch goes by context, the others by jumps, which ask nothing of the system.
void resume(Fibre& fibre) {
  running = &fibre;
  if (_setjmp(scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = &scheduler_context;
  makecontext(&context, begin_fibre, 0);
  setcontext(&context);
}

void run_group(std::vector<std::unique_ptr<Block>>& blocks, unsigned threads, unsigned cluster_size, size_t shared_bytes) {
  std::vector<Cluster> clusters(blocks.size() / cluster_size);
  std::vector<Fibre> fibres(blocks.size() * threads);
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = *blocks[b];
    Cluster& cluster = clusters[b / cluster_size];
    block.rank = b % cluster_size;
    block.cluster = &cluster;
    block.meeting.size = static_cast<int>(threads);
    cluster.blocks.push_back(&block);
    cluster.meeting.size = static_cast<int>(threads * cluster_size);
    block.shared.assign(shared_bytes + kGuardBytes, kPoison);
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.meeting.size = 32;
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = fibres[b * threads + t];
      fibre.thread.x = t;
      fibre.block = &block;
      fibre.warp = &block.warps[t / 32];
    }
  }
  while (stacks.size() < fibres.size()) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for a stack");
    stacks.push_back(stack);
  }
  for (size_t i = 0; i < fibres.size(); ++i) fibres[i].stack = stacks[i];

  std::vector<size_t> turns(fibres.size());
  std::iota(turns.begin(), turns.end(), 0);
  if (order == kBackward) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(1);
  size_t left = fibres.size();
  while (left > 0) {
    if (order == kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    const uint64_t before = progress;
    for (size_t turn : turns) {
      if (fibres[turn].finished) continue;
      resume(fibres[turn]);
      if (!failure.empty()) return;
      left -= fibres[turn].finished;
    }
    if (progress == before) {
      failure = "threads wait for others that do not come";
      return;
    }
  }
  for (const auto& block : blocks)
    if (!std::all_of(block->shared.end() - kGuardBytes, block->shared.end(), [](unsigned char byte) { return byte == kPoison; }))
      failure = "something was written beyond the shared memory";
}

}  // namespace

void yield() {
  Fibre& self = *running;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

void note_progress() { ++progress; }

void fail(const std::string& why) {
  failure = why;
  _longjmp(scheduler, 1);
}

void meet(Meeting& meeting) {
  const uint64_t generation = meeting.generation;
  note_progress();
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

void run(unsigned columns, unsigned rows, unsigned threads, unsigned cluster, size_t shared_bytes, bool together, const std::function<void()>& body) {
  if (threads % 32 != 0 || columns % cluster != 0) throw std::runtime_error("blocks must be whole warps, and launches whole clusters");
  grid = {columns, rows};
  body_of_all = &body;
  failure.clear();
  const unsigned at_once = together ? columns * rows : cluster;
  for (unsigned first = 0; first < columns * rows; first += at_once) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (unsigned b = first; b < first + at_once; ++b) {
      blocks.push_back(std::make_unique<Block>());
      blocks.back()->index = {b % columns, b / columns};
    }
    run_group(blocks, threads, cluster, shared_bytes);
    if (!failure.empty()) throw std::runtime_error(failure);
  }
}

}  // namespace emulator

namespace recontrol::cuda {
Device emulated_device;
}

extern "C" {

// major: compute capability; processors: blocks that run together; order: in which threads take turns.
void configure(int major, int processors, int order) {
  recontrol::cuda::emulated_device = {major, processors};
  emulator::order = static_cast<emulator::Order>(order);
}

size_t workspace_bytes(const recontrol::ValueNetwork* network, int64_t rows) { return recontrol::cuda_workspace_bytes(*network, rows); }

const char* why_not(const recontrol::ValueNetwork* network) { return recontrol::cuda_why_not(*network); }

// Null, or what went wrong.
const char* ascend(const recontrol::ValueNetwork* network, const float* offset, const recontrol::AscentBatch* batch, void* workspace) {
  static std::string error;
  try {
    recontrol::ascend_cuda(*network, offset, *batch, workspace, nullptr);
    return nullptr;
  } catch (const std::exception& found) {
    error = found.what();
    return error.c_str();
  }
}
}
