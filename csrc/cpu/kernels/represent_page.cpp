#include "represent_page.h"

#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

// Adds what the tokens inside the window got, summed over the group in the order of its heads.
void gather(const RepresentPageParams& p, int64_t b, int64_t h, float* weight) {
  const int64_t page_size = p.cache.page_size, length = p.seq_lens[b], first = first_inside(p, length);
  const int64_t width = p.capacity * page_size;
  const int64_t entries = p.counts ? p.counts[b * p.cache.kv_heads + h] : p.capacity;
  const int32_t* const list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
  const float* const mass = p.mass + (b * p.cache.kv_heads + h) * p.group * width;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int64_t start = list[entry] * page_size;  // negative where nothing is listed
    if (start < 0 || start + page_size <= first) continue;
    for (int64_t t = start < first ? first - start : 0; t < page_size && start + t < length; ++t) {
      float sum = 0;
      for (int64_t g = 0; g < p.group; ++g) sum += mass[g * width + entry * page_size + t];
      weight[start + t] += sum;
    }
  }
}

// The mean of the heaviest keys of a page, whose tokens have these weights, added up from the heaviest on.
template <class T, class S>
void represent(const RepresentPageParams& p, const float* weight, int64_t physical, int64_t h) {
  const int64_t page_size = p.cache.page_size;
  int64_t heaviest[kMaxRepresentatives];
  for (int64_t t = 0; t < page_size; ++t) {
    int64_t before = 0;
    for (int64_t other = 0; other < page_size; ++other) before += comes_before(weight[other], other, weight[t], t);
    if (before < p.representatives) heaviest[before] = t;
  }
  const PagedBuffer& k = p.cache.k;
  const T* const keys = static_cast<const T*>(k.data) + physical * k.stride_page + h * k.stride_head;
  S* const mean = static_cast<S*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
  const Vec count = Vec::set1(static_cast<float>(p.representatives));
  for (int64_t d = 0; d < p.cache.head_dim; d += Vec::N) {
    Vec sum = Vec::load(keys + heaviest[0] * k.stride_token + d);
    for (int64_t r = 1; r < p.representatives; ++r) sum = sum + Vec::load(keys + heaviest[r] * k.stride_token + d);
    (sum / count).store(mean + d);
  }
}

}  // namespace

void represent_page(const RepresentPageParams& p, int64_t begin, int64_t end) {
  with_stored_dtype(p.cache.dtype, [&]<class T>(const T*) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.cache.kv_heads, h = i % p.cache.kv_heads, page = leaving_page(p, p.seq_lens[b]);
      float* const weight = p.weight + i * p.table.max_pages * p.cache.page_size;
      gather(p, b, h, weight);
      const int64_t physical = page < 0 ? -1 : p.table.at(b, h, page);
      if (physical < 0) continue;
      const auto one = p.summary.dtype == DType::kFloat8E4M3 ? represent<T, e4m3> : represent<T, T>;
      one(p, weight + page * p.cache.page_size, physical, h);
    }
  });
}

}  // namespace lil::cpu::LIL_ISA
