"""The Hugging Face integration on tiny random models of each family, against transformers' own attention."""

import pytest
import torch
import transformers as hf
from tiny_models import (
    ALTERNATING,
    BASE,
    FAMILIES,
    WINDOW,
    LogitsLog,
    build,
    dense_implementation,
    hf_generate,
    left_padded,
    prompts,
    taking,
)

from lil_ops.cache import OutOfPagesError
from lil_ops.decode import generate
from lil_ops.integrations.attach import attach
from lil_ops.integrations.transformers import LilCache, lil_attention, register

NEW = 40
COVERING = [
    ("quest", {"budget": 128}),
    ("quest", {"budget": 128, "scoring": "meanstd"}),
    ("quest", {"budget": 128, "summary_dtype": "float8"}),
    ("sink", {"budget": 128}),
    ("quest", {"budget": 128, "dense_layers": 0}),
]


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def expected(model, input_ids, new_tokens=NEW, **options):
    model.set_attn_implementation(dense_implementation(model))
    return hf_generate(model, input_ids, new_tokens, **options)


def test_full_gives_the_tokens_of_transformers_generate(model):
    batch = torch.stack(prompts(27, 27, 27))
    want = expected(model, batch)
    assert len(set(map(tuple, want))) == 3, "prompts that give the same output prove little"
    assert generate(model, batch, max_new_tokens=NEW).tokens == want


@pytest.mark.parametrize(("policy", "options"), COVERING)
def test_a_covering_budget_gives_fulls_logits_bit_for_bit(model, policy, options):
    batch = prompts(27, 9)
    with LogitsLog(model) as full:
        generate(model, batch, max_new_tokens=NEW)
    with LogitsLog(model) as covered:
        generate(model, batch, max_new_tokens=NEW, policy=policy, **options)
    assert len(full.logits) == NEW + 1
    assert all(map(torch.equal, full.logits, covered.logits))


def test_float8_summaries_reach_the_cache():
    caches = [
        LilCache(build("llama"), "quest", budget=64, max_tokens=64, **o) for o in ({}, {"summary_dtype": "float8"})
    ]
    assert [cache.kv.summary[0].dtype for cache in caches] == [torch.float32, torch.float8_e4m3fn]


def test_sink_reads_exactly_its_tokens():
    model, prompt = build("llama"), prompts(30)
    with LogitsLog(model) as log:
        tokens = generate(model, prompt, max_new_tokens=NEW, policy="sink", budget=32, sink=4, page_size=8).tokens[0]
    # The same run in one dense pass: a generated token sees the first 4 and the last 28, a prompt token everything.
    ids = torch.cat([prompt[0], torch.tensor(tokens[:-1])])[None]
    place = torch.arange(ids.shape[1])
    query = place[:, None]
    seen = (place <= query) & ((query < 30) | (place < 4) | (place > query - 28))
    model.set_attn_implementation("sdpa")
    dense = model(ids, attention_mask=seen[None, None]).logits[0, 29:]
    torch.testing.assert_close(torch.cat(log.logits), dense, atol=1e-4, rtol=1e-4)
    full = model(ids).logits[0, 29:]
    assert (full - dense).abs().max() > 0.1, "the tokens left out must matter for the comparison to mean anything"


@pytest.mark.parametrize("policy", ["full", "quest"])
def test_generate_with_a_left_padded_batch(model, policy):
    ids, mask = left_padded(prompts(27, 9, 18))
    want = expected(model, ids, attention_mask=mask)
    model.set_attn_implementation("lil")
    cache = LilCache(model, policy, batch=3, max_tokens=27 + NEW, **({"budget": 80} if policy == "quest" else {}))
    assert hf_generate(model, ids, NEW, attention_mask=mask, cache=cache) == want
    # The last token is never fed back. Padding is never stored.
    assert cache.kv.lengths == [27 + NEW - 1, 9 + NEW - 1, 18 + NEW - 1]


def test_without_a_lil_cache_it_is_dense_attention(model):
    ids, mask = left_padded(prompts(27, 9))
    model.set_attn_implementation(dense_implementation(model))
    with LogitsLog(model) as dense:
        want = hf_generate(model, ids, NEW, attention_mask=mask)
    model.set_attn_implementation("lil")
    with LogitsLog(model) as lil:
        assert hf_generate(model, ids, NEW, attention_mask=mask) == want
    for a, b in zip(dense.logits, lil.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_packed_and_uncached_passes_are_dense(cached):
    model = build("gemma2")
    ids = torch.stack(prompts(40, 40))
    outputs = []
    for implementation in ("eager", "lil"):
        model.set_attn_implementation(implementation)
        # Positions that start again pack two sequences in one row, where there is no cache.
        positions = None if cached else torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)
        outputs.append(model(ids, position_ids=positions, use_cache=cached).logits)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill(model, padded):
    ids, mask = left_padded(prompts(27, 12 if padded else 27))
    want = expected(model, ids, attention_mask=mask)
    model.set_attn_implementation("lil")
    cache = LilCache(model, batch=2, max_tokens=27 + NEW)
    # Chunks of 10: for the short prompt the first one is all padding.
    assert hf_generate(model, ids, NEW, attention_mask=mask, cache=cache, prefill_chunk_size=10) == want
    assert cache.kv.lengths == [len(row[row > 0]) + NEW - 1 for row in ids * mask]


