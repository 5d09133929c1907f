"""A run's file: JSON lines that only grow. One that is finished may be kept as NAME.jsonl.xz.

The first line is ``{"settings": ...}``, what was asked for. Each start of the run adds ``{"environment": ...}``, what
it ran on. Every other line is one problem's record, with the keys of `RECORD`. A batch's records are written together
and synced to the disk, so that a kill loses no batch that was finished.
"""

from __future__ import annotations

import fcntl
import json
import lzma
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lil_ops import _C
from lil_ops.evaluation.grid import policy_name

NUMBER = (int, float)
# Key of a record -> its type, which a line must have to count, and what it is.
RECORD = {
    "id": str,  # the problem's
    "gold": str,  # the right answer
    "answer": (str, type(None)),  # the one found in the text
    "correct": bool,
    "stop": str,  # eos, length or guardian
    "prompt_tokens": int,
    "ttft_s": NUMBER,  # the prefill of the problem's batch
    "tbt_s": NUMBER,  # mean, over the steps after the first token that the problem took part in
    "jct_s": NUMBER,  # both together, until its last token
    "kv_bytes": int,  # the problem's part of the cache, at its end: its peak
    "phrases": int,  # LZ77 size of the tokens
    "lost_bits": (int, float, type(None)),  # mean of the steps, see `LilCache`; null: not measured
    "events": list,  # what the stop rule brought about: [tokens so far, "answer", "rescue" or "recovered"]
    "text": str,  # without special tokens
    "lengths": list,  # characters of ``text`` that each token completes
    "tokens": list,  # the new ids
}


@dataclass
class Run:
    """What a file holds. ``damaged``: its lines that do not count, with the reason."""

    path: Path
    settings: dict
    environments: list[dict] = field(default_factory=list)
    records: dict[str, dict] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @property
    def policy(self) -> str:
        """With budget and options: ``quest 64``; ``dense`` for the one that reads everything."""
        policy = self.settings["policy"]
        return "dense" if policy == "full" else policy_name(policy, self.settings["policy_options"])

    @property
    def stop(self) -> str:
        return self.settings["stop"]

    @property
    def name(self) -> str:
        return self.policy if self.stop == "off" else f"{self.policy}, {self.stop}"

    @property
    def shared(self) -> tuple:
        """The settings that a run must have too to be compared with this one."""
        return tuple(json.dumps(self.settings.get(key)) for key in (*SHARED, "engine"))

    def curve(self, id: str, unit: str = "phrases") -> np.ndarray:
        """The size of a problem's output after each token."""
        tokens = np.array(self.records[id]["tokens"], dtype=np.int64)
        return _C.lz77_trace(tokens, self.settings["vocab_size"])[("phrases", "bits").index(unit)]


# Settings that runs must share to be compared; times are compared too. "engine", where it served the batches, as well.
SHARED = (
    "model", "dtype", "problems_sha256", "template", "chat", "answer_by", "max_new_tokens", "ignore_eos", "temperature",
    "top_k", "top_p", "seed", "batch", "page_size", "device",
)  # fmt: skip
SETTINGS = (*SHARED, "data", "problems", "policy", "policy_options", "stop", "vocab_size")


START = b'{"settings"'


def read(path: Path) -> Run:
    """The run in a file. Raises ValueError where it is none; damaged lines are only listed."""
    try:
        held = path.read_bytes()
        lines = (lzma.decompress(held) if path.suffix == ".xz" else held).split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    first, reason = _object(lines[0])
    settings = first.get("settings") if first else None
    if not isinstance(settings, dict) or any(key not in settings for key in SETTINGS):
        raise ValueError(f"{path}, line 1: expected the settings of a run{f' ({reason})' if reason else ''}")
    run = Run(path, settings)
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        found, reason = _object(line)
        if found and isinstance(found.get("environment"), dict):
            run.environments.append(found["environment"])
            continue
        reason = reason or _fault(found, settings["vocab_size"])
        if not reason and found["id"] in run.records:
            reason = f"a second record of problem {found['id']!r}"
        if reason:
            run.damaged.append(f"line {number}: {reason}")
        else:
            run.records[found["id"]] = found
    return run


class Writer:
    """Opens a run's file to add to it: a new one, or one that has the same settings. A context manager.

    Raises ValueError where the file has other settings, is no run's, is being written by another process, or cannot be
    written. ``run``: what the file held before.
    """

    def __init__(self, path: Path, settings: dict, environment: dict):
        self.path, self._settings, self._environment = path, settings, environment

    def __enter__(self) -> Writer:
        with _writing(self.path):
            self._file: BinaryIO = self.path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"{self.path}: another process is writing this run") from error
        try:
            self.run = self._start()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception) -> None:
        with _writing(self.path):  # what could not be written before is tried again
            self._file.close()

    def append(self, records: list[dict]) -> None:
        """Add lines and return when they are on the disk."""
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        # A lone surrogate, which some tokenizers decode to, has no UTF-8: it is written as its escape.
        with _writing(self.path):
            self._file.write(text.encode(errors="backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _start(self) -> Run:
        held = self.path.read_bytes()
        # A kill may have come before the first line was whole.
        if b"\n" not in held and held[: len(START)] == START[: len(held)]:
            self._file.truncate(0)
            self.append([{"settings": self._settings}])
            run = Run(self.path, self._settings)
        else:
            run = read(self.path)
            check_settings(run, self._settings)
            if not held.endswith(b"\n"):
                # What follows must not become part of the cut line.
                self._file.write(b"\n")
        self.append([{"environment": self._environment}])
        return run


def check_settings(run: Run, settings: dict) -> None:
    """Raise ValueError where the run was begun with others."""
    # As JSON has them: a tuple comes back as a list.
    before, now = run.settings, json.loads(json.dumps(settings))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key}: {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{run.path}: begun with other settings ({differences}); take those, or another folder for --out"
        )


def packed(path: Path, settings: dict) -> Run | None:
    """The finished run that is kept as .xz in place of ``path``, if there is one.

    Raises ValueError where it has other settings, is not finished, or is kept both ways.
    """
    kept = path.with_name(path.name + ".xz")
    if not kept.exists():
        return None
    if path.exists():
        raise ValueError(f"{path}: kept both as it is and as {kept.name}; remove one")
    run = read(kept)
    check_settings(run, settings)
    if len(run.records) < settings["problems"]:
        raise ValueError(f"{kept}: has {len(run.records)} of {settings['problems']} problems; unpack it to go on")
    return run


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _object(line: bytes) -> tuple[dict | None, str]:
    """The JSON object of a line, or why it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None, "not JSON, cut or damaged"
    return (found, "") if isinstance(found, dict) else (None, "not an object")


def _fault(record: dict, vocab_size: int) -> str:
    """Why a record does not count; "" where it does."""
    for key, kind in RECORD.items():
        if key not in record or not isinstance(record[key], kind):
            return f"expected {key!r} as in every record"
    if not all(math.isfinite(record[key]) for key in ("ttft_s", "tbt_s", "jct_s")):
        return "expected finite times"
    lengths = record["lengths"]
    if len(record["tokens"]) != len(lengths) or not lengths:
        return "expected as many lengths as tokens"
    if not all(type(length) is int and length >= 0 for length in lengths) or sum(lengths) != len(record["text"]):
        return "expected lengths that add up to the text's"
    if not all(type(token) is int and 0 <= token < vocab_size for token in record["tokens"]):
        return f"expected tokens from 0 to {vocab_size - 1}"
    return ""
