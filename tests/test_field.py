"""What bench/field.py makes of outputs; its workers are not run."""

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def field(bench):
    return bench("field")


def test_quality_compares_answers_with_dense_and_with_the_truth(field):
    outputs, dense = [[5, 6, 2], [5, 7], [8]], [[5, 6, 2], [5, 6], [8]]
    texts, dense_texts = ["#11 then #12", "none", "#3"], ["#12", "none", "#4"]
    row = field.quality(outputs, dense, [2], ["12", "1", "3"], texts, dense_texts, r"#(\d+)")
    assert (row["same_answer"], row["right"], row["ended"], row["identical"]) == (1, 2, 1, 2)
    assert row["agree"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-3)
    assert "right" not in field.quality(outputs, dense, [2], None, texts, dense_texts, r"#(\d+)")


def test_what_reads_alike_has_the_same_budget(field):
    runs = list(field.runs((64,), ["lil_ops", "kvpress", "R-KV"], ["sink", "rkv"]))
    by_key = {run.key: run for run in runs}
    assert len(by_key) == len(runs)
    assert by_key["kvpress, StreamingLLMPress, every step, 64"].spec["target"] == 63  # and the new token
    assert by_key["kvpress, StreamingLLMPress, every 16, 64"].spec["target"] == 64
    buffers = by_key["lil_ops, rkv, every 16, 64"].spec["buffer"], by_key["R-KV, rkv, every 16, 64"].spec["interval"]
    assert buffers == (16, 16)
    snapkv = by_key["kvpress, SnapKVPress, every 16, 64"].spec
    assert snapkv["options"]["window_size"] < snapkv["buffer"] == 16


def test_problems_of_the_commonest_length(field, tmp_path):
    file = tmp_path / "problems.jsonl"
    lines = [{"prompt": "ab", "answer": "1"}, {"prompt": "abc"}, {"prompt": "cd", "answer": "2"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    ids, answers = field.problems_of(file, lambda text: {"input_ids": [ord(c) for c in text]})
    assert ids == [[97, 98], [99, 100]] and answers == ["1", "2"]


def test_progress_goes_on_with_the_same_measurement_only(field, tmp_path):
    file = tmp_path / "progress.jsonl"
    assert field.Progress(file, {"budget": 64}, False).get("a", lambda: {"x": 1}) == {"x": 1}
    assert field.Progress(file, {"budget": 64}, False).get("a", lambda: {"x": 2}) == {"x": 1}
    assert field.Progress(file, {"budget": 32}, False).get("a", lambda: {"x": 2}) == {"x": 2}
    assert field.Progress(file, {"budget": 32}, True).get("a", lambda: {"x": 3}) == {"x": 3}