@pytest.mark.parametrize(("policy", "least"), [("sink", 41), ("quest", 64)])
def test_a_protected_prompt_in_chunks_must_fit_whole(policy, least):
    model, ids = build("llama"), torch.stack(prompts(40))
    model.set_attn_implementation("lil")
    caches = [
        LilCache(model, policy, budget=budget, protect_prompt=True, max_tokens=60) for budget in (least, least - 1)
    ]
    hf_generate(model, ids, 9, cache=caches[0], prefill_chunk_size=10)
    with pytest.raises(
        ValueError, match=f"expected at least {least} tokens to protect a prompt of 40.* got {least - 1}"
    ):
        hf_generate(model, ids, 9, cache=caches[1], prefill_chunk_size=10)


def test_reset_serves_all_rows_again():
    model, ids = build("llama"), torch.stack(prompts(12, 12))
    model.set_attn_implementation("lil")
    cache = LilCache(model, batch=2, max_tokens=30)
    cache.rows = [1]
    hf_generate(model, ids[:1], 3, cache=cache)
    cache.reset()
    assert cache.rows == [0, 1] and len(hf_generate(model, ids, 3, cache=cache)) == 2


def test_a_second_turn_continues_the_cache(model):
    first, second = torch.stack(prompts(20, 20)), torch.stack(prompts(11, 11, seed=2))
    model.set_attn_implementation("lil")
    cache = LilCache(model, batch=2, max_tokens=120)
    reply = torch.tensor(hf_generate(model, first, 9, cache=cache))
    talk = torch.cat([first, reply, second], 1)
    found = hf_generate(model, talk, NEW, cache=cache)
    assert found == expected(model, talk)
    model.set_attn_implementation("lil")
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.kv.bytes_in_use == 0
    assert hf_generate(model, talk, NEW, cache=cache) == found


def test_importing_registers_once_and_again():
    register()
    register()
    model = FAMILIES["llama"]()
    model.set_attn_implementation("lil")
    assert model.config._attn_implementation == "lil"
    assert (
        hf.LlamaForCausalLM._from_config(model.config, attn_implementation="lil").config._attn_implementation == "lil"
    )


def test_attach_returns_the_shape():
    shape = attach(build("gemma2"))
    assert (shape.num_layers, shape.kv_heads, shape.head_dim, shape.vocab_size) == (4, 2, 64, 211)
    assert shape.sliding_windows == (WINDOW, None, WINDOW, None)
    assert attach(build("mistral-sliding")).sliding_windows == (WINDOW,) * 4
    assert attach(build("mistral")).sliding_windows == attach(build("llama")).sliding_windows == (None,) * 4
    # A config keeps what its model does not know: an attribute left from another family is no window.
    left_over = hf.LlamaForCausalLM(hf.LlamaConfig(**small(sliding_window=WINDOW)))
    assert attach(left_over).sliding_windows == (None,) * 4


def small(**changes):
    return {**BASE, **changes}


def further(kv=None, **changes):
    """Options for a config of any family: heads of 64, ``kv`` of them for keys; None: the config does not say."""
    unsaid = {"head_dim", "num_key_value_heads"}
    options = {name: value for name, value in small(hidden_size=256).items() if name not in unsaid}
    return {**options, **({"num_key_value_heads": kv} if kv else {}), **changes}


def of_type(kind, **changes):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **further(**changes))).eval()


