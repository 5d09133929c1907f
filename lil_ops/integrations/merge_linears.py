"""Linear layers of one input as one product: a decode step reads weights, and small reads leave bandwidth unused."""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from itertools import accumulate
from operator import attrgetter

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.nn import functional as F

# x[i] = y, x += y and its like.
WRITES = {
    operator.setitem,
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
}


class MergeLinears(CustomGraphPass):
    """Replaces the linear layers that share an input (query, key and value; gate and up) by one, and slices of it.

    A pass of torch.compile over its graph of torch functions, ``torch._inductor.config.pre_grad_custom_pass``, for
    frozen weights: they are concatenated in the graph, and freezing does that once, at compilation. Layers with a bias
    and layers without are merged apart. Where something is written in place between them, their input may not be the
    same: they stay.
    """

    def __call__(self, graph: Graph) -> None:
        groups, written = defaultdict(list), writes(graph)
        for node in graph.find_nodes(op="call_function", target=F.linear):
            x, weight, bias = arguments(node)
            if all(parameter is None or parameter.op == "get_attr" for parameter in (weight, bias)):
                groups[x, bias is None].append(node)
        for nodes in groups.values():
            if len(nodes) > 1 and not any(nodes[0] < node < nodes[-1] for node in written):
                merge(graph, nodes)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def merge(graph: Graph, nodes: list[Node]) -> None:
    """Put one product in place of these nodes, where the first of them is."""
    (x, *_), weights, biases = zip(*map(arguments, nodes), strict=True)
    with graph.inserting_before(nodes[0]):
        weight = side_by_side(graph, weights)
        merged = graph.call_function(F.linear, (x, weight, None if biases[0] is None else side_by_side(graph, biases)))
        widths = list(map(outputs, weights))
        begins = accumulate(widths, initial=0)
        slices = [
            graph.call_function(torch.narrow, (merged, -1, begin, width))
            for begin, width in zip(begins, widths, strict=False)
        ]
    for node, part in zip(nodes, slices, strict=True):
        replace(node, part)


def writes(graph: Graph) -> list[Node]:
    """The calls that change a tensor in place: ``x.add_(y)``, ``x += y``, ``out=x``, ``relu(x, inplace=True)``, and
    operators whose schema says so."""
    return [node for node in graph.nodes if node.op in ("call_method", "call_function") and is_write(node)]


def is_write(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = (getattr(target, name) for name in target.overloads() if "out" not in name)
        return "out" in node.kwargs or any(overload._schema.is_mutable for overload in overloads)
    if getattr(target, "__module__", None) == operator.add.__module__:
        return target in WRITES
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    try:
        given = inspect.signature(target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a method's name, or a function of C++
        given = node.kwargs
    marked = name.endswith("_") and not name.endswith("__")
    return marked or given.get("out") is not None or bool(given.get("inplace"))


def replace(node: Node, by: Node) -> None:
    """Use another node in its place, and erase it with what was there for it alone. Not
    `Graph.eliminate_dead_code`: that takes a call like ``x.add_(y)``, whose result nobody uses, for dead."""
    node.replace_all_uses_with(by)
    dead = [node]
    while dead:
        node = dead.pop()
        if not node.users and node.op != "placeholder" and not node._erased:
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            dead += inputs


def side_by_side(graph: Graph, parameters: tuple[Node, ...]) -> Node:
    """Their concatenation. Some are read only behind this place, so all are read anew."""
    return graph.call_function(torch.cat, ([graph.node_copy(each) for each in parameters],))


def outputs(weight: Node) -> int:
    """Rows of a parameter, or of a concatenation of some."""
    if weight.target is torch.cat:
        return sum(map(outputs, weight.args[0]))
    return parameter(weight).shape[0]


def parameter(node: Node) -> torch.Tensor:
    return attrgetter(node.target)(node.graph.owning_module)


def arguments(linear: Node) -> tuple[Node, Node, Node | None]:
    def of(input, weight, bias=None):
        return input, weight, bias

    return of(*linear.args, **linear.kwargs)
