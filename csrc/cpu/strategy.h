// In which way the blocks of a masked tensor are visited: the results are the same, the time is not, and
// which way takes less depends on the processor. So it is measured, on the user's own steps: in the first
// ones, tensors of a kind are visited in either way by turns, and the way that was faster is kept as long as
// the process lives.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparseopt::cpu {

enum class Strategy : uint8_t {
  kStream,  // all blocks; those without an active weight are written with zeros
  kList,    // the live blocks alone, from a list, prefetched
};

// What may decide which is faster. Kinds with the same key are one.
struct Kind {
  int64_t step_bytes;  // of parameters, gradients and momentum buffers: do they stay in a cache?
  double live_share;   // of a tensor's blocks
  int element_bytes;   // of a stored weight
  bool ham;            // more arithmetic for the same bytes

  int64_t key() const;
};

// What is known of a kind: the least that a block took, in nanoseconds, on the mean of a step.
struct Decision {
  Kind kind;
  Strategy strategy;
  double stream_ns, list_ns;
};

// What to visit the tensors of a kind with in this step; all of them alike, since threads share the
// bandwidth. Until it is decided, their time is to be told.
struct Choice {
  Strategy strategy;
  bool decided;
};

// The environment variable SPARSEOPT_CPU_STRATEGY, stream or list, replaces what was measured.
std::vector<Choice> choices(const std::vector<Kind>& kinds);

// In one step, a block took so long with a strategy, on the mean over the chunks of a kind.
void measured(const Kind& kind, Strategy strategy, double ns);

// All decisions so far.
std::vector<Decision> decisions();

}  // namespace sparseopt::cpu
