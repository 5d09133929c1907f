"""A real model, SmolLM2-135M-Instruct in float32: the loop's tokens are those of transformers' own generate."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import LogitsLog, hf_generate

from lil_ops.decode import generate

MODELS = Path(os.environ.get("LIL_MODELS", Path(__file__).resolve().parents[1] / "models"))
GGUF = MODELS / "SmolLM2-135M-Instruct" / "model.gguf"
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not GGUF.exists(), reason=f"{GGUF} is missing (make models, or set LIL_MODELS to its folder)"),
]

NEW = 256
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Question: A train travels 60 km in 45 minutes. What is its speed in km/h? Answer:",
    "List five uses of a paper clip.",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
]


@pytest.fixture(scope="module")
def smollm2():
    from lil_ops.models import load_model

    return load_model(GGUF, dtype=torch.float32)


@pytest.fixture(scope="module")
def full(smollm2):
    """Full's result and logits, all prompts in one ragged batch."""
    model, tokenizer = smollm2
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with LogitsLog(model) as log:
        return prompts, generate(model, prompts, max_new_tokens=NEW), log.logits


def test_eight_prompts_equal_transformers_generate(smollm2, full):
    model, _ = smollm2
    prompts, result, _ = full
    assert model.config._attn_implementation == "sdpa"
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens == hf_generate(model, torch.tensor([prompt]), NEW)[0]
    assert len(set(map(tuple, result.tokens))) == 8 and max(map(len, result.tokens)) == NEW


@pytest.mark.parametrize("policy", ["quest", "sink"])
def test_a_covering_budget_gives_fulls_tokens_bit_for_bit(smollm2, full, policy):
    model, _ = smollm2
    prompts, result, logits = full
    budget = max(map(len, prompts)) + NEW + 16
    with LogitsLog(model) as log:
        assert generate(model, prompts, max_new_tokens=NEW, policy=policy, budget=budget).tokens == result.tokens
    assert len(log.logits) == len(logits) and all(map(torch.equal, log.logits, logits))


def test_load_model_gives_plain_dense_layers(smollm2, tmp_path):
    model, tokenizer = smollm2
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is torch.nn.Linear and linear.weight.dtype == torch.float32 and not model.training
    assert tokenizer.decode(tokenizer("Hello").input_ids) == "Hello"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from lil_ops.models import load_model

    again, _ = load_model(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, linear.weight)
