"""What the workers of field.py share: requests as JSON lines, greedy decoding through transformers, memory's peak.

Runs in environments with other packages, so that it imports none of lil_ops.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def serve(start: Callable[[str], Callable[[dict], dict]], versions: Callable[[], dict]) -> None:
    """Answer the requests on standard input, one JSON line each, until it ends.

    start: makes of a model's folder the function that answers a request: ``spec``, ``prompts`` (token ids, of one
    length), ``new`` (tokens at most), ``eos`` (ids that end a sequence). Its reply has ``tokens`` (the new ones),
    ``step_seconds`` (without the prefill), ``kv_bytes`` and ``state_bytes`` (the most of all steps); here comes
    ``rss_bytes``. Before the first reply a line says which versions these are.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the replies
    torch.set_num_threads(arguments.threads)
    answer = start(arguments.model)
    print(json.dumps(versions()), file=replies, flush=True)
    for line in sys.stdin:
        resident_peak(reset=True)
        try:
            with torch.inference_mode():
                reply = answer(json.loads(line)) | {"rss_bytes": resident_peak()}
        except (ValueError, AssertionError) as error:  # what an option out of range raises
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


def resident_peak(reset: bool = False) -> int | None:
    """The most memory this process had resident since the last reset, in bytes; None where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def decode(
    model: torch.nn.Module,
    request: dict,
    cache: object,
    kv: Callable[[], Iterable[torch.Tensor]],
    state: Callable[[], Iterable[torch.Tensor]],
) -> dict:
    """Greedy decoding of prompts of one length, until all have ended.

    Positions are given, because a cache that forgot tokens does not know how many there were. kv, state: the tensors
    that the cache, and the method beside it, hold; added up between steps, outside of what is timed.
    """
    ids = torch.tensor(request["prompts"])
    eos = torch.tensor(request["eos"], dtype=torch.int64)
    outputs: list[list[int]] = [[] for _ in ids]
    running, seconds, kv_bytes, state_bytes = set(range(len(ids))), [], 0, 0
    positions = torch.arange(ids.shape[1])[None]
    for _ in range(request["new"]):
        started = time.perf_counter()
        logits = model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        chosen = logits.argmax(-1)
        tokens, ended = chosen.tolist(), torch.isin(chosen, eos).tolist()
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        seconds.append(time.perf_counter() - started)
        for row in sorted(running):
            outputs[row].append(tokens[row])
            if ended[row]:
                running.discard(row)
        kv_bytes = max(kv_bytes, size(kv()))
        state_bytes = max(state_bytes, size(state()))
        if not running:
            break
    return {"tokens": outputs, "step_seconds": seconds[1:], "kv_bytes": kv_bytes, "state_bytes": state_bytes}


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
