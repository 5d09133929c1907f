"""What a result says of its run: when, of what, where and how."""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent
WHERE = "--commit", "--out"  # options that say nothing of what was measured
LIBRARIES = "lil_ops", "transformers", "flashinfer"


def add_commit(parser: argparse.ArgumentParser) -> None:
    """``--commit``, for `facts`."""
    parser.add_argument("--commit", help="where there is no repository")


def facts(device: str | torch.device = "cuda", commit: str | None = None) -> dict:
    """commit: where there is no repository."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": today(),
        "commit": commit or current_commit(),
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "versions": versions(),
        "command": command_line(),
    }


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def versions() -> dict[str, str | None]:
    """Of torch, and of the libraries that the script has imported."""
    imported = (sys.modules[name] for name in LIBRARIES if name in sys.modules)
    own = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return own | {module.__name__: module.__version__ for module in imported}


def current_commit() -> str:
    """The commit that was measured; a + behind it says that the sources were changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "csrc", "lil_ops") else "")


def command_line() -> str:
    """How the script was started, but for where its result goes; of absolute paths, which are of one machine, the last
    part."""
    words = sys.argv[1:]
    values = {i + 1 for i, word in enumerate(words) if word in WHERE}
    kept = [word for i, word in enumerate(words) if i not in values and word.partition("=")[0] not in WHERE]
    kept = [Path(word).name if word.startswith("/") else word for word in kept]
    return " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *kept])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True).stdout.strip()
