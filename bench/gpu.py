#!/usr/bin/env python3
"""The operators on a machine with a GPU, from a bare checkout: bench/gpu.py test|sanitize|bench [ARGUMENTS ...]

Builds in place for the GPUs found, with the Python that runs this: it has a torch with CUDA and what pyproject.toml
names for building and testing; nothing is installed. Then ``test`` runs the operators' test files (ARGUMENTS go to
pytest, whose exit code is returned), ``sanitize`` runs some of them under compute-sanitizer (LIL_SANITIZER=memcheck,
the default, racecheck, ...), and ``bench`` runs bench/peers.py (ARGUMENTS go there).
"""

from __future__ import annotations

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


# A few cases of every kernel: under the sanitizer a test takes many times its time.
SANITIZED = "cuda and (one_token or head_dims or groups_and_pages or many_pages or long or empty or values_out or gain)"
SANITIZER = [
    "compute-sanitizer",
    "--tool",
    os.environ.get("LIL_SANITIZER", "memcheck"),
    "--error-exitcode",
    "9",
    "--target-processes",
    "all",
]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("test", "sanitize", "bench"):
        raise SystemExit(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit(f"bench/gpu.py: torch {torch.__version__} of {sys.executable} finds no GPU")
    what, *arguments = arguments
    python = [sys.executable]
    command = [*python, "-m", "pytest", *operator_tests()]
    if what == "sanitize":
        command = [*SANITIZER, *command, "-k", SANITIZED]
    elif what == "bench":
        command = [*python, str(ROOT / "bench" / "peers.py")]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for step in ([*python, "setup.py", "build_ext", "--inplace"], [*command, *arguments]):
        code = subprocess.run(step, cwd=ROOT, env=environment).returncode
        if code:
            break
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
