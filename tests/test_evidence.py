"""bench/evidence.py, whose commands docs/results/README.md names."""

import shlex
import subprocess
import sys
from pathlib import Path

EVIDENCE = Path(__file__).resolve().parents[1] / "bench" / "evidence.py"


def test_list_prints_commands_that_a_shell_runs():
    arguments = ["gsm8k-check", "--model", "a model", "--data", "problems", "--out", "runs", "--list"]
    listed = subprocess.run([sys.executable, EVIDENCE, *arguments], capture_output=True, text=True, check=True).stdout
    words = shlex.split(listed)
    templates = {words[i + 1] for i, word in enumerate(words) if word == "--template"}
    assert len(templates) == 1 and templates.pop().startswith("{question}\n\nReason step by step.")
    assert {words[i + 1] for i, word in enumerate(words) if word == "--model"} == {"a model"}
