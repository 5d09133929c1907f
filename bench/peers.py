#!/usr/bin/env python3
"""The CUDA operators beside their peers, on one GPU: bench/peers.py [--quick] [--cases A:1:32768,...] [--out FILE]

Each figure is the median of CUDA-graph replays over enough distinct layers that L2 cannot help. Ours, of which some
differ by little, take turns, and the median of the turns counts. Peers that are not installed, or cannot do a case, are
left out. Writes JSON with device, versions, commit and every figure after each case, and prints them.

Peers: FlashInfer (dense paged decode; sparse as one request a KV head; its top-k), torch.compile'd scoring,
torch.topk, gather + scaled_dot_product_attention, FlexAttention. The best of each kind makes the pipeline that a user
can assemble; what it needs in between (physical page ids, plans, block masks) is made outside the graph and not
counted, and neither is its append. A peer that takes longer than PEER_LIMIT_S is left out from then on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from facts import add_commit, facts  # noqa: E402
from report import report  # noqa: E402
from timers import layer_us, read_bandwidth  # noqa: E402

import lil_ops  # noqa: E402

try:
    import flashinfer
except (ImportError, OSError) as error:
    flashinfer = None
    print(f"without FlashInfer: {error}", file=sys.stderr)

PAGE_SIZE, BUDGET, HEAD_DIM = 16, 1024, 128
SHAPES = {"A": (32, 8), "B": (12, 2)}  # query heads, KV heads
CASES = [
    ("A", 1, 8192),
    ("A", 1, 32768),
    ("A", 1, 131072),
    ("A", 8, 32768),
    ("A", 32, 32768),
    ("B", 1, 32768),
    ("B", 32, 32768),
]
FLEX_CASES = [("A", 1, 32768), ("A", 8, 32768)]
SHORT = [("A", 1, 1024), ("A", 1, 2048), ("A", 1, 4096), ("A", 8, 2048), ("A", 8, 4096)]
FP8_SCALE = 1 / 32  # normal keys and values stay well inside float8's range
COLD_BYTES = 150 << 20  # three times the L2 of an H100: what a round of layers must touch
RESULT = ROOT / "bench" / "results" / "cuda.json"
PEER_LIMIT_S = 300  # some compile kernels of their own at first
TURNS = 3


@dataclass
class Layer:
    """One layer's tensors; the batch's sequences are `context` tokens long, their pages in random order."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    summary: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor
    pages: torch.Tensor
    counts: torch.Tensor


