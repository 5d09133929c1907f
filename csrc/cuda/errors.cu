#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <string>

#include "api/checks.h"
#include "cuda/errors.cuh"
#include "cuda/launch.cuh"

namespace lil::cuda {
namespace {

__device__ ErrorWord word;

std::atomic<ErrorWord*> words[kMaxDevices];

std::string message(const ErrorWord& e) {
  static constexpr const char* kOps[] = {"append_kv", "score_pages", "select_pages", "sparse_decode"};
  const auto expected = [&]() -> std::string {
    switch (e.wrong) {
      case Wrong::kSeqLens:
        return text("seq_lens: expected 0 to ", e.limit, " tokens (max_pages * page_size) for");
      case Wrong::kSeqLensShort:
        return text("seq_lens: expected at least the ", e.limit, " tokens added to");
      case Wrong::kCuSeqlens:
        return text("cu_seqlens: expected ascending offsets into ", e.limit, " tokens at");
      case Wrong::kPageTable:
        return text("page_table: expected a page from 0 to ", e.limit, " for");
      case Wrong::kPages:
        return text("pages: expected -1 or a page from 0 to ", e.limit, " for");
      case Wrong::kCounts:
        return text("counts: expected 0 to ", e.limit, " pages for");
      default:
        return "";
    }
  };
  return text("lil::", kOps[static_cast<int>(e.op)], ": ", expected(), " sequence ", e.sequence, ", got ", e.got);
}

}  // namespace

ErrorWord* error_word() {
  std::atomic<ErrorWord*>& there = words[current_device().index];
  ErrorWord* found = there.load(std::memory_order_relaxed);
  if (found == nullptr) {
    void* address = nullptr;
    STD_CUDA_CHECK(cudaGetSymbolAddress(&address, word));
    found = static_cast<ErrorWord*>(address);
    there.store(found, std::memory_order_relaxed);
  }
  return found;
}

}  // namespace lil::cuda

// The message of the device's first error since the last call, or null. The caller has synchronised the device.
extern "C" __attribute__((visibility("default"))) const char* lil_cuda_take_error(int device) {
  using namespace lil::cuda;
  static thread_local std::string text;
  if (device < 0 || device >= kMaxDevices) return nullptr;
  ErrorWord* const there = words[device].load(std::memory_order_relaxed);
  if (there == nullptr) return nullptr;  // no kernel has run there
  ErrorWord found{};
  if (cudaMemcpy(&found, there, sizeof found, cudaMemcpyDefault) != cudaSuccess || found.wrong == Wrong::kNothing) {
    return nullptr;
  }
  const ErrorWord none{};
  if (cudaMemcpy(there, &none, sizeof none, cudaMemcpyDefault) != cudaSuccess) return nullptr;
  text = message(found);
  return text.c_str();
}
