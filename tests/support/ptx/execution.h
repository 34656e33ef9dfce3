// Executes a launch: block after block, and in a block warp after warp, from barrier to barrier. The lanes of
// a warp that are at the same instruction go together; of several groups, the one that is furthest behind
// goes on, so that lanes that parted meet again.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "instruction.h"

namespace ptx {

// A kernel.
struct Program {
  std::vector<Instruction> code;
  std::vector<int> register_nbytes;  // 0: a predicate
};

// A launch of a kernel.
class Execution {
 public:
  // Grids have one dimension. A kernel with mistakes is told by the other one which of them to make.
  Execution(const Program& program, std::string parameters, int64_t blocks, int64_t mistake, int threads,
            size_t shared_nbytes, std::vector<LiveMemory::Block> memory)
      : code_(program.code),
        register_nbytes_(program.register_nbytes),
        parameters_(std::move(parameters)),
        blocks_(blocks),
        mistake_(mistake),
        threads_(threads),
        shared_(shared_nbytes),
        memory_(std::move(memory), races_),
        shared_touches_(shared_nbytes, races_) {
    if (threads % kWarp != 0) throw std::invalid_argument("a block must have whole warps");
  }

  void run() {
    for (int64_t block = 0; block < blocks_; ++block) {
      std::fill(shared_.begin(), shared_.end(), static_cast<unsigned char>(kPoison));
      shared_touches_.order_all();
      run_block(block);
    }
  }

  static void decode(Instruction& own, const Functions& functions);

  const Races& races() const { return races_; }

