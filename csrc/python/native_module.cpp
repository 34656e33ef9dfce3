// The native library as Python sees it: addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/digit_search.h"
#include "../cpu/drop_and_grow.h"
#include "../cpu/packed_mask.h"
#include "../cpu/random_choice.h"
#include "../cpu/step.h"
#include "../cpu/strategy.h"
#include "../cpu/table.h"
#include "../cpu/write_watch.h"
#include "../cpu/zero_outside.h"
#include "memory_reader.h"
#include "repeatable_step.h"
#include "step_reader.h"

namespace py = pybind11;
using namespace sparseopt;
using namespace sparseopt::cpu;

namespace {

// Defines step and squared_norm, which run without the GIL.
void define_steps(py::module_& module) {
  using Rules = std::vector<const Rule*>;
  module.def(
      "step",
      [](const Table& table, const py::bytes& grads, const Rules& rules, int threads) {
        const std::vector<TensorStep> updates = updates_of(table, std::string_view(grads), rules);
        py::gil_scoped_release release;
        step(updates, threads);
      },
      py::arg("table"), py::arg("grads"), py::arg("rules"), py::arg("threads"));
  module.def(
      "squared_norm",
      [](const Table& table, const py::bytes& grads, const Rules& rules, int threads, bool dense) {
        const std::vector<TensorStep> updates = updates_of(table, std::string_view(grads), rules);
        py::gil_scoped_release release;
        return squared_norm(updates, threads, dense);
      },
      py::arg("table"), py::arg("grads"), py::arg("rules"), py::arg("threads"), py::arg("dense"));
}

// Returns c_i of each run of a mask, from those of its neurons (null: all are 1); empty if all are 1.
std::vector<double> factors_of_runs(const PackedMask* mask, const double* factors) {
  if (mask == nullptr || factors == nullptr) return {};
  if (std::all_of(factors, factors + mask->neurons(), [](double factor) { return factor == 1.0; })) return {};
  std::vector<double> of_runs(static_cast<size_t>(mask->runs()));
  for (int64_t run = 0; run < mask->runs(); ++run) of_runs[run] = factors[mask->neuron_of(run)];
  return of_runs;
}

const char* strategy_name(Strategy strategy) { return strategy == Strategy::kList ? "list" : "stream"; }

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

void define_drop_and_grow(py::module_& module) {
  py::class_<MaskedLayer>(module, "MaskedLayer")
      .def(py::init([](const std::string& dtype, uintptr_t weights, uintptr_t mask, uintptr_t explored,
                       int64_t numel, int64_t min_fan_in, const std::array<int64_t, 4>& grid) {
             const NeuronGrid neurons{grid[0], grid[1], grid[2], grid[3]};
             if (neurons.neurons() * neurons.inputs() != numel)
               throw std::invalid_argument("grid must have as many elements as the layer");
             return MaskedLayer{dtype_named(dtype),
                                reinterpret_cast<void*>(weights),
                                reinterpret_cast<uint8_t*>(mask),
                                reinterpret_cast<uint8_t*>(explored),
                                numel,
                                min_fan_in,
                                neurons};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("weights"), py::arg("mask"), py::arg("explored"),
           py::arg("numel"), py::arg("min_fan_in"), py::arg("grid"));
  py::class_<Scores>(module, "Scores")
      .def(
          py::init([](size_t layer, const std::string& dtype, uintptr_t values, int64_t at_most, bool fills) {
            return Scores{layer, dtype_named(dtype), reinterpret_cast<const void*>(values), at_most, fills};
          }),
          py::kw_only(), py::arg("layer"), py::arg("dtype"), py::arg("values"), py::arg("at_most"),
          py::arg("fills"));

  py::class_<Change>(module, "Change")
      .def(py::init([](int64_t drop, int64_t grow, const std::string& dtype, uintptr_t drop_scores,
                       std::optional<std::pair<uint64_t, uint64_t>> seeds) {
             return Change{drop, grow, dtype_named(dtype), reinterpret_cast<const void*>(drop_scores), seeds};
           }),
           py::kw_only(), py::arg("drop"), py::arg("grow"), py::arg("dtype"), py::arg("drop_scores"),
           py::arg("seeds"));

  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<DropAndGrow>(module, "DropAndGrow")
      .def(py::init<std::vector<MaskedLayer>, int>(), py::arg("layers"), py::arg("threads"), Released())
      .def_property_readonly("active", &DropAndGrow::active)
      .def_property_readonly("missing", &DropAndGrow::missing)
      .def_property_readonly("sees_active", &DropAndGrow::sees_active)
      .def_property_readonly("sees_inactive", &DropAndGrow::sees_inactive)
      .def("rank", &DropAndGrow::rank, py::arg("scores"), py::arg("threads"), Released())
      .def(
          "update",
          [](DropAndGrow& updates, const std::vector<Change>& changes, int threads) {
            std::vector<std::array<int64_t, 5>> numbers;
            for (const LayerUpdate& own : updates.update(changes, threads))
              numbers.push_back({own.dropped, own.grown, own.died, own.revived, own.most_grown});
            return numbers;
          },
          py::arg("changes"), py::arg("threads"), Released());
  module.def(
      "choose_random",
      [](uintptr_t chosen, int64_t size, int64_t k, uint64_t seed) {
        if (k < 0 || k > size) throw std::invalid_argument("k is out of range: it must be in [0, size]");
        choose_random(reinterpret_cast<uint8_t*>(chosen), size, k, seed);
      },
      py::arg("chosen"), py::arg("size"), py::arg("k"), py::arg("seed"), Released());
}

void define_digit_search(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<DigitSearch>(module, "DigitSearch")
      .def(py::init([](const std::string& dtype, uintptr_t values, uintptr_t candidates, uintptr_t first,
                       int64_t numel) {
             return DigitSearch(dtype_named(dtype), reinterpret_cast<const void*>(values),
                                reinterpret_cast<const uint8_t*>(candidates),
                                reinterpret_cast<const uint8_t*>(first), numel);
           }),
           py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("candidates"), py::arg("first"),
           py::arg("numel"))
      .def_property_readonly("key_bits", &DigitSearch::key_bits)
      .def("counts", &DigitSearch::counts, py::arg("prefix"), py::arg("left"), py::arg("threads"), Released())
      .def(
          "mark",
          [](DigitSearch& search, uint64_t threshold, uintptr_t chosen, int threads) {
            return search.mark(threshold, reinterpret_cast<uint8_t*>(chosen), threads);
          },
          py::arg("threshold"), py::arg("chosen"), py::arg("threads"), Released())
      .def(
          "choose",
          [](const DigitSearch& search, uintptr_t chosen, int64_t in_first, int64_t elsewhere) {
            search.choose(reinterpret_cast<uint8_t*>(chosen), in_first, elsewhere);
          },
          py::arg("chosen"), py::arg("in_first"), py::arg("elsewhere"), Released());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native CPU backend of sparseopt_kernels. Private: use SparseOpt.";
  module.attr("MASK_TURNS") = kMaskTurns;
  module.attr("WEIGHT_TURNS") = kWeightTurns;

  py::class_<PackedMask>(module, "PackedMask")
      .def(py::init([](uintptr_t mask, int64_t groups, int64_t segments, int64_t neurons_per_group,
                       int64_t length, int threads) {
             py::gil_scoped_release release;
             return PackedMask(reinterpret_cast<const uint8_t*>(mask), groups, segments, neurons_per_group,
                               length, threads);
           }),
           py::arg("mask"), py::arg("groups"), py::arg("segments"), py::arg("neurons_per_group"),
           py::arg("length"), py::arg("threads"))
      .def_property_readonly("neurons", &PackedMask::neurons)
      .def(
          "count_fan_in",
          [](const PackedMask& mask, uintptr_t fan_in, int threads) {
            mask.count_fan_in(reinterpret_cast<int64_t*>(fan_in), threads);
          },
          py::arg("fan_in"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bits", &PackedMask::bits)
      .def_property_readonly("live_blocks", &PackedMask::live_blocks)
      .def_property_readonly("live_bits", &PackedMask::live_bits);

  py::class_<WriteWatch>(module, "WriteWatch")
      .def(py::init(
               [](uintptr_t mask, int element_bytes, const PackedMask& packed, int64_t numel, bool in_order) {
                 return std::make_unique<WriteWatch>(reinterpret_cast<const void*>(mask), element_bytes,
                                                     packed, numel, in_order);
               }),
           py::arg("mask"), py::arg("element_bytes"), py::arg("packed"), py::arg("numel"),
           py::arg("in_order"), py::keep_alive<1, 4>())
      .def_property_readonly("mask_written", &WriteWatch::mask_written)
      .def_property_readonly("weights_written", &WriteWatch::weights_written)
      .def("forget", &WriteWatch::forget);
  py::class_<Tensor>(module, "Tensor")
      .def(
          py::init([](const std::string& dtype, uintptr_t parameter, uintptr_t momentum_buffer, int64_t numel,
                      bool ham, const PackedMask* mask, uintptr_t factors, WriteWatch* watch) {
            return Tensor{dtype_named(dtype),
                          reinterpret_cast<void*>(parameter),
                          reinterpret_cast<void*>(momentum_buffer),
                          numel,
                          ham,
                          mask,
                          factors_of_runs(mask, reinterpret_cast<const double*>(factors)),
                          watch};
          }),
          py::kw_only(), py::arg("dtype"), py::arg("parameter"), py::arg("momentum_buffer"), py::arg("numel"),
          py::arg("ham"), py::arg("mask").none(true), py::arg("factors"), py::arg("watch").none(true),
          py::keep_alive<1, 7>(), py::keep_alive<1, 9>());

  py::class_<Rule>(module, "Rule")
      .def(py::init([](double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                       bool maximize, double ham_alpha, double ham_beta, double gamma) {
             return Rule{lr,       momentum,  dampening, weight_decay, nesterov,
                         maximize, ham_alpha, ham_beta,  gamma};
           }),
           py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"),
           py::arg("nesterov"), py::arg("maximize"), py::arg("ham_alpha"), py::arg("ham_beta"),
           py::arg("gamma"));

  py::class_<Table>(module, "Table")
      .def(py::init([](const std::vector<const Tensor*>& tensors, const std::vector<size_t>& rules) {
             if (tensors.size() != rules.size())
               throw std::invalid_argument("tensors and rules must be of one length");
             return Table{tensors, rules};
           }),
           py::arg("tensors"), py::arg("rules"), py::keep_alive<1, 2>())
      .def("forget", &Table::forget);

  py::class_<MemoryReader>(module, "MemoryReader")
      .def(py::init<const py::capsule&, const py::type&, const py::type&>(), py::arg("exchange_api"),
           py::arg("tensor"), py::arg("parameter"))
      .def("read", &MemoryReader::read, py::arg("tensors"));
  py::class_<Snapshot>(module, "Snapshot")
      .def("__eq__", &Snapshot::operator==, py::arg("other"), py::is_operator());
  py::class_<Optimizer>(module, "Optimizer")
      .def(py::init([](py::object groups, py::object state, py::list mask_owners, py::list masks,
                       py::list parameters, py::list watched) {
             return Optimizer{groups, state, mask_owners, masks, parameters, watched};
           }),
           py::arg("groups"), py::arg("state"), py::arg("mask_owners"), py::arg("masks"),
           py::arg("parameters"), py::arg("watched"));
  py::class_<StepReader>(module, "StepReader")
      .def(py::init<const MemoryReader&>(), py::arg("memory"))
      .def("read", &StepReader::read, py::arg("optimizer"));
  py::class_<RepeatableStep>(module, "RepeatableStep")
      .def(py::init<const StepReader&, const Table&, std::vector<size_t>, Snapshot, std::vector<int64_t>,
                    bool>(),
           py::arg("reader"), py::arg("table"), py::arg("positions"), py::arg("snapshot"),
           py::arg("versions"), py::arg("dense_norm"), py::keep_alive<1, 3>())
      .def("repeat", &RepeatableStep::repeat, py::arg("optimizer"), py::arg("updated"),
           py::arg("increment_version"), py::arg("threads"))
      .def("versions", &RepeatableStep::versions);

  define_steps(module);
  py::class_<Kind>(module, "Kind")
      .def(py::init([](int64_t step_bytes, double live_share, int element_bytes, bool momentum, bool ham) {
             return Kind{step_bytes, live_share, element_bytes, momentum, ham};
           }),
           py::kw_only(), py::arg("step_bytes"), py::arg("live_share"), py::arg("element_bytes"),
           py::arg("momentum"), py::arg("ham"));
  py::class_<Strategies>(module, "Strategies")
      .def(py::init<>())
      .def(
          "choices",
          [](Strategies& strategies, const std::vector<Kind>& kinds, bool is_step) {
            std::vector<std::pair<const char*, bool>> found;
            for (const Choice& choice : strategies.choices(kinds, is_step))
              found.emplace_back(strategy_name(choice.strategy), choice.timed);
            return found;
          },
          py::arg("kinds"), py::arg("is_step"))
      .def(
          "measured",
          [](Strategies& strategies, const Kind& kind, const std::string& strategy, double ns) {
            strategies.measured(kind, strategy == "list" ? Strategy::kList : Strategy::kStream, ns);
          },
          py::arg("kind"), py::arg("strategy"), py::arg("ns"))
      .def("decisions", &Strategies::decisions);
  py::class_<Decision>(module, "Decision")
      .def_property_readonly("step_bytes", [](const Decision& d) { return d.kind.step_bytes; })
      .def_property_readonly("live_share", [](const Decision& d) { return d.kind.live_share; })
      .def_property_readonly("element_bytes", [](const Decision& d) { return d.kind.element_bytes; })
      .def_property_readonly("ham", [](const Decision& d) { return d.kind.ham; })
      .def_property_readonly("strategy", [](const Decision& d) { return strategy_name(d.strategy); })
      .def_readonly("stream_ns", &Decision::stream_ns)
      .def_readonly("list_ns", &Decision::list_ns);
  module.def("any_written", &any_written, py::arg("table"), py::arg("everything"));
  module.def("decisions", [] { return strategies().decisions(); });
  module.def(
      "zero_outside",
      [](uintptr_t mask, uintptr_t data, int64_t numel, int element_bytes, int threads) {
        zero_outside(reinterpret_cast<const uint8_t*>(mask), reinterpret_cast<void*>(data), numel,
                     element_bytes, threads);
      },
      py::arg("mask"), py::arg("data"), py::arg("numel"), py::arg("element_bytes"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  module.def("available_isas", &available_isas);
  module.def("build_info", &build_info);
  define_drop_and_grow(module);
  define_digit_search(module);
}
