"""Tiny random models of every family that is served, and helpers to run them. head_dim 64, float32."""

from __future__ import annotations

import torch
import transformers as hf

from lil_ops.integrations.transformers import cache_argument

WINDOW = 16
BASE = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    # Wide enough that a random model's greedy output does not fall into a loop at once.
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BASE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**BASE, "hidden_size": 256})),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=None)),
    "mistral-sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=WINDOW)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**BASE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **BASE,
            sliding_window=WINDOW,
            layer_types=ALTERNATING,
            # Low enough to bend the scores of a random model.
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=64,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**BASE, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=64)
    ),
}


def build(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def dense_implementation(model: hf.PreTrainedModel) -> str:
    """transformers' own exact attention for the model: sdpa knows no softcap."""
    return "eager" if model.config.model_type == "gemma2" else "sdpa"


def prompts(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, BASE["vocab_size"], (length,), generator=generator) for length in lengths]


def taking(model: hf.PreTrainedModel, cache: hf.Cache) -> dict[str, hf.Cache]:
    """The keyword argument that gives ``cache`` to the model's forward or generate."""
    return {cache_argument(model): cache}


def hf_generate(
    model: hf.PreTrainedModel, input_ids: torch.Tensor, new_tokens: int, cache: hf.Cache | None = None, **options
) -> list[list[int]]:
    """The new tokens of transformers' own greedy generate under the model's present attention implementation."""
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    if cache is not None:
        options |= taking(model, cache)
    output = model.generate(input_ids, max_new_tokens=new_tokens, do_sample=False, **options)
    return output[:, input_ids.shape[1] :].tolist()


def left_padded(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)``, each ``[batch, longest]``."""
    longest = max(map(len, sequences))
    pads = [longest - len(sequence) for sequence in sequences]
    ids = torch.stack([torch.nn.functional.pad(s, (pad, 0)) for s, pad in zip(sequences, pads, strict=True)])
    mask = torch.stack([(torch.arange(longest) >= pad).long() for pad in pads])
    return ids, mask


class LogitsLog:
    """Context manager that keeps the last-position logits of every forward pass of a model."""

    def __init__(self, model: hf.PreTrainedModel):
        self._model, self.logits = model, []

    def __enter__(self) -> LogitsLog:
        self._hook = self._model.register_forward_hook(
            lambda module, arguments, output: self.logits.append(output.logits[:, -1].clone())
        )
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()
