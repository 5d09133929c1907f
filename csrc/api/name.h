#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace lil {

// A `str` argument. Taken as std::string, torch (2.11 to 2.13) makes one on the heap at each call and never frees it.
struct Name : std::string {
  using std::string::string;
};

}  // namespace lil

template <>
struct torch::stable::detail::ToImpl<lil::Name> {
  // The operator owns the string, and deletes it.
  static lil::Name call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* data;
    size_t length;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    lil::Name name(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
