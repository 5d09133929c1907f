"""docs/performance.md, sections "Information loss", from bench/results/loss*.json."""

from __future__ import annotations

TEXT = """## Information loss: {models}, {dtype}

How near `information_loss` is to the truth: {device}; torch {torch}; {date}, commit {commit}; `{command}`. A
model reads {text} (windows: {prompts}) and goes on densely for {steps} steps. In each Quest chooses pages in every
layer, by either kind of scores, and what they would miss is compared with what is told: a *bound* by `minmax`, an
*estimate* by `meanstd`. *Sink*: tokens at the start that are always chosen. *True*: the share
of the softmax mass that is missed.
*Off*: told less true. *Absolute*: the mean of its absolute value. *Least*: the smallest difference of any head and
step; a bound is never below 0, up to rounding. Means over steps, query heads and layers; *worst*: the largest mean
absolute value of a layer."""
SHARES = "true | off | worst | least | estimate: true | off | absolute | worst"
BITS = """The same in bits a step, `-log2(1 - share)`, which is what `lost_bits` holds and a loss-aware rule reads: the
mean over steps, query heads and layers."""
LAYERS = """By layer, after {tokens} tokens, with a sink of {sink} and a budget of {budget}: *off* of the bound; *off*
and *absolute* of the estimate."""
LAYERS_BUDGET = 256


def loss_lines(result: dict) -> list[str]:
    cases = {}
    for case in result["cases"]:
        key = tuple(case[name] for name in ("model", "tokens", "sink", "budget"))
        cases.setdefault(key, {})[case["scoring"]] = case
    shares = (_row(*key, *_shares(**scorings)) for key, scorings in cases.items())
    bits = (_row(*key, *_bits(**scorings)) for key, scorings in cases.items())
    models = ", ".join(dict.fromkeys(model for model, *_ in cases))
    lines = [TEXT.format(models=models, **result, **result["versions"]), "", *_head(SHARES), *shares]
    return [*lines, "", BITS, "", *_head("true | told | estimate: true | told"), *bits, *_layer_lines(cases)]


def _head(columns: str) -> list[str]:
    columns = f"model | tokens | sink | budget | bound: {columns}"
    return [_row(columns), _row("---", *["---:"] * columns.count("|"))]


def _layer_lines(cases: dict) -> list[str]:
    _, tokens, sink, _ = max(cases, key=lambda key: key[1:3])
    shown = {key[0]: each for key, each in cases.items() if key[1:] == (tokens, sink, LAYERS_BUDGET)}
    lines = ["", LAYERS.format(tokens=tokens, sink=sink, budget=LAYERS_BUDGET), ""]
    lines += [_row("layer", *(f"{model}: bound off | estimate off | absolute" for model in shown))]
    lines += [_row(*["---:"] * (1 + 3 * len(shown)))]
    for layer in range(max(len(each["minmax"]["layers"]) for each in shown.values())):
        lines.append(_row(layer, *(cell for each in shown.values() for cell in _layer(layer, **each))))
    return lines


def _layer(layer: int, minmax: dict, meanstd: dict) -> list[str]:
    if layer >= len(minmax["layers"]):
        return [""] * 3
    bound, estimate = minmax["layers"][layer], meanstd["layers"][layer]
    return [f"{bound['bias']:+.3f}", f"{estimate['bias']:+.3f}", f"{estimate['mean_absolute_error']:.3f}"]


def _shares(minmax: dict, meanstd: dict) -> list[str]:
    least = min(layer["least"] for layer in minmax["layers"])
    bound = [f"{_mean(minmax, 'true'):.3f}", f"{_mean(minmax, 'bias'):+.3f}", _worst(minmax), f"{least:+.1e}"]
    estimate = [f"{_mean(meanstd, 'true'):.3f}", f"{_mean(meanstd, 'bias'):+.3f}"]
    return [*bound, *estimate, f"{_mean(meanstd, 'mean_absolute_error'):.3f}", _worst(meanstd)]


def _bits(minmax: dict, meanstd: dict) -> list[str]:
    return [f"{case[key]:.2f}" for case in (minmax, meanstd) for key in ("true_bits", "told_bits")]


def _mean(case: dict, key: str) -> float:
    return sum(layer[key] for layer in case["layers"]) / len(case["layers"])


def _worst(case: dict) -> str:
    errors = [layer["mean_absolute_error"] for layer in case["layers"]]
    return f"{max(errors):.3f} (layer {errors.index(max(errors))})"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
