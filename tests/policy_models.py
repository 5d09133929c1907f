"""The policies' rules in plain PyTorch, written apart from the package: what each head reads at each decode step.

Nothing is evicted or paged here. All keys are kept, and a rule gives a bool mask of the tokens that are read. The
tokens are given (teacher forcing), and a layer sees later tokens only through its own rule. So one causal pass over
prompt and output is enough: in each layer the rule goes through the decode steps one after the other. Attention and
scores are float64. A batch is one run a sequence.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "policy_model"


def top(scores: torch.Tensor, count: int, later: bool = False) -> torch.Tensor:
    """Bool, of the shape of ``scores``: the ``count`` highest of each row. Of equals the earliest, or the latest."""
    if later:
        return top(scores.flip(-1), count).flip(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Rule:
    """One policy, for one sequence in one layer: `start` with the prompt, then `read` and `observe` for each step.

    ``below`` is the rule of the layer before. ``held`` of a rule that evicts is a mask too. ``closest`` is the smallest
    relative distance between something taken and something left, other than 0: near it float32 may decide otherwise.
    """

    dense_layers = 0
    held: torch.Tensor | None = None
    scale = 1.0

    def __init__(self, budget=0, *, sink=0, recent=1, protect_prompt=False, page_size=16, layer=0, below=None):
        self.budget, self.sink, self.recent = budget, sink, recent
        self.protect_prompt, self.page_size = protect_prompt, page_size
        self.layer, self.below = layer, below
        self.closest = math.inf

    def start(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
        """The prompt: ``q [q_heads, P, dim]``, ``k [kv_heads, P, dim]``, softmax ``weights [q_heads, P, P]``."""
        self.kv_heads, self.prompt = k.shape[:2]
        if self.protect_prompt:
            self.sink = max(self.sink, self.prompt)
        self.begin(q, k, weights)

    def begin(self, q, k, weights) -> None:
        """What the rule itself makes of the prompt."""

    def read(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The tokens that are read, ``[kv_heads, n]``: ``q [q_heads, dim]`` of the last of ``k [kv_heads, n, dim]``."""
        return torch.ones(k.shape[:2], dtype=torch.bool)

    def observe(self, weights: torch.Tensor) -> None:
        """The step's softmax weights ``[q_heads, n]``, 0 where nothing was read."""

    def by_group(self, weights: torch.Tensor) -> torch.Tensor:
        """Sum over the query heads of each KV head: ``[q_heads, ...]`` -> ``[kv_heads, ...]``."""
        return weights.unflatten(0, (self.kv_heads, -1)).sum(1)

    def take(self, scores: torch.Tensor, count: int, later: bool = False) -> torch.Tensor:
        """`top`, and a note of how close it was."""
        ordered = scores.sort(dim=-1, descending=True).values
        if 0 < count < scores.shape[-1]:
            self.note(ordered[..., count - 1], ordered[..., count])
        return top(scores, count, later)

    def note(self, taken: torch.Tensor, left: torch.Tensor) -> None:
        gap = (taken - left) / torch.maximum(taken.abs(), left.abs())
        self.closest = min([self.closest, *(x for x in gap.flatten().tolist() if x > 0)])


class Tokens(Rule):
    """Token slots: at ``budget`` tokens the one of least priority goes, of equals the earliest. Sink: all are equal."""

    def begin(self, q, k, weights):
        self.held = torch.ones(self.kv_heads, self.prompt, dtype=torch.bool)
        self.priority = self.of_prompt(weights)
        if self.prompt > self.budget:
            self.keep(self.budget, self.prompt + 1)

    def of_prompt(self, weights):
        return torch.zeros(self.kv_heads, self.prompt, dtype=torch.float64)

    def keep(self, count: int, length: int) -> None:
        """Keep ``count`` of the held, with those always kept once the sequence has ``length`` tokens."""
        place = torch.arange(self.held.shape[1])
        always = (place < self.sink) | (place >= length - self.recent)
        value = self.priority.masked_fill(always, math.inf).masked_fill(~self.held, -math.inf)
        self.held = self.take(value, count, later=True)

    def read(self, q, k):
        length = k.shape[1]
        if int(self.held[0].sum()) >= self.capacity:
            self.make_room(length)
        self.held, self.priority = F.pad(self.held, (0, 1), value=True), F.pad(self.priority, (0, 1))
        return self.held

    @property
    def capacity(self):
        return self.budget

    def make_room(self, length: int) -> None:
        self.keep(self.budget - 1, length)


