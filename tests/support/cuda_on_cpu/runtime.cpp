// The launches of the stand-in: a block's threads as fibres. Each runs until it returns or has to wait; they
// take turns warp by warp.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fibre {
  State state = State::kDone;
  bool started = false;  // its stack holds a frame to return to
  Site site{};           // where it waits
  unsigned mask = 0;     // the lanes it waits for
  uint64_t value = 0;    // what it gives, then what it gets
  int source = 0;
  jmp_buf context;
  ucontext_t beginning;
  void* stack = nullptr;
};

std::vector<std::unique_ptr<Fibre>> fibres;  // made once, used by every launch
unsigned in_warp[kMaxThreads / warpSize];    // of each warp, the lanes that wait for others
Fibre* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
std::string failure;

cudaError_t fail_next = cudaSuccess, last_error = cudaSuccess;
int64_t launches = 0;
cudaLaunchConfig_t last_launch{};

// Returns the error that a test asked for, as calls of a real runtime do: it stays the last one until someone
// gets it.
cudaError_t failure_asked_for() {
  if (fail_next == cudaSuccess) return cudaSuccess;
  last_error = fail_next;
  fail_next = cudaSuccess;
  return last_error;
}

// Leaves the running fibre, and comes back when it is its turn again.
void leave() {
  Fibre* self = running;
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

// A fibre's whole life: one thread of one block after another.
void live() {
  for (;;) {
    (*body)();
    running->state = State::kDone;
    leave();
  }
}

[[noreturn]] void fail(const std::string& message) {
  failure = message;
  _longjmp(scheduler, 1);
}

void resume(Fibre& fibre) {
  running = &fibre;
  if (_setjmp(scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.context, 1);
  fibre.started = true;
  getcontext(&fibre.beginning);
  fibre.beginning.uc_stack.ss_sp = fibre.stack;
  fibre.beginning.uc_stack.ss_size = kStackBytes;
  makecontext(&fibre.beginning, live, 0);
  setcontext(&fibre.beginning);
}

void make_fibres(unsigned count) {
  while (fibres.size() < count) {
    auto fibre = std::make_unique<Fibre>();
    fibre->stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (fibre->stack == MAP_FAILED) throw std::bad_alloc();
    fibres.push_back(std::move(fibre));
  }
}

std::string at(Site site) { return std::string(site.what) + " in line " + std::to_string(site.line); }

std::string name(unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x);
}

// The lanes of the running warp that are in `mask`.
template <class Visit>
void for_lanes(unsigned mask, Visit visit) {
  const unsigned first = threadIdx.x / warpSize * warpSize;
  for (unsigned lane = 0; lane < unsigned(warpSize); ++lane)
    if ((mask >> lane & 1u) != 0) {
      if (first + lane >= blockDim.x)
        fail("a lane that does not exist is in the mask of " + at(running->site));
      visit(*fibres[first + lane], first + lane);
    }
}

bool same(Site left, Site right) {
  return left.line == right.line && (left.what == right.what || std::strcmp(left.what, right.what) == 0);
}

// Waits until all lanes in `mask` are at this site; the last one calls `finish`, which gives all their
// values.
template <class Finish>
uint64_t meet(Site site, unsigned mask, uint64_t value, int source, Finish finish) {
  Fibre& self = *running;
  self.site = site;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.state = State::kInWarp;
  if ((mask >> lane() & 1u) == 0) fail(name(threadIdx.x) + " is not in its own mask at " + at(site));
  unsigned& waiting = in_warp[threadIdx.x / warpSize];
  waiting |= 1u << lane();
  if ((waiting & mask) != mask) {
    leave();
    return self.value;
  }
  for_lanes(mask, [&](Fibre& other, unsigned thread) {
    if (!same(other.site, site) || other.mask != mask)
      fail(name(threadIdx.x) + " is at " + at(site) + ", " + name(thread) + " is at " + at(other.site) +
           (other.mask == mask ? "" : " with another mask"));
  });
  finish();
  for_lanes(mask, [](Fibre& other, unsigned) { other.state = State::kReady; });
  waiting &= ~mask;
  return self.value;
}

// Why no thread can go on.
std::string deadlock() {
  unsigned done = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) done += fibres[i]->state == State::kDone;
  for (unsigned i = 0; i < blockDim.x; ++i)
    if (fibres[i]->state != State::kDone)
      return "deadlock: " + name(i) + " waits at " + at(fibres[i]->site) +
             " for threads that are elsewhere; " + std::to_string(done) + " of " +
             std::to_string(blockDim.x) + " have returned";
  return "";
}

