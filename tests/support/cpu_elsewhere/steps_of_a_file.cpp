// Makes steps of the CPU loops without Python: on processors, and under sanitizers, that have none.
//   steps_of_a_file <in >out
// In: cases, one after another, as written by program.py; out: weights, momentum buffers and norms.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../../csrc/cpu/step.h"

using namespace sparseopt;
using namespace sparseopt::cpu;

namespace {

// Of one case; arrays follow: parameter, momentum buffer, mask, c_i of its runs, and a gradient for each
// step.
struct Header {
  int64_t dtype, element_bytes, has_buffer, has_mask, ham, groups, segments, neurons, length, steps, threads;
  int64_t nesterov, maximize, has_factors;
  double lr, momentum, dampening, weight_decay, ham_alpha, ham_beta, gamma;
};

template <class T>
bool read(T* to, size_t count) {
  return std::fread(to, sizeof(T), count, stdin) == count;
}

// Of exactly the size asked for, so that a sanitizer sees the end.
std::unique_ptr<uint8_t[]> read_bytes(size_t count) {
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[count]);
  if (!read(bytes.get(), count)) std::exit(2);
  return bytes;
}

void write(const void* from, size_t count) {
  if (std::fwrite(from, 1, count, stdout) != count) std::exit(3);
}

void run(const Header& h) {
  const size_t numel = size_t(h.groups * h.segments * h.neurons * h.length);
  const size_t bytes = numel * size_t(h.element_bytes);
  const auto parameter = read_bytes(bytes);
  const auto buffer = read_bytes(h.has_buffer ? bytes : 0);
  const auto mask = read_bytes(h.has_mask ? numel : 0);
  std::unique_ptr<PackedMask> packed;
  if (h.has_mask)
    packed =
        std::make_unique<PackedMask>(mask.get(), h.groups, h.segments, h.neurons, h.length, int(h.threads));
  std::unique_ptr<WriteWatch> watch;
  if (h.has_mask) watch = std::make_unique<WriteWatch>(mask.get(), 1, *packed, int64_t(numel), true);
  std::vector<double> factors(h.has_factors ? size_t(packed->runs()) : 0);
  if (!read(factors.data(), factors.size())) std::exit(2);
  const Tensor tensor{Dtype(h.dtype), parameter.get(), h.has_buffer ? buffer.get() : nullptr,
                      int64_t(numel), h.ham != 0,      packed.get(),
                      factors,        watch.get()};
  const Rule rule{h.lr,
                  h.momentum,
                  h.dampening,
                  h.weight_decay,
                  h.nesterov != 0,
                  h.maximize != 0,
                  h.ham_alpha,
                  h.ham_beta,
                  h.gamma};
  double norm = 0;
  for (int64_t i = 0; i < h.steps; ++i) {
    const auto gradient = read_bytes(bytes);
    const std::vector<TensorStep> steps = {{&tensor, gradient.get(), &rule}};
    norm = squared_norm(steps, int(h.threads), false);
    step(steps, int(h.threads));
    // Nobody but steps writes here.
    if (watch && watch->look(parameter.get(), Dtype(h.dtype), i % 2 == 0)) std::abort();
  }
  write(parameter.get(), bytes);
  write(buffer.get(), h.has_buffer ? bytes : 0);
  write(&norm, sizeof norm);
}

}  // namespace

int main() {
  for (Header header; read(&header, 1);) run(header);
}
