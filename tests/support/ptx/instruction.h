// Instructions as they are decoded, and the lanes that execute them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "memory.h"

namespace ptx {

using Lanes = uint32_t;  // a set of lanes of a warp
constexpr Lanes kAll = ~Lanes(0);
constexpr Bits kPoison = 0x5a5a5a5a5a5a5a5a;  // what nobody wrote
constexpr int64_t kMostSteps = 20'000'000;    // of all warps: a loop without an end is noticed

enum Kind { kRegister, kConstant, kSpecial, kUnused };          // of program.py
enum Special { kThread, kThreads, kBlock, kBlocks, kMistake };  // likewise
enum class Space { kGlobal, kShared, kParameter };

struct Operand {
  int kind;
  Bits number;
};

struct Access {
  Space space;
  bool is_constant, is_signed;
  size_t nbytes;  // of each part
};

struct Instruction;
class Execution;
struct Warp;
using Handler = void (Execution::*)(Warp&, Lanes, const Instruction&);

struct Instruction {
  std::string opcode;
  std::vector<std::vector<Operand>> operands;
  int guard;
  bool is_negated;
  std::string text;
  // What follows from the opcode.
  Handler handler;
  Function function;
  Access access;
};

struct Warp {
  int64_t block;
  int first_thread;
  std::vector<std::array<Bits, kWarp>> registers;
  std::array<size_t, kWarp> at{};  // the next instruction of each lane
  Lanes alive = kAll;
  bool waits = false;

  // Returns the lanes that are furthest behind.
  Lanes next_group() const {
    size_t least = SIZE_MAX;
    Lanes group = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((alive >> lane & 1) == 0 || at[lane] > least) continue;
      if (at[lane] < least) group = 0;
      least = at[lane];
      group |= Lanes(1) << lane;
    }
    return group;
  }
};

template <class Visit>
void for_each_lane(Lanes lanes, Visit&& visit) {
  for (; lanes != 0; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

inline std::vector<std::string> parts_of(const std::string& opcode) {
  std::vector<std::string> parts;
  std::istringstream stream(opcode);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

inline bool is_one_of(const std::string& part, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), part) != names.end();
}

inline size_t nbytes_of(const std::string& type) { return std::stoul(type.substr(1)) / 8; }

// Understands ld.global.nc.v4.u32 and the like; hints for caches do not matter.
inline std::optional<Access> access_of(const std::vector<std::string>& parts) {
  Access access{Space::kGlobal, false, parts.back()[0] == 's', nbytes_of(parts.back())};
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    if (parts[i] == "shared")
      access.space = Space::kShared;
    else if (parts[i] == "param")
      access.space = Space::kParameter;
    else if (parts[i] == "nc")
      access.is_constant = true;
    else if (!is_one_of(parts[i], {"global", "v2", "v4", "ca", "cg", "cs", "lu", "wb", "wt"}))
      return std::nullopt;
  }
  return access;
}

}  // namespace ptx
