"""bench/facts.py: what a benchmark's result says of its run."""

import sys

import pytest


@pytest.fixture
def facts(bench):
    return bench("facts")


@pytest.mark.parametrize(
    "given, want",
    [
        ([], ""),
        (["--data", "/home/me/problems.jsonl", "--steps", "4"], " --data problems.jsonl --steps 4"),
        (["--commit", "abc", "--steps", "4", "--out", "/tmp/result.json", "--quick"], " --steps 4 --quick"),
        (["--commit=abc", "--quick"], " --quick"),
    ],
)
def test_a_command_without_its_place(facts, given, want, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/bench/loss_quality.py", *given])
    assert facts.command_line() == f"python bench/loss_quality.py{want}"


def test_of_a_run(facts):
    found = facts.facts("cpu", commit="abc")
    assert list(found) == ["date", "commit", "device", "versions", "command"] and found["commit"] == "abc"
    assert found["device"] == facts.cpu_name() and {"torch", "lil_ops"} <= set(found["versions"])
    assert facts.facts("cpu")["commit"] == facts.current_commit()
