// What the two binding files of the block index share: arrays of keys and of references.
#pragma once

#include "arrays.h"
#include "kvx/block_index.h"

namespace kvx::bind {

using KeyRows = nanobind::ndarray<const uint8_t, nanobind::shape<-1, sizeof(BlockKey)>,
                                  nanobind::c_contig, nanobind::device::cpu>;
using NumpyKeys = nanobind::ndarray<nanobind::numpy, uint8_t, nanobind::ndim<2>>;
using Slots = Row<int64_t>;
using Generations = Row<uint32_t>;
using IndexClass = nanobind::class_<BlockIndex>;

std::span<const BlockKey> view_keys(const KeyRows& keys);
NumpyKeys adopt_keys(std::vector<BlockKey> keys);
// Raises UsageError unless every batch argument has `count` rows.
void check_rows(size_t count, std::initializer_list<size_t> others);
References view_references(const Slots& slots, const Generations& generations);

// The methods, by what they are for.
void bind_index_writing(IndexClass& index);
void bind_index_reading(IndexClass& index);
void bind_index_holding(IndexClass& index);
void bind_index_admin(IndexClass& index);

}  // namespace kvx::bind
