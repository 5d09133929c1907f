#!/usr/bin/env python3
"""The CUDA operators beside their peers, on one GPU: bench/peers.py [--quick] [--out FILE]

Each figure is the median of CUDA-graph replays over enough distinct layers that L2 cannot help. Peers that are not
installed are left out. Writes JSON with device, versions, commit and every figure; prints a table.

Peers: FlashInfer (dense paged decode; sparse as one request a KV head; its top-k), torch.compile'd scoring,
torch.topk, gather + scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import report  # noqa: E402

import lil_ops  # noqa: E402

try:
    import flashinfer
except ImportError as error:
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
SHORT = [("A", 1, 1024), ("A", 1, 2048), ("A", 1, 4096), ("A", 8, 2048), ("A", 8, 4096)]
COLD_BYTES = 150 << 20  # three times the L2 of an H100: what a round of layers must touch
REPEATS = 15
RESULT = ROOT / "bench" / "results" / "cuda.json"


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


def ours(c: Case) -> Iterator[tuple[str, Step]]:
    def append(x: Layer):
        lil_ops.append_kv(x.k_cache, x.v_cache, x.summary, x.k, x.v, c.page_table, c.seq_lens)

    def score(x: Layer):
        return lil_ops.score_pages(x.q, x.summary, c.page_table, c.seq_lens, PAGE_SIZE)

    def attend(x: Layer, pages=None, counts=None):
        return lil_ops.sparse_decode(x.q, x.k_cache, x.v_cache, c.page_table, c.seq_lens, pages, counts)

    def ops(x: Layer):
        append(x)
        attend(x, *lil_ops.select_pages(score(x), c.seq_lens, PAGE_SIZE, BUDGET))

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
    if hasattr(lil_ops, "sparse_decode_step"):
        yield (
            "lil step",
            lambda x: lil_ops.sparse_decode_step(
                x.q, x.k, x.v, x.k_cache, x.v_cache, x.summary, c.page_table, c.seq_lens, BUDGET
            ),
        )


def torch_peers(c: Case) -> Iterator[tuple[str, Step]]:
    heads = torch.arange(c.kv_heads, device="cuda")
    batch = torch.arange(c.batch, device="cuda")

    @torch.compile(dynamic=False)
    def score(q, summary):
        pages = summary[c.page_table.long()]  # [batch, pages, kv_heads, 2, head_dim]
        q = q.view(c.batch, 1, c.kv_heads, c.group, HEAD_DIM)
        low, high = pages[:, :, :, 0, None], pages[:, :, :, 1, None]
        return torch.maximum(q * low, q * high).float().sum(-1).amax(-1).transpose(1, 2) * HEAD_DIM**-0.5

    def gather(x: Layer):
        physical = c.page_table[batch[:, None, None], x.pages.long()].long()
        k, v = (cache[physical, heads[None, :, None]].flatten(2, 3) for cache in (x.k_cache, x.v_cache))
        return F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=True)

    first = c.layers[0]
    torch.testing.assert_close(score(first.q, first.summary), first.scores, rtol=0.05, atol=1.0)
    yield "torch.compile score", lambda x: score(x.q, x.summary)
    if c.num_pages > BUDGET // PAGE_SIZE:
        yield "torch.topk + sort", lambda x: x.scores.topk(BUDGET // PAGE_SIZE, sorted=False).indices.sort()
    yield "gather + SDPA 1024", gather


def flashinfer_peers(c: Case) -> Iterator[tuple[str, Step]]:
    """Planned once, outside the graph, which is the best its users can do with fixed lengths."""
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def wrapper(indptr, indices, last, q_heads, kv_heads, tensor_cores):
        w = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last,
        )
        options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        w.plan(indptr, indices, last, q_heads, kv_heads, HEAD_DIM, PAGE_SIZE, **options)
        return w

    def pointers(requests: int, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        indptr = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * pages
        return indptr, torch.full((requests,), PAGE_SIZE, dtype=torch.int32, device="cuda")

    for tensor_cores in (False, True):
        name = f"FlashInfer dense{', tensor cores' if tensor_cores else ''}"
        try:
            indptr, last = pointers(c.batch, c.num_pages)
            dense = wrapper(indptr, c.page_table.flatten(), last, c.q_heads, c.kv_heads, tensor_cores)
            x = c.layers[0]
            want = lil_ops.sparse_decode(x.q, x.k_cache, x.v_cache, c.page_table, c.seq_lens)[0]
            torch.testing.assert_close(dense.run(x.q, (x.k_cache, x.v_cache)), want, rtol=0.05, atol=0.02)
            yield name, lambda x, dense=dense: dense.run(x.q, (x.k_cache, x.v_cache))
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            print(f"{name}: {error}", file=sys.stderr)

    # A request a KV head: page (physical, head) of a cache with one head.
    chosen = c.page_table[torch.arange(c.batch, device="cuda")[:, None, None], c.layers[0].pages.long()]
    indices = (chosen * c.kv_heads + torch.arange(c.kv_heads, device="cuda", dtype=torch.int32)[:, None]).flatten()
    indptr, last = pointers(c.batch * c.kv_heads, chosen.shape[2])
    for tensor_cores in (False, True):
        name = f"FlashInfer sparse 1024{', tensor cores' if tensor_cores else ''}"
        try:
            sparse = wrapper(indptr, indices.int(), last, c.group, 1, tensor_cores)
            yield (
                name,
                lambda x, sparse=sparse: sparse.run(
                    x.q.view(-1, c.group, HEAD_DIM),
                    (x.k_cache.view(-1, 1, PAGE_SIZE, HEAD_DIM), x.v_cache.view(-1, 1, PAGE_SIZE, HEAD_DIM)),
                ),
            )
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            print(f"{name}: {error}", file=sys.stderr)
    if c.num_pages > BUDGET // PAGE_SIZE:
        yield "FlashInfer top-k", lambda x: flashinfer.top_k(x.scores.view(-1, c.num_pages), BUDGET // PAGE_SIZE)


def time_us(c: Case, step: Step) -> float:
    """Microseconds of one layer: a graph over all layers, replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in c.layers[:2]:
            step(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for x in c.layers:
            step(x)
    rounds = max(1, 64 // c.num_layers)
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / rounds / c.num_layers)
    return statistics.median(times[2:])


def read_bandwidth() -> float:
    """Bytes a second of a bf16 sum over 2 GB."""
    data = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return data.numel() * 2 / statistics.median(times[2:])


def measure(name: tuple[str, int, int], peers: bool, bandwidth: float) -> dict:
    c = Case(*name)
    sources = [ours(c)] + ([torch_peers(c)] if peers else []) + ([flashinfer_peers(c)] if peers and flashinfer else [])
    times = {}
    for source in sources:
        for variant, step in source:
            times[variant] = round(time_us(c, step), 2)
    limits = {"attend 1024": c.attend_bytes, "score": c.score_bytes, "dense": c.dense_bytes}
    limit = {key: round(value / bandwidth * 1e6, 2) for key, value in limits.items()}
    return {
        "shape": c.shape,
        "batch": c.batch,
        "context": c.context,
        "layers": c.num_layers,
        "us": times,
        "limit": limit,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the operators only, without peers")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", default=_git("rev-parse", "--short", "HEAD"), help="where there is no repository")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "lil_ops": lil_ops.__version__}
    if flashinfer:
        versions["flashinfer"] = flashinfer.__version__
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "read_gb_s": round(bandwidth / 1e9),
        "versions": versions,
        "command": "make bench-gpu",
        "cases": [],
    }
    for name in CASES + SHORT:
        case = measure(name, not arguments.quick, bandwidth)
        result["cases"].append(case)
        print(f"{name[0]} batch {name[1]} context {name[2]} ({case['layers']} layers), limits {case['limit']}")
        for variant, us in case["us"].items():
            print(f"    {variant:32} {us:9.2f} us", flush=True)
        torch.cuda.empty_cache()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.out == RESULT:
        report()


if __name__ == "__main__":
    main()
