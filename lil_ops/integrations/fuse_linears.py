"""The linear layers of a decode step as `lil_ops.decode_linear`, with the norm, gate and addition around them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.nn import functional as F

from lil_ops import _C  # the operator, too
from lil_ops.integrations import merge_linears
from lil_ops.integrations.merge_linears import MergeLinears, arguments, outputs, parameter, replace, writes


def has_kernel(x: torch.Tensor, norm: bool) -> bool:
    """Whether `decode_linear` has a kernel for this device and dtype, with a norm or without."""
    dtypes = (torch.bfloat16,) if norm else (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and x.dtype in dtypes and torch.cuda.get_device_capability(x.device) >= (9, 0)


class FuseLinears(CustomGraphPass):
    """Merges the linear layers of one input (`MergeLinears`); where the input is a few rows, as in a decode step, makes
    each of them a `decode_linear`, which takes with it

    - an RMS norm that makes its input, as transformers writes it for Llama, Qwen and their like,
    - the rotary embedding of the queries and keys in its output, where nothing lies between,
    - the gate of a gated MLP, ``silu(gate(x)) * up(x)``,
    - the addition of the residual, the only use of its output.

    A layer stays where something is written in place between its input and the last of what it would take along. Angles
    of the rotary embedding are put in memory once. A pass as `MergeLinears` is one. has_kernel: whether the operator
    takes this input, with a norm or without.
    """

    def __init__(self, has_kernel: Callable[[torch.Tensor, bool], bool] = has_kernel):
        self.has_kernel = has_kernel

    def __call__(self, graph: Graph) -> None:
        MergeLinears()(graph)
        written = writes(graph)
        for node in graph.find_nodes(op="call_function", target=F.linear):
            if self._fits(node):
                x = value_of(arguments(node)[0])
                fuse(graph, node, self.has_kernel(x, True), written)
        share_angles(graph, written)

    def _fits(self, linear: Node) -> bool:
        x, weight, _ = arguments(linear)
        value = value_of(x)
        if value is None or not frozen(weight) or not self.has_kernel(value, False):
            return False
        inputs, width = value.shape[-1], outputs(weight)
        few = value.numel() <= _C.MAX_LINEAR_ROWS * inputs and value.is_contiguous()
        return few and inputs % 16 == 0 and width % 16 == 0

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, merge_linears.__file__))


def fuse(graph: Graph, linear: Node, with_norm: bool, written: list[Node]) -> None:
    """Put one `decode_linear` in the place of this node and of what it takes with it."""
    x, weight, bias = arguments(linear)
    options, last = {}, linear
    norm = rms_norm(x) if with_norm else None
    if norm is not None:
        x, options["norm"], options["eps"] = norm
    gated = gate(linear) if bias is None else None
    if gated is not None and outputs(weight) % 32 == 0:
        options["gated"], last = True, gated
    rotations = [] if gated else rotary(linear)
    if rotations:
        options |= {"cos": rotations[0].cos, "sin": rotations[0].sin, "rotated": sum(each.width for each in rotations)}
    added = addition(last)
    if added is not None:
        last, options["residual"] = added
    if any(x < node < max([last, *(each.rotated for each in rotations)]) for node in written):
        return
    with graph.inserting_before(last):
        fused = graph.call_function(torch.ops.lil.decode_linear.default, (x, weight, bias), options)
        value = value_of(x)
        with torch.no_grad():
            fused.meta["example_value"] = value.new_empty(
                (*value.shape[:-1], outputs(weight) // (2 if "gated" in options else 1))
            )
    replace(last, fused)
    for each in rotations:
        replace(each.rotated, each.heads)


def share_angles(graph: Graph, written: list[Node]) -> None:
    """Have the angles that layers take in memory, as far as nothing is written in place after they were made: Inductor
    would compute them for each layer anew."""
    in_memory = {}
    for layer in graph.find_nodes(op="call_function", target=torch.ops.lil.decode_linear.default):
        for name in ("cos", "sin"):
            angles = layer.kwargs.get(name)
            if angles is None or value_of(angles) is None or any(angles < node < layer for node in written):
                continue
            if angles not in in_memory:
                with graph.inserting_after(angles):
                    order = (angles, value_of(angles).stride())
                    in_memory[angles] = graph.call_function(inductor_prims.force_stride_order, order)
                in_memory[angles].meta["example_value"] = value_of(angles)
            layer.update_kwarg(name, in_memory[angles])


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


@dataclass
class Rotation:
    """``rotated = heads * cos + rotate_half(heads) * sin``, the heads being `width` outputs of a layer."""

    heads: Node
    rotated: Node
    cos: Node
    sin: Node
    width: int


def rotary(linear: Node) -> list[Rotation]:
    """The rotations of the layer's first outputs, all by the same angles."""
    slices = {part.args[2]: part for part in linear.users if part.target is torch.narrow}
    found, begin = [], 0
    while begin in slices and len(slices) == len(linear.users):
        rotation = rotation_of(slices[begin])
        if rotation is None or (found and (rotation.cos, rotation.sin) != (found[0].cos, found[0].sin)):
            break
        found.append(rotation)
        begin += rotation.width
    if not found:
        return []
    cos, sin = found[0].cos, found[0].sin
    rows = value_of(arguments(linear)[0]).shape[:-1]
    # Angles are made once for all layers, before the first; elsewhere they might come too late.
    fits = cos < linear and sin < linear and rows == value_of(cos).shape[:-1]
    return found if fits else []


