"""Linear layers of one input become one, in the graphs that torch.compile makes of a model with frozen weights."""

import pytest

pytest.importorskip("transformers")

import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from lil_ops.integrations.compiled import compiled
from lil_ops.integrations.merge_linears import MergeLinears

WIDTH = 8


class Layers(torch.nn.Module):
    def __init__(self, biases):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 + i, bias=bias) for i, bias in enumerate(biases))

    def forward(self, x):
        first = self.layers[0](x).sin()  # used before the others are made
        return [first, *(layer(x) for layer in self.layers[1:])]


class Chain(Layers):
    def forward(self, x):
        a, b = self.layers
        return [a(x), b(x + 1)]


class Products(Layers):
    def forward(self, x):
        return [F.linear(x, x), F.linear(x, x + 1), *(layer(x) for layer in self.layers)]


class Overwritten(Layers):
    """The input changes between its layers, in the way that `write` does it."""

    def __init__(self, write):
        super().__init__([True, True])
        self.write = write

    def forward(self, x):
        a, b = self.layers
        x = x * 1
        first = a(x)
        self.write(x)
        return [first, b(x)]


def assign(x):
    x[:, 0] = 1


def add(x):
    x += 1


@torch.library.custom_op("lil_test::double", mutates_args=("x",))
def double(x: torch.Tensor) -> None:
    x.mul_(2)


class Repeated(Layers):
    def forward(self, x):
        (layer,) = self.layers
        return [layer(x), F.linear(weight=layer.weight, input=x, bias=layer.bias)]


def merged(module, x):
    """How many linear layers are left, and what they give."""
    left = []

    def backend(graph_module, _):
        MergeLinears()(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        left.append(len(graph_module.graph.find_nodes(op="call_function", target=F.linear)))
        return graph_module.forward

    torch._dynamo.reset()
    with config.patch(freezing=True), torch.inference_mode():
        given = torch.compile(module, backend=backend, fullgraph=True)(x)
    return left, given


@pytest.mark.parametrize(
    "module, left",
    [
        (Layers([True, True, True]), 1),
        (Layers([False, False]), 1),
        (Layers([True, False, True, False]), 2),
        (Layers([True, False]), 2),
        (Layers([True]), 1),
        (Chain([True, True]), 2),
        (Products([True, True]), 3),
        (Repeated([True]), 1),
        (Overwritten(lambda x: F.relu(x)), 1),
        (Overwritten(lambda x: F.relu(x, inplace=False)), 1),
        (Overwritten(lambda x: F.relu(x, True)), 2),
        (Overwritten(lambda x: x.clamp_(min=0)), 2),
        (Overwritten(lambda x: torch.exp(x, out=x)), 2),
        (Overwritten(assign), 2),
        (Overwritten(add), 2),
        (Overwritten(torch.ops.lil_test.double), 2),
        (Overwritten(torch.ops.lil_test.double.default), 2),
    ],
)
def test_layers_of_one_input(module, left):
    x = torch.randn(2, WIDTH)
    counts, given = merged(module, x)
    assert counts == [left]
    with torch.inference_mode():
        torch.testing.assert_close(given, module(x))


def test_weights_are_concatenated_when_compiled():
    module = Layers([True, True])
    x = torch.randn(2, WIDTH)
    torch._dynamo.reset()
    with torch.inference_mode():
        given, (code,) = run_and_get_code(compiled(module), x)
        torch.testing.assert_close(given, module(x))
    assert "_frozen_param" in code and "cat" not in code


def test_any_number_of_shapes():
    """An engine's number of slots is a shape, and Dynamo counts those of all engines together."""
    module = Layers([True])
    torch._dynamo.reset()
    call = compiled(module, backend="eager")
    with torch.inference_mode():
        for rows in range(2, 14):
            torch.testing.assert_close(call(torch.ones(rows, WIDTH)), module(torch.ones(rows, WIDTH)))
