"""The decode loop: prefill, then one token a running sequence a step, until every sequence has stopped."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lil_ops import _C
from lil_ops.actions import Action
from lil_ops.checks import is_whole
from lil_ops.integrations.attach import attach
from lil_ops.loop import ModelLoop, TokenIds, check_prompts, eos_ids, uniforms, whole_numbers
from lil_ops.policies import Policy
from lil_ops.result import GenerationResult, StepEvent
from lil_ops.sampling import sample
from lil_ops.stopping import Lz77Tracker, Progress, StopReason, StopRule


class DecodeLoop(ModelLoop):
    """Decodes a batch step by step. Arguments and errors as in `generate`, but the batch must not be empty.

    A context manager, which gives the model attention "lil" and on leaving puts back what it had (so loops that share a
    model are left in the reverse order). Iterating runs it::

        with DecodeLoop(model, input_ids, policy="quest", budget=256) as loop:
            for event in loop:          # the same as loop.prefill() if need be, then loop.step() while loop.active
                print(event.tokens)
        print(loop.result().tokens)

    An exception, KeyboardInterrupt included, may end it anywhere: `result` then has what was produced before.

    Attributes: ``active`` the rows still running, ``cache`` the `LilCache`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: TokenIds,
        *,
        policy: str | Policy = "full",
        guardian: StopRule | None = None,
        action: Action | None = None,
        measure_loss: bool = False,
        max_new_tokens: int = 256,
        eos_token_id: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        page_size: int = 16,
        **policy_options,
    ):
        if not is_whole(max_new_tokens, 1):  # more than memory has is another error
            raise ValueError(f"max_new_tokens: expected a whole number of at least 1, got {max_new_tokens!r}")
        self._prompts = check_prompts(input_ids, attach(model).vocab_size)
        lengths = [len(prompt) for prompt in self._prompts]
        batch = len(lengths)
        super().__init__(
            model,
            policy=policy,
            guardian=guardian,
            action=action,
            measure_loss=measure_loss,
            batch=batch,
            max_tokens=max(lengths) + max_new_tokens,
            prompt_lens=lengths,
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            page_size=page_size,
            **policy_options,
        )
        self._max_new_tokens = max_new_tokens
        # Drawn before the run, from each row's own generator: they depend neither on the batch nor on who stops.
        self._uniforms = torch.stack([uniforms(max_new_tokens, each) for each in _seeds(seed, batch)])
        # Who stops is decided on the CPU, which reads each step's tokens anyway, and where lz77_append has its kernel.
        self._eos = torch.tensor(eos_ids(model, eos_token_id), dtype=torch.int64)
        self._tracker = Lz77Tracker(batch, max_new_tokens, self._vocab_size)
        self._watch = guardian.start(batch) if guardian else None
        self._courses = [self._course() for _ in range(batch)]

        # One entry a row, running or not; `_rows` selects the running ones.
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64)
        self._positions = torch.tensor(lengths, dtype=torch.int64)[:, None]
        self._num_tokens = torch.zeros(batch, dtype=torch.int32)
        self._stop = torch.zeros(batch, dtype=torch.int32)
        self._run(list(range(batch)))

        self._output: list[list[int]] = [[] for _ in range(batch)]
        self._reasons = [StopReason.RUNNING] * batch
        self._step_times: list[float] = []
        self._lost = torch.zeros(batch)
        self._kv_bytes = [0] * batch

    def __iter__(self) -> Iterator[StepEvent]:
        if not self._step_times:
            yield self.prefill()
        while self.active:
            yield self.step()

    @torch.inference_mode()
    def prefill(self) -> StepEvent:
        """Run the prompts, one by one and without padding, and produce every row's first token. Once, before `step`;
        called again: RuntimeError."""
        if self._step_times:
            raise RuntimeError("DecodeLoop: prefill: the prompts have been run")
        started = time.perf_counter()
        logits = []
        for row, prompt in enumerate(self._prompts):
            self.cache.rows = [row]
            logits.append(self._forward(prompt[None], torch.arange(len(prompt))[None]))
        self.cache.rows = self.active
        return self._accept(torch.cat(logits), started)

    @torch.inference_mode()
    def step(self) -> StepEvent:
        """Produce one more token of every running row. Without one, or before `prefill`: RuntimeError."""
        if not self._step_times or not self.active:
            raise RuntimeError(f"DecodeLoop: step: {'no row runs' if self._step_times else 'expected prefill first'}")
        started = time.perf_counter()
        logits = self._forward(self._tokens[self._rows], self._positions[self._rows])
        self._positions += 1
        return self._accept(logits, started)

    def result(self) -> GenerationResult:
        """What has been produced so far; valid at any time, also after an exception."""
        curves = [_C.lz77_trace(np.array(tokens, dtype=np.int64), self._vocab_size)[0] for tokens in self._output]
        return GenerationResult(
            tokens=[list(tokens) for tokens in self._output],
            stop_reason=list(self._reasons),
            step_times=list(self._step_times),
            kv_bytes_peak=self.cache.kv.bytes_peak,
            lz77=curves,
            events=[list(course.events) for course in self._courses],
            lost_bits=None if self.cache.lost_bits is None else self._mean_loss(),
            # A stopped row's pages are free again, so it has none now.
            kv_bytes=[self._kv_bytes[row] or self.cache.kv.bytes_of(row) for row in range(len(self._output))],
        )

    def _accept(self, logits: torch.Tensor, started: float) -> StepEvent:
        """Choose the running rows' tokens and decide who stops."""
        step = len(self._step_times)
        chosen = sample(logits, self._uniforms[self._rows, step].to(logits.device), **self._sampling)
        self._tokens[self._rows, 0] = chosen.cpu()  # the step's one wait for the device
        forced = [row for row in self.active if self._courses[row].forced]
        for row in forced:
            self._tokens[row, 0] = self._courses[row].forced.popleft()
        self._num_tokens += 1
        phrases, bits = self._tracker.append(self._tokens, self._counts)
        # Who stops is settled in this order: end of sequence, Guardian, length. A stopped row keeps its reason.
        ended = (self._tokens == self._eos).any(1) & (self._stop == StopReason.RUNNING)
        ended[forced] = False
        self._stop.masked_fill_(ended, StopReason.EOS)
        # Behind the transfer above, so that it waits for nothing more.
        lost = None if self.cache.lost_bits is None else self.cache.lost_bits.cpu()
        if lost is not None:
            self._lost[self._rows] += lost[self._rows]
        if self._watch:
            now = self._tokens[:, 0], phrases, bits, self._num_tokens, self._counts > 0, lost, self._stop
            self._watch.check(Progress(*now))
            self._act()
        if step + 1 == self._max_new_tokens:
            self._stop.masked_fill_(self._stop == StopReason.RUNNING, StopReason.LENGTH)
        columns = [self._tokens[:, 0], self._stop, phrases] + ([self._watch.gain] if self._watch else [])
        tokens, stop, phrases, *gain = torch.stack(columns).tolist()

        served = self.active
        self._step_times.append(time.perf_counter() - started)
        for row in served:
            self._output[row].append(tokens[row])
            self._reasons[row] = StopReason(stop[row])
        stopped = {row: self._reasons[row] for row in served if stop[row]}
        for row in stopped:
            self._kv_bytes[row] = self.cache.kv.bytes_of(row)
            self.cache.kv.free(row)
        if stopped:
            self._run([row for row in served if row not in stopped])
        return StepEvent(
            step=step,
            tokens={row: tokens[row] for row in served},
            stop=stopped,
            seconds=self._step_times[-1],
            phrases={row: phrases[row] for row in served},
            gain={row: gain[0][row] for row in served} if gain else {},
            kv_bytes=self.cache.kv.bytes_in_use,
        )

    def _mean_loss(self) -> list[float]:
        """Bits lost in a decode step, of which the first token needs none."""
        steps = [max(1, len(tokens) - 1) for tokens in self._output]
        return [lost / count for lost, count in zip(self._lost.tolist(), steps, strict=True)]

    def _act(self) -> None:
        """Rows of whose stop an action makes something else go on."""
        if self._action is None:
            return
        codes = self._stop.tolist()
        for row in self.active:
            course, at = self._courses[row], len(self._output[row]) + 1
            more = at < self._max_new_tokens or course.limit is not None
            if codes[row] == StopReason.GUARDIAN and more and course.fired(at):
                self._stop[row] = StopReason.RUNNING
            elif codes[row] == StopReason.RUNNING:
                course.went_on(at)
            if course.limit is not None and at >= course.limit and codes[row] != StopReason.EOS:
                self._stop[row] = StopReason.LENGTH
        rescued = [row in self.active and self._courses[row].rescued_until is not None for row in range(len(codes))]
        self.cache.raised = torch.tensor(rescued, device=self._model.device) if any(rescued) else None

    def _run(self, rows: list[int]) -> None:
        """From here on the model runs these rows only; the others' LZ77 state stays untouched."""
        self.active = self.cache.rows = rows
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._counts = torch.zeros(len(self._tokens), dtype=torch.int32)
        self._counts[self._rows] = 1