def rotation_of(part: Node) -> Rotation | None:
    """The rotation where outputs are used, as transformers writes it for Llama, Qwen and their like: ``cos`` and
    ``sin`` of `apply_rotary_pos_emb`, ``x.view(batch, 1, -1, head_dim).transpose(1, 2)`` as its heads."""
    view = only_user(part)
    heads = only_user(view) if view is not None and view.target == "view" else None
    if heads is None or heads.target != "transpose" or heads.args[1:] != (1, 2):
        return None
    if value_of(heads) is None or value_of(heads).ndim != 4:
        return None
    count, tokens, head_dim = value_of(heads).shape[1:]
    if tokens != 1 or head_dim % 32 or count * head_dim != part.args[3]:
        return None
    first = second = None
    for user in heads.users:
        if user.target is operator.getitem and user.args[1] == (..., slice(None, head_dim // 2, None)):
            first = user
        if user.target is operator.getitem and user.args[1] == (..., slice(head_dim // 2, None, None)):
            second = user
    products = [user for user in heads.users if user.target is operator.mul]
    if len(heads.users) != 3 or len(products) != 1 or first is None or second is None:
        return None
    negated, total = only_user(second), only_user(products[0])
    turned = only_user(first)
    if negated is None or negated.target != operator.neg or turned is None or only_user(negated) is not turned:
        return None
    if turned.target is not torch.cat or (*turned.args, *turned.kwargs.values()) != ((negated, first), -1):
        return None
    product = only_user(turned)
    if product is None or product.target is not operator.mul or total is None or total.target is not operator.add:
        return None
    if set(total.args) != {products[0], product}:
        return None
    cos, sin = angles_of(products[0], heads), angles_of(product, turned)
    return None if cos is None or sin is None else Rotation(heads, total, cos, sin, count * head_dim)


def angles_of(product: Node, factor: Node) -> Node | None:
    """``angles`` where the product is of the factor and ``angles.unsqueeze(1)``, ``[batch, 1, head_dim]``."""
    other = product.args[1] if product.args[0] is factor else product.args[0]
    if not isinstance(other, Node) or other.target != "unsqueeze" or other.args[1:] != (1,):
        return None
    angles, (batch, _, _, head_dim) = other.args[0], value_of(factor).shape
    value = value_of(angles)
    fits = value is not None and value.shape == (batch, 1, head_dim) and value.dtype == value_of(factor).dtype
    return angles if fits and value.is_contiguous() else None


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
