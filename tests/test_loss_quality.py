"""What bench/loss_quality.py finds on a tiny model, and what bench/report_loss.py makes of it."""

import torch
from tiny_models import build, prompts


def test_figures_by_layer_and_in_bits(bench):
    true = torch.tensor([[0.5, 0.0], [0.75, 0.75]], dtype=torch.float64)  # two layers
    told = torch.tensor([[0.75, 0.0], [0.5, 1.0]], dtype=torch.float64)
    found = bench("loss_quality").figures(told, true)
    assert found["true_bits"] == (1 + 0 + 2 + 2) / 4
    assert found["told_bits"] == (2 + 0 + 1 + 24) / 4  # a share of 1 is 24 bits
    assert found["layers"] == [
        {"true": 0.25, "bias": 0.125, "mean_absolute_error": 0.125, "least": 0},
        {"true": 0.75, "bias": 0, "mean_absolute_error": 0.25, "least": -0.25},
    ]


def test_a_model_and_its_report(bench):
    model, choices = build("llama"), [(0, 32), (16, 32), (0, 256), (16, 256)]
    cases = []
    for scoring in ("minmax", "meanstd"):
        for row in bench("loss_quality").measure(model, prompts(300, 300), scoring, choices, steps=3):
            cases.append({"model": "tiny", "tokens": 300, **row})
    assert [(case["sink"], case["budget"]) for case in cases] == 2 * choices
    for case in cases:
        assert len(case["layers"]) == model.config.num_hidden_layers
        assert all(0 < layer["true"] < 1 for layer in case["layers"])
        assert case["scoring"] == "meanstd" or min(layer["least"] for layer in case["layers"]) > -1e-5
    # The same dense steps under both scorings; a larger budget misses less.
    for few, more in zip(cases[::4], cases[2::4], strict=True):
        assert more["true_bits"] < few["true_bits"]
    names = ("device", "dtype", "date", "commit", "command", "prompts", "text", "steps")
    facts = dict.fromkeys(names, "-") | {"versions": {"torch": "-"}}
    lines = bench("report_loss").loss_lines(facts | {"cases": cases})
    by_case = [line for line in lines if line.startswith("| tiny | 300 | 16 | 32 |")]
    assert len(by_case) == 2 and f"{cases[1]['true_bits']:.2f} | {cases[1]['told_bits']:.2f}" in by_case[1]
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("| layer |")) :]
    assert len(table) == 2 + model.config.num_hidden_layers
    assert f"{cases[7]['layers'][0]['mean_absolute_error']:.3f} |" in table[2]