class Case:
    def __init__(self, shape: str, batch: int, context: int):
        self.shape, self.batch, self.context = shape, batch, context
        self.q_heads, self.kv_heads = SHAPES[shape]
        self.group, self.num_pages = self.q_heads // self.kv_heads, context // PAGE_SIZE
        token = self.kv_heads * HEAD_DIM * 2 * 2  # K and V of one token
        self.attend_bytes, self.score_bytes = batch * min(context, BUDGET) * token, batch * self.num_pages * token
        self.dense_bytes = batch * context * token
        free = torch.cuda.mem_get_info()[0] * 0.8
        self.num_layers = int(
            max(
                2, min(COLD_BYTES // min(self.attend_bytes, self.score_bytes) + 1, free // (1.2 * self.dense_bytes), 64)
            )
        )
        torch.manual_seed(0)
        self.page_table = torch.randperm(batch * self.num_pages, device="cuda").int().view(batch, self.num_pages)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.layers = [self._layer() for _ in range(self.num_layers)]

    def _layer(self) -> Layer:
        def bf16(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()

        cache = (self.batch * self.num_pages, self.kv_heads, PAGE_SIZE, HEAD_DIM)
        k_cache, v_cache, q = bf16(*cache), bf16(*cache), bf16(self.batch, self.q_heads, HEAD_DIM)
        summary = torch.stack([k_cache.amin(2), k_cache.amax(2)], 2)
        scores = lil_ops.score_pages(q, summary, self.page_table, self.seq_lens, PAGE_SIZE)
        pages, counts = lil_ops.select_pages(scores, self.seq_lens, PAGE_SIZE, BUDGET)
        k, v = (bf16(self.batch, self.kv_heads, HEAD_DIM) for _ in range(2))
        return Layer(q, k_cache, v_cache, summary, k, v, scores, pages, counts)


Step = Callable[[Layer], object]
Rows = Iterator[tuple[str, Step]]


def takes(operator: str, argument: str) -> bool:
    return argument in inspect.signature(getattr(lil_ops, operator)).parameters


def ours(c: Case) -> Rows:
    def append(x: Layer):
        lil_ops.append_kv(x.k_cache, x.v_cache, x.summary, x.k, x.v, c.page_table, c.seq_lens)

    def score(x: Layer):
        return lil_ops.score_pages(x.q, x.summary, c.page_table, c.seq_lens, PAGE_SIZE)

    def attend(x: Layer, pages=None, counts=None, **options):
        return lil_ops.sparse_decode(x.q, x.k_cache, x.v_cache, c.page_table, c.seq_lens, pages, counts, **options)

    def ops(x: Layer):
        append(x)
        attend(x, *lil_ops.select_pages(score(x), c.seq_lens, PAGE_SIZE, BUDGET))

    def step(x: Layer, **options):
        return lil_ops.sparse_decode_step(
            x.q, x.k, x.v, x.k_cache, x.v_cache, x.summary, c.page_table, c.seq_lens, BUDGET, **options
        )

    yield "lil append", append
    yield "lil score", score
    yield "lil select", lambda x: lil_ops.select_pages(x.scores, c.seq_lens, PAGE_SIZE, BUDGET)
    yield "lil attend 1024", lambda x: attend(x, x.pages, x.counts)
    if c.context > 2 * BUDGET:
        wide = [lil_ops.select_pages(x.scores, c.seq_lens, PAGE_SIZE, 2 * BUDGET) for x in c.layers]
        chosen = {id(x): pages for x, pages in zip(c.layers, wide, strict=True)}
        yield "lil attend 2048", lambda x: attend(x, *chosen[id(x)])
    yield "lil dense", attend
    yield "lil step, four operators", ops
    yield "lil step", step
    if takes("sparse_decode_step", "loss"):
        losses = {id(x): torch.empty(c.batch, c.q_heads, device="cuda") for x in c.layers}
        yield "lil step with loss", lambda x: step(x, loss=losses[id(x)])
        # Rounding does not matter to the time.
        narrow = {id(x): replace(x, summary=x.summary.to(torch.float8_e4m3fn)) for x in c.layers}
        yield "lil score, float8 summaries", lambda x: score(narrow[id(x)])
        yield "lil step, float8 summaries", lambda x: step(narrow[id(x)])
        yield "lil step with loss, float8 summaries", lambda x: step(narrow[id(x)], loss=losses[id(x)])
    if takes("sparse_decode", "k_scale"):
        scale = torch.full((c.kv_heads,), FP8_SCALE, device="cuda")
        scales = {"k_scale": scale, "v_scale": scale}
        stored = {id(x): _float8(x) for x in c.layers}
        x = c.layers[0]
        got, want = (attend(y, x.pages, x.counts, **o)[0] for y, o in ((stored[id(x)], scales), (x, {})))
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.03)
        yield "lil attend 1024, fp8", lambda x: attend(stored[id(x)], x.pages, x.counts, **scales)
        yield "lil dense, fp8", lambda x: attend(stored[id(x)], **scales)
        yield "lil step, fp8", lambda x: step(stored[id(x)], **scales)


def _float8(x: Layer) -> Layer:
    """The layer with cache and summary as float8: half as much memory again while they are in use."""
    names = ("k_cache", "v_cache", "summary")
    return replace(x, **{name: (getattr(x, name) / FP8_SCALE).to(torch.float8_e4m3fn) for name in names})


# One graph a case: shapes known to the compiler make the fastest kernel, and seven small compilations are cheap.
# Without graph breaks, so that a recompile limit fails instead of timing eager code.
@torch.compile(dynamic=False, fullgraph=True)
def compiled_score(q: torch.Tensor, summary: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    pages = summary[page_table.long()]  # [batch, pages, kv_heads, 2, head_dim]
    q = q.view(q.shape[0], 1, summary.shape[1], -1, HEAD_DIM)
    low, high = pages[:, :, :, 0, None], pages[:, :, :, 1, None]
    return torch.maximum(q * low, q * high).float().sum(-1).amax(-1).transpose(1, 2) * HEAD_DIM**-0.5


def torch_score(c: Case) -> Rows:
    x, start = c.layers[0], time.perf_counter()
    scores = compiled_score(x.q, x.summary, c.page_table)
    want = lil_ops.score_pages(x.q, x.summary, c.page_table, c.seq_lens, PAGE_SIZE)
    torch.testing.assert_close(scores, want, rtol=0.05, atol=0.1)
    print(f"    scoring compiled in {time.perf_counter() - start:.1f} s", flush=True)
    yield "torch.compile score", lambda x: compiled_score(x.q, x.summary, c.page_table)


def torch_top_k(c: Case) -> Rows:
    yield "torch.topk + sort", lambda x: x.scores.topk(BUDGET // PAGE_SIZE, sorted=False).indices.sort()


def torch_gather(c: Case) -> Rows:
    heads, batch = (torch.arange(n, device="cuda") for n in (c.kv_heads, c.batch))

    def gather(x: Layer):
        physical = c.page_table[batch[:, None, None], x.pages.long()].long()
        k, v = (cache[physical, heads[None, :, None]].flatten(2, 3) for cache in (x.k_cache, x.v_cache))
        return F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=True)

    yield "gather + SDPA 1024", gather


def flex(c: Case) -> Rows:
    """FlexAttention over a contiguous copy of each sequence's keys and values, its KV blocks the pages.

    Its decoding kernel packs a group of queries only where all KV heads of a sequence share one block mask, so a KV
    head is a sequence here. Groups must be powers of two: not shape B. The pages are listed as partial blocks under a
    mask that is always true, since the kernel splits full blocks by their place in the whole sequence.
    """
    attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    lists = (c.batch * c.kv_heads, 1, 1)

    def prepare(x: Layer) -> tuple[torch.Tensor, torch.Tensor, BlockMask]:
        k, v = (
            cache[c.page_table.long()].transpose(1, 2).reshape(-1, 1, c.context, HEAD_DIM)
            for cache in (x.k_cache, x.v_cache)
        )
        pages = F.pad(x.pages.view(*lists, -1), (0, c.num_pages - x.pages.shape[2]))
        size = {"BLOCK_SIZE": (128, PAGE_SIZE), "seq_lengths": (1, c.context)}
        return k, v, BlockMask.from_kv_blocks(x.counts.view(lists), pages, **size)

    prepared = {id(x): prepare(x) for x in c.layers}

    def attend(x: Layer):
        k, v, mask = prepared[id(x)]
        return attention(x.q.view(-1, c.group, 1, HEAD_DIM), k, v, block_mask=mask, enable_gqa=True)

    _check_attention(c, attend(c.layers[0]), sparse=True)
    yield "FlexAttention 1024", attend


def flashinfer_wrapper(requests: int, indices: torch.Tensor, q_heads: int, kv_heads: int, tensor_cores: bool):
    """Planned once, outside the graph, which is the best its users can do with fixed lengths."""
    indptr = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * (len(indices) // requests)
    last = torch.full((requests,), PAGE_SIZE, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(indptr, indices, last, q_heads, kv_heads, HEAD_DIM, PAGE_SIZE, **options)
    return wrapper


def flashinfer_dense(c: Case, tensor_cores: bool) -> Rows:
    wrapper = flashinfer_wrapper(c.batch, c.page_table.flatten(), c.q_heads, c.kv_heads, tensor_cores)

    def attend(x: Layer):
        return wrapper.run(x.q, (x.k_cache, x.v_cache))

    _check_attention(c, attend(c.layers[0]), sparse=False)
    yield f"FlashInfer dense{', tensor cores' if tensor_cores else ''}", attend


def flashinfer_sparse(c: Case, tensor_cores: bool) -> Rows:
    """A request a KV head: page (physical, head) of a cache with one head. The pages of the first layer for all."""
    chosen = c.page_table[torch.arange(c.batch, device="cuda")[:, None, None], c.layers[0].pages.long()]
    indices = chosen * c.kv_heads + torch.arange(c.kv_heads, device="cuda", dtype=torch.int32)[:, None]
    wrapper = flashinfer_wrapper(c.batch * c.kv_heads, indices.flatten(), c.group, 1, tensor_cores)

    def attend(x: Layer):
        caches = (cache.view(-1, 1, PAGE_SIZE, HEAD_DIM) for cache in (x.k_cache, x.v_cache))
        return wrapper.run(x.q.view(-1, c.group, HEAD_DIM), tuple(caches))

    _check_attention(c, attend(c.layers[0]), sparse=True)
    yield f"FlashInfer sparse 1024{', tensor cores' if tensor_cores else ''}", attend


def flashinfer_top_k(c: Case) -> Rows:
    yield "FlashInfer top-k", lambda x: flashinfer.top_k(x.scores.view(-1, c.num_pages), BUDGET // PAGE_SIZE)


def peers(c: Case) -> list[Rows]:
    """Short contexts are there to compare dense with sparse: they need no other peer."""
    rows = [flashinfer_dense(c, tensor_cores) for tensor_cores in (False, True)] if flashinfer else []
    if c.context <= max(context for _, _, context in SHORT):
        return rows
    rows += [torch_score(c), torch_top_k(c), torch_gather(c)]
    if flashinfer:
        rows += [*(flashinfer_sparse(c, tensor_cores) for tensor_cores in (False, True)), flashinfer_top_k(c)]
    return rows + ([flex(c)] if (c.shape, c.batch, c.context) in FLEX_CASES else [])


def _check_attention(c: Case, out: torch.Tensor, sparse: bool) -> None:
    x = c.layers[0]
    pages = (x.pages, x.counts) if sparse else ()
    want = lil_ops.sparse_decode(x.q, x.k_cache, x.v_cache, c.page_table, c.seq_lens, *pages)[0]
    torch.testing.assert_close(out.reshape(want.shape), want, rtol=0.05, atol=0.02)


def captured(c: Case, step: Step) -> torch.cuda.CUDAGraph:
    """A step over all layers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in c.layers[:2]:
            step(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for x in c.layers:
            step(x)
    return graph


def times_in_turns(c: Case, rows: list[tuple[str, Step]]) -> dict[str, float]:
    """Microseconds of a layer, of each variant. Their steps keep the tensors that the graphs use."""
    graphs = [captured(c, step) for _, step in rows]
    turns = [[layer_us(graph, c.num_layers) for graph in graphs] for _ in range(TURNS)]
    return {name: statistics.median(us) for (name, _), us in zip(rows, zip(*turns, strict=True), strict=True)}


def best_peer(times: dict[str, float], kind: str) -> float | None:
    return min((us for name, us in times.items() if kind in name and not name.startswith("lil ")), default=None)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError where what is inside takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(name: tuple[str, int, int], with_peers: bool, bandwidth: float, too_slow: set[str]) -> dict:
    """too_slow: peers that are not asked; one that turns out to be is added."""
    c = Case(*name)
    limits = {"attend 1024": c.attend_bytes, "score": c.score_bytes, "dense": c.dense_bytes}
    limit = {key: round(value / bandwidth * 1e6, 2) for key, value in limits.items()}
    print(f"{c.shape} batch {c.batch} context {c.context} ({c.num_layers} layers), limits {limit}", flush=True)
    times = {}

    def keep(variant: str, us: float) -> None:
        times[variant] = round(us, 2)
        print(f"    {variant:36} {us:9.2f} us", flush=True)

    for variant, us in times_in_turns(c, list(ours(c))).items():
        keep(variant, us)
    for rows in peers(c) if with_peers else []:
        if rows.__name__ in too_slow:
            continue
        try:
            with at_most(PEER_LIMIT_S):
                for variant, step in rows:
                    keep(variant, layer_us(captured(c, step), c.num_layers))
        except Exception as error:  # a peer may fail in any way
            if isinstance(error, TimeoutError):
                too_slow.add(rows.__name__)
            print(f"    {rows.__name__} left out: {error!r}"[:400], flush=True)
    case = {"shape": c.shape, "batch": c.batch, "context": c.context, "layers": c.num_layers, "us": times}
    pipeline = [best_peer(times, kind) for kind in ("score", "top", "1024")]
    if None not in pipeline:
        case["pipeline"] = round(sum(pipeline), 2)
    if (dense := best_peer(times, "dense")) is not None:
        case["dense_peer"] = dense
    return case | {"limit": limit}


def parse_cases(text: str) -> list[tuple[str, int, int]]:
    cases = [(shape, int(batch), int(context)) for shape, batch, context in (c.split(":") for c in text.split(","))]
    if any(shape not in SHAPES or context % PAGE_SIZE for shape, _, context in cases):
        raise ValueError(text)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the operators only, without peers")
    parser.add_argument("--cases", type=parse_cases, help="only these, SHAPE:BATCH:CONTEXT,...; kept only with --out")
    parser.add_argument("--out", type=Path, help=f"where the JSON goes; default {RESULT.relative_to(ROOT)}")
    add_commit(parser)
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.cases else RESULT)
    start = time.perf_counter()
    bandwidth = read_bandwidth()
    result = facts(commit=arguments.commit) | {"read_gb_s": round(bandwidth / 1e9), "cases": []}

    def keep() -> None:
        torch.cuda.empty_cache()
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"    {time.perf_counter() - start:.0f} s so far", flush=True)

    too_slow: set[str] = set()
    for name in arguments.cases or CASES + SHORT:
        result["cases"].append(measure(name, not arguments.quick, bandwidth, too_slow))
        keep()
    if out == RESULT:
        report()


if __name__ == "__main__":
    main()
