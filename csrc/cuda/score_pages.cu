#include "cuda/backend.h"
#include "cuda/score_pages.cuh"
#include "cuda/score_pages_launch.h"
#include "cuda/score_representatives.cuh"

namespace lil::cuda {
namespace {

template <auto Kernel>
void start(const ScorePagesParams& p, const AppendKvParams& append, size_t shared, const Launch& launch) {
  const ScoreGrid grid(p, append.k != nullptr);
  allow_shared<Kernel>(shared);
  launch(Kernel, grid.blocks, kScoreThreads, shared, 1, p, append, grid.tiles_per_warp, error_word());
}

void score_representatives(const ScorePagesParams& p, const Tensor& on) {
  const Launch launch(on);
  const ScoreGrid grid(p, false, kRepresentativeTile);
  const size_t shared = p.summary.vectors * p.head_dim * sizeof(float);  // 16 KB at most
  with_dtype(p.summary.dtype, [&]<class T>(const T*) {
    launch(score_pages_representative<T>, grid.blocks, kScoreThreads, shared, 1, p, grid.tiles_per_warp, error_word());
  });
}

}  // namespace

void append_and_score(const AppendKvParams& append, const ScorePagesParams& p, const Tensor& on) {
  const Launch launch(on);
  const int64_t blocks = (p.group + kScoreHeads - 1) / kScoreHeads;
  const bool mma =
      p.q_dtype != DType::kFloat32 && (p.q_dtype == p.summary.dtype || p.summary.dtype == DType::kFloat8E4M3);
  with_dtype(p.summary.dtype, [&]<class T>(const T*) {
    if constexpr (!std::is_same_v<T, float>) {
      bool started = false;
      with_head_dim(p.head_dim, [&]<class D>(D) {
        const size_t shared = ScoreQueries<T, D::value>::bytes(blocks);
        if (!mma || shared > current_device().max_shared) return;
        start<score_pages_mma<T, D::value>>(p, append, shared, launch);
        started = true;
      });
      if (started) return;
    }
    start<score_pages_fma<T>>(p, append, kScoreHeads * 2 * p.head_dim * sizeof(float), launch);
  });
}

void score_pages(const ScorePagesParams& p, const Tensor& on) {
  if (p.pages.max_pages == 0) return;
  p.summary.mode == SummaryMode::kRepresentative ? score_representatives(p, on) : append_and_score({}, p, on);
}

}  // namespace lil::cuda
