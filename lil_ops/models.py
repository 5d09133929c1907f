"""Loading a causal language model and its tokenizer from a GGUF file, a safetensors folder or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path_or_id: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        path_or_id: a ``.gguf`` file, a folder that holds one (and no safetensors), a folder in transformers' format, or
            a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``. GGUF weights are unpacked to plain dense layers.
        dtype: default: the checkpoint's own, float32 for GGUF. device: default: CPU.

    Raises FileNotFoundError where the path does not exist or the folder holds no model, or more than one GGUF file.
    """
    source, gguf_file = _locate(path_or_id)
    options = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)
        dtype = dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    if gguf_file:
        # The weights are dense now, but transformers would still take the model for quantized, and refuse to save it.
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    return model.to(device or "cpu").eval(), tokenizer


def _locate(path_or_id: str | Path) -> tuple[str, str | None]:
    """``(folder or hub id, name of the GGUF file in it or None)``."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path}: expected a .gguf file or a folder, got a file of another kind")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path), None
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) != 1:
            found = ", ".join(files) or "neither"
            raise FileNotFoundError(
                f"{path}: expected config.json or exactly one .gguf file in this folder, found {found}"
            )
        return str(path), files[0]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path_or_id)) and not path.parent.exists():
        return str(path_or_id), None
    raise FileNotFoundError(f"{path_or_id}: no such file or folder")
