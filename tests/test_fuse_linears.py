"""Which linear layers of a compiled step become decode_linear, and that the model still computes the same."""

import re

import pytest

pytest.importorskip("transformers")

import torch
from tiny_models import build
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lil_ops  # noqa: F401  (the operators)
from lil_ops import Engine, Request
from lil_ops.integrations.fuse_linears import FuseLinears, has_kernel

WIDTH = 32
OPERATOR = torch.ops.lil.decode_linear.default


class Norm(torch.nn.Module):
    def __init__(self, eps=1e-5, shift=0.0, shape=(WIDTH,)):
        super().__init__()
        self.weight, self.eps, self.shift = torch.nn.Parameter(torch.rand(shape) + 0.5), eps, shift

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        y = self.weight * wide.to(x.dtype)
        return y + self.shift if self.shift else y


def linear(width=WIDTH, outputs=WIDTH, bias=False):
    return torch.nn.Linear(width, outputs, bias=bias)


class Block(torch.nn.Module):
    """A decode layer without its attention."""

    def __init__(self, bias=True, act=F.silu, norm=Norm, hidden=48):
        super().__init__()
        self.norms = torch.nn.ModuleList([norm(), norm()])
        self.q, self.k, self.o = linear(bias=bias), linear(outputs=16, bias=bias), linear()
        self.gate, self.up, self.down = linear(outputs=hidden), linear(outputs=hidden), linear(hidden)
        self.act = act

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.o(self.q(y) * self.k(y).repeat(1, 1, 2))
        y = self.norms[1](x)
        return self.down(self.act(self.gate(y)) * self.up(y)) + x


