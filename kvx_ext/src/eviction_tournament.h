// Which owner's coldest block is the coldest: a tournament tree over one tick per owner.
//
// O(log owners) when an owner's cold end changes, O(log owners) to find the winner, and nothing to
// speak of for the usual single owner.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvx {

class OwnerTournament {
 public:
  static constexpr uint64_t kAbsent = UINT64_MAX;

  // Makes room for `owners`, all of whom keep their ticks.
  void grow(size_t owners) {
    if (owners <= leaves_) return;
    size_t leaves = std::max<size_t>(leaves_, 1);
    while (leaves < owners) leaves *= 2;
    std::vector<uint64_t> tree(2 * leaves, kAbsent);
    std::copy_n(tree_.begin() + static_cast<ptrdiff_t>(leaves_), leaves_,
                tree.begin() + static_cast<ptrdiff_t>(leaves));
    for (size_t i = leaves - 1; i > 0; --i) tree[i] = std::min(tree[2 * i], tree[2 * i + 1]);
    tree_ = std::move(tree);
    leaves_ = leaves;
  }

  // REQUIRES: owner below the last grow().
  void set(size_t owner, uint64_t tick) {
    size_t i = leaves_ + owner;
    tree_[i] = tick;
    for (i /= 2; i > 0; i /= 2) {
      const uint64_t least = std::min(tree_[2 * i], tree_[2 * i + 1]);
      if (tree_[i] == least) return;
      tree_[i] = least;
    }
  }

  [[nodiscard]] bool is_empty() const { return leaves_ == 0 || tree_[1] == kAbsent; }

  // REQUIRES: not empty. The lowest owner wins a tie.
  [[nodiscard]] size_t winner() const {
    size_t i = 1;
    while (i < leaves_) i = tree_[2 * i] == tree_[i] ? 2 * i : 2 * i + 1;
    return i - leaves_;
  }

  [[nodiscard]] int64_t memory_bytes() const {
    return static_cast<int64_t>(tree_.capacity() * sizeof(uint64_t));
  }

 private:
  std::vector<uint64_t> tree_{kAbsent, kAbsent};  // tree_[1] is the root, leaves from leaves_
  size_t leaves_ = 0;
};

}  // namespace kvx