FURTHER = {
    **{kind: {} for kind in ("codegen", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "persimmon")},
    **{kind: {"kv": 2} for kind in ("cohere", "granite", "nemotron", "olmo2", "phi", "smollm3")},
    **{kind: {"kv": 2, "sliding_window": WINDOW} for kind in ("mixtral", "phi3", "phimoe", "starcoder2")},
    "glm4": {"kv": 2, "head_dim": 64},
    "qwen2_moe": {"kv": 2, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


@pytest.mark.parametrize("kind", FURTHER)
def test_further_families_give_the_tokens_of_transformers(kind):
    model, sequences = of_type(kind, **FURTHER[kind]), prompts(27, 9)
    ids, mask = left_padded(sequences)
    model.set_attn_implementation("eager")
    want = hf_generate(model, ids, NEW, attention_mask=mask)
    assert min(len(set(row)) for row in want) > 5, "outputs of few tokens prove little"
    assert generate(model, sequences, max_new_tokens=NEW).tokens == want
    model.set_attn_implementation("lil")
    cache = LilCache(model, batch=2, max_tokens=27 + NEW)
    assert hf_generate(model, ids, NEW, attention_mask=mask, cache=cache) == want


UNSERVED = {
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=64, d_kv=64, d_ff=64, num_layers=1, num_heads=1)
        ),
        "encoder-decoder",
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small(head_dim=32))), "head_dim 32"),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**small(layer_types=ALTERNATING, num_local_experts=2, num_experts_per_tok=1))
        ),
        "attention sinks",
    ),
    "deepseek_v3": (
        lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **{k: v for k, v in BASE.items() if k != "head_dim"},
                q_lora_rank=16,
                kv_lora_rank=16,
                n_routed_experts=2,
                n_group=1,
                topk_group=1,
                num_experts_per_tok=1,
                moe_intermediate_size=32,
                first_k_dense_replace=4,
            )
        ),
        "MLA",
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**further(), add_cross_attention=True)),
        "not causal",
    ),
    "mllama_text_model": (
        lambda: hf.MllamaForCausalLM(hf.MllamaTextConfig(**further(kv=2, bos_token_id=1), cross_attention_layers=[1])),
        "cross-attention layers",
    ),
    "diffllama": (lambda: of_type("diffllama", kv=2), "differential"),
    "doge": (lambda: of_type("doge", kv=2), "mask of its own"),
    "jetmoe": (lambda: of_type("jetmoe", kv=2, kv_channels=64), "experts"),
    "bloom": (lambda: of_type("bloom"), "AttentionInterface"),
    "falcon": (lambda: of_type("falcon"), "AttentionInterface"),
    "bert": (lambda: of_type("bert", is_decoder=True), "no standard attention"),
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1)),
        "AttentionInterface|no standard attention",
    ),
    "gemma3_text": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**BASE, use_bidirectional_attention=True)),
        "not causal",
    ),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_models_that_cannot_be_served(kind):
    make, reason = UNSERVED[kind]
    model = make()
    with pytest.raises(ValueError, match=f"cannot serve model type '{kind}': .*({reason})"):
        attach(model)
    with pytest.raises(ValueError, match=reason):
        LilCache(model, max_tokens=16)


def test_a_model_that_uses_the_cache_in_its_own_way():
    model = build("llama")
    model.set_attn_implementation("lil")
    cache, module = LilCache(model, max_tokens=16), model.model.layers[0].self_attn

    def states(heads=2):
        return torch.zeros(2, 1, heads, 3, 64).unbind()

    def refused(reason):
        return pytest.raises(ValueError, match=f"cannot serve model type 'llama': {reason}")

    with refused("layer 1 ran where layer 0 was expected"):
        cache.update(*states(), 1)
    with refused(r"layer 0: keys and values: expected shape \[1, 2, 3, 64\], got \[1, 4, 3, 64\]"):
        cache.update(*states(heads=4), 0)
    key, value = cache.update(*states(), 0)
    with refused("layer 0 changes its keys behind the cache"):
        cache.update(*states(), 1)
    lil_attention(module, torch.zeros(1, 4, 3, 64), key, value, None)
    with refused("layer 0 reads its keys more than once"):
        lil_attention(module, torch.zeros(1, 4, 3, 64), key, value, None)
    cache.reset()
    cache.update(*states(), 0)


def test_not_a_transformers_model():
    with pytest.raises(ValueError, match="'Linear': it is not a transformers model"):
        attach(torch.nn.Linear(2, 2))


def test_another_attention_implementation_is_told():
    model, ids = build("llama"), torch.stack(prompts(5))
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('lil'\)"):
        model(ids, use_cache=True, **taking(model, LilCache(model, max_tokens=16)))


def test_errors_of_a_pass():
    model, ids = build("llama"), torch.stack(prompts(5, 5))
    model.set_attn_implementation("lil")

    def run(cache, **options):
        return model(ids, use_cache=True, **taking(model, cache), **options)

    with pytest.raises(ValueError, match="batch: expected 1 sequences, got 2"):
        run(LilCache(model, max_tokens=16))
    with pytest.raises(ValueError, match="expected at most 4 tokens"):
        run(LilCache(model, batch=2, max_tokens=4))
    with pytest.raises(ValueError, match="attention_mask: expected"):
        run(LilCache(model, batch=2, max_tokens=16), attention_mask=torch.zeros(2, 1, 5, 5))
    cache = LilCache(model, batch=2, max_tokens=16)
    cache.kv.pool_of(0).free.clear()
    with pytest.raises(OutOfPagesError):
        run(cache)
    with pytest.raises(NotImplementedError, match="beam search"):
        model.generate(
            ids[:1],
            attention_mask=torch.ones(1, 5),
            num_beams=2,
            max_new_tokens=4,
            **taking(model, LilCache(model, batch=2, max_tokens=16)),
        )
