"""What every fake kernel does before its own work."""

import pytest
import torch

import lil_ops  # noqa: F401  (loads the operators)

NAMES = sorted(name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lil::"))
TENSORS = [
    (name, argument.name)
    for name in NAMES
    for argument in getattr(torch.ops.lil, name).default._schema.arguments
    if "Tensor" in str(argument.type)
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_a_meta_tensor_among_others_is_an_error(name, argument):
    """torch takes the fake kernel for it, which writes nothing."""
    operator = getattr(torch.ops.lil, name).default
    plain = {"int": 16, "float": 1.0, "str": "sum", "bool": False}
    arguments = {
        one.name: torch.zeros(1, device="meta" if one.name == argument else "cpu")
        if "Tensor" in str(one.type)
        else plain[str(one.type).removeprefix("Optional[").removesuffix("]")]
        for one in operator._schema.arguments
    }
    with pytest.raises(RuntimeError, match=f"^lil::{name}: [a-z_]+: expected device (meta|cpu), got (cpu|meta)"):
        operator(**arguments)
