"""The engine: a fixed number of slots, whose step waits for nothing and is one CUDA graph.

`DecodeLoop` decides on the host who stops, at the very token. Here everything that a step decides is decided on the
device: the token, the LZ77 size, the stop rule, who goes on. A sequence that has stopped stands still, at the very
token too. The host follows some steps behind: it reads the codes from pinned copies, and gives the slot to the next.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lil_ops.actions import Action, ActionEvent, Answer, Course, Rescue
from lil_ops.cache import OutOfPagesError
from lil_ops.checks import is_whole
from lil_ops.device_steps import DeviceSteps
from lil_ops.integrations.compiled import StepCache, compiled
from lil_ops.integrations.transformers import NAME
from lil_ops.loop import ModelLoop, check_prompts, eos_ids, uniforms
from lil_ops.policies import Policy
from lil_ops.sampling import most_likely, sample
from lil_ops.stopping import Lz77Tracker, Progress, StopReason, StopRule

ANSWER_TOKENS = 64  # room for the forced tokens of an `Answer`


@dataclass(frozen=True, eq=False)
class Request:
    """A sequence to generate. seed: its draws are those of `generate` with this seed, alone. Requests are told apart as
    objects, so that one can be a key: a `Completion` has the very one it answers."""

    prompt: torch.Tensor | Sequence[int]
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What became of a request. Fields as in `GenerationResult`, of one sequence; ``phrases``, ``bits``: its size.
    kv_bytes: of the pages that were its own, those of its whole length."""

    request: Request
    tokens: list[int]
    stop_reason: StopReason
    phrases: int
    bits: int
    kv_bytes: int
    events: list[ActionEvent] = field(default_factory=list)
    lost_bits: float | None = None


@dataclass
class _Slot:
    request: Request
    course: Course
    begun: int  # its first report


