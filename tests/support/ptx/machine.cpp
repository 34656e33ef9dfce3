// The module _machine: executes PTX kernels on a CPU. machine.py says what is checked, and what is not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "execution.h"

namespace py = pybind11;

namespace ptx {

// Finds out what an opcode means.
void Execution::decode(Instruction& own, const Functions& functions) {
  const auto parts = parts_of(own.opcode);
  const std::string& name = parts[0];
  const auto handled_by = [&](Handler handler) { own.handler = handler; };
  const bool has_one_result = own.operands.empty() || own.operands[0].size() == 1;
  if (const auto found = functions.find(own.opcode); found != functions.end() && has_one_result) {
    own.function = found->second;
    return handled_by(&Execution::compute);
  }
  if (name == "mov") return handled_by(&Execution::move);
  if (own.opcode == "cvta.to.global.u64") return handled_by(&Execution::move);
  if (name == "bra") return handled_by(&Execution::branch);
  if (own.opcode == "ret") return handled_by(&Execution::end);
  if (name == "ld" || name == "st") {
    if (const auto access = access_of(parts)) {
      own.access = *access;
      return handled_by(name == "ld" ? &Execution::load : &Execution::store);
    }
  }
  const bool is_of_whole_block = own.operands.size() == 1 && own.operands[0][0].number == 0;
  if (own.opcode == "bar.sync" && is_of_whole_block) return handled_by(&Execution::block_barrier);
  if (own.opcode == "bar.warp.sync") return handled_by(&Execution::warp_barrier);
  if (name == "shfl") return handled_by(&Execution::shuffle);
  if (own.opcode == "vote.sync.ballot.b32") return handled_by(&Execution::ballot);
  if (own.opcode == "redux.sync.add.s32" || own.opcode == "redux.sync.max.s32")
    return handled_by(&Execution::reduce);
  own.access = {Space::kShared, false, false, 16};
  if (own.opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16" ||
      own.opcode == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
    return handled_by(&Execution::load_matrices);
  if (own.opcode == "stmatrix.sync.aligned.m8n8.x4.shared.b16") return handled_by(&Execution::store_matrices);
  throw std::invalid_argument("an instruction that is not known: " + own.text);
}

Instruction instruction_of(const py::handle& fields, const Functions& functions) {
  const auto [opcode, operands, guard, is_negated, text] = fields.cast<
      std::tuple<std::string, std::vector<std::vector<std::tuple<int, Bits>>>, int, bool, std::string>>();
  Instruction own{opcode, {}, guard, is_negated, text, nullptr, nullptr, {}};
  for (const auto& parts : operands) {
    own.operands.emplace_back();
    for (const auto& [kind, number] : parts) own.operands.back().push_back({kind, number});
  }
  Execution::decode(own, functions);
  return own;
}

Program program_of(const py::sequence& instructions, std::vector<int> register_nbytes) {
  Program program{{}, std::move(register_nbytes)};
  const Functions functions = all_functions();
  for (const py::handle fields : instructions) program.code.push_back(instruction_of(fields, functions));
  return program;
}

// Returns the races.
Races execute(const Program& program, const py::bytes& parameters, int64_t blocks, int64_t mistake,
              int threads, size_t shared_nbytes, std::vector<LiveMemory::Block> memory) {
  Execution execution(program, parameters, blocks, mistake, threads, shared_nbytes, std::move(memory));
  py::gil_scoped_release release;
  execution.run();
  return execution.races();
}

}  // namespace ptx

PYBIND11_MODULE(_machine, module) {
  py::register_exception<ptx::Illegal>(module, "Illegal");
  py::class_<ptx::Program>(module, "Program")
      .def(py::init(&ptx::program_of), py::arg("instructions"), py::arg("register_nbytes"))
      .def("execute", &ptx::execute, py::arg("parameters"), py::arg("blocks"), py::arg("mistake"),
           py::arg("threads"), py::arg("shared_nbytes"), py::arg("memory"));
}