// Runs the threads of one warp until each has returned or waits.
void run_warp(unsigned first) {
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = first; i < first + warpSize && i < blockDim.x; ++i) {
      if (fibres[i]->state != State::kReady) continue;
      threadIdx = dim3(i, 0, 0);
      resume(*fibres[i]);
      if (!failure.empty()) return;
      again = true;
    }
  }
}

// Lets all threads pass the barrier if all are there; returns whether they are.
bool open_barrier() {
  for (unsigned i = 0; i < blockDim.x; ++i)
    if (fibres[i]->state != State::kAtBarrier || !same(fibres[i]->site, fibres[0]->site)) return false;
  for (unsigned i = 0; i < blockDim.x; ++i) fibres[i]->state = State::kReady;
  return true;
}

bool all_done() {
  for (unsigned i = 0; i < blockDim.x; ++i)
    if (fibres[i]->state != State::kDone) return false;
  return true;
}

void run_block() {
  for (unsigned i = 0; i < blockDim.x; ++i) fibres[i]->state = State::kReady;
  for (unsigned& waiting : in_warp) waiting = 0;
  do {
    for (unsigned first = 0; first < blockDim.x && failure.empty(); first += warpSize) run_warp(first);
    if (failure.empty() && !all_done() && !open_barrier()) failure = deadlock();
  } while (failure.empty() && !all_done());
}

}  // namespace

int lane() { return static_cast<int>(threadIdx.x % warpSize); }

void barrier(Site site) {
  running->site = site;
  running->state = State::kAtBarrier;
  leave();
}

uint64_t exchange(Site site, unsigned mask, uint64_t value, int source) {
  return meet(site, mask, value, source, [mask, site] {
    const unsigned first = threadIdx.x / warpSize * warpSize;
    uint64_t given[warpSize] = {};
    for_lanes(mask, [&](Fibre& fibre, unsigned thread) { given[thread - first] = fibre.value; });
    for_lanes(mask, [&](Fibre& fibre, unsigned thread) {
      if ((mask >> fibre.source & 1u) == 0)
        fail(name(thread) + " reads a lane outside the mask of " + at(site));
      fibre.value = given[fibre.source];
    });
  });
}

unsigned vote(Site site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(meet(site, mask, predicate, 0, [mask] {
    const unsigned first = threadIdx.x / warpSize * warpSize;
    uint64_t votes = 0;
    for_lanes(mask, [&](Fibre& fibre, unsigned thread) { votes |= fibre.value << (thread - first); });
    for_lanes(mask, [&](Fibre& fibre, unsigned) { fibre.value = votes; });
  }));
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const cudaError_t error = failure_asked_for()) return error;
  if (config.blockDim.x == 0 || config.blockDim.x > kMaxThreads || config.gridDim.x == 0 ||
      config.gridDim.x > 0x7fffffffu)
    return last_error = cudaErrorInvalidConfiguration;
  make_fibres(config.blockDim.x);
  ++launches;
  last_launch = config;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  body = &thread;
  failure.clear();
  for (unsigned block = 0; block < gridDim.x && failure.empty(); ++block) {
    blockIdx = dim3(block, 0, 0);
    run_block();
  }
  if (failure.empty()) return cudaSuccess;
  for (auto& fibre : fibres) fibre->started = false;  // they were left in the middle of a kernel
  throw std::runtime_error("cuda_on_cpu: " + failure);
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "an error of the stand-in";
}

cudaError_t cudaDriverGetVersion(int* version) {
  if (const cudaError_t error = cuda_on_cpu::failure_asked_for()) return error;
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

// What -fsanitize=alignment calls: a GPU does not read or write 16 bytes at any address but a multiple of 16.
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* place, uintptr_t address) {
  struct Place {
    const char* file;
    uint32_t line, column;
  };
  const Place& at = *static_cast<const Place*>(place);
  cuda_on_cpu::fail("the address " + std::to_string(address) + " is not aligned in " + at.file + ":" +
                    std::to_string(at.line));
}

// For tests: the next call fails with this error; the error that nobody got yet; how many launches there
// were, and the blocks and the stream of the last one.
EXPORTED void cuda_on_cpu_fail_next(int error) { cuda_on_cpu::fail_next = static_cast<cudaError_t>(error); }
EXPORTED int cuda_on_cpu_last_error() { return cuda_on_cpu::last_error; }
EXPORTED int64_t cuda_on_cpu_launches() { return cuda_on_cpu::launches; }
EXPORTED int64_t cuda_on_cpu_blocks() { return cuda_on_cpu::last_launch.gridDim.x; }
EXPORTED int64_t cuda_on_cpu_stream() {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(cuda_on_cpu::last_launch.stream));
}

// The mistake that is made, by its number in mistakes.py; 0: none.
extern "C" {
__attribute__((visibility("default"))) int cuda_on_cpu_mistake = 0;
}
