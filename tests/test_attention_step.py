"""torch.compile of attention steps with optional mutated outputs, in both forms: the operators, and the one operator.

Unlike test_step.py this needs no operator that is the CPU's alone, so it runs on CUDA too, also as CUDA graphs.
"""

import pytest
import torch
from cases import FLOAT8, assert_same, paged

import lil_ops

OPERATORS = ["append_kv", "score_pages", "select_pages", "sparse_decode", "information_loss", "sparse_decode_step"]
BATCH, KV_HEADS, Q_HEADS, HEAD_DIM, PAGE_SIZE, BUDGET = 2, 2, 6, 64, 8, 48
LENGTHS, STEPS = [60, 50], 6


class Engine:
    """The static buffers of an engine that serves one layer. Every sequence has the pages that it will grow into."""

    def __init__(self, device, dtype, summary_dtype=None):
        lengths = [n + STEPS for n in LENGTHS]
        scales = "page" if dtype == FLOAT8 else None
        cache = paged(device, lengths, page_size=PAGE_SIZE, kv_heads=KV_HEADS, dtype=dtype, scales=scales,
                      summary_mode="meanstd", summary_dtype=summary_dtype)  # fmt: skip
        self.k, self.v, self.summary, self.page_table = cache.k, cache.v, cache.summary, cache.page_table
        self.scales = cache.scales
        self.seq_lens = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        self.loss = torch.full((BATCH, Q_HEADS), torch.nan, device=device)
        self.page_mass = torch.full((BATCH, Q_HEADS, BUDGET // PAGE_SIZE), torch.nan, device=device)
        self.token_mass = torch.full((BATCH, Q_HEADS, BUDGET), torch.nan, device=device)
        self.heat = torch.zeros(BATCH, Q_HEADS, device=device)

    def buffers(self):
        scales = [scale for scale in self.scales.values() if scale is not None]
        written = self.k, self.v, self.summary, self.seq_lens, self.loss, self.page_mass, self.token_mass, self.heat
        return [*written, self.page_table, *scales]


def separate(e, qkv):
    """What a policy that keeps attention mass does: the operators, and a tensor that it computes from the mass."""
    q, k, v = qkv.view(BATCH, -1, HEAD_DIM).split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
    e.seq_lens += 1
    tables = e.page_table, e.seq_lens
    lil_ops.append_kv(e.k, e.v, e.summary, k, v, *tables, summary_mode="meanstd", **e.scales)
    scores = lil_ops.score_pages(q, e.summary, *tables, PAGE_SIZE, summary_mode="meanstd", k_scale=e.scales["k_scale"])
    pages, counts = lil_ops.select_pages(scores, e.seq_lens, PAGE_SIZE, BUDGET, sink=4)
    out, lse = lil_ops.sparse_decode(
        q, e.k, e.v, *tables, pages, counts, page_mass=e.page_mass, token_mass=e.token_mass, **e.scales
    )
    e.heat += e.page_mass[..., 0]
    loss = lil_ops.information_loss(lse, scores, e.seq_lens, PAGE_SIZE, pages, counts)
    return out, lse + loss, loss


def fused(e, qkv):
    q, k, v = qkv.view(BATCH, -1, HEAD_DIM).split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
    e.seq_lens += 1
    out, lse = lil_ops.sparse_decode_step(
        q, k, v, e.k, e.v, e.summary, e.page_table, e.seq_lens, BUDGET, sink=4, summary_mode="meanstd", loss=e.loss,
        **e.scales,
    )  # fmt: skip
    e.heat += e.loss
    return out, lse + e.loss, e.loss.clone()


def inputs(device, dtype):
    g = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        yield torch.randn(BATCH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=g).to(device, dtype)


@pytest.fixture
def compile_step():
    torch._dynamo.reset()
    yield lambda step, **options: torch.compile(step, fullgraph=True, **options)
    torch._dynamo.reset()


def check(step, compiled_step, device, dtype, summary_dtype=None):
    """Compiled equals eager, in place, and compiles once."""
    eager, compiled = (Engine(device, dtype, summary_dtype) for _ in range(2))
    places = [buffer.data_ptr() for buffer in compiled.buffers()]
    for buffer in compiled.buffers():
        torch._dynamo.mark_static_address(buffer)
    for index, qkv in enumerate(inputs(device, torch.bfloat16 if dtype == FLOAT8 else dtype)):
        want = step(eager, qkv)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = compiled_step(compiled, qkv)
        for a, b in zip((*got, *compiled.buffers()), (*want, *eager.buffers()), strict=True):
            assert_same(a, b)
    assert places == [buffer.data_ptr() for buffer in compiled.buffers()]
    assert eager.heat.isfinite().all() and (eager.heat > 0).all()
    return eager


DTYPES_OF_CACHE_AND_SUMMARY = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, FLOAT8), (FLOAT8, None)]


@pytest.mark.parametrize(("dtype", "summary_dtype"), DTYPES_OF_CACHE_AND_SUMMARY)
@pytest.mark.parametrize("step", [separate, fused])
def test_compiled_equals_eager(device, dtype, summary_dtype, step, compile_step):
    e = check(step, compile_step(step), device, dtype, summary_dtype)
    if step is separate:
        torch.testing.assert_close(e.page_mass.sum(-1), torch.ones_like(e.heat))


@pytest.mark.parametrize(("dtype", "summary_dtype"), DTYPES_OF_CACHE_AND_SUMMARY[1:])
@pytest.mark.parametrize("step", [separate, fused])
def test_compiled_as_a_cuda_graph_equals_eager(device, dtype, summary_dtype, step, compile_step):
    if device == "cpu":
        pytest.skip("CUDA graphs")
    check(step, compile_step(step, mode="reduce-overhead"), device, dtype, summary_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_both_forms_agree(device, dtype):
    apart, together = Engine(device, dtype), Engine(device, dtype)
    for qkv in inputs(device, torch.float32):
        want, got = separate(apart, qkv), fused(together, qkv)
        for a, b in zip(got, want, strict=True):
            # The loss may differ in the last bits on CUDA.
            torch.testing.assert_close(a, b, rtol=1e-5 if device == "cuda" else 0, atol=0)
