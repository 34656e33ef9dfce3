// The memory that a kernel may touch, and which lanes touched each byte of it. Lanes are numbered through the
// whole launch, so that those of a warp follow each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kWarp = 32;

// Tells if `nbytes` from `at` on are among the first `all`; sums might overflow.
inline bool is_within(uint64_t at, uint64_t nbytes, uint64_t all) {
  return nbytes <= all && at <= all - nbytes;
}

// What a GPU would refuse, or do in no defined way.
struct Illegal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Descriptions of accesses that nothing orders, and how many bytes they were of.
using Races = std::map<std::string, int64_t>;

// Which lanes touched each byte of a block of memory, as far as it takes to find a race.
class Touches {
 public:
  Touches(size_t nbytes, Races& races) : bytes_(nbytes), races_(&races) {}

  void read(size_t at, size_t nbytes, int lane, const std::string& text) {
    for (size_t i = at; i < at + nbytes; ++i) {
      if (bytes_[i].writer.may_come_later_than(lane)) note("read of what another lane wrote", text);
      bytes_[i].add_reader(lane);
    }
  }

  void write(size_t at, size_t nbytes, int lane, const std::string& text) {
    for (size_t i = at; i < at + nbytes; ++i) {
      Byte& byte = bytes_[i];
      if (byte.writer.may_come_later_than(lane)) note("write of what another lane wrote", text);
      if (byte.reader.may_come_later_than(lane) || byte.other_reader.may_come_later_than(lane))
        note("write of what another lane read", text);
      if (byte.is_constant) note("write of what was read as constant (ld.nc)", text);
      byte.writer = {lane, false};
    }
  }

  // A read through a cache that does not see what the kernel writes, not even what the same lane does.
  void read_constant(size_t at, size_t nbytes, const std::string& text) {
    for (size_t i = at; i < at + nbytes; ++i) {
      bytes_[i].is_constant = true;
      if (bytes_[i].writer.lane != kNobody) note("read as constant (ld.nc) of what was written", text);
    }
  }

  // A barrier of the warp of `lane`: its lanes see what each of them did before.
  void order_warp(int lane) {
    for (Byte& byte : bytes_)
      for (Touch* touch : {&byte.writer, &byte.reader, &byte.other_reader})
        touch->is_ordered |= touch->is_of_warp_of(lane);
  }

  // A barrier of all lanes.
  void order_all() { std::fill(bytes_.begin(), bytes_.end(), Byte{}); }

 private:
  static constexpr int kNobody = -kWarp;  // no lane, and of no warp that there is

  struct Touch {
    int lane = kNobody;
    bool is_ordered = false;  // it is before all that its warp does now

    bool is_of_warp_of(int other) const { return lane / kWarp == other / kWarp; }
    bool may_come_later_than(int other) const {
      return lane != kNobody && lane != other && !(is_ordered && is_of_warp_of(other));
    }
  };

  struct Byte {
    Touch writer, reader, other_reader;
    bool is_constant = false;

    // Of many readers two suffice: no lane can be both. They are of two warps if any two are.
    void add_reader(int lane) {
      if (!reader.may_come_later_than(lane))
        reader = {lane, false};
      else if (other_reader.lane == kNobody || other_reader.is_of_warp_of(reader.lane))
        other_reader = {lane, false};
    }
  };

  void note(const char* what, const std::string& text) { ++(*races_)[std::string(what) + ": " + text]; }

  std::vector<Byte> bytes_;
  Races* races_;
};

// The blocks of memory of this process that kernels may touch. They are read and written where they are.
class LiveMemory {
 public:
  using Block = std::pair<uint64_t, uint64_t>;  // an address, and a number of bytes

  LiveMemory(std::vector<Block> blocks, Races& races) : blocks_(std::move(blocks)), races_(&races) {
    std::sort(blocks_.begin(), blocks_.end());
    // Several may share memory.
    std::vector<Block> apart;
    for (const auto& [address, nbytes] : blocks_) {
      if (apart.empty() || apart.back().first + apart.back().second <= address)
        apart.emplace_back(address, nbytes);
      else
        apart.back().second = std::max(apart.back().second, address + nbytes - apart.back().first);
    }
    blocks_ = std::move(apart);
    touches_.resize(blocks_.size());
  }

  // Returns the touches of the block that has these bytes, and where they are in it; null if none has.
  std::pair<Touches*, size_t> find(uint64_t address, size_t nbytes) {
    const auto after = std::upper_bound(blocks_.begin(), blocks_.end(), Block{address, UINT64_MAX});
    const size_t index = static_cast<size_t>(after - blocks_.begin()) - 1;
    if (after == blocks_.begin() || !is_within(address - blocks_[index].first, nbytes, blocks_[index].second))
      return {nullptr, 0};
    if (!touches_[index]) touches_[index] = std::make_unique<Touches>(blocks_[index].second, *races_);
    return {touches_[index].get(), address - blocks_[index].first};
  }

 private:
  std::vector<Block> blocks_;
  std::vector<std::unique_ptr<Touches>> touches_;  // of the blocks that were touched
  Races* races_;
};

}  // namespace ptx
