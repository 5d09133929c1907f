"""Linear layers of one input as one product: a decode step reads weights, and small reads leave bandwidth unused."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from operator import attrgetter

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.nn import functional as F


class MergeLinears(CustomGraphPass):
    """Replaces the linear layers that share an input (query, key and value; gate and up) by one, and slices of it.

    A pass of torch.compile over its graph of torch functions, ``torch._inductor.config.pre_grad_custom_pass``, for
    frozen weights: they are concatenated in the graph, and freezing does that once, at compilation. Layers with a bias
    and layers without are merged apart.
    """

    def __call__(self, graph: Graph) -> None:
        groups = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=F.linear):
            x, weight, bias = arguments(node)
            if all(parameter is None or parameter.op == "get_attr" for parameter in (weight, bias)):
                groups[x, bias is None].append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
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
