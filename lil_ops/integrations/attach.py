"""Which Hugging Face models can be served, and the facts about them that the cache needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

HEAD_DIMS = (64, 80, 96, 128, 192, 256)

# Attributes of attention modules that compute something else, though they look like the others.
_UNLIKE = {
    "sinks": "it has learned attention sinks",
    "indexer": "its attention chooses keys with an indexer of its own",
    "prepare_dynamic_mask": "its attention makes a mask of its own",
    "lambda_q1": "its attention is differential",
    "experts": "its attention has experts",
}


@dataclass(frozen=True)
class ModelShape:
    """Shape of a decoder-only model; ``sliding_windows`` has one entry a layer: tokens, or None for full attention."""

    num_layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    sliding_windows: tuple[int | None, ...]


def attach(model: nn.Module) -> ModelShape:
    """Check that every layer of ``model`` is attention that the operators compute, and return the model's shape.

    Served: decoder-only transformers models that reach attention through ``AttentionInterface``, each layer causal
    softmax attention (full or sliding window, with or without softcap) with one head_dim and one number of KV heads.
    Raises ValueError naming the model type and the reason for anything else. The model is not changed.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", type(model).__name__)

    def require(condition: bool, reason: str) -> None:
        if not condition:
            raise refusal(name, reason)

    require(hasattr(config, "get_text_config"), "it is not a transformers model")
    require(not config.is_encoder_decoder, "it is an encoder-decoder; only decoder-only models are served")
    require(config.get_text_config() is config, "it is multimodal; load its text model instead")
    require(
        getattr(model, "_supports_attention_backend", False),
        "its attention does not go through transformers' AttentionInterface",
    )
    # Such a config raises an error where an attribute that differs is read.
    require(not getattr(config, "is_heterogeneous", False), "its layers differ (per_layer_config)")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    require(not kinds, f"it has layers of type {', '.join(sorted(kinds))}")
    require(not getattr(config, "kv_lora_rank", None), "it has multi-head latent attention (MLA)")
    require(not getattr(config, "cross_attention_layers", None), "it has cross-attention layers")
    require(getattr(config, "n_recurrent_loops", 1) == 1, "it runs layers more than once a pass")

    modules = [module for module in model.modules() if _is_attention(module)]
    without = sorted(set(range(config.num_hidden_layers)) - {module.layer_idx for module in modules})
    require(not without, f"layers {without} have no standard attention module")
    for module in modules:
        for attribute, reason in _UNLIKE.items():
            require(getattr(module, attribute, None) is None, reason)
        require(getattr(module, "is_causal", True), "its attention is not causal")
        require(
            not getattr(module, "is_kv_shared_layer", False), "some of its layers share another layer's keys and values"
        )
    require(len(modules) == config.num_hidden_layers, "some of its layers have several attention modules")
    head_dims = {_head_dim(module) for module in modules}
    kv_heads = {_kv_heads(module, config) for module in modules}
    require(len(head_dims) == 1, f"its layers differ in head_dim: {sorted(head_dims)}")
    require(len(kv_heads) == 1, f"its layers differ in KV heads: {sorted(kv_heads)}")
    (head_dim,), (heads,) = head_dims, kv_heads
    require(head_dim in HEAD_DIMS, f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    return ModelShape(len(modules), heads, head_dim, config.vocab_size, _sliding_windows(config))


def refusal(name: str, reason: str) -> ValueError:
    """The error for a model of type ``name`` that cannot be served."""
    return ValueError(f"lil_ops cannot serve model type {name!r}: {reason}")


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and isinstance(_head_dim(module), int)


def _head_dim(module: nn.Module) -> int | None:
    return getattr(module, "head_dim", getattr(module, "head_size", None))


def _kv_heads(module: nn.Module, config) -> int:
    # Models with one fused qkv projection have no k_proj; their layers are all alike.
    width = getattr(getattr(module, "k_proj", None), "out_features", None)
    if width is not None:
        return width // _head_dim(module)
    for source in (module, config):
        if (heads := getattr(source, "num_key_value_heads", None)) is not None:
            return heads
    return config.num_attention_heads


def _sliding_windows(config) -> tuple[int | None, ...]:
    # A config keeps attributes that its own model never reads; those that a model reads, its class declares.
    window = getattr(config, "sliding_window", None) if hasattr(type(config), "sliding_window") else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
