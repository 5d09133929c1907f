"""The linear layers of a decode step as `lil_ops.decode_linear`, with the norm, gate and addition around them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.nn import functional as F

import lil_ops  # noqa: F401  (the operator)
from lil_ops.integrations import merge_linears
from lil_ops.integrations.merge_linears import MergeLinears, arguments, outputs, parameter

MAX_ROWS = 8  # of decode_linear


def has_kernel(x: torch.Tensor, norm: bool) -> bool:
    """Whether `decode_linear` has a kernel for this device and dtype, with a norm or without."""
    dtypes = (torch.bfloat16,) if norm else (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and x.dtype in dtypes and torch.cuda.get_device_capability(x.device) >= (9, 0)


class FuseLinears(CustomGraphPass):
    """Merges the linear layers of one input (`MergeLinears`); where the input is a few rows, as in a decode step, makes
    each of them a `decode_linear`, which takes with it

    - an RMS norm that makes its input, as transformers writes it for Llama, Qwen and their like,
    - the gate of a gated MLP, ``silu(gate(x)) * up(x)``,
    - the addition of the residual, the only use of its output.

    A pass as `MergeLinears` is one. has_kernel: whether the operator takes this input, with a norm or without.
    """

    def __init__(self, has_kernel: Callable[[torch.Tensor, bool], bool] = has_kernel):
        self.has_kernel = has_kernel

    def __call__(self, graph: Graph) -> None:
        MergeLinears()(graph)
        for node in graph.find_nodes(op="call_function", target=F.linear):
            if self._fits(node):
                x = value_of(arguments(node)[0])
                fuse(graph, node, self.has_kernel(x, True))
        graph.eliminate_dead_code()

    def _fits(self, linear: Node) -> bool:
        x, weight, _ = arguments(linear)
        value = value_of(x)
        if value is None or not frozen(weight) or not self.has_kernel(value, False):
            return False
        inputs, width = value.shape[-1], outputs(weight)
        few = value.numel() <= MAX_ROWS * inputs and value.is_contiguous()
        return few and inputs % 16 == 0 and width % 16 == 0

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, merge_linears.__file__))


def fuse(graph: Graph, linear: Node, with_norm: bool) -> None:
    """Put one `decode_linear` in the place of this node and of what it takes with it."""
    x, weight, bias = arguments(linear)
    options, last = {}, linear
    norm = rms_norm(x) if with_norm else None
    if norm is not None:
        x, options["norm"], options["eps"] = norm
    gated = gate(linear) if bias is None else None
    if gated is not None and outputs(weight) % 32 == 0:
        options["gated"], last = True, gated
    added = addition(last)
    if added is not None:
        last, options["residual"] = added
    with graph.inserting_before(last):
        fused = graph.call_function(torch.ops.lil.decode_linear.default, (x, weight, bias), options)
        value = value_of(x)
        with torch.no_grad():
            fused.meta["example_value"] = value.new_empty(
                (*value.shape[:-1], outputs(weight) // (2 if "gated" in options else 1))
            )
    last.replace_all_uses_with(fused)


def value_of(node: Node) -> torch.Tensor | None:
    """What tracing knows of the tensor."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def parts(weight: Node) -> list[Node]:
    """What the weight is a concatenation of; itself where it is none."""
    return weight.args[0] if weight.target is torch.cat else [weight]


def frozen(weight: Node) -> bool:
    """A parameter, or a concatenation of some."""
    return all(part.op == "get_attr" for part in parts(weight))


def whole(node: Node) -> Node:
    """The tensor of which this is a slice of everything."""
    while node.target is operator.getitem:
        source, index = node.args
        index = index if isinstance(index, tuple) else (index,)
        same = value_of(source) is not None and value_of(source).shape == value_of(node).shape
        if not (same and all(isinstance(part, slice) for part in index)):
            break
        node = source
    return node


def rms_norm(node: Node) -> tuple[Node, Node, float] | None:
    """``(x, weight, eps)`` where ``weight * (x32 * rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)`` is what
    the node computes, with ``x32 = x.to(float32)``."""
    match whole(node):
        case Node(target=operator.mul, args=(Node(op="get_attr") as weight, Node(target="to", args=(scaled, dtype)))):
            pass
        case _:
            return None
    match scaled:
        case Node(target=operator.mul, args=(Node(target="to", args=(x, torch.float32)) as wide, Node() as root)):
            pass
        case _:
            return None
    match root:
        case Node(args=(Node(target=operator.add, args=(Node(target="mean") as mean, float(eps))),)):
            squares = mean.args[0]
        case _:
            return None
    ok = root.target is torch.rsqrt and mean.args[1:] == (-1,) and mean.kwargs == {"keepdim": True}
    ok = ok and squares.target == "pow" and squares.args == (wide, 2)
    value = value_of(x)
    ok = ok and value is not None and value.dtype == dtype and value.is_contiguous()
    ok = ok and parameter(weight).shape == value.shape[-1:]
    return (x, weight, eps) if ok else None


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def gate(linear: Node) -> Node | None:
    """The product where the layer's outputs are used as ``silu(first half) * second half`` and not otherwise."""
    halves = {part.args[2]: part for part in linear.users if part.target is torch.narrow}
    half = outputs(arguments(linear)[1]) // 2
    if len(linear.users) != 2 or set(halves) != {0, half} or halves[half].args[3] != half:
        return None
    activated, product = only_user(halves[0]), only_user(halves[half])
    if activated is None or product is None or activated.target is not F.silu or only_user(activated) is not product:
        return None
    return product if product.target is operator.mul and set(product.args) == {activated, halves[half]} else None


def addition(node: Node) -> tuple[Node, Node] | None:
    """``(sum, residual)`` where the node's only use is to be added to a tensor of its shape and dtype."""
    total = only_user(node)
    if total is None or total.target is not operator.add or len(total.args) != 2:
        return None
    other = total.args[1] if total.args[0] is node else total.args[0]
    if not isinstance(other, Node) or other is node:
        return None
    residual, value = value_of(other), value_of(total)
    same = residual is not None and value is not None and residual.is_contiguous()
    same = same and residual.shape == value.shape and residual.dtype == value.dtype
    return (total, other) if same else None