class Engine(ModelLoop):
    """Serves sequences in ``slots`` places of one batch; sequences come and go while it runs.

    Args:
        model: as in `generate`. slots: sequences at a time. max_tokens: of the longest one, prompt and output.
        policy, guardian, action, measure_loss, temperature, top_k, top_p, page_size: as in `generate`; the same for all
            sequences.
        num_pages: size of the cache's pools; a sequence takes the pages of its whole length when it comes.
        compile: torch.compile the model's part of a step, in one graph and with its weights frozen: layers that share
            an input become one product, for which their weights are copied. On CUDA also what a step does beside the
            model. A dict has arguments for `torch.compile`.
            A compiled model rounds differently: tokens may differ from those of `generate`.
        graph: capture the step in a CUDA graph; None: where that is possible, and a warning says why where it is not.
        lag: steps that the host may be behind the device.

    Use as a context manager, which gives the model attention "lil" (outside, `add` and `step` raise RuntimeError)::

        with Engine(model, slots=64, max_tokens=4096, policy="quest", budget=1024) as engine:
            for completion in engine.run(requests):
                print(completion.tokens)

    Raises ValueError for what cannot be served, before any work. A step that broke off (an interrupt, a full device)
    has left its sequences between two tokens: `add`, `step` and `completed` raise RuntimeError from then on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        slots: int,
        max_tokens: int,
        policy: str | Policy = "full",
        guardian: StopRule | None = None,
        action: Action | None = None,
        measure_loss: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        page_size: int = 16,
        num_pages: int | None = None,
        compile: bool | dict = False,
        graph: bool | None = None,
        lag: int = 4,
        **policy_options,
    ):
        if graph and model.device.type != "cuda":
            raise ValueError(f"Engine: graph: expected None or False for a model on {model.device.type}, got {graph}")
        if not is_whole(lag, 0):
            raise ValueError(f"Engine: lag: expected a whole number of at least 0, got {lag!r}")
        final = action.then if isinstance(action, Rescue) else action
        if isinstance(final, Answer) and len(final.tokens) > ANSWER_TOKENS:
            raise ValueError(f"Answer: tokens: expected at most {ANSWER_TOKENS} in an Engine, got {len(final.tokens)}")
        super().__init__(
            model,
            policy=policy,
            guardian=guardian,
            action=action,
            measure_loss=measure_loss,
            batch=slots,
            max_tokens=max_tokens,
            prompt_lens=[],
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            page_size=page_size,
            num_pages=num_pages,
            **policy_options,
        )
        if not self.cache.policy.on_device:
            raise ValueError(f"Engine: policy {self.cache.policy.name} decides on the host; use lil_ops.generate")
        self._device = model.device
        self._eos = torch.tensor(eos_ids(model, eos_token_id), dtype=torch.int64, device=self._device)
        self._lag, self._graph_wanted = lag, graph
        self._compiled = None
        if compile:
            options = compile if isinstance(compile, dict) else {}
            self._compiled = compiled(model, **options)
            self._step_cache = StepCache(self.cache.shape.num_layers)
        self._choose = partial(sample, **self._sampling)
        self._prepared, self._taken, self._closed = self._bookkeeping()
        if compile and model.device.type == "cuda":
            self.compile_bookkeeping(**options)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=self._device)

        # One entry a slot. What a step needs that changes from sequence to sequence is in tensors: a graph reads them.
        self._tokens, self._output = ints(1, dtype=torch.int64), ints(max_tokens)
        self._num_tokens, self._limit = ints(), ints()
        self._uniforms = ints(max_tokens, dtype=torch.float32)
        self._stop = ints() + StopReason.LENGTH  # nobody runs
        self._forced, self._forced_at, self._forced_len = ints(ANSWER_TOKENS, dtype=torch.int64), ints(), ints()
        self._raised_until, self._answering = ints(), ints(dtype=torch.bool)
        self._lost = ints(dtype=torch.float32)
        # What the host hears of each slot: code, tokens, size in phrases and in bits.
        self._summary = torch.zeros(4, slots, dtype=torch.int32, device=self._device)
        self._tracker = Lz77Tracker(slots, max_tokens, self._vocab_size, self._device)
        self._watch = guardian.start(slots, self._device) if guardian else None
        self._slot = torch.arange(slots, device=self._device)

        self._steps = DeviceSteps(self.cache.kv)
        self._steps.install()
        self._slots: list[_Slot | None] = [None] * slots
        self._broke_off = False
        self._reported = 0
        self._reports: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    @property
    def free_slots(self) -> int:
        return self._slots.count(None)

    @torch.inference_mode()
    def add(self, request: Request) -> None:
        """Run its prompt in a free slot, and produce its first token.

        Raises `OutOfPagesError` where the pools have too few pages left, ValueError where no slot is free and for a
        request that cannot be served; nothing has changed then.
        """
        self._check_usable()
        (prompt,) = check_prompts([request.prompt], self._vocab_size)
        most = self.cache.kv.max_tokens - len(prompt)
        if most < 1:
            raise ValueError(f"Engine: prompt: expected at most {len(prompt) + most - 1} tokens, got {len(prompt)}")
        if not is_whole(request.max_new_tokens, 1, most):
            raise ValueError(
                f"Engine: max_new_tokens: expected a whole number from 1 to {most} behind a prompt of {len(prompt)} "
                f"tokens, got {request.max_new_tokens!r}"
            )
        if not self.free_slots:
            raise ValueError(f"Engine: expected a free slot, got {len(self._slots)} that are taken")
        row = self._slots.index(None)
        draws = uniforms(request.max_new_tokens, request.seed)
        self.cache.policy.check_budget(self.cache.kv, [len(prompt)])
        self.cache.kv.reserve(row, len(prompt), request.max_new_tokens - 1)  # the last token is never fed back
        try:
            self._begin(row, request, prompt, draws)
        except BaseException:
            self.cache.kv.free(row)
            self._steps.install()
            self._stop[row] = StopReason.LENGTH
            raise
        self._slots[row] = _Slot(request, self._course(), self._reported)
        self._report()

    def _begin(self, row: int, request: Request, prompt: torch.Tensor, draws: torch.Tensor) -> None:
        """A sequence's prompt and first token, in a slot whose pages are reserved."""
        self.cache.begin_pass([row])
        logits = self._forward(prompt[None], torch.arange(len(prompt))[None])
        self._steps.install()
        self._steps.load(row)
        for tensor, value in (
            (self._num_tokens, 0),
            (self._limit, request.max_new_tokens),
            (self._stop, StopReason.RUNNING),
            (self._forced_len, 0),
            (self._answering, False),
            (self._raised_until, 0),
            (self._lost, 0),
        ):
            tensor[row] = value
        self._tracker.reset(row)
        if self._watch:
            self._watch.reset(row)
        self._uniforms[row, : len(draws)] = draws.to(self._device)
        first = sample(logits, self._uniforms[row : row + 1, 0], **self._sampling)
        if self.cache.lost_bits is not None:
            self.cache.lost_bits.zero_()
        self._settle(first.repeat(len(self._slots)), self._slot == row)

    @torch.inference_mode()
    def step(self) -> None:
        """Produce one more token in every running slot; does not wait for the device."""
        self._check_usable()
        try:
            self._step()
        except BaseException:
            self._broke_off = True
            raise
        self._report()

    def _step(self) -> None:
        raised = any(slot and slot.course.rescued_until is not None for slot in self._slots)
        if self._graph_wanted is not False and self._device.type == "cuda":
            self._replay(raised)
        else:
            self._device_step(raised)

    @torch.inference_mode()
    def completed(self, wait: bool = False) -> list[Completion]:
        """The sequences that are known to have ended; their slots are free again.

        Reads what the device has reported. It waits for a report that is more than ``lag`` steps old, and with ``wait``
        for all.
        """
        self._check_whole()
        done = []
        while self._reports:
            number, report, event = self._reports[0]
            if event is not None and not event.query():
                if len(self._reports) <= self._lag and not wait:
                    break
                event.synchronize()
            self._reports.popleft()
            done += self._read(number, report)
        return done

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests in their order, as many at a time as there are slots and pages; completions as they come.
        A request is taken from ``requests`` when there is a slot for it, and may have to wait for pages then.

        Raises as `add`, for too few pages only where a request cannot be served though nothing runs. What runs then, or
        when the iteration is left, is still there, and ``run([])`` goes on with it; a request that waits is not.
        """
        self._check_usable()
        waiting, request = iter(requests), None
        while True:
            while self.free_slots and (request := request or next(waiting, None)):
                try:
                    self.add(request)
                except OutOfPagesError:
                    if self.free_slots == len(self._slots):
                        raise
                    break  # until somebody ends
                request = None
            if self.free_slots == len(self._slots):
                return
            self.step()
            yield from self.completed()

    def compile_bookkeeping(self, **options) -> None:
        """torch.compile what a step does beside the model and the stop rule: some fifty small operations, which on a
        GPU are a kernel each. ``compile`` does so on CUDA. options: of `torch.compile`. Before the first step.

        A draw stays as it is: compiled, its probabilities would be rounded otherwise.
        """
        parts = (compiled(part, **options) for part in self._bookkeeping())
        self._prepared, self._taken, self._closed = parts
        if self._sampling["temperature"] == 0:
            greedy = compiled(most_likely, **options)
            self._choose = lambda logits, draws: greedy(logits)

    def _bookkeeping(self) -> tuple[Callable, ...]:
        return self._prepare, self._take, self._close

    def _check_whole(self) -> None:
        if self._broke_off:
            raise RuntimeError("Engine: a step broke off, so that nothing can go on; make another Engine")

    def _check_usable(self) -> None:
        self._check_whole()
        if self._model.config._attn_implementation != NAME:
            raise RuntimeError(
                f"Engine: expected to be used in its `with` block, in which the model has attention {NAME}"
            )

    def synchronize(self) -> None:
        """Wait until the device has done all that it was sent."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _device_step(self, raised: bool) -> None:
        """One step of all slots: tensor operations only, on tensors that never move."""
        self._steps.forget()
        running, positions, draws = self._prepared()
        self.cache.raised = self._num_tokens < self._raised_until if raised else None
        with self.cache.on_device_steps():
            if self._compiled is None:
                logits = self._forward(self._tokens, positions)
            else:
                logits = self._logits(self._compiled, self._step_cache, self._tokens, positions)
        self._settle(self._choose(logits, draws), running)

    def _prepare(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Who runs in the next step, at which positions, and the numbers for what is drawn."""
        running = self._stop == StopReason.RUNNING.value
        self._steps.advance(running)
        positions = (self._steps.positions - 1).clamp(min=0).long()[:, None]
        draws = self._uniforms.gather(1, self._num_tokens.long()[:, None])
        return running, positions, draws[:, 0]

    def _settle(self, chosen: torch.Tensor, active: torch.Tensor) -> None:
        """Take the token of each active slot, and decide who stops. Both ``[slots]``."""
        counts, before = self._taken(chosen, active)
        phrases, bits = self._tracker.append(self._tokens, counts)
        if self._watch:
            lost = self.cache.lost_bits
            self._watch.check(Progress(self._tokens[:, 0], phrases, bits, self._num_tokens, active, lost, self._stop))
        self._closed(active, before, phrases, bits)

    # In this order: end of sequence, the rule, the length. A slot that has stopped keeps its reason.

    def _take(self, chosen: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens into the output, and the codes of those that end by themselves. How many tokens each slot has
        taken, and the codes before."""
        before = self._stop.clone()
        at = self._forced_at.clamp(max=ANSWER_TOKENS - 1).long()[:, None]
        forced = active & (self._forced_at < self._forced_len)
        chosen = torch.where(forced, self._forced.gather(1, at)[:, 0], chosen)
        self._forced_at += forced
        self._tokens.copy_(torch.where(active[:, None], chosen[:, None], self._tokens))
        # Where a slot does not run, that is behind its output; it has room for the prompt as well.
        self._output.scatter_(1, self._num_tokens.long()[:, None], self._tokens.int())
        self._num_tokens += active
        ended = (self._tokens == self._eos).any(1) & active & ~forced
        self._stop.masked_fill_(ended, StopReason.EOS.value)
        return active.int(), before

    def _close(self, active: torch.Tensor, before: torch.Tensor, phrases: torch.Tensor, bits: torch.Tensor) -> None:
        """Who goes on in spite of the rule, who is full, and what the host will hear."""
        running, guardian = StopReason.RUNNING.value, StopReason.GUARDIAN.value
        self._stop.masked_fill_(self._answering & (self._stop == guardian), running)
        full = active & (self._stop == running) & (self._num_tokens >= self._limit)
        self._stop.masked_fill_(full, StopReason.LENGTH.value)
        # Rules look at all slots; one that took no token keeps its code.
        self._stop.copy_(torch.where(active, self._stop, before))
        if self.cache.lost_bits is not None:
            self._lost += torch.where(active, self.cache.lost_bits, 0)
        self._summary.copy_(torch.stack([self._stop, self._num_tokens, phrases, bits]))

    def _report(self) -> None:
        """Send the summary to the host, behind what the device has to do."""
        on_gpu, event = self._device.type == "cuda", None
        report = torch.empty(self._summary.shape, dtype=torch.int32, pin_memory=on_gpu)
        report.copy_(self._summary, non_blocking=True)
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._reports.append((self._reported, report, event))
        self._reported += 1

    def _read(self, number: int, report: torch.Tensor) -> list[Completion]:
        """What a report says of each slot. Actions take effect from here on: a stopped slot waits."""
        done = []
        for row, (code, count, phrases, bits) in enumerate(report.T.tolist()):
            slot = self._slots[row]
            if slot is None or number < slot.begun:
                continue
            course = slot.course
            if code in (StopReason.RUNNING, StopReason.LENGTH):
                course.went_on(count)
            if code == StopReason.RUNNING:
                continue
            # The report of a stop that an action has answered already.
            if course.events and course.events[-1].at == count and course.events[-1].what != "recovered":
                continue
            may_act = code == StopReason.GUARDIAN and count < slot.request.max_new_tokens
            if may_act and course.fired(count):
                self._act(row, course, count)
                continue
            tokens = self._output[row, :count].tolist()
            kv_bytes = self.cache.kv.bytes_of(row)
            lost = None if self.cache.lost_bits is None else self._lost[row].item() / max(1, count - 1)
            done.append(
                Completion(slot.request, tokens, StopReason(code), phrases, bits, kv_bytes, course.events, lost)
            )
            self._slots[row] = None
            self.cache.kv.free(row)
        return done

    def _act(self, row: int, course: Course, count: int) -> None:
        """Let a stopped slot go on, as its course says."""
        if course.forced:
            forced = torch.tensor(list(course.forced), dtype=torch.int64)
            self._forced[row, : len(forced)] = forced.to(self._device)
            self._forced_at[row], self._forced_len[row] = 0, len(forced)
            self._limit[row] = min(course.limit, self._slots[row].request.max_new_tokens)
            self._answering[row] = True
            self._raised_until[row] = 0
            course.forced.clear()
        elif course.rescued_until is not None:
            self._raised_until[row] = course.rescued_until
        self._stop[row] = StopReason.RUNNING

    def _replay(self, raised: bool) -> None:
        """Replay the graph of a step, captured at its first use."""
        if raised not in self._graphs:
            try:
                self._graphs[raised] = self._capture(raised)
            except RuntimeError as error:
                if self._graph_wanted:
                    raise
                self._graph_wanted = False
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"Engine: this model's step cannot be captured, and runs without a graph: {reason}", stacklevel=3
                )
                self._device_step(raised)
                return
        self._graphs[raised].replay()

    def _capture(self, raised: bool) -> torch.cuda.CUDAGraph:
        """Warm up on slots that stand still, so that nothing is produced, and capture."""
        stop = self._stop.clone()
        self._stop.fill_(StopReason.LENGTH)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._device_step(raised)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            self._stop.copy_(stop)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._device_step(raised)
        return graph
