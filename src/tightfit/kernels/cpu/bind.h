// What the Python module is made of, one file for each kind of kernel.
#pragma once

#include <nanobind/nanobind.h>

namespace tightfit {

void bind_matmul(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_rows(nanobind::module_& m);

}  // namespace tightfit
