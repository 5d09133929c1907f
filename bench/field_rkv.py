"""The worker of field.py for R-KV's own code (github.com/Zefan-Cai/R-KV): an environment where `import rkv` works.

R-KV replaces transformers' attention; it compresses the prompt, and then every ``interval`` tokens, to ``budget``
tokens: one sequence at a time, because its similarity looks at the first of a batch only. Without a budget (dense) the
same replaced attention compresses never.
"""

from __future__ import annotations

import platform

import torch
import transformers
from field_serve import decode, serve
from rkv import replace_llama

NEVER = 1 << 40
# The defaults of its evaluation script (run_math.py): window, mix and similarity; our policy `rkv` has the same.
METHOD = {
    "budget": NEVER,
    "window_size": 8,
    "mix_lambda": 0.1,
    "retain_ratio": 0.2,
    "retain_direction": "last",
    "first_tokens": 4,
}


def start(folder: str):
    replace_llama({"method": "rkv", "method_config": METHOD, "compression": None, "update_kv": True})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").float().eval()
    model.config.update({"divide_method": "step_length", "compression_content": "all"})

    def together(request: dict) -> dict:
        spec = request["spec"]
        model.config.update({"divide_length": spec["interval"] or NEVER})
        model.length = 0  # it counts on from one generation to the next
        for layer in model.model.layers:
            layer.self_attn.config.compression = None  # as at the start: the prompt is compressed
            layer.self_attn.kv_cluster.budget = spec["budget"] or NEVER
        cache = transformers.DynamicCache()
        return decode(
            model,
            request,
            cache,
            lambda: [*cache.key_cache, *cache.value_cache],
            lambda: cache.query_cache.values(),
        )

    def answer(request: dict) -> dict:
        if request["spec"]["budget"] is None:
            return together(request)
        replies = [together(request | {"prompts": [prompt]}) for prompt in request["prompts"]]
        return {
            "tokens": [reply["tokens"][0] for reply in replies],
            "step_seconds": [seconds for reply in replies for seconds in reply["step_seconds"]],
            "kv_bytes": max(reply["kv_bytes"] for reply in replies),
            "state_bytes": max(reply["state_bytes"] for reply in replies),
        }

    return answer


def versions() -> dict:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    serve(start, versions)