class Attention(torch.nn.Module):
    """What a layer does before attention reads: queries and keys of 4 and 2 heads of 32, rotated, and values."""

    def __init__(self, heads=(4, 2), norm=torch.nn.Identity, angles=None):
        super().__init__()
        self.q, self.k, self.v = (linear(outputs=32 * count, bias=True) for count in (*heads, 2))
        self.norm, self.angles = norm(), angles or (lambda x: x)

    def forward(self, x):
        position = torch.arange(1, 1 + len(x), dtype=torch.float32)[:, None, None]
        angles = position * torch.linspace(1, 0.01, 32)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k, v = (layer(x).view(len(x), 1, -1, 32).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return *apply_rotary_pos_emb(self.norm(q), k, self.angles(cos), sin), v


class Turned(Attention):
    """Angles change between two layers that take them."""

    def forward(self, x):
        cos, sin = torch.ones(len(x), 1, 32) / 2, torch.ones(len(x), 1, 32) / 3
        found = []
        for _ in range(2):
            q, k, v = (layer(x).view(len(x), 1, -1, 32).transpose(1, 2) for layer in (self.q, self.k, self.v))
            found += [*apply_rotary_pos_emb(q, k, cos, sin), v]
            cos.mul_(2)
            sin.add_(1)
            x = x * 1
        return tuple(found)


class Flat(Attention):
    """Rows without a dimension of tokens, which the angles have."""

    def forward(self, x):
        return super().forward(x[:, 0])


class Interleaved(Attention):
    """Another rotation: neighbours turn with each other."""

    def forward(self, x):
        cos = sin = x
        q = self.q(x).view(len(x), 1, -1, 32).transpose(1, 2)
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
        return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


class InPlace(Block):
    """A write whose result is not used is done all the same."""

    def forward(self, x):
        y = super().forward(x) * 1
        y.add_(1)
        return y


class Overwritten(Block):
    """Something is written between a layer and what it would take along, or be merged with."""

    def forward(self, x):
        x = x * 1
        y = self.o(self.norms[0](x))
        x.mul_(2)
        y = y + x
        gate = self.gate(y)
        y += 1
        up = self.up(y)
        z = self.down(self.act(gate) * up)
        y[:, :, 0] = 0
        return z + y


class Head(torch.nn.Module):
    """The last hidden state's logits, as transformers slices it."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = Norm(), linear(outputs=64)

    def forward(self, x):
        return self.head(self.norm(x)[:, slice(-1, None), :]).float()


class Used(Block):
    """Everything that might be taken along is used elsewhere too."""

    def forward(self, x):
        y = self.norms[0](x)
        projected = self.o(y)
        z = projected + x
        gate, up = self.gate(z), self.up(z)
        return self.down(self.act(gate) * up) + gate.sum() + projected + y


class Broadcast(torch.nn.Module):
    """Additions that are no residual: of another shape, of itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        y = self.a(x) + x[:, :, :1]
        z = self.b(y)
        return z + z


def fused(module, x, has_kernel=lambda x, norm: True):
    """The options of each decode_linear, the linear layers left, and what the graph gives."""
    found = []

    def backend(graph_module, _):
        FuseLinears(has_kernel)(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        calls = graph_module.graph.find_nodes(op="call_function", target=OPERATOR)
        left = graph_module.graph.find_nodes(op="call_function", target=F.linear)
        names = [{name for name, value in call.kwargs.items() if value is not None} - {"eps"} for call in calls]
        found.append((names, len(left)))
        return graph_module.forward

    torch._dynamo.reset()
    with config.patch(freezing=True), torch.inference_mode():
        given = torch.compile(module, backend=backend, fullgraph=True)(x)
    (found,) = found
    return *found, given


def module_of(kind, **options):
    torch.manual_seed(0)
    return kind(**options).eval()


ROTATED = {"cos", "sin", "rotated"}
ALL = [{"norm"}, {"residual"}, {"norm", "gated"}, {"residual"}]


@pytest.mark.parametrize(
    "module, want, left",
    [
        (module_of(Block), ALL, 0),
        (module_of(Block, bias=False), ALL, 0),
        (module_of(Block, act=torch.nn.SiLU()), ALL, 0),
        (module_of(Block, act=F.gelu), [{"norm"}, {"residual"}, {"norm"}, {"residual"}], 0),
        (module_of(Block, norm=lambda: Norm(shift=1.0)), [set(), {"residual"}, {"gated"}, {"residual"}], 0),
        (module_of(Block, norm=lambda: Norm(shape=(1, WIDTH))), [set(), {"residual"}, {"gated"}, {"residual"}], 0),
        (module_of(Block, norm=torch.nn.Identity), [set(), {"residual"}, {"gated"}, {"residual"}], 0),
        (module_of(Block, hidden=40), [{"norm"}, {"residual"}, {"norm"}], 1),
        (module_of(Head), [{"norm"}], 0),
        (module_of(Used), [{"norm"}, set(), set()], 0),
        (module_of(Broadcast), [set(), set()], 0),
        (module_of(Attention), [ROTATED], 0),
        (module_of(Attention, heads=(3, 1)), [ROTATED], 0),
        (module_of(Turned), [ROTATED, ROTATED], 0),
        # The queries are normalised first: nothing ahead of the keys is left as it comes, so they are not rotated.
        (module_of(Attention, norm=lambda: torch.nn.LayerNorm(32)), [set()], 0),
        # The angles' rows have another shape: as they are used, and not as the operator takes them.
        (module_of(Attention, angles=lambda cos: cos[:1]), [set()], 0),
        (module_of(Interleaved), [set()], 0),
        (module_of(Flat), [set()], 0),
        (module_of(InPlace), ALL, 0),
        (module_of(Overwritten), [set(), set()], 2),
    ],
)
def test_what_is_taken_along(module, want, left):
    torch.manual_seed(1)
    x = torch.randn(3, 1, WIDTH) * 3
    names, others, given = fused(module, x)
    assert (names, others) == (want, left)
    with torch.inference_mode():
        plain = module(x.clone())
    torch.testing.assert_close(given, plain, rtol=1e-4, atol=1e-4)


def test_only_a_few_rows():
    for rows, want in ((1, 4), (8, 4), (9, 0), (64, 0)):
        names, left, _ = fused(module_of(Block), torch.randn(rows, 1, WIDTH))
        assert len(names) == want and left == 4 - want


def test_norms_stay():
    """Where the kernel takes none."""
    x = torch.randn(2, 1, WIDTH, dtype=torch.float16)
    names, left, _ = fused(module_of(Block).half(), x, lambda x, norm: not norm)
    assert (names, left) == ([set(), {"residual"}, {"gated"}, {"residual"}], 0)


def test_without_a_kernel_layers_are_merged_alone():
    x = torch.randn(2, 1, WIDTH)
    assert not has_kernel(x, False)
    assert fused(module_of(Block), x, has_kernel)[:2] == ([], 4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_models(family):
    """An engine's compiled step of a model gives the tokens that it gives without; all layers are fused."""
    model, counts = build(family), []

    def backend(graph_module, _):
        FuseLinears(lambda x, norm: True)(graph_module.graph)
        graph_module.recompile()
        counts.append(len(graph_module.graph.find_nodes(op="call_function", target=OPERATOR)))
        return graph_module.forward

    def tokens(**options):
        with Engine(model, slots=2, max_tokens=64, **options) as engine:
            return [done.tokens for done in engine.run([Request(list(range(2, 9)), max_new_tokens=12)])]

    torch._dynamo.reset()
    assert tokens(compile={"backend": backend}) == tokens()
    assert counts == [4 * model.config.num_hidden_layers + (model.config.vocab_size % 16 == 0)]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="on the CPU, earlier ones take from the graph what tracing knew")
def test_angles_are_made_once(monkeypatch):
    """All layers take the same ones from memory."""
    monkeypatch.setattr(FuseLinears.__init__, "__defaults__", (lambda x, norm: True,))
    model = build("llama")

    def run():
        with Engine(model, slots=1, max_tokens=64, compile=True) as engine:
            list(engine.run([Request(list(range(2, 9)), max_new_tokens=3)]))

    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(run)
    taken = re.findall(r"decode_linear\.default\(.* cos=(buf\d+), sin=(buf\d+),", "".join(codes))
    assert len(taken) == model.config.num_hidden_layers > 1
    assert len(set(taken)) == 1
