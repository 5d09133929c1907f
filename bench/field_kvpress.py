"""The worker of field.py that runs in kvpress's own environment: dense, or one press inside a DecodingPress.

It does what kvpress's pipeline does (a DynamicCache, positions given, greedy), but takes token ids, and times steps.
"""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import version

import kvpress
import torch
import transformers
from field_serve import decode, serve


def start(folder: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    def answer(request: dict) -> dict:
        spec = request["spec"]
        # Attention weights, which ObservedAttentionPress reads, are there with eager attention only.
        model.set_attn_implementation(spec.get("attention", "sdpa"))
        cache = transformers.DynamicCache()
        press = None
        if spec["press"]:
            press = kvpress.DecodingPress(
                base_press=getattr(kvpress, spec["press"])(**spec["options"]),
                compression_interval=spec["interval"],
                target_size=spec["target"],
                hidden_states_buffer_size=spec["buffer"],
            )

        def kv():
            return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

        def state():
            return [tensor for kept in press.hidden_states_buffer.values() for tensor in kept] if press else []

        with press(model) if press else contextlib.nullcontext():
            return decode(model, request, cache, kv, state)

    return answer


def versions() -> dict:
    return {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    serve(start, versions)
