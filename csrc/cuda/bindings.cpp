// The CUDA library as Python sees it: addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string_view>

#include "table.h"

namespace py = pybind11;
using namespace sparseopt;
using namespace sparseopt::cuda;

namespace {

Tensor make_tensor(const std::string& dtype, uintptr_t parameter, uintptr_t momentum_buffer, int64_t rows,
                   int64_t columns, uintptr_t bits, uintptr_t mean_fan_in, bool ham) {
  if (bits != 0 && mean_fan_in == 0)
    throw std::invalid_argument("mean_fan_in is 0, it must be an address where there are bits");
  if (bits == 0 && rows != 1)
    throw std::invalid_argument("rows is " + std::to_string(rows) + ", it must be 1 where there are no bits");
  return {dtype_named(dtype), parameter, momentum_buffer, rows, columns, bits, mean_fan_in, ham};
}

Rule make_rule(double lr, uintptr_t lr_address, double momentum, double dampening, double weight_decay,
               bool nesterov, bool maximize, const std::string& correction, double ham_alpha, double ham_beta,
               double gamma, uintptr_t gamma_address) {
  return {lr,           lr_address, momentum, dampening,
          weight_decay, nesterov,   maximize, correction_named(correction),
          ham_alpha,    ham_beta,   gamma,    gamma_address};
}

Step step_of(const Table& table, const py::bytes& grads, std::vector<const Rule*> rules) {
  const std::string_view addresses = grads;
  Step step;
  step.grads.resize(table.tensors().size());
  if (addresses.size() != step.grads.size() * sizeof(uintptr_t))
    throw std::invalid_argument("grads must have one address per tensor");
  for (const size_t group : table.groups())
    if (group >= rules.size()) throw std::invalid_argument("rules must have one element per group");
  std::memcpy(step.grads.data(), addresses.data(), addresses.size());
  step.rules = std::move(rules);
  return step;
}

int run_step(const Table& table, const py::bytes& grads, std::vector<const Rule*> rules, uintptr_t grad_scale,
             uintptr_t found_inf, uintptr_t stream) {
  Step step = step_of(table, grads, std::move(rules));
  step.grad_scale = grad_scale;
  step.found_inf = found_inf;
  py::gil_scoped_release release;
  return sparseopt::cuda::step(table, step, stream);
}

void run_squared_norm(const Table& table, const py::bytes& grads, std::vector<const Rule*> rules,
                      uintptr_t partial_sums, uintptr_t stream) {
  const Step step = step_of(table, grads, std::move(rules));
  py::gil_scoped_release release;
  squared_norm(table, step, partial_sums, stream);
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
  module.attr("LAUNCH_CAPACITY") = kTensorsPerLaunch;

  // Local to the module, so that tests can load several builds of it in one process.
  py::class_<Tensor>(module, "Tensor", py::module_local())
      .def(py::init(&make_tensor), py::kw_only(), py::arg("dtype"), py::arg("parameter"),
           py::arg("momentum_buffer"), py::arg("rows"), py::arg("columns"), py::arg("bits"),
           py::arg("mean_fan_in"), py::arg("ham"));

  py::class_<Rule>(module, "Rule", py::module_local())
      .def(py::init(&make_rule), py::kw_only(), py::arg("lr"), py::arg("lr_address"), py::arg("momentum"),
           py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"),
           py::arg("correction"), py::arg("ham_alpha"), py::arg("ham_beta"), py::arg("gamma"),
           py::arg("gamma_address"));

  py::class_<Table>(module, "Table", py::module_local())
      .def(py::init<std::vector<Tensor>, std::vector<size_t>>(), py::arg("tensors"), py::arg("groups"));

  module.def("step", &run_step, py::arg("table"), py::arg("grads"), py::arg("rules"), py::arg("grad_scale"),
             py::arg("found_inf"), py::arg("stream"));
  module.def("squared_norm", &run_squared_norm, py::arg("table"), py::arg("grads"), py::arg("rules"),
             py::arg("partial_sums"), py::arg("stream"));
  module.def("partial_sum_count", &Table::partial_sum_count, py::arg("table"));
  module.def(
      "pack",
      [](uintptr_t mask, int64_t rows, int64_t columns, uintptr_t bits, uintptr_t nnz, uintptr_t stream) {
        py::gil_scoped_release release;
        pack(mask, rows, columns, bits, nnz, stream);
      },
      py::arg("mask"), py::arg("rows"), py::arg("columns"), py::arg("bits"), py::arg("nnz"),
      py::arg("stream"));
  module.def("build_info", &build_info);
}
