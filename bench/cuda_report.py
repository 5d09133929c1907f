#!/usr/bin/env python3
"""Registers, shared memory, stack and spills of every CUDA kernel instance, read from ptxas.

Exit 1 where a kernel has any of the last two: an array that is indexed by a variable is on the stack, without a spill.
Compiles csrc/cuda/*.cu and the instances that the build generated for LIL_CUDA_ARCHS (default 90), without linking.
Needs nvcc, no GPU, and any torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_log(source: Path, archs: list[str]) -> str:
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    command += ["-c", str(source), "-o", os.devnull]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem={path}" for path in include_paths()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangled(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    return (done.stdout.strip() or name).split("(")[0].replace("lil::cuda::", "").replace("(anonymous namespace)::", "")


def main() -> int:
    archs = os.environ.get("LIL_CUDA_ARCHS", "90").split(";")
    in_memory = False
    print(f"{'kernel':60} {'arch':7} {'registers':>9} {'smem':>7} {'stack':>6} {'spills':>7}")
    build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    if not any(build.glob("instances/*.cu")):
        raise SystemExit(f"{build}: no instances there; build first (make does)")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted(build.glob("instances/*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda source: compile_log(source, archs), sources)
    for log in logs:
        kernel = arch = None
        stack = (0, 0, 0)
        for line in log.splitlines():
            if found := KERNEL.search(line):
                kernel, arch = found.groups()
            elif found := STACK.search(line):
                stack = tuple(map(int, found.groups()))
            elif (found := USED.search(line)) and kernel:
                spills = stack[1] + stack[2]
                in_memory |= any(stack)
                name, shared = demangled(kernel)[:60], found[2] or 0
                print(f"{name:60} {arch:7} {found[1]:>9} {shared:>7} {stack[0]:>6} {spills:>7}")
                kernel = None
    if in_memory:
        print("a kernel keeps in memory what belongs in registers", file=sys.stderr)
    return int(in_memory)


if __name__ == "__main__":
    sys.exit(main())
