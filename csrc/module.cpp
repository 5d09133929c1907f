// lil_ops._C: what the dispatcher cannot express. Build facts, limits, and host tools on numpy arrays. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "lz77.h"
#include "params.h"

namespace py = pybind11;

namespace lil {
namespace {

py::list words(const std::string& text) { return py::str(text).attr("split")(); }

py::dict build_facts() {
  const std::string cuda = LIL_CUDA_VERSION;
  py::dict facts;
  facts["cxx_compiler"] = LIL_CXX_COMPILER;
  facts["cuda_version"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  facts["cuda_archs"] = words(LIL_CUDA_ARCHS);
  facts["isas"] = words(LIL_ISAS);
  return facts;
}

void expect(bool condition, const char* what, const std::string& got) {
  if (!condition) throw py::value_error(std::string(what) + ", got " + got);
}

int64_t lz77_state_size(int64_t capacity) {
  static_assert(lz77::kMaxCapacity == 16777216);
  expect(capacity >= 1 && capacity <= lz77::kMaxCapacity, "lz77_state: capacity: expected 1 to 16777216 tokens",
         std::to_string(capacity));
  return lz77::state_size(capacity);
}

py::tuple lz77_trace(const py::array& input, int64_t vocab_size) {
  expect(py::isinstance<py::array_t<int32_t>>(input) || py::isinstance<py::array_t<int64_t>>(input),
         "lz77_trace: tokens: expected dtype int32 or int64", py::str(input.dtype()));
  expect(input.ndim() == 1, "lz77_trace: tokens: expected one dimension", std::to_string(input.ndim()));
  expect(input.size() <= lz77::kMaxCapacity, "lz77_trace: tokens: expected at most 16777216",
         std::to_string(input.size()));
  expect(vocab_size >= 1 && vocab_size <= INT32_MAX, "lz77_trace: vocab_size: expected 1 to 2147483647",
         std::to_string(vocab_size));
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> array(input);
  const int64_t n = array.size();
  const int64_t* tokens = array.data();
  for (int64_t i = 0; i < n; ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
    throw py::value_error("lz77_trace: tokens: expected 0 to " + std::to_string(vocab_size - 1) + " at index " +
                          std::to_string(i) + ", got " + std::to_string(tokens[i]));
  }
  py::array_t<int32_t> phrases(n), bits(n);
  int32_t *phrases_out = phrases.mutable_data(), *bits_out = bits.mutable_data();
  {
    const py::gil_scoped_release release;
    // calloc: memory that the parse does not reach is never touched.
    const int64_t size = lz77::state_size(n);
    const std::unique_ptr<void, decltype(&std::free)> state(std::calloc(size, sizeof(int32_t)), &std::free);
    if (!state) throw std::bad_alloc();
    lz77::Parse parse(static_cast<int32_t*>(state.get()), size);
    const int32_t token_bits = lz77::index_bits(vocab_size);
    for (int64_t i = 0; i < n; ++i) {
      parse.append(static_cast<int32_t>(tokens[i]), token_bits);
      phrases_out[i] = parse.phrases();
      bits_out[i] = parse.bits(token_bits);
    }
  }
  return py::make_tuple(phrases, bits);
}

}  // namespace
}  // namespace lil

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, limits of operators and numpy-facing host tools of lil_ops.";
  m.attr("MAX_LINEAR_ROWS") = lil::kMaxLinearRows;  // of decode_linear
  m.def("build_facts", &lil::build_facts,
        "Compiler, CUDA version (None: built without), CUDA architectures and CPU instruction sets of this build.");
  m.def("lz77_state_size", &lil::lz77_state_size, py::arg("capacity"),
        "int32 words of a row of lil_ops.lz77_state that holds up to capacity tokens.");
  m.def("lz77_trace", &lil::lz77_trace, py::arg("tokens"), py::arg("vocab_size"),
        "The LZ77 size after each token of a 1-D int32 or int64 array: (phrases, bits), int32 arrays of its length.\n\n"
        "The same parse and units as lil_ops.lz77_append; lil_ops.reference.lz77_sizes defines it.");
}
