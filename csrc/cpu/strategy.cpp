#include "strategy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace sparseopt::cpu {
namespace {

// Steps that are timed with each strategy: several, because the caches may be cold in the first. At sparsity
// 0.97, 2 and 8 take 0.96 and 0.99 of its time (make tuning, Zen 3; noise 2%).
constexpr int kSamples = 4;
// Smaller differences are chance, of so few samples and of a trial. Then the list is chosen if it fetches
// less than half of the memory, because other programs may use the bandwidth, too. 0.85 and 1.0 take 1.04
// and 1.03 of its time at sparsity 0.95, 1.05 and 1.00 at 0.9 (make tuning, Zen 3; noise 6%).
constexpr double kClearlyLess = 0.95;

// The other strategy is tried so rarely that it takes this share of the time, or less. Without it, one of six
// processes stayed with the stream at 0.98, which took twice as long (Zen 4, whose memory was at times 1.6
// times as fast as at others).
constexpr double kTrialShare = 0.002;
constexpr int64_t kShortestWait = 64;  // steps, where the strategies differ little
constexpr int64_t kTimedBefore = 2;    // steps before a trial that are timed

Strategy other_than(Strategy strategy) {
  return strategy == Strategy::kList ? Strategy::kStream : Strategy::kList;
}

std::optional<Strategy> asked_for() {
  const char* name = std::getenv("SPARSEOPT_CPU_STRATEGY");
  if (name == nullptr || *name == '\0') return std::nullopt;
  if (std::string(name) == "stream") return Strategy::kStream;
  if (std::string(name) == "list") return Strategy::kList;
  throw std::runtime_error("SPARSEOPT_CPU_STRATEGY is '" + std::string(name) +
                           "', it must be stream or list");
}

}  // namespace

int64_t Kind::key() const {
  int64_t size = 0;  // one more for each factor of four
  for (int64_t bytes = step_bytes; bytes >= 4; bytes /= 4) ++size;
  const int64_t share = std::min<int64_t>(15, int64_t(live_share * 16));
  return (((size * 16 + share) * 16 + element_bytes) * 2 + momentum) * 2 + ham;
}

void Strategies::Samples::add(double ns) {
  ++count;
  least_ns = std::min(least_ns, ns);
}

// Returns the strategy of the next step, unless that waits with its trial.
Strategy Strategies::Cell::next_strategy() const {
  if (decision) return until_trial == 1 ? other_than(decision->strategy) : decision->strategy;
  // stream, list, list, stream: two optimizers that take turns both get both.
  const int place = (stream.count + list.count) % 4;
  return place == 1 || place == 2 ? Strategy::kList : Strategy::kStream;
}

// Returns the choice of one more step. It does not try the other strategy unless it may.
Choice Strategies::Cell::next(bool may_try) {
  if (!decision) return {next_strategy(), true};
  if (until_trial == 1 && !may_try) return {decision->strategy, true};
  const Choice choice{next_strategy(), until_trial <= kTimedBefore + 1};
  if (until_trial == kTimedBefore + 1) before.clear();
  if (--until_trial == 0) until_trial = wait;
  return choice;
}

void Strategies::Cell::wait_for(double slower, double faster) {
  const double steps = (slower / faster - 1) / kTrialShare;
  wait = static_cast<int64_t>(std::clamp(steps, double(kShortestWait), 1e9));
  until_trial = wait;
}

void Strategies::Cell::decide(const Kind& kind) {
  const double at_most = kind.live_share < 0.5 ? 1 / kClearlyLess : kClearlyLess;
  const bool is_list = list.least_ns < at_most * stream.least_ns;
  decision = {kind, is_list ? Strategy::kList : Strategy::kStream, stream.least_ns, list.least_ns};
  const auto [least, most] = std::minmax(stream.least_ns, list.least_ns);
  wait_for(most, least);
  before.clear();
}

// Takes the time of a step that tried the other strategy. It is compared with steps of as many weights alone.
void Strategies::Cell::compare(const Kind& own, double ns) {
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [other, other_ns] : before)
    if (other.step_bytes == own.step_bytes && other.live_share == own.live_share)
      least = std::min(least, other_ns);
  before.clear();
  if (std::isinf(least)) return;
  if (ns < kClearlyLess * least) {
    decision.reset();
    stream = list = Samples();
  } else {
    wait_for(ns, least);
  }
}

std::vector<Choice> Strategies::choices(const std::vector<Kind>& kinds, bool is_step) {
  if (const std::optional<Strategy> strategy = asked_for()) return {kinds.size(), Choice{*strategy, false}};
  std::vector<Choice> chosen;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int64_t, Choice> of_step;
  bool may_try = true;  // one kind in a step: the load of another trial would be measured, too
  for (const Kind& kind : kinds) {
    const auto found = cells_.find(kind.key());
    if (found == cells_.end()) {
      chosen.push_back({Strategy::kStream, is_step});
      continue;
    }
    Cell& cell = found->second;
    if (!is_step) {
      chosen.push_back({cell.next_strategy(), false});
      continue;
    }
    const auto [own, is_first] = of_step.try_emplace(found->first);
    if (is_first) {
      own->second = cell.next(may_try);
      if (cell.decision && own->second.strategy != cell.decision->strategy) may_try = false;
    }
    chosen.push_back(own->second);
  }
  return chosen;
}

void Strategies::measured(const Kind& kind, Strategy strategy, double ns) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Cell& cell = cells_.try_emplace(kind.key()).first->second;
  if (cell.decision && strategy == cell.decision->strategy) {
    cell.before.emplace_back(kind, ns);
  } else if (cell.decision) {
    cell.compare(kind, ns);
  } else {
    (strategy == Strategy::kList ? cell.list : cell.stream).add(ns);
    if (std::min(cell.stream.count, cell.list.count) >= kSamples) cell.decide(kind);
  }
}

std::vector<Decision> Strategies::decisions() const {
  std::vector<Decision> found;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [key, cell] : cells_)
    if (cell.decision) found.push_back(*cell.decision);
  return found;
}

Strategies& strategies() {
  static Strategies known;
  return known;
}

}  // namespace sparseopt::cpu
