"""The JSON document of `lil-ops generate --json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lil_ops.cli.runs import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def document(
    options: dict,
    prompt: str,
    prompt_ids: list[int],
    outcomes: Sequence[Outcome],
    interrupted: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict:
    """What ``--json`` prints.

    Keys:
        prompt: as given. prompt_ids: what the model was given, chat template included; empty where Ctrl-C came first.
        model: path or id. options: the command's other options, under their names; null where not given (dtype: as
        loaded).
        versions: `lil_ops.build_info`. interrupted: whether Ctrl-C ended the command.
        runs: one object for each finished run, and for the one that was interrupted:
            name: as in the table. policy: name. policy_options: those given, and --loss-aware's defaults. guardian:
            null, or its interval, threshold, unit, loss_aware and loss_weight. tokens: the new ids. text: theirs,
            without special tokens. stop_reason: eos, length, guardian or interrupted.
            ttft_s, tbt_s, jct_s: seconds to the first token, between tokens (mean), in all.
            kv_bytes_peak: the most cache bytes in use. phrases: LZ77 size of ``tokens``. ratio: phrases a token.
            events: what the Guardian brought about, as [tokens so far, "answer", "rescue" or "recovered"].
            lz77_curve: element i is the LZ77 size of the first i + 1 tokens.
    """
    from lil_ops import build_info

    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "model": options["model"],
        "options": {name: value for name, value in options.items() if name != "model"},
        "versions": build_info(),
        "interrupted": interrupted,
        "runs": [_run(outcome, tokenizer) for outcome in outcomes],
    }


def _run(outcome: Outcome, tokenizer: PreTrainedTokenizerBase) -> dict:
    run, result = outcome.run, outcome.result
    return {
        "name": run.name,
        "policy": run.policy,
        "policy_options": run.policy_options,
        "guardian": vars(run.guardian) if run.guardian else None,
        "tokens": outcome.tokens,
        "text": tokenizer.decode(outcome.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "stop_reason": outcome.stop_reason,
        "ttft_s": result.ttft,
        "tbt_s": result.tbt,
        "jct_s": result.jct,
        "kv_bytes_peak": result.kv_bytes_peak,
        "phrases": result.phrases[0],
        "ratio": result.ratio[0],
        "events": [list(event) for event in result.events[0]],
        "lz77_curve": result.lz77[0].tolist(),
    }
