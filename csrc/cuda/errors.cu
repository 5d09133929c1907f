#include <cuda_runtime.h>

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
  static constexpr const char* kOps[] = {"append_kv",        "score_pages", "select_pages",   "sparse_decode",
                                         "information_loss", "evict_pages", "represent_page", "compact_kv",
                                         "key_redundancy",   "lz77_append"};
  const auto expected = [&]() -> std::string {
    switch (e.wrong) {
      case Wrong::kSeqLens:
        return text("seq_lens: expected ", lengths_text(e.limit), " for");
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
      case Wrong::kSlots:
        return text("slots: expected -1 or a slot from 0 to ", e.limit, " for");
      case Wrong::kHeld:
        return text("held: expected -1 or a page from 0 to ", e.limit, " for");
      case Wrong::kSlotPages:
        return "slot_pages: expected a page for each slot of";
      case Wrong::kKeep:
        return text("keep: expected ascending slots below ", e.limit, " for");
      case Wrong::kKeepCounts:
        return text("counts: expected 0 to ", e.limit, " slots for");
      case Wrong::kPositions:
        return text("positions: expected at least ", e.limit, " for");
      case Wrong::kPositionsShort:
        return text("positions: expected a capacity of at least ", e.limit, " for");
      case Wrong::kTokens:
        return text("tokens: expected 0 to ", e.limit, " for");
      case Wrong::kTokenCounts:
        return text("counts: expected 0 to ", e.limit, " tokens for");
      case Wrong::kRoom:
        return text("state: expected a capacity of at least ", e.limit, " for");
      case Wrong::kState:
        return "state: expected a row of lil_ops.lz77_state, which only lz77_append writes, for";
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
    check_cuda(cudaGetSymbolAddress(&address, word));
    found = static_cast<ErrorWord*>(address);
    there.store(found, std::memory_order_relaxed);
  }
  return found;
}

}  // namespace lil::cuda

// Waits for the device; the message of its first error since the last call, or null. No context is made on a device
// where no kernel has run.
extern "C" __attribute__((visibility("default"))) const char* lil_cuda_take_error(int device) {
  using namespace lil::cuda;
  static thread_local std::string found_text;
  ErrorWord* const there =
      device < 0 || device >= kMaxDevices ? nullptr : words[device].load(std::memory_order_relaxed);
  if (there == nullptr) return nullptr;
  int before = 0;
  ErrorWord found{};
  const ErrorWord none{};
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  if (status == cudaSuccess) status = cudaMemcpy(&found, there, sizeof found, cudaMemcpyDefault);
  if (status == cudaSuccess && found.wrong != Wrong::kNothing) {
    status = cudaMemcpy(there, &none, sizeof none, cudaMemcpyDefault);
  }
  cudaSetDevice(before);
  if (status != cudaSuccess) {
    found_text = lil::text("lil_ops.check_errors: ", cudaGetErrorString(status));
  } else if (found.wrong != Wrong::kNothing) {
    found_text = message(found);
  } else {
    return nullptr;
  }
  return found_text.c_str();
}
