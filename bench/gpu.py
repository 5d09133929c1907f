#!/usr/bin/env python3
"""The package on a machine with a GPU, from a bare checkout: bench/gpu.py test|sanitize|bench|policies [ARGUMENTS ...]

Builds in place for the GPUs found, with the Python that runs this: it has a torch with CUDA and what pyproject.toml
names for building and testing; nothing is installed. Then ``test`` runs the operators' test files, and the one of
device memory in long decodes (ARGUMENTS go to pytest, whose exit code is returned; LIL_RANDOM_CASES=10000 for so many
random cases), ``sanitize`` runs some of them under each tool of compute-sanitizer (LIL_SANITIZER="memcheck racecheck"
for some of the tools), ``bench`` runs bench/peers.py (ARGUMENTS go there), lz77_gpu.py, policies_gpu.py,
linears_gpu.py, layer_gpu.py and engine_gpu.py, and ``policies`` policies_gpu.py alone (ARGUMENTS go there). Tests run
in several processes where pytest-xdist is there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def operator_tests() -> list[str]:
    """The test files that tests/conftest.py runs on CUDA as well."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file) for file in files if re.search(r"^OPERATORS? = ", file.read_text(), re.MULTILINE)]


# Of files that do not take a device.
OTHER_TESTS = ["test_memory.py::test_a_long_decode_takes_no_more_device_memory"]

# A few cases of every kernel: under the sanitizer a test takes many times its time.
SANITIZED = (
    "cuda and ((one_token or mean_and_deviation) and cuda-16 or float8_head_dims and (cuda-64-page or cuda-256-page) "
    "or float8_summary_head_dims and cuda-64 or "
    "ragged or many_pages or more_pages or long_sequence or empty or values_out or only_at_interval or any_masses or "
    "selected_pages or loss_bounds or in_a_row or test_meanstd_estimates or many_heads or test_random_cases or "
    "always_read or many_keys or any_representatives or step_by_step or long_rows or "
    "leading_dimensions or one_after_another or one_behind or rows_do_not_meet or rotates_as_transformers or "
    "a_bad_row or full_to_the_last or states_move or another_vocabulary)"
)
PROCESSES = ["-n", "8"] if importlib.util.find_spec("xdist") else []
TOOLS = os.environ.get("LIL_SANITIZER", "memcheck racecheck initcheck synccheck").split()


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("test", "sanitize", "bench", "policies"):
        raise SystemExit(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit(f"bench/gpu.py: torch {torch.__version__} of {sys.executable} finds no GPU")
    what, *arguments = arguments
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    python = [sys.executable]
    tests = [*python, "-m", "pytest", *PROCESSES, *operator_tests()]
    names = "lz77", "policies", "linears", "layer", "engine"
    lz77, policies, *model = ([*python, str(ROOT / "bench" / f"{name}_gpu.py")] for name in names)
    if what == "bench":
        commands = [[*python, str(ROOT / "bench" / "peers.py"), *arguments], lz77, policies, *model]
    elif what == "policies":
        commands = [[*policies, *arguments]]
    elif what == "test":
        commands = [[*tests, *(f"{ROOT}/tests/{test}" for test in OTHER_TESTS), *arguments]]
    else:
        environment.setdefault("LIL_RANDOM_CASES", "10")
        sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
        # torch's own kernels need no check, and take most of the time. initcheck has to see what they write.
        only = {tool: [] if tool == "initcheck" else ["--kernel-name", "kns=lil"] for tool in TOOLS}
        commands = [[*sanitizer, tool, *only[tool], *tests, "-k", SANITIZED, *arguments] for tool in TOOLS]
    for command in ([*python, "setup.py", "build_ext", "--inplace"], *commands):
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code:
            break
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
