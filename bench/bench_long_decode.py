"""Does a step take longer, or the process more memory, at the 20,000th token than at the 1,000th? For each policy that
holds no more than its budget, and for full.

The model is random and tiny, so that attention and policy are most of a step: there growth would show best.
"""

import os
import statistics
from pathlib import Path

import pytest
import torch
from recorded import recorded, report

from lil_ops import DecodeLoop, Guardian
from lil_ops.policies import POLICIES

transformers = pytest.importorskip("transformers")

TOKENS = int(os.environ.get("LIL_LONG_DECODE", 20_000))
EARLY, WINDOW, BUDGET = TOKENS // 20, TOKENS // 20, 512
PROMPT = [list(range(32))]
STATM = Path("/proc/self/statm")
NAMES = ["full", *(name for name, policy in POLICIES.items() if policy.memory == "bounded")]

pytestmark = pytest.mark.benchmark(timer=recorded)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * TOKENS, initializer_range=0.15,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", NAMES)
def test_long_decode(benchmark, model, name):
    torch.set_num_threads(1)  # so small a step gains nothing from a second one
    options = {} if name == "full" else {"policy": name, "budget": BUDGET}
    options |= {"guardian": Guardian(250, 0), "max_new_tokens": TOKENS, "eos_token_id": ()}
    with DecodeLoop(model, PROMPT, **options) as old, DecodeLoop(model, PROMPT, **options) as young:
        for loop, tokens in (old, EARLY + WINDOW), (young, EARLY):
            run(loop, tokens)
        early_mb = resident_mb()
        run(old, TOKENS - EARLY - 2 * WINDOW)
        # In turn, so that both meet the machine in the same state.
        for _ in range(WINDOW):
            old.step()
            young.step()
        late_mb = resident_mb()
    late, early = (loop.result().step_times[-WINDOW:] for loop in (old, young))
    assert len(old.result().tokens[0]) == TOKENS
    facts = {
        "early_us": round(statistics.median(early) * 1e6, 1),
        "late_us": round(statistics.median(late) * 1e6, 1),
        "early_mb": early_mb,
        "late_mb": late_mb,
        "cache_kb": round(old.cache.kv.bytes_peak / 1024),
    }
    case = f"long decode, {TOKENS} tokens, budget {BUDGET}, batch 1"
    seconds = [statistics.median(part) for part in (late[i::5] for i in range(5))]
    report(benchmark, case, name, seconds, table="long decode", tokens=TOKENS, budget=BUDGET, window=WINDOW, **facts)


def run(loop, tokens):
    if not loop.result().step_times:
        loop.prefill()
        tokens -= 1
    for _ in range(tokens):
        loop.step()


def resident_mb():
    if not STATM.exists():
        return None
    return round(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
