#include "strategy.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace sparseopt::cpu {
namespace {

// Steps that are timed with each strategy: several, because the caches may be cold in the first. At sparsity
// 0.97, 2 and 8 take 0.96 and 0.99 of its time (make tuning, Zen 3; noise 2%).
constexpr int kSamples = 4;
// Smaller differences of so few samples are chance. Then the list is chosen if it fetches less than half of
// the memory, because other programs may use the bandwidth, too. 0.85 and 1.0 take 1.04 and 1.03 of its time
// at sparsity 0.95, 1.05 and 1.00 at 0.9 (make tuning, Zen 3; noise 6%).
constexpr double kClearlyLess = 0.95;

// Steps from a decision until one of them tries the other strategy. Each time that the decision is confirmed,
// twice as many: where the other one takes four times as long, 1% of 2,000 steps are spent on it, and 0.3% of
// what follows. Without it, one of six processes stayed with the stream at 0.98, which took twice as long
// (Zen 4, whose memory was at times 1.6 times as fast as at others).
constexpr int64_t kFirstWait = 16, kLongestWait = 1024;

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
  return ((size * 16 + share) * 16 + element_bytes) * 2 + ham;
}

void Strategies::Samples::add(double ns) {
  ++count;
  least_ns = std::min(least_ns, ns);
}

Strategy Strategies::Cell::less_measured() const {
  return list.count < stream.count ? Strategy::kList : Strategy::kStream;
}

Choice Strategies::Cell::next() {
  if (!decision) return {less_measured(), true};
  if (--left > 0) return {decision->strategy, left == 1};
  left = wait;
  return {other_than(decision->strategy), true};
}

void Strategies::Cell::decide() {
  const double at_most = kind.live_share < 0.5 ? 1 / kClearlyLess : kClearlyLess;
  const bool is_list = list.least_ns < at_most * stream.least_ns;
  decision = {kind, is_list ? Strategy::kList : Strategy::kStream, stream.least_ns, list.least_ns};
  left = wait = kFirstWait;
}

// Takes the time of a step that tried the other strategy. If it is clearly less, both are measured anew.
void Strategies::Cell::compare(double ns) {
  const double before = std::exchange(ns_before, 0);
  if (before == 0) return;
  if (ns < kClearlyLess * before) {
    decision.reset();
    stream = list = Samples();
  } else {
    left = wait = std::min(2 * wait, kLongestWait);
  }
}

std::vector<Choice> Strategies::choices(const std::vector<Kind>& kinds, bool is_step) {
  if (const std::optional<Strategy> strategy = asked_for()) return {kinds.size(), Choice{*strategy, false}};
  std::vector<Choice> chosen;
  const std::lock_guard<std::mutex> lock(mutex_);
  steps_ += is_step;
  for (const Kind& kind : kinds) {
    const auto found = cells_.find(kind.key());
    if (found == cells_.end()) {
      chosen.push_back({Strategy::kStream, is_step});
      continue;
    }
    Cell& cell = found->second;
    if (!is_step) {
      chosen.push_back({cell.decision ? cell.decision->strategy : cell.less_measured(), false});
      continue;
    }
    if (cell.step != steps_) cell.choice = cell.next();
    cell.step = steps_;
    chosen.push_back(cell.choice);
  }
  return chosen;
}

void Strategies::measured(const Kind& kind, Strategy strategy, double ns) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Cell& cell = cells_.try_emplace(kind.key()).first->second;
  if (cell.decision) {
    if (strategy == cell.decision->strategy)
      cell.ns_before = ns;
    else
      cell.compare(ns);
    return;
  }
  cell.kind = kind;
  (strategy == Strategy::kList ? cell.list : cell.stream).add(ns);
  if (std::min(cell.stream.count, cell.list.count) >= kSamples) cell.decide();
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