 private:
  void run_block(int64_t block) {
    std::vector<Warp> warps;
    for (int thread = 0; thread < threads_; thread += kWarp) {
      warps.push_back({block, thread, {}});
      std::array<Bits, kWarp> poison;
      poison.fill(kPoison);
      warps.back().registers.assign(register_nbytes_.size(), poison);
    }
    for (;;) {
      for (Warp& warp : warps) run_to_barrier(warp);
      const auto waiting = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.waits; });
      if (waiting == 0) return;
      if (waiting != int64_t(warps.size())) throw Illegal("a barrier that not all threads of a block reach");
      shared_touches_.order_all();
      for (Warp& warp : warps) warp.waits = false;
    }
  }

  void run_to_barrier(Warp& warp) {
    while (warp.alive != 0 && !warp.waits) {
      const Lanes group = warp.next_group();
      const Instruction& instruction = code_[warp.at[__builtin_ctz(group)]];
      Lanes lanes = group;
      if (instruction.guard >= 0)
        for_each_lane(group, [&](int lane) {
          const bool is_set = warp.registers[instruction.guard][lane] != 0;
          if (is_set == instruction.is_negated) lanes &= ~(Lanes(1) << lane);
        });
      for_each_lane(group, [&](int lane) { ++warp.at[lane]; });
      if (lanes != 0) (this->*instruction.handler)(warp, lanes, instruction);
      if (++steps_ > kMostSteps) throw Illegal("it does not end: " + instruction.text);
    }
  }

  // ---- operands ----

  Bits get(const Warp& warp, const Operand& operand, int lane) const {
    if (operand.kind == kRegister) return warp.registers[operand.number][lane];
    if (operand.kind == kConstant) return operand.number;
    switch (operand.number) {
      case kThread:
        return static_cast<Bits>(warp.first_thread + lane);
      case kThreads:
        return static_cast<Bits>(threads_);
      case kBlock:
        return static_cast<Bits>(warp.block);
      case kBlocks:
        return static_cast<Bits>(blocks_);
      default:
        return static_cast<Bits>(mistake_);
    }
  }

  Bits get(const Warp& warp, const Instruction& of, size_t operand, int lane) const {
    return get(warp, of.operands.at(operand).at(0), lane);
  }

  void set(Warp& warp, const Operand& operand, int lane, Bits bits) const {
    if (operand.kind == kUnused) return;
    if (operand.kind != kRegister) throw std::invalid_argument("a result that is no register");
    const int nbytes = register_nbytes_[operand.number];
    warp.registers[operand.number][lane] =
        nbytes == 8 ? bits : bits & ((Bits(1) << std::max(8 * nbytes, 1)) - 1);
  }

  void set(Warp& warp, const Instruction& of, int lane, Bits bits) const {
    set(warp, of.operands.at(0).at(0), lane, bits);
  }

  int number_of(const Warp& warp, int lane) const {
    return static_cast<int>(warp.block * threads_) + warp.first_thread + lane;
  }

  [[noreturn]] void refuse(const std::string& what, const Warp& warp, int lane, const Instruction& of) const {
    throw Illegal(what + ", by thread " + std::to_string(warp.first_thread + lane) + " of block " +
                  std::to_string(warp.block) + ": " + of.text);
  }

  // ---- one lane ----

  void compute(Warp& warp, Lanes lanes, const Instruction& own) {
    for_each_lane(lanes, [&](int lane) {
      Bits operands[4] = {};
      for (size_t i = 1; i < own.operands.size(); ++i) operands[i - 1] = get(warp, own, i, lane);
      set(warp, own, lane, own.function(operands));
    });
  }

  // Vectors are taken apart and put together.
  void move(Warp& warp, Lanes lanes, const Instruction& own) {
    const auto& to = own.operands.at(0);
    const auto& from = own.operands.at(1);
    const size_t nbits =
        own.opcode == "mov.pred" ? 1 : 8 * nbytes_of(own.opcode.substr(own.opcode.rfind('.') + 1));
    for_each_lane(lanes, [&](int lane) {
      Bits bits = get(warp, from[0], lane);
      for (size_t i = 1; i < from.size(); ++i) bits |= get(warp, from[i], lane) << (i * nbits / from.size());
      for (size_t i = 0; i < to.size(); ++i) set(warp, to[i], lane, bits >> (i * nbits / to.size()));
    });
  }

  void branch(Warp& warp, Lanes lanes, const Instruction& own) {
    for_each_lane(lanes, [&](int lane) { warp.at[lane] = own.operands[0][0].number; });
  }

  void end(Warp& warp, Lanes lanes, const Instruction&) { warp.alive &= ~lanes; }

  // ---- memory ----

  // Returns where the bytes of an access are, and notes that they are touched.
  unsigned char* touch(const Warp& warp, const Instruction& own, size_t address_operand, int lane,
                       size_t nbytes, bool writes) {
    const auto& address_parts = own.operands.at(address_operand);
    const Bits address = get(warp, address_parts.at(0), lane) + get(warp, address_parts.at(1), lane);
    if (address % nbytes != 0) refuse("a misaligned address", warp, lane, own);
    if (own.access.space == Space::kParameter) {
      if (writes || !is_within(address, nbytes, parameters_.size()))
        refuse("no such parameter", warp, lane, own);
      return reinterpret_cast<unsigned char*>(&parameters_[address]);
    }
    Touches* touches = &shared_touches_;
    size_t at = address;
    if (own.access.space == Space::kGlobal) {
      std::tie(touches, at) = memory_.find(address, nbytes);
      if (touches == nullptr) refuse("an address outside of live memory", warp, lane, own);
    } else if (!is_within(address, nbytes, shared_.size())) {
      refuse("an address outside of shared memory", warp, lane, own);
    }
    if (writes)
      touches->write(at, nbytes, number_of(warp, lane), own.text);
    else if (own.access.is_constant)
      touches->read_constant(at, nbytes, own.text);
    else
      touches->read(at, nbytes, number_of(warp, lane), own.text);
    return own.access.space == Space::kShared ? &shared_[address] : reinterpret_cast<unsigned char*>(address);
  }

  void load(Warp& warp, Lanes lanes, const Instruction& own) {
    const auto& to = own.operands.at(0);
    const size_t nbytes = own.access.nbytes;
    for_each_lane(lanes, [&](int lane) {
      const unsigned char* from = touch(warp, own, 1, lane, nbytes * to.size(), false);
      for (size_t i = 0; i < to.size(); ++i) {
        Bits bits = 0;
        std::memcpy(&bits, from + i * nbytes, nbytes);
        if (own.access.is_signed && (bits >> (8 * nbytes - 1) & 1) != 0 && nbytes < 8)
          bits |= ~Bits(0) << (8 * nbytes);
        set(warp, to[i], lane, bits);
      }
    });
  }

  void store(Warp& warp, Lanes lanes, const Instruction& own) {
    const auto& from = own.operands.at(1);
    const size_t nbytes = own.access.nbytes;
    for_each_lane(lanes, [&](int lane) {
      unsigned char* to = touch(warp, own, 0, lane, nbytes * from.size(), true);
      for (size_t i = 0; i < from.size(); ++i) {
        const Bits bits = get(warp, from[i], lane);
        std::memcpy(to + i * nbytes, &bits, nbytes);
      }
    });
  }

  // Four matrices of 8 rows of 16 bytes. Lane i has the address of row i, and of each matrix four bytes.

  using Rows = std::array<std::array<unsigned char, 16>, kWarp>;

  static unsigned char* part_of(Rows& rows, int matrix, int lane) {
    return &rows[8 * matrix + lane / 4][4 * (lane % 4)];
  }

  void load_matrices(Warp& warp, Lanes lanes, const Instruction& own) {
    check_all_are_there(warp, lanes, own);
    const bool is_transposed = own.opcode.find(".trans") != std::string::npos;
    Rows rows;
    for_each_lane(lanes,
                  [&](int lane) { std::memcpy(&rows[lane], touch(warp, own, 1, lane, 16, false), 16); });
    for_each_lane(lanes, [&](int lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t parts[2];  // numbers of two bytes, which are transposed
        std::memcpy(parts, part_of(rows, matrix, lane), 4);
        for (int i = 0; is_transposed && i < 2; ++i)
          std::memcpy(&parts[i], &rows[8 * matrix + 2 * (lane % 4) + i][2 * (lane / 4)], 2);
        set(warp, own.operands[0].at(matrix), lane, parts[0] | Bits(parts[1]) << 16);
      }
    });
  }

  void store_matrices(Warp& warp, Lanes lanes, const Instruction& own) {
    check_all_are_there(warp, lanes, own);
    Rows rows;
    for_each_lane(lanes, [&](int lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Bits part = get(warp, own.operands[1].at(matrix), lane);
        std::memcpy(part_of(rows, matrix, lane), &part, 4);
      }
    });
    for_each_lane(lanes,
                  [&](int lane) { std::memcpy(touch(warp, own, 0, lane, 16, true), &rows[lane], 16); });
  }

  void check_all_are_there(const Warp& warp, Lanes lanes, const Instruction& own) const {
    if (lanes != kAll) refuse("not all lanes of the warp are there", warp, __builtin_ctz(lanes), own);
  }

  // ---- several lanes ----

  // The mask, which is the operand of that index, must be that of the lanes that are there.
  void check_together(const Warp& warp, Lanes lanes, const Instruction& own, size_t mask_operand) const {
    for_each_lane(lanes, [&](int lane) {
      if (of<Lanes>(get(warp, own, mask_operand, lane)) != lanes)
        refuse("its mask is not that of the lanes that are there", warp, lane, own);
    });
  }

  void warp_barrier(Warp& warp, Lanes lanes, const Instruction& own) {
    check_together(warp, lanes, own, 0);
    if (lanes == kAll) shared_touches_.order_warp(number_of(warp, 0));
  }

  void block_barrier(Warp& warp, Lanes lanes, const Instruction& own) {
    if (lanes != kAll)
      refuse("a barrier that not all threads of a block reach", warp, __builtin_ctz(lanes), own);
    warp.waits = true;
  }

  void shuffle(Warp& warp, Lanes lanes, const Instruction& own) {
    check_together(warp, lanes, own, 4);
    const std::string way = parts_of(own.opcode).at(2);
    std::array<Bits, kWarp> values{};
    for_each_lane(lanes, [&](int lane) { values[lane] = get(warp, own, 1, lane); });
    for_each_lane(lanes, [&](int lane) {
      const int by = get(warp, own, 2, lane) & 31, control = static_cast<int>(get(warp, own, 3, lane));
      const int segment = control >> 8 & 31, least = lane & segment, most = least | (control & 31 & ~segment);
      int from = way == "up"     ? lane - by
                 : way == "down" ? lane + by
                 : way == "bfly" ? lane ^ by
                                 : least | (by & ~segment);
      const bool is_inside = way == "up" ? from >= most : from <= most;
      if (!is_inside) from = lane;
      if ((lanes >> from & 1) == 0) refuse("shfl from a lane that is not there", warp, lane, own);
      set(warp, own, lane, values[from]);
      if (own.operands[0].size() > 1) set(warp, own.operands[0][1], lane, is_inside);
    });
  }

  void ballot(Warp& warp, Lanes lanes, const Instruction& own) {
    check_together(warp, lanes, own, 2);
    Lanes votes = 0;
    for_each_lane(lanes, [&](int lane) { votes |= Lanes(get(warp, own, 1, lane) != 0) << lane; });
    for_each_lane(lanes, [&](int lane) { set(warp, own, lane, votes); });
  }

  void reduce(Warp& warp, Lanes lanes, const Instruction& own) {
    check_together(warp, lanes, own, 2);
    const bool is_sum = own.opcode == "redux.sync.add.s32";
    int64_t result = is_sum ? 0 : INT32_MIN;
    for_each_lane(lanes, [&](int lane) {
      const int64_t value = of<int32_t>(get(warp, own, 1, lane));
      result = is_sum ? result + value : std::max(result, value);
    });
    for_each_lane(lanes, [&](int lane) { set(warp, own, lane, static_cast<uint32_t>(result)); });
  }

  const std::vector<Instruction>& code_;
  const std::vector<int>& register_nbytes_;
  std::string parameters_;
  int64_t blocks_, mistake_;
  int threads_;
  std::vector<unsigned char> shared_;
  Races races_;
  LiveMemory memory_;
  Touches shared_touches_;
  int64_t steps_ = 0;
};

}  // namespace ptx
