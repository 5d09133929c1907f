// The stop rule for one sequence, the same code on every backend.
#pragma once

#include "host_device.h"
#include "params.h"

namespace lil {

LIL_HOST_DEVICE inline void guardian_check_one(const GuardianCheckParams& p, int64_t b) {
  const int32_t tokens = p.num_tokens[b], interval = p.interval[b];
  // An interval below 1 turns the rule off for this sequence.
  if (p.stop[b] != kRunning || interval < 1 || tokens - p.checkpoint[2 * b] < interval) return;
  const int32_t gain = p.sizes[b] - p.checkpoint[2 * b + 1];
  p.gain[b] = gain;
  p.checkpoint[2 * b] = tokens;
  p.checkpoint[2 * b + 1] = p.sizes[b];
  if (static_cast<float>(gain) < p.threshold[b]) p.stop[b] = kStopGuardian;
}

}  // namespace lil