class Sink(Tokens):
    def __init__(self, budget, *, sink=4, **options):
        super().__init__(budget, sink=sink, **options)


class H2O(Tokens):
    """Priority: all the mass so far."""

    def __init__(self, budget, *, recent=None, **options):
        super().__init__(budget, recent=budget // 2 if recent is None else recent, **options)

    def of_prompt(self, weights):
        return self.by_group(weights).sum(1)

    def observe(self, weights):
        self.priority = self.priority + self.by_group(weights)


class TOVA(Tokens):
    """Priority: the last query's mass, over all heads of the layer."""

    def of_prompt(self, weights):
        return self.shared(weights[:, -1])

    def observe(self, weights):
        self.priority = self.shared(weights)

    def shared(self, weights):
        return weights.sum(0).expand(self.kv_heads, -1)


class SnapKV(Tokens):
    """Only the prompt is cut, by what its last ``window`` queries read, smoothed along the positions."""

    capacity = math.inf

    def __init__(self, budget, *, window=32, kernel=7, **options):
        super().__init__(budget, **options)
        self.window, self.kernel, self.recent = window, kernel, window + 1

    def of_prompt(self, weights):
        before = max(0, self.prompt - self.window)
        score = self.by_group(weights[:, before:, :before].sum(1))
        if before:
            # The window's own columns are cut off first: positions beside it are smoothed with zeros.
            score = F.avg_pool1d(score, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(score, (0, self.prompt - before))


class RKV(Tokens):
    """Cut to ``budget`` whenever ``buffer`` more are held: what is read by the last queries and has no newer like."""

    def __init__(self, budget, *, buffer=128, window=8, kernel=7, lam=0.1, threshold=0.5, **options):
        super().__init__(budget, **options)
        self.buffer, self.window, self.kernel, self.lam, self.threshold = buffer, window, kernel, lam, threshold

    @property
    def capacity(self):
        return self.budget + self.buffer

    def begin(self, q, k, weights):
        self.held = torch.ones(self.kv_heads, self.prompt, dtype=torch.bool)
        self.priority = self.of_prompt(weights)
        self.queries, self.keys = q[:, -self.window :], k
        if self.prompt > self.budget:
            self.compress()

    def read(self, q, k):
        mask = super().read(q, k)
        self.queries = torch.cat([self.queries, q[:, None]], 1)[:, -self.window :]
        self.keys = k
        return mask

    def make_room(self, length):
        self.compress()

    def compress(self):
        held = self.held.clone()
        for h, queries in enumerate(self.queries.unflatten(0, (self.kv_heads, -1))):
            places = self.held[h].nonzero().flatten()
            keys = self.keys[h, places]
            score = self.lam * self.importance(queries, keys[: -self.window])
            score -= (1 - self.lam) * redundancy(keys, self.threshold)[: -self.window]
            left = ~self.take(score, self.budget - self.window, later=True)
            held[h, places[: -self.window][left]] = False
        self.held = held

    def importance(self, queries, keys):
        """``queries [group, window, dim]``, ``keys [candidates, dim]``: the softmax is over the candidates alone."""
        weights = (self.scale * queries @ keys.T).amax(0).softmax(-1).mean(0)
        return F.max_pool1d(weights[None], self.kernel, stride=1, padding=self.kernel // 2)[0]


def redundancy(keys: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """How much like the other keys each is, ``[n]``: a softmax. Each key forgives the latest one that is like it.

    One that nothing is like forgives the first: the published code's search for the latest begins there.
    """
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    similarity = (unit @ unit.T).fill_diagonal_(0)
    for row in similarity:
        like = (row > threshold).nonzero().flatten()
        row[like[-1] if len(like) else 0] = 0
    return similarity.mean(0).softmax(-1)


class Pages(Rule):
    """Pages are read by score; those of the first ``sink`` and the last ``recent`` tokens always."""

    def read(self, q, k):
        length = k.shape[1]
        scores = self.scores(q, k)
        scores = scores.masked_fill(self.always(length), math.inf).expand(self.kv_heads, -1)
        return self.tokens(self.take(scores, self.budget // self.page_size), length)

    def always(self, length: int) -> torch.Tensor:
        page = torch.arange(ceil_div(length, self.page_size))
        first_recent = max(0, length - self.recent) // self.page_size
        return (page < ceil_div(self.sink, self.page_size)) | (page >= first_recent)

    def tokens(self, pages: torch.Tensor, length: int) -> torch.Tensor:
        return pages.repeat_interleave(self.page_size, -1)[:, :length]

    def mass(self, weights: torch.Tensor) -> torch.Tensor:
        """``[heads, n]`` -> ``[heads, pages]``."""
        return F.pad(weights, (0, -weights.shape[1] % self.page_size)).unflatten(-1, (-1, self.page_size)).sum(-1)


class Quest(Pages):
    """Score: the highest q . k that the smallest and largest elements of a page's keys allow, over the group."""

    dense_layers = 2

    def scores(self, q, k):
        queries = q.unflatten(0, (self.kv_heads, -1))
        bounds = []
        for page in k.split(self.page_size, dim=1):
            low, high = queries * page.amin(1, keepdim=True), queries * page.amax(1, keepdim=True)
            bounds.append(torch.maximum(low, high).sum(-1).amax(1))
        return self.scale * torch.stack(bounds, 1)


class InfLLM(Pages):
    """Score: q . k over ``representatives`` of a page, those that its local window read most, over all heads."""

    def __init__(self, budget, *, sink=4, recent=None, representatives=4, **options):
        super().__init__(budget, sink=sink, recent=budget // 2 if recent is None else recent, **options)
        self.representatives, self.chosen = representatives, []

    def begin(self, q, k, weights):
        place = torch.arange(self.prompt)
        window = place[:, None] - place[None] < self.recent
        self.weight = self.by_group((weights * window).sum(1))

    def scores(self, q, k):
        size, length = self.page_size, k.shape[1]
        while (len(self.chosen) + 1) * size <= length - self.recent:
            # The page has left the window: what represents it is settled for good.
            here = slice(len(self.chosen) * size, (len(self.chosen) + 1) * size)
            best = self.take(self.weight[:, here], self.representatives)
            self.chosen.append(k[:, here][best].unflatten(0, (self.kv_heads, -1)).sum(1))
        scores = torch.full((1, ceil_div(length, size)), -math.inf, dtype=torch.float64)
        for page, keys in enumerate(self.chosen):
            scores[0, page] = (self.by_group(q) * keys).sum()
        return scores

    def observe(self, weights):
        length = weights.shape[1]
        inside = torch.arange(length) >= length - self.recent
        self.weight = F.pad(self.weight, (0, 1)) + self.by_group(weights) * inside


class LessIsMore(Pages):
    """Selecting layers read everything, and choose for the layers above: each head's first page, then each second."""

    dense_layers = 2

    def __init__(self, budget, *, sink=4, recent=None, select_layers=None, num_layers=0, dense_layers=2, **options):
        super().__init__(budget, sink=sink, recent=budget // 4 if recent is None else recent, **options)
        layers = (dense_layers, num_layers // 3) if select_layers is None else select_layers
        self.selects = self.layer in [max(layer, dense_layers) for layer in layers]

    def begin(self, q, k, weights):
        self.choices = [] if self.selects else self.below.choices

    def read(self, q, k):
        if self.selects:
            return Rule.read(self, q, k)
        return self.choices[k.shape[1] - self.prompt - 1]

    def observe(self, weights):
        if not self.selects:
            return
        heads, length = weights.shape
        always = self.always(length)
        mass = self.mass(weights).masked_fill(always, -1)
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
        self.note(ordered[:, :-1], ordered[:, 1:])
        turn = order.argsort(-1) * heads + torch.arange(heads)[:, None]
        # A page's place in the union is the turn at which the first head names it.
        scores = -turn.amin(0, keepdim=True).double().masked_fill(always, -math.inf)
        pages = top(scores, self.budget // self.page_size).expand(self.kv_heads, -1)
        self.choices.append(self.tokens(pages, length))


class RaaS(Pages):
    """Pages are held; the one that was longest not among the better half goes. The prompt's never."""

    def __init__(self, budget, *, share=0.5, **options):
        super().__init__(budget, **options)
        self.share = share

    def begin(self, q, k, weights):
        self.pinned = ceil_div(self.prompt, self.page_size)
        self.pages = torch.ones(self.kv_heads, self.pinned, dtype=torch.bool)
        self.stamp = torch.full((self.kv_heads, self.pinned), self.prompt)
        self.held = self.tokens(self.pages, self.prompt)

    def read(self, q, k):
        length, capacity = k.shape[1], self.budget // self.page_size
        if (length - 1) // self.page_size == self.pages.shape[1]:
            if int(self.pages[0].sum()) == capacity:
                value = self.stamp.double().masked_fill(~self.pages, -math.inf)
                value[:, : self.pinned] = math.inf
                self.pages = top(value, capacity - 1, later=True)
            self.pages, self.stamp = F.pad(self.pages, (0, 1), value=True), F.pad(self.stamp, (0, 1), value=length)
        self.held = self.tokens(self.pages, length)
        return self.held

    def observe(self, weights):
        mass = self.mass(self.by_group(weights)).masked_fill(~self.pages, -1)
        better = math.ceil(self.share * int(self.pages[0].sum()))
        self.stamp = self.stamp.masked_fill(self.take(mass, better), weights.shape[1])


RULES = {
    "full": Rule,
    "sink": Sink,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "rkv": RKV,
    "raas": RaaS,
    "quest": Quest,
    "infllm": InfLLM,
    "lessismore": LessIsMore,
}


class Trace(NamedTuple):
    """One sequence's run: ``logits [steps, vocab]``, of which the first are the prompt's.

    ``reads[layer]`` has a mask ``[kv_heads, n]`` for each decode step; ``closest`` is as in `Rule`.
    """

    logits: torch.Tensor
    reads: list[list[torch.Tensor]]
    closest: float


@torch.inference_mode()
def run(model, name: str, prompt, tokens, *, dense_layers: int | None = None, **options) -> Trace:
    """The model over ``prompt`` and the output ``tokens`` (the last is not fed back) under a rule."""
    prompt, layers = list(prompt), model.config.num_hidden_layers
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    rules, reads = [], [[] for _ in range(layers)]
    dense_layers = RULES[name].dense_layers if dense_layers is None else dense_layers
    if name == "lessismore":
        options = {**options, "num_layers": layers, "dense_layers": dense_layers}
    for layer in range(layers):
        place = {"layer": layer, "below": rules[-1] if rules else None}
        rules.append(Rule() if layer < dense_layers else RULES[name](**options, **place))
    AttentionInterface.register(NAME, functools.partial(_attention, rules, len(prompt), reads))
    # No mask: the attention function is causal by itself.
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 :]
    finally:
        model.set_attn_implementation(before)
    return Trace(logits, reads, min(rule.closest for rule in rules))


def _attention(rules, prompt, reads, module, query, key, value, mask, scaling=None, **kwargs):
    """transformers' attention function: a prompt's queries read all before them, later ones what the rule says."""
    layer, (q, k, v) = module.layer_idx, (states[0].double() for states in (query, key, value))
    rule, group, length = rules[layer], q.shape[0] // k.shape[0], q.shape[1]
    rule.scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    logits = rule.scale * q @ k.repeat_interleave(group, 0).mT
    weights = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    rule.start(q[:, :prompt], k[:, :prompt], weights[:, :prompt, :prompt])
    for n in range(prompt + 1, length + 1):
        reads[layer].append(rule.read(q[:, n - 1], k[:, :n]))
        read = reads[layer][-1].repeat_interleave(group, 0)
        weights[:, n - 1, :n] = logits[:, n - 1, :n].masked_fill(~read, -math.inf).softmax(-1)
        rule.observe(weights[:, n - 1, :n])
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)[None].to(query.dtype), None