def generate(
    model: torch.nn.Module,
    input_ids: TokenIds,
    *,
    policy: str | Policy = "full",
    guardian: StopRule | None = None,
    action: Action | None = None,
    measure_loss: bool = False,
    max_new_tokens: int = 256,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    page_size: int = 16,
    on_token: Callable[[StepEvent], object] | None = None,
    **policy_options,
) -> GenerationResult:
    """Generate with a policy and, if given, an early stop.

    Args:
        model: a transformers model that `attach` takes. Its attention implementation is "lil" during the call only.
        input_ids: token ids ``[batch, tokens]`` (no padding), or a list of sequences of any lengths, each a list of
            ints or a 1-D integer tensor.
        policy: name or `Policy`; ``policy_options`` (budget=256, sink=4, ...) go to it. guardian: a stop rule, such as
            `Guardian`; None: no early stop. action: what it brings about: `Answer`, `Rescue`; None: the end.
        measure_loss: record what attention loses in a step, as ``lost_bits``; for policies that tell it (quest, full).
            A stop rule that weighs it has it recorded anyway.
        max_new_tokens: per sequence. eos_token_id: id or ids; None: the model's own; ``()``: none.
        temperature, top_k, top_p: as in `lil_ops.sampling.sample`; temperature 0 is greedy. seed: sequence ``row``
            draws from its own generator, seeded ``seed + row``; or a list of one seed a sequence, which makes its draws
            independent of its place in the batch too. torch's generator uses only the lower 32 bits of a seed.
        page_size: tokens in a page of the cache. on_token: called with a `StepEvent` after each step; what it raises
            ends the generation (use `DecodeLoop` to keep what was produced).

    Sequences stop for the first of: an end-of-sequence token, the stop rule, ``max_new_tokens``. A stopped sequence
    leaves the batch and returns its pages. An empty batch gives an empty result.

    Raises ValueError, before any work, for a model that cannot be served, an empty prompt, ids outside the vocabulary,
    or an option out of range.
    """
    if len(input_ids) == 0:
        return GenerationResult(tokens=[], stop_reason=[], step_times=[], kv_bytes_peak=0, lz77=[], kv_bytes=[])
    loop = DecodeLoop(
        model,
        input_ids,
        policy=policy,
        guardian=guardian,
        action=action,
        measure_loss=measure_loss,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        page_size=page_size,
        **policy_options,
    )
    with loop:
        for event in loop:
            if on_token is not None:
                on_token(event)
    return loop.result()


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    several = isinstance(seed, Sequence) or getattr(seed, "ndim", 0) > 0
    seeds = whole_numbers(seed) if several else [operator.index(seed) + row for row in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"seed: expected a number, or one for each of {batch} sequences, got {len(seeds)}")
    return seeds
