"""docs/performance.md, section "Information loss", from bench/results/loss.json."""

from __future__ import annotations

TEXT = """## Information loss

The share of the softmax mass that Quest's pages miss, as `information_loss` tells it, against the truth: {model} reads
{tokens} tokens of a text and goes on for {steps}; {date}, commit {commit}; `{command}`. All layers sparse. Means over
steps, query heads and layers; *worst layer*: the largest of the layers' own. *Least*: the smallest difference of any
head and step; a bound is never below 0, up to float32 rounding."""


def loss_lines(result: dict) -> list[str]:
    lines = [TEXT.format(**result), ""]
    lines.append("| budget | scores | true loss | told - true | mean absolute error | worst layer | least |")
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for case in result["cases"]:
        layers = case["layers"]
        true, bias, error = (
            sum(layer[key] for layer in layers) / len(layers) for key in ("true", "bias", "mean_absolute_error")
        )
        worst = max(layers, key=lambda layer: layer["mean_absolute_error"])
        kind = {"minmax": "minmax, a bound", "meanstd": "meanstd, an estimate"}[case["scoring"]]
        least = min(layer["least"] for layer in layers)
        lines.append(
            f"| {case['budget']} | {kind} | {true:.3f} | {bias:+.3f} | {error:.3f} | "
            f"{worst['mean_absolute_error']:.3f} (layer {worst['layer']}) | {least:+.1e} |"
        )
    return lines
