"""Memory: a policy that is bounded stays so however long the output is, and a sequence that is over leaves nothing."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import BASE, LogitsLog, prompts, taking

import lil_ops
from lil_ops import policies
from lil_ops.decode import DecodeLoop
from lil_ops.guardian import Guardian
from lil_ops.integrations.transformers import LilCache

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = int(os.environ.get("LIL_LONG_DECODE", 2000))
LAYERS, PAGE = 2, 16
PAGE_BYTES = 2 * BASE["num_key_value_heads"] * PAGE * BASE["head_dim"] * 4  # K and V of one layer
BOUNDED = [name for name, policy in policies.POLICIES.items() if policy.memory == "bounded"]
STATM = Path("/proc/self/statm")
MARGIN = 1 << 20  # what the allocator and the interpreter move by


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
        most, sizes = LAYERS * -(-held // PAGE) * PAGE_BYTES, []
        assert held <= 2 * budget
        for event in loop:
            assert event.kv_bytes <= most
            # First when the budget is full.
            if event.step + 1 in (held + 100, TOKENS):
                sizes.append(resident())
        assert kv.bytes_peak <= most and len(loop.result().tokens[0]) == TOKENS
    # LZ77's state is there from the start, and is first touched token by token: 64 bytes each.
    assert sizes[1] - sizes[0] < MARGIN + 64 * TOKENS, sizes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["sink", "h2o", "raas", "tova"])
def test_a_long_decode_takes_no_more_device_memory(name):
    """All that a step allocates is as large at the 3000th token as at the 1000th."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**BASE, "num_hidden_layers": LAYERS, "max_position_embeddings": 4096})
    model, peaks = hf.LlamaForCausalLM(config).eval().cuda(), {}
    options = {"max_new_tokens": 3000, "eos_token_id": (), "guardian": Guardian(250, 0)}
    with DecodeLoop(model, prompts(40), policy=name, budget=512, **options) as loop:
        for event in loop:
            if event.step + 1 in (900, 2900):  # a hundred steps each
                torch.cuda.reset_peak_memory_stats()
            if event.step + 1 in (1000, 3000):
                peaks[event.step + 1] = torch.cuda.max_memory_allocated()
    assert peaks[1000] == peaks[3000], peaks


POLICIES = [("full", {}), *((name, {"budget": 64}) for name in policies.POLICIES if name != "full")]
# What a case of few layers and short sequences needs.
SMALL = {
    "quest": {"dense_layers": 0},
    "lessismore": {"dense_layers": 0},
    "snapkv": {"recent": 8},
    "rkv": {"buffer": 16},
}


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
    served, sizes = Served(model, name, options, batch=2), {}
    lengths = torch.randint(2, 40, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, length in enumerate(lengths):
        # Some are long enough that something goes.
        served.run(i % 2, prompts(length, seed=i)[0], 50 if i % 100 == 0 else 2)
        if i in (200, 999):
            sizes[i] = resident()
    kv = served.cache.kv
    assert kv.bytes_in_use == 0
    for layer in range(LAYERS):
        pool = kv.pool_of(layer)
        assert sorted(pool.free) == list(range(pool.num_pages)) and (pool.page_table == -1).all()
    assert sizes[999] - sizes[200] < MARGIN, sizes
    # A row that many have used gives what a fresh one does, also where something goes.
    prompt = prompts(40, seed=7)[0]
    fresh = Served(model, name, options, batch=1).run(0, prompt, 60)
    assert all(torch.equal(served.run(row, prompt, 60), fresh) for row in (1, 0))


@pytest.mark.parametrize(("name", "options"), POLICIES)
def test_a_row_begins_anew_beside_one_that_goes_on(model, name, options):
    """A row is freed and used again between the steps of another, which notices nothing."""
    first, second = prompts(30, 36, seed=9)
    alone = Served(model, name, options, batch=1).run(0, first, 60)
    served = Served(model, name, options, batch=2)
    assert torch.equal(interleaved(served, first, second, 60), alone)


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


class Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "chunks", "fast", "maps", "mapped", "_", "fast_free")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("used", "free", "top")]


def heap_in_use():
    malloc = ctypes.CDLL(None).mallinfo2
    malloc.restype = Heap
    return malloc().used


def calls():
    k, v, summary = torch.zeros(4, 2, 16, 64), torch.zeros(4, 2, 16, 64), torch.zeros(4, 2, 2, 64)
    new, q, lens = torch.randn(1, 2, 64), torch.randn(1, 4, 64), torch.tensor([40], dtype=torch.int32)
    table, one = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0, 1], dtype=torch.int32)
    scores, held, priority = torch.zeros(1, 2, 4), torch.full((1, 2, 64), -1, dtype=torch.int32), torch.zeros(1, 2, 64)
    pages, counts = torch.arange(4, dtype=torch.int32).repeat(1, 2, 1), torch.full((1, 2), 3, dtype=torch.int32)
    mean, weight, linear = torch.zeros(4, 2, 1, 64), torch.zeros(1, 2, 64), torch.ones(16, 16)
    mass, lse, places = torch.empty(1, 4, 64), torch.zeros(1, 4), torch.arange(40, dtype=torch.int32).repeat(1, 2, 1)
    return {
        "append_kv": lambda: lil_ops.append_kv(k, v, summary, new, new, table, lens, one, summary_mode="meanstd"),
        "score_pages": lambda: lil_ops.score_pages(q, summary, table, lens, 16, scale=0.1),
        "select_pages": lambda: lil_ops.select_pages(scores, lens, 16, 32, protected_lens=lens),
        "sparse_decode": lambda: lil_ops.sparse_decode(q, k, v, table, lens, pages, counts, scale=0.1, token_mass=mass),
        "information_loss": lambda: lil_ops.information_loss(lse, scores, lens, 16, pages, counts),
        "sparse_decode_step": lambda: lil_ops.sparse_decode_step(q, new, new, k, v, summary, table, lens, 32, loss=lse),
        "evict_pages": lambda: lil_ops.evict_pages(held, priority, lens, 1, protected_lens=lens),
        "fold_mass": lambda: lil_ops.fold_mass(priority, mass, held, lens, 1, rule="stamp"),
        "represent_page": lambda: lil_ops.represent_page(
            mean, weight, k, table, lens, mass, pages, counts, recent=9, representatives=4
        ),
        "compact_kv": lambda: lil_ops.compact_kv(k, v, table, places, lens),
        "decode_linear": lambda: lil_ops.decode_linear(linear[:8], linear, norm=linear[0], residual=linear[:8]),
        "key_redundancy": lambda: lil_ops.key_redundancy(k, table, lens),
    }


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
@pytest.mark.parametrize("operator", calls())
def test_a_call_leaves_nothing_behind(operator):
    """torch's own conversion of a str argument leaks one at each call (csrc/api/name.h)."""
    call, count = calls()[operator], 2000
    for _ in range(count):
        call()
    before = heap_in_use()
    for _ in range(count):
        call()
    assert heap_in_use() - before < 8 * count
