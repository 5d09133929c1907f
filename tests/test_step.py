"""torch.compile of a whole decode step that uses every operator: eager's results, in place, compiled once."""

import math
import re
from dataclasses import dataclass, fields

import pytest
import torch
from cases import DTYPES, paged
from torch._inductor.utils import run_and_get_code

import lil_ops
from lil_ops.guardian import Guardian
from lil_ops.stopping import StopReason

OPERATORS = ["append_kv", "score_pages", "select_pages", "sparse_decode", "lz77_append", "guardian_check"]
BATCH, KV_HEADS, Q_HEADS, HEAD_DIM, PAGE_SIZE, BUDGET, VOCAB = 3, 2, 6, 64, 8, 48, 11
# Tokens before the first step. Within STEPS two sequences enter new pages, and the Guardian ends one.
LENGTHS = [60, 5, 33]
STEPS = 6
RUNNING = int(StopReason.RUNNING)  # dynamo does not trace the comparison of a tensor with an IntEnum


@dataclass
class Engine:
    """The static buffers of an engine that serves one layer."""

    k: torch.Tensor
    v: torch.Tensor
    summary: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    parse: torch.Tensor
    num_tokens: torch.Tensor
    interval: torch.Tensor
    threshold: torch.Tensor
    checkpoint: torch.Tensor
    gain: torch.Tensor
    stop: torch.Tensor


def engine(device, dtype, lengths=LENGTHS):
    """Every sequence has the pages that it will grow into."""
    cache = paged(device, [length + STEPS for length in lengths], page_size=PAGE_SIZE, kv_heads=KV_HEADS, dtype=dtype)
    watch = Guardian(interval=4, threshold=3).start(BATCH, device)
    return Engine(
        cache.k, cache.v, cache.summary, cache.page_table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        parse=lil_ops.lz77_state(BATCH, STEPS, device),
        num_tokens=torch.zeros(BATCH, dtype=torch.int32, device=device),
        interval=watch.interval,
        threshold=watch.threshold,
        checkpoint=watch.checkpoint,
        gain=watch.gain,
        stop=torch.zeros(BATCH, dtype=torch.int32, device=device),
    )  # fmt: skip


def decode_step(e, page_table, qkv, bias, tokens):
    """One token a sequence: write, choose, read; then look at what was generated."""
    heads = (qkv + bias).view(-1, Q_HEADS + 2 * KV_HEADS, HEAD_DIM)
    q, k, v = heads.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
    e.seq_lens += 1
    lil_ops.append_kv(e.k, e.v, e.summary, k, v, page_table, e.seq_lens)
    scores = lil_ops.score_pages(q, e.summary, page_table, e.seq_lens, PAGE_SIZE)
    pages, counts = lil_ops.select_pages(scores, e.seq_lens, PAGE_SIZE, BUDGET, sink=4, recent=8)
    out, lse = lil_ops.sparse_decode(q, e.k, e.v, page_table, e.seq_lens, pages, counts)
    running = (e.stop == RUNNING).int()
    # Not `+= running`: Inductor (2.13) may compute that after guardian_check, from the codes that it wrote.
    e.num_tokens += 1
    phrases, bits = lil_ops.lz77_append(e.parse, tokens, running, VOCAB)
    lil_ops.guardian_check(phrases, e.num_tokens, e.interval, e.threshold, e.checkpoint, e.gain, e.stop)
    return out, lse, scores, pages, counts, phrases, bits


def inputs(device, dtype):
    """``(qkv, bias, tokens)`` of each step; the first sequence repeats itself."""
    g = torch.Generator().manual_seed(4)
    shape = (BATCH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM)
    for step in range(STEPS):
        qkv, bias = torch.randn(shape, generator=g).to(device, dtype), torch.randn(shape[1], generator=g)
        yield qkv, bias.to(device, dtype), torch.tensor([[1], [step], [step % 4]], device=device)


def check_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def buffers(e):
    return [getattr(e, field.name) for field in fields(e)]


@pytest.fixture
def compiled_step():
    torch._dynamo.reset()
    yield lambda **options: torch.compile(decode_step, fullgraph=True, **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager_while_lengths_grow(device, dtype, compiled_step):
    eager, compiled = engine(device, dtype), engine(device, dtype)
    step, places = compiled_step(), [buffer.data_ptr() for buffer in buffers(compiled)]
    for index, arguments in enumerate(inputs(device, dtype)):
        want = decode_step(eager, eager.page_table, *arguments)
        # Whatever differs from one step to the next must be data: only the first may compile.
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            check_same(step(compiled, compiled.page_table, *arguments), want)
        check_same(buffers(compiled), buffers(eager))
    assert places == [buffer.data_ptr() for buffer in buffers(compiled)]
    assert eager.seq_lens.tolist() == [length + STEPS for length in LENGTHS]
    assert eager.stop.tolist() == [StopReason.GUARDIAN, StopReason.RUNNING, StopReason.RUNNING]


def test_a_page_table_that_widens_compiles_once(device, compiled_step):
    eager, compiled = (engine(device, torch.float32, lengths=[18, 5, 3]) for _ in range(2))
    step = compiled_step(dynamic=True)
    for index, arguments in enumerate(inputs(device, torch.float32)):
        # From fewer pages than the budget's six to more.
        table = torch.nn.functional.pad(eager.page_table, (0, index), value=-1)
        want = decode_step(eager, table, *arguments)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            check_same(step(compiled, table, *arguments), want)
    check_same(buffers(compiled), buffers(eager))


def test_the_compiled_step_copies_no_buffer(device, compiled_step):
    e = engine(device, torch.float32)
    _, (code,) = run_and_get_code(compiled_step(), e, e.page_table, *next(inputs(device, torch.float32)))
    allocated = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    elements = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in allocated]
    # The largest buffer it may need holds this step's queries (and keys and values, where Inductor has one thread).
    assert 0 < max(elements) <= BATCH * (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM < min(e.k.numel(), e.summary.numel())
