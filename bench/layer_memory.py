#!/usr/bin/env python3
"""How busy memory is while a GPU does the layers of bench/layer_gpu.py, as bench/results/layer_memory.json.

    bench/layer_memory.py [--out FILE]

Nsight Compute (``ncu``) samples one replay of their graph. *Bands*: microseconds of a layer in which memory reads at so
large a share of its peak.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts import add_commit, facts
from layer_gpu import BATCHES, LAYERS, SHAPES, graph_of

BENCH = Path(__file__).resolve().parent
EDGES = (5, 50, 70, 90)  # between the bands, in percent
OPTIONS = [
    "--profile-from-start", "off", "--graph-profiling", "graph", "--cache-control", "none", "--clock-control", "none",
    "--section", "PmSampling", "--pm-sampling-interval", "1000", "--pm-sampling-buffer-size", str(1 << 26),
]  # fmt: skip


def replay(shape: str, batch: int) -> None:
    """What is sampled: one replay, behind others."""
    with torch.inference_mode():
        graph, _layers, _x = graph_of(shape, batch)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def sampled(shape: str, batch: int) -> str:
    """ncu's table of the replay."""
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/replay.ncu-rep"
        script = [sys.executable, __file__, "--replay", shape, str(batch)]
        subprocess.run(["ncu", *OPTIONS, "-o", report, *script], check=True, stdout=subprocess.DEVNULL)
        show = ["ncu", "--import", report, "--page", "raw", "--csv", "--print-metric-instances", "values"]
        return subprocess.run(show, check=True, capture_output=True, text=True).stdout


def bands_of(table: str, layers: int) -> dict:
    """Of a layer: how long it takes, and how long memory is in each band, from its first read to its last."""
    names, units, values = csv.reader(table.splitlines())
    metric, unit = dict(zip(names, values, strict=True)), dict(zip(names, units, strict=True))
    (read,) = (value for name, value in metric.items() if "dramc__read_throughput" in name)
    shares = [float(share.replace(",", "")) for share in re.search(r"\((.*)\)", read)[1].split(";")]
    clock = "profiler__pmsampler_interval_time"
    interval = float(metric[clock].split()[0]) * {"us": 1, "ns": 1e-3}[unit[clock]]
    busy = [i for i, share in enumerate(shares) if share >= EDGES[0]]
    shares = shares[busy[0] : busy[-1] + 1]
    bands = [0.0] * (len(EDGES) + 1)
    for share in shares:
        bands[sum(share >= edge for edge in EDGES)] += interval / layers
    return {"us": round(len(shares) * interval / layers, 1), "bands_us": [round(band, 1) for band in bands]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "layer_memory.json")
    parser.add_argument("--replay", nargs=2, metavar=("SHAPE", "BATCH"), help=argparse.SUPPRESS)
    add_commit(parser)
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay[0], int(options.replay[1]))
    of_run, rows = facts(commit=options.commit), []
    for shape in SHAPES:
        for batch in BATCHES:
            rows.append({"shape": shape, "batch": batch} | bands_of(sampled(shape, batch), LAYERS))
            print(rows[-1], flush=True)
    options.out.write_text(json.dumps(of_run | {"edges": EDGES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
