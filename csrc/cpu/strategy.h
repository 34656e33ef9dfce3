// The strategy by which the blocks of a masked tensor are visited. It changes the time of a step, not the
// result, and the faster one depends on the processor, and on what else its memory has to do. So it is
// measured on the user's own steps: the first ones visit tensors of a kind by either strategy, and the faster
// one is kept. Later, a step now and then tries the other one. If that has become faster, both are measured
// anew.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
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
  bool momentum;       // one more array to read and write
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
struct Choice {
  Strategy strategy;
  bool timed;  // the caller is to report the time by measured()
};

// What is known of the kinds. Several threads may use it at the same time.
class Strategies {
 public:
  // Returns a choice for each kind. `is_step` is true if a step follows. A norm goes the way of the step
  // after it, and is not timed. SPARSEOPT_CPU_STRATEGY=stream or list replaces what was measured.
  std::vector<Choice> choices(const std::vector<Kind>& kinds, bool is_step);

  // Takes the time of a block in one step, in nanoseconds: the mean over the chunks of a kind.
  void measured(const Kind& kind, Strategy strategy, double ns);

  // Returns the present decisions.
  std::vector<Decision> decisions() const;

 private:
  // The times of steps with one strategy.
  struct Samples {
    int count = 0;
    double least_ns = std::numeric_limits<double>::infinity();  // the least disturbed one

    void add(double ns);
  };

  struct Cell {
    Samples stream, list;
    std::optional<Decision> decision;  // once there are enough of both
    int64_t wait = 0;                  // steps from one trial of the other strategy to the next
    int64_t until_trial = 0;           // steps left until then
    // Steps that were timed just before the trial: two, because two optimizers may take turns.
    std::vector<std::pair<Kind, double>> before;

    Strategy next_strategy() const;
    Choice next(bool may_try);
    void decide(const Kind& kind);
    void wait_for(double slower, double faster);
    void compare(const Kind& own, double ns);
  };

  mutable std::mutex mutex_;
  std::map<int64_t, Cell> cells_;
};

// Returns what this process knows.
Strategies& strategies();

}  // namespace sparseopt::cpu
