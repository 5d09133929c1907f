"""What a run ran on: versions, commit, processor, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import lil_ops
from lil_ops._library import PACKAGE


def environment() -> dict:
    """`lil_ops.build_info`, and commit (null where the package is in no checkout of its own), processor and date."""
    return {
        **lil_ops.build_info(),
        "transformers": metadata.version("transformers"),
        "commit": commit(PACKAGE.parent),
        "processor": processor(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit(folder: Path) -> str | None:
    """The commit that the folder is a checkout of, with ``+`` where files were changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
