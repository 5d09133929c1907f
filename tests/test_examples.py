"""The examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import build, prompts

import lil_ops
from lil_ops import policies
from lil_ops.decode import DecodeLoop

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def shared_heads():
    spec = importlib.util.spec_from_file_location("shared_heads", EXAMPLES / "shared_heads.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_policy_of_ones_own_reads_what_any_head_ranks_highest(shared_heads):
    found = []

    class Logged(shared_heads.SharedHeads):
        def select(self, layer, q, cache, scale):
            selection = super().select(layer, q, cache, scale)
            low, high = cache.summary[layer][cache.step_of(layer).page_table[0].clamp(min=0)].unbind(2)
            bounds = torch.maximum(
                q[0].unflatten(0, (2, -1)) * low[:, :, None], q[0].unflatten(0, (2, -1)) * high[:, :, None]
            )
            found.append((bounds.sum(-1).amax((1, 2)), selection, cache.lengths[0]))
            return selection

    options = {"max_new_tokens": 20, "page_size": 8, "eos_token_id": []}
    with DecodeLoop(build("llama"), prompts(40), policy=Logged(budget=32, dense_layers=1), **options) as loop:
        list(loop)
    assert len(found) == 3 * 19
    for bounds, selection, length in found:
        pages = -(-length // 8)
        bounds = bounds[:pages].clone()
        bounds[-1] = torch.inf  # the current page
        assert selection.pages[0].tolist() == [bounds.topk(4).indices.sort().values.tolist()] * 2


def test_a_policy_of_ones_own_is_dense_where_its_budget_covers_all(shared_heads):
    model, sequences = build("llama"), prompts(40, 7)
    covering = shared_heads.SharedHeads(budget=512)
    results = [lil_ops.generate(model, sequences, policy=p, max_new_tokens=20) for p in (covering, "full")]
    assert results[0].tokens == results[1].tokens


def test_the_example_runs(shared_heads, monkeypatch, capsys):
    class Characters:
        def apply_chat_template(self, chat, **options):
            return [ord(character) for character in chat[0]["content"]]

        def decode(self, tokens):
            return f"{len(tokens)} characters"

    monkeypatch.setattr(lil_ops, "load_model", lambda name: (build("llama"), Characters()))
    shared_heads.main("any", "What is it?" * 12)
    lines = capsys.readouterr().out.splitlines()
    count = lines[0].split()[0]
    assert lines[1].startswith(f"{count} tokens, ") and "TBT" in lines[1]
    assert "shared-heads" not in policies.POLICIES
