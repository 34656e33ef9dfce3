// The strategy by which the blocks of a masked tensor are visited. It changes the time of a step, not the
// result, and the faster one depends on the processor. So it is measured on the user's own steps: the first
// ones visit tensors of a kind by either strategy in turn, and the faster one is kept until the process ends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparseopt::cpu {

enum class Strategy : uint8_t {
  kStream,  // all blocks; those without an active weight are written with zeros
  kList,    // the live blocks alone, from a list, prefetched
};

// The properties of an update that may decide which strategy is faster. Equal keys are the same kind.
struct Kind {
  int64_t step_bytes;  // parameters, gradients and momentum buffers, which a cache may hold
  double live_share;   // live blocks / all blocks
  int element_bytes;   // of a stored weight
  bool ham;            // more arithmetic for the same bytes

  int64_t key() const;
};

// The strategy of a kind, and the nanoseconds that a block took with each: the mean of the fastest step.
struct Decision {
  Kind kind;
  Strategy strategy;
  double stream_ns, list_ns;
};

// The strategy of a kind in this step. All its tensors have the same, because threads share the bandwidth.
// Until it is decided, the caller is to report their time by measured().
struct Choice {
  Strategy strategy;
  bool decided;
};

// Returns a choice for each kind. SPARSEOPT_CPU_STRATEGY=stream or list replaces what was measured.
std::vector<Choice> choices(const std::vector<Kind>& kinds);

// Takes the time of a block in one step, in nanoseconds: the mean over the chunks of a kind.
void measured(const Kind& kind, Strategy strategy, double ns);

// Returns all decisions so far.
std::vector<Decision> decisions();

}  // namespace sparseopt::cpu
