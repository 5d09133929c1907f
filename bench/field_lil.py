"""The worker of field.py for lil_ops itself: one policy."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch
import transformers
from field_serve import serve, size

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lil_ops
from lil_ops import policies


def start(folder: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    def answer(request: dict) -> dict:
        policy = policies.get(**request["spec"])
        result = lil_ops.generate(
            model, request["prompts"], policy=policy, max_new_tokens=request["new"], eos_token_id=request["eos"]
        )
        lists = [value for value in vars(policy).values() if isinstance(value, list)]
        state = [tensor for values in lists for tensor in values if isinstance(tensor, torch.Tensor)]
        return {
            "tokens": result.tokens,
            "step_seconds": result.step_times[1:],
            "kv_bytes": result.kv_bytes_peak,
            "state_bytes": size(state),
        }

    return answer


def versions() -> dict:
    build = lil_ops.build_info()
    return {name: build[name] for name in ("lil_ops", "torch", "python", "isa")} | {
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    serve(start, versions)
