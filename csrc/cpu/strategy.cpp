#include "strategy.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>

namespace sparseopt::cpu {
namespace {

// Steps that are timed with each strategy: several, because the caches may be cold in the first. At sparsity
// 0.97, 2 and 8 take 0.96 and 0.99 of its time (make tuning, Zen 3; noise 2%).
constexpr int kSamples = 4;
// Smaller differences of so few samples are chance. Then the list is chosen if it fetches less than half of
// the memory, because other programs may use the bandwidth, too. 0.85 and 1.0 take 1.04 and 1.03 of its time
// at sparsity 0.95, 1.05 and 1.00 at 0.9 (make tuning, Zen 3; noise 6%).
constexpr double kClearlyLess = 0.95;

// The times of steps with one strategy.
struct Samples {
  int count = 0;
  double least_ns = std::numeric_limits<double>::infinity();  // the least disturbed one

  void add(double ns) {
    ++count;
    least_ns = std::min(least_ns, ns);
  }
};

struct Cell {
  Kind kind;
  Samples stream, list;
  std::optional<Decision> decision;  // once there are enough of both

  Strategy less_measured() const { return list.count < stream.count ? Strategy::kList : Strategy::kStream; }
};

std::mutex mutex;
std::map<int64_t, Cell>& cells() {
  static std::map<int64_t, Cell> cells;
  return cells;
}

Decision decide(const Cell& cell) {
  const double stream_ns = cell.stream.least_ns, list_ns = cell.list.least_ns;
  const double at_most = cell.kind.live_share < 0.5 ? 1 / kClearlyLess : kClearlyLess;
  return {cell.kind, list_ns < at_most * stream_ns ? Strategy::kList : Strategy::kStream, stream_ns, list_ns};
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

std::vector<Choice> choices(const std::vector<Kind>& kinds) {
  if (const std::optional<Strategy> strategy = asked_for()) return {kinds.size(), Choice{*strategy, true}};
  std::vector<Choice> chosen;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Kind& kind : kinds) {
    const auto found = cells().find(kind.key());
    if (found == cells().end())
      chosen.push_back({Strategy::kStream, false});
    else if (found->second.decision)
      chosen.push_back({found->second.decision->strategy, true});
    else
      chosen.push_back({found->second.less_measured(), false});
  }
  return chosen;
}

void measured(const Kind& kind, Strategy strategy, double ns) {
  const std::lock_guard<std::mutex> lock(mutex);
  Cell& cell = cells().try_emplace(kind.key(), Cell{kind, {}, {}, {}}).first->second;
  if (cell.decision) return;
  (strategy == Strategy::kList ? cell.list : cell.stream).add(ns);
  if (std::min(cell.stream.count, cell.list.count) >= kSamples) cell.decision = decide(cell);
}

std::vector<Decision> decisions() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<Decision> found;
  for (const auto& [key, cell] : cells())
    if (cell.decision) found.push_back(*cell.decision);
  return found;
}

}  // namespace sparseopt::cpu
