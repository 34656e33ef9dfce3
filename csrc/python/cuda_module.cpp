// The CUDA library as Python sees it: addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>

#include "../cuda/argument.h"
#include "../cuda/launches.h"
#include "../cuda/sectors.h"
#include "../cuda/tables.h"
#include "../cuda/threads.h"

namespace py = pybind11;
using namespace sparseopt;
using namespace sparseopt::cuda;

namespace {

// The fields of contract.Rule, in its order; a test compares them.
constexpr const char* kRuleFields[] = {"lr",       "momentum",  "dampening", "weight_decay", "nesterov",
                                       "maximize", "ham_alpha", "ham_beta",  "gamma"};

double number_of(py::handle value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

// Reads a number, or the address of one if `value` has a data_ptr(): it is a tensor of the device then.
void number_or_address(py::handle value, double& number, uintptr_t& address) {
  if (!PyFloat_CheckExact(value.ptr()) && py::hasattr(value, "data_ptr"))
    address = value.attr("data_ptr")().cast<uintptr_t>();
  else
    number = number_of(value);
}

Rule rule_of(py::handle fields) {
  if (!py::isinstance<py::tuple>(fields) || py::len(fields) != std::size(kRuleFields))
    throw py::type_error("a rule must be a tuple of " + std::to_string(std::size(kRuleFields)) + " fields");
  const auto field = [&](int i) { return py::handle(PyTuple_GET_ITEM(fields.ptr(), i)); };
  Rule rule{};
  number_or_address(field(0), rule.lr, rule.lr_address);
  rule.momentum = number_of(field(1));
  rule.dampening = number_of(field(2));
  rule.weight_decay = number_of(field(3));
  rule.nesterov = field(4).cast<bool>();
  rule.maximize = field(5).cast<bool>();
  rule.ham_alpha = number_of(field(6));
  rule.ham_beta = number_of(field(7));
  number_or_address(field(8), rule.gamma, rule.gamma_address);
  return rule;
}

Inputs inputs_of(const py::bytes& gradients, const py::sequence& rules, uintptr_t grad_scale,
                 uintptr_t found_inf) {
  Inputs inputs{gradients, {}, grad_scale, found_inf};
  inputs.rules.reserve(rules.size());
  for (const py::handle rule : rules) inputs.rules.push_back(rule_of(rule));
  return inputs;
}

void run_masked_step(const std::string& dtype, uintptr_t table, uintptr_t block_to_tensor, int64_t blocks,
                     const py::bytes& gradients, const py::sequence& rules, uintptr_t grad_scale,
                     uintptr_t found_inf, uintptr_t stream) {
  const StepLaunch launch{dtype_named(dtype), table, block_to_tensor, blocks};
  const Inputs inputs = inputs_of(gradients, rules, grad_scale, found_inf);
  py::gil_scoped_release release;
  masked_step(launch, inputs, stream);
}

void run_sector_step(const SectorLaunch& launch, const py::bytes& gradients, const py::sequence& rules,
                     uintptr_t grad_scale, uintptr_t found_inf, uintptr_t stream) {
  const Inputs inputs = inputs_of(gradients, rules, grad_scale, found_inf);
  py::gil_scoped_release release;
  sector_step(launch, inputs, stream);
}

void run_sector_squares(const SectorLaunch& launch, const py::bytes& gradients, uintptr_t sums,
                        uintptr_t stream) {
  const std::string_view addresses(gradients);
  py::gil_scoped_release release;
  sector_squares(launch, addresses, sums, stream);
}

void run_count_rows(const std::string& dtype, uintptr_t table, uintptr_t block_to_tensor, uintptr_t fan_in,
                    uintptr_t live, int64_t blocks, uintptr_t stream) {
  const Listing listing{dtype_named(dtype), table, block_to_tensor, fan_in, live, blocks};
  py::gil_scoped_release release;
  count_rows(listing, stream);
}

void run_list_sectors(const std::string& dtype, uintptr_t table, uintptr_t block_to_tensor, uintptr_t fan_in,
                      uintptr_t live, uintptr_t ends, int64_t blocks, uintptr_t stream) {
  const Listing listing{dtype_named(dtype), table, block_to_tensor, fan_in, live, blocks};
  py::gil_scoped_release release;
  list_sectors(listing, ends, stream);
}

template <size_t kCount>
py::tuple names(const char* const (&fields)[kCount]) {
  py::tuple result(kCount);
  for (size_t i = 0; i < kCount; ++i) result[i] = py::str(fields[i]);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["cuda"] = SPARSEOPT_CUDA_VERSION;
  info["architectures"] = std::vector<int>{SPARSEOPT_CUDA_ARCHITECTURES};
  info["ptx"] = std::vector<int>{SPARSEOPT_CUDA_PTX};
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA backend of sparseopt_kernels. Private: use SparseOpt.";
  module.attr("MOST_TENSORS") = kTensorCapacity;
  module.attr("MOST_RULES") = kRuleCapacity;
  module.attr("SECTOR_BYTES") = kSectorBytes;
  module.attr("CHUNK") = kChunk;
  module.attr("LIST_ROWS") = kWarps;
  module.attr("STEP_ROW") = names(kStepRowFields);
  module.attr("SECTOR_ROW") = names(kSectorRowFields);
  module.attr("LIST_ROW") = names(kListRowFields);
  module.attr("RULE") = names(kRuleFields);

  // Local to the module, so that tests can load several builds of it in one process.
  py::class_<SectorLaunch>(module, "SectorLaunch", py::module_local())
      .def(py::init([](const std::string& dtype, uintptr_t table, uintptr_t chunk_to_tensor, uintptr_t chunks,
                       bool wide, int64_t most_chunks, int multiprocessors) {
             return SectorLaunch{dtype_named(dtype), table,          chunk_to_tensor, chunks, wide,
                                 most_chunks,        multiprocessors};
           }),
           py::arg("dtype"), py::arg("table"), py::arg("chunk_to_tensor"), py::arg("chunks"), py::arg("wide"),
           py::arg("most_chunks"), py::arg("multiprocessors"))
      .def_property_readonly("blocks", [](const SectorLaunch& launch) {
        return sector_blocks(launch.dtype, launch.most_chunks, launch.multiprocessors);
      });

  module.def("step_rows", &step_rows, py::arg("columns"));
  module.def("masked_step", &run_masked_step, py::arg("dtype"), py::arg("table"), py::arg("block_to_tensor"),
             py::arg("blocks"), py::arg("gradients"), py::arg("rules"), py::arg("grad_scale"),
             py::arg("found_inf"), py::arg("stream"));
  module.def("sector_step", &run_sector_step, py::arg("launch"), py::arg("gradients"), py::arg("rules"),
             py::arg("grad_scale"), py::arg("found_inf"), py::arg("stream"));
  module.def("sector_squares", &run_sector_squares, py::arg("launch"), py::arg("gradients"), py::arg("sums"),
             py::arg("stream"));
  module.def("count_rows", &run_count_rows, py::arg("dtype"), py::arg("table"), py::arg("block_to_tensor"),
             py::arg("fan_in"), py::arg("live"), py::arg("blocks"), py::arg("stream"));
  module.def("list_sectors", &run_list_sectors, py::arg("dtype"), py::arg("table"),
             py::arg("block_to_tensor"), py::arg("fan_in"), py::arg("live"), py::arg("ends"),
             py::arg("blocks"), py::arg("stream"));
  module.def("build_info", &build_info);
  module.def("driver_version", &driver_version);
}
