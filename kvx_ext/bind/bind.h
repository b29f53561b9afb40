// What the binding files share. bind/ holds no logic: it checks arguments, releases the GIL and
// calls.
#pragma once

#include <nanobind/nanobind.h>

#include "kvx/status.h"

namespace kvx::bind {

// Raises the exception of kvx.errors that fits; returns normally when `status` is ok.
void raise_if_error(const Status& status);

void bind_memory(nanobind::module_& module);
void bind_checksum(nanobind::module_& module);
void bind_body_copy(nanobind::module_& module);
void bind_digest(nanobind::module_& module);
void bind_copy_plan(nanobind::module_& module);
void bind_layers(nanobind::module_& module);
void bind_dlpack(nanobind::module_& module);
void bind_block_index(nanobind::module_& module);
void bind_failpoint(nanobind::module_& module);
void bind_device(nanobind::module_& module);
void bind_copies(nanobind::module_& module);
void bind_kernels(nanobind::module_& module);
void bind_engine(nanobind::module_& module);
void bind_agent(nanobind::module_& module);
void bind_remote(nanobind::module_& module);

}  // namespace kvx::bind
