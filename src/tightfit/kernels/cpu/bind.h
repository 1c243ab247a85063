// What the Python module is made of, one file for each kind of kernel.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "weight.h"

namespace tightfit {

Kind kind_of(const std::string& name);  // raises ValueError for an unknown one

void bind_matmul(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_pages(nanobind::module_& m);
void bind_lists(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_encode(nanobind::module_& m);
void bind_ggml(nanobind::module_& m);
void bind_gemm(nanobind::module_& m);

}  // namespace tightfit
