"""Memory: a policy that is bounded stays so however long the output is, and a sequence that is over leaves nothing."""

import gc
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import BASE, LogitsLog, prompts, taking

from lil_ops import policies
from lil_ops.decode import DecodeLoop
from lil_ops.guardian import Guardian
from lil_ops.integrations.transformers import LilCache

TOKENS = int(os.environ.get("LIL_LONG_DECODE", 2000))
LAYERS, PAGE = 2, 16
PAGE_BYTES = 2 * BASE["num_key_value_heads"] * PAGE * BASE["head_dim"] * 4  # K and V of one layer
BOUNDED = [name for name, policy in policies.POLICIES.items() if policy.memory == "bounded"]
STATM = Path("/proc/self/statm")
MARGIN = 2 << 20  # what the allocator and the interpreter move by


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many small operations, to which threads only bring waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**BASE, "num_hidden_layers": LAYERS})).eval()


def resident():
    """Bytes of the process in memory."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
@pytest.mark.parametrize("name", BOUNDED)
def test_a_long_decode_stays_within_the_budget(model, name):
    """LIL_LONG_DECODE=20000 for so many tokens."""
    budget = 512
    options = {"max_new_tokens": TOKENS, "eos_token_id": (), "guardian": Guardian(250, 0)}
    with DecodeLoop(model, prompts(40), policy=name, budget=budget, **options) as loop:
        kv = loop.cache.kv
        # What the layers say that they hold: the budget, or, where it is cut from time to time, a little more.
        held = max(room.total for room in kv.rooms)
        most, sizes = LAYERS * (-(-held // PAGE) + 1) * PAGE_BYTES, []
        assert held <= 2 * budget
        for event in loop:
            assert event.kv_bytes <= most
            if event.step % 100 == 99:
                sizes.append(resident())
        assert kv.bytes_peak <= most and len(loop.result().tokens[0]) == TOKENS
    # The budget is full after a third. LZ77's state is in place from the start, and is first touched token by token.
    touched = TOKENS * 64
    assert sizes[-1] - sizes[len(sizes) // 3] < MARGIN + touched, [size >> 10 for size in sizes]


POLICIES = [("full", {}), *((name, {"budget": 64}) for name in policies.POLICIES if name != "full")]
# What a case of few layers and short sequences needs.
SMALL = {"quest": {"dense_layers": 0}, "lessismore": {"dense_layers": 0}, "snapkv": {"recent": 8}}


class Served:
    """Sequences through one `LilCache`, as an engine would: a row, a prompt, some tokens, and the row is free again."""

    def __init__(self, model, name, options, batch):
        model.set_attn_implementation("lil")
        self._model = model
        self.cache = LilCache(model, name, batch=batch, max_tokens=128, **options, **SMALL.get(name, {}))
        self.cache.begin([40] * batch)

    @torch.inference_mode()
    def run(self, row, prompt, new_tokens):
        """The logits of each pass."""
        self.cache.rows = [row]
        with LogitsLog(self._model) as log:
            tokens, place = prompt, 0
            for _ in range(new_tokens):
                positions = torch.arange(place, place + len(tokens))[None]
                place += len(tokens)
                logits = self._model(tokens[None], position_ids=positions, **taking(self._model, self.cache)).logits
                tokens = logits[0, -1].argmax()[None]
        self.cache.kv.free(row)
        return torch.cat(log.logits)


@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
@pytest.mark.parametrize(("name", "options"), POLICIES)
def test_a_thousand_sequences_through_one_cache(model, name, options):
    served, sizes = Served(model, name, options, batch=2), []
    lengths = torch.randint(2, 40, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, length in enumerate(lengths):
        # Some are long enough that something goes.
        served.run(i % 2, prompts(length, seed=i)[0], 50 if i % 100 == 0 else 2)
        if i % 100 == 99:
            sizes.append(resident())
    kv = served.cache.kv
    assert kv.bytes_in_use == 0
    for layer in range(LAYERS):
        pool = kv.pool_of(layer)
        assert sorted(pool.free) == list(range(pool.num_pages)) and (pool.page_table == -1).all()
    assert sizes[-1] - sizes[2] < MARGIN, [size >> 10 for size in sizes]
    # A row that many have used gives what a fresh one does, also where something goes.
    prompt = prompts(40, seed=7)[0]
    fresh = Served(model, name, options, batch=1).run(0, prompt, 60)
    assert all(torch.equal(served.run(row, prompt, 60), fresh) for row in (1, 0))


@pytest.mark.parametrize(("name", "options"), POLICIES)
def test_a_row_begins_anew_beside_one_that_goes_on(model, name, options):
    """A row is freed and used again between the steps of another, which notices nothing."""
    first, second = (prompt for prompt in prompts(30, 36, seed=9))
    alone = Served(model, name, options, batch=1).run(0, first, 60)
    served = Served(model, name, options, batch=2)
    model.set_attn_implementation("lil")
    steps = interleaved(served, first, second, 60)
    assert torch.equal(steps, alone)


@torch.inference_mode()
def interleaved(served, first, second, new_tokens):
    """Logits of a sequence in row 0, between whose steps others run in row 1."""
    logits, tokens, place = [], first, 0
    for step in range(new_tokens):
        served.cache.rows = [0]
        positions = torch.arange(place, place + len(tokens))[None]
        place += len(tokens)
        cache = taking(served._model, served.cache)
        logits.append(served._model(tokens[None], position_ids=positions, **cache).logits[:, -1])
        tokens = logits[-1][0].argmax()[None]
        if step % 20 == 5:
            served.run(1, second, 40)
    return torch.cat(logits)
