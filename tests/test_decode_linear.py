import pytest
import torch
from cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import lil_ops
from lil_ops import reference

OPERATOR = "decode_linear"
CASES = {"linear": {}, "bias": {"bias": True}, "norm": {"norm": True}, "residual": {"residual": True}}
CASES |= {
    "gated": {"gated": True},
    "norm, bias": {"norm": True, "bias": True},
    "norm, gated": {"norm": True, "gated": True},
    "bias, residual": {"bias": True, "residual": True},
    "all but bias": {"norm": True, "gated": True, "residual": True},
    "all but gated": {"norm": True, "bias": True, "residual": True},
    "rotated": {"rotated": 64},
    "all rotated, bias, norm": {"rotated": 96, "bias": True, "norm": True},
    "rotated, residual": {"rotated": 32, "residual": True},
}


def case(
    device,
    dtype,
    rows,
    inputs,
    outputs,
    *,
    bias=False,
    norm=False,
    gated=False,
    residual=False,
    rotated=0,
    head_dim=32,
    seed=0,
):
    """Arguments by name. x is large where there is a norm, as hidden states are. The angles of a head's halves differ,
    as they may."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape, around=0.0):
        return (around + torch.randn(shape, generator=g)).to(dtype).to(device)

    return {
        "x": random(rows, inputs) * (30 if norm else 1),
        "weight": random((2 if gated else 1) * outputs, inputs),
        "bias": random(outputs) if bias else None,
        "norm": random(inputs, around=1.0) if norm else None,
        "gated": gated,
        "residual": random(rows, outputs) if residual else None,
        "cos": random(rows, head_dim).cos() if rotated else None,
        "sin": random(rows, head_dim).sin() if rotated else None,
        "rotated": rotated,
    }


def skip_what_cuda_refuses(device, dtype, norm=False):
    if device == "cuda" and (dtype == torch.float32 or (norm and dtype == torch.float16)):
        pytest.skip("refused on CUDA, see test_cuda_says_what_it_takes")
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")


# A rounded factor's error relative to it, and what fp32 sums of some thousand products add.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def check(arguments):
    """Against the reference, by a bound of the error: half a step of the result, and of each product's factor."""
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    out, want = lil_ops.decode_linear(**arguments), reference.decode_linear(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value)
    dtype = arguments["x"].dtype
    assert out.dtype == dtype and out.is_contiguous() and out.shape == want.shape
    plain = {"gated": False, "residual": None, "cos": None, "sin": None, "rotated": 0}
    absolute = arguments | {name: value.abs() for name, value in before.items()} | plain
    size = reference.decode_linear(**absolute)  # the sums of the products' sizes
    factor = ROUNDING[dtype] if arguments["norm"] is not None else 1e-6
    bound = (factor + 1e-6) * size
    if arguments["gated"]:
        gate, up = reference.decode_linear(**arguments | plain).chunk(2, -1)
        gate_bound, up_bound = bound.chunk(2, -1)
        # SiLU's slope is at most 1.1.
        bound = 1.1 * gate_bound * (up.abs() + up_bound) + F.silu(gate).abs() * up_bound + 1e-6 * want.abs()
    if rotated := arguments["rotated"]:
        # Where the angles' sines are negative, the reference adds what it takes away elsewhere.
        cos, sin = arguments["cos"].double().abs().unsqueeze(-2), arguments["sin"].double().abs().unsqueeze(-2)
        heads = bound[:, :rotated].unflatten(-1, (-1, cos.shape[-1]))
        heads = heads * cos + heads.roll(cos.shape[-1] // 2, -1) * sin
        bound = torch.cat((heads.flatten(-2), bound[:, rotated:]), -1)
    error = (out.double() - want).abs()
    assert (error <= 1.01 * (bound + ROUNDING[dtype] * (want.abs() + bound)) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_matches_reference(device, dtype, name, rows):
    skip_what_cuda_refuses(device, dtype, CASES[name].get("norm"))
    check(case(device, dtype, rows, 272, 96, **CASES[name]))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 8),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    norm=st.booleans(),
    gated=st.booleans(),
    residual=st.booleans(),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    heads=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, dtype, rows, inputs, outputs, bias, norm, gated, residual, head_dim, heads, seed):
    if device == "cuda":
        dtype = torch.bfloat16 if norm or dtype == torch.float32 else dtype
        skip_what_cuda_refuses(device, dtype)
    options = {"bias": bias and not gated, "norm": norm, "gated": gated, "residual": residual, "seed": seed}
    if not gated:
        heads = min(heads, 16 * outputs // head_dim)
        options |= {"rotated": heads * head_dim, "head_dim": head_dim}
    check(case(device, dtype, rows, 16 * inputs, 16 * outputs, **options))


@pytest.mark.parametrize("name", ["linear", "norm, bias", "norm, gated", "residual"])
@pytest.mark.parametrize(
    "shape", [(1536, 2048), (8960, 1536), (896, 9728), (16, 16), (512, 16), (528, 4240), (4112, 4240)]
)
def test_shapes_of_models(device, name, shape):
    """More units than blocks, and fewer; rows of one stage, of many, and of a piece of one."""
    skip_what_cuda_refuses(device, torch.bfloat16)
    for rows in (1, 8):
        check(case(device, torch.bfloat16, rows, *shape, **CASES[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_reference_with_long_rows(device, dtype):
    """Few of them, which CUDA takes eight at a time, and of more stages than its ring has; the last columns are a piece
    of what a warp takes."""
    skip_what_cuda_refuses(device, dtype)
    for rows in (1, 3, 8):
        check(case(device, dtype, rows, 7184, 48, bias=True, residual=True))


def test_one_after_another(device):
    """Kernels that begin before the one ahead has ended still read what it wrote."""
    skip_what_cuda_refuses(device, torch.bfloat16)
    first = case(device, torch.bfloat16, 4, 512, 2048, norm=True, gated=True)
    second = case(device, torch.bfloat16, 4, 2048, 512, residual=True)
    second["residual"] = first["x"]
    x = first["x"]
    for _ in range(20):
        hidden = lil_ops.decode_linear(**first | {"x": x})
        x = lil_ops.decode_linear(**second | {"x": hidden, "residual": x})
        x = x / x.abs().max()
    y = first["x"]
    for _ in range(20):
        synced = first | {"x": y}
        hidden = lil_ops.decode_linear(**synced)
        if device == "cuda":
            torch.cuda.synchronize()
        y = lil_ops.decode_linear(**second | {"x": hidden, "residual": y})
        if device == "cuda":
            torch.cuda.synchronize()
        y = y / y.abs().max()
    assert torch.equal(x, y)


@pytest.mark.parametrize("outputs", [1536, 4224])
def test_same_bits_every_time(device, outputs):
    """What the kernel keeps of the weights is not overwritten before all have read it, however late x comes. Without
    its fence, and with six stages on their way, an H100 gave others in two calls of three."""
    if device == "cpu":
        pytest.skip("nothing is written behind what reads there")
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 8, 8192, outputs)
    check(arguments)
    want, elsewhere = lil_ops.decode_linear(**arguments), torch.zeros(1 << 26, device=device)
    for _ in range(100):
        elsewhere.add_(1)  # x leaves the caches
        assert torch.equal(lil_ops.decode_linear(**arguments), want)


# Of fewer outputs than inputs, which the ring alone is filled for; and one that is read ahead beyond the ring as well.
@pytest.mark.parametrize(("heads", "outputs", "gated"), [(64, 256, True), (32, 4096, False)])
def test_one_behind_attention(device, heads, outputs, gated):
    """While x is on its way, weights are read; they are multiplied all the same."""
    skip_what_cuda_refuses(device, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    q, k_cache, v_cache = (
        torch.randn(shape, generator=g).bfloat16().to(device)
        for shape in ((1, heads, 128), (256, 8, 16, 128), (256, 8, 16, 128))
    )
    page_table = torch.randperm(256, generator=g).int().view(1, 256).to(device)
    seq_lens = torch.tensor([4096], dtype=torch.int32, device=device)
    pages = torch.arange(64, dtype=torch.int32, device=device).repeat(1, 8, 1)

    def attended():
        out, _ = lil_ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages)
        return out.flatten(1)

    arguments = case(device, torch.bfloat16, 1, heads * 128, outputs, norm=True, gated=gated) | {"x": attended()}
    check(arguments)
    want = lil_ops.decode_linear(**arguments)
    for _ in range(20):
        assert torch.equal(lil_ops.decode_linear(**arguments | {"x": attended()}), want)


def test_leading_dimensions(device):
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 6, 64, 32, norm=True, residual=True, rotated=32)
    want = lil_ops.decode_linear(**arguments)
    by_row = ("x", "residual", "cos", "sin")
    for lead in ((6,), (3, 2), (6, 1), (1, 6, 1)):
        shaped = {name: arguments[name].view(*lead, -1) for name in by_row}
        assert torch.equal(lil_ops.decode_linear(**arguments | shaped), want.view(*lead, -1))
    alone = {name: arguments[name][0] for name in by_row}
    assert torch.equal(lil_ops.decode_linear(**arguments | alone), want[0])


def test_rotates_as_transformers_does(device):
    """And what lies behind the rotated heads is as it would be without."""
    apply_rotary_pos_emb = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 5, 64, 4 * 64, bias=True, rotated=3 * 64, head_dim=64)
    rotated = lil_ops.decode_linear(**arguments)
    plain = lil_ops.decode_linear(**arguments | {"cos": None, "sin": None, "rotated": 0})
    assert torch.equal(rotated[:, 192:], plain[:, 192:])
    heads = plain[:, :192].float().view(5, 1, 3, 64).transpose(1, 2)
    cos, sin = (arguments[name].float()[:, None] for name in ("cos", "sin"))
    want, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rotated[:, :192].float(), want.flatten(1), rtol=0.02, atol=0.2)


def test_rows_do_not_meet(device):
    """A row's result does not depend on the others, nor on how many there are."""
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 8, 528, 96, norm=True, gated=True, residual=True)
    want = lil_ops.decode_linear(**arguments)
    for rows in (1, 4, 7):
        some = {name: arguments[name][:rows] for name in ("x", "residual")}
        assert torch.equal(lil_ops.decode_linear(**arguments | some), want[:rows])
    arguments["x"][3] = torch.nan
    out = lil_ops.decode_linear(**arguments)
    assert out[3].isnan().all()
    assert torch.equal(torch.cat([out[:3], out[4:]]), torch.cat([want[:3], want[4:]]))


def test_large_and_tiny(device):
    """What the norm brings together may be far apart; SiLU far out is 0 or its argument."""
    skip_what_cuda_refuses(device, torch.bfloat16)
    for scale in (1e-3, 1e3, 1e8):
        arguments = case(device, torch.bfloat16, 3, 128, 64, norm=True, gated=True)
        arguments["x"] *= scale
        check(arguments)
    arguments = case(device, torch.bfloat16, 3, 128, 64, gated=True)
    arguments["weight"] *= 50
    check(arguments)


def test_no_rows(device):
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 0, 64, 32, residual=True)
    assert lil_ops.decode_linear(**arguments).shape == (0, 32)


BAD = {
    "x: expected dtype float32, float16 or bfloat16, got Double": lambda a: a.update(x=a["x"].double()),
    "x: expected at most 8 rows, got 9": lambda a: a.update(x=a["x"].new_zeros(9, 64)),
    "x: expected in_features a multiple of 16, got 72": lambda a: a.update(x=a["x"].new_zeros(2, 72)),
    "x: expected a contiguous tensor": lambda a: a.update(x=a["x"].new_zeros(64, 2).mT),
    "weight: expected shape \\[out_features, in_features\\] = \\[\\*, 64\\]": lambda a: a.update(
        weight=a["weight"][:, :48].contiguous()
    ),
    "weight: expected BFloat16, got Float": lambda a: a.update(weight=a["weight"].float()),
    "weight: expected a contiguous tensor": lambda a: a.update(weight=a["weight"].mT.contiguous().mT),
    "weight: expected out_features a multiple of 16, got 40 rows": lambda a: a.update(
        weight=a["weight"].new_zeros(40, 64)
    ),
    "weight: expected out_features a multiple of 16, twice as many rows, got 48 rows": lambda a: a.update(
        weight=a["weight"].new_zeros(48, 64), bias=None, gated=True
    ),
    "bias: expected None where gated": lambda a: a.update(gated=True),
    "bias: expected shape": lambda a: a.update(bias=a["bias"][1:]),
    "norm: expected shape": lambda a: a.update(norm=a["norm"][1:]),
    "norm: expected BFloat16, got Half": lambda a: a.update(norm=a["norm"].half()),
    "eps: expected at least 0": lambda a: a.update(eps=-1.0),
    "residual: expected contiguous, of the output's shape, got \\[2, 64\\]": lambda a: a.update(residual=a["x"]),
    "residual: expected BFloat16, got Float": lambda a: a.update(residual=a["residual"].float()),
    "sin: expected a tensor, as cos is, got None": lambda a: a.update(cos=a["x"][:, :32].contiguous(), rotated=32),
    "sin: expected None, as cos is": lambda a: a.update(sin=a["x"]),
    "cos: expected None where gated": lambda a: a.update(
        cos=a["x"], sin=a["x"], rotated=64, bias=None, gated=True, residual=None
    ),
    "cos: expected head_dim a multiple of 32, got 48": lambda a: a.update(
        cos=a["x"].new_zeros(2, 48), sin=a["x"].new_zeros(2, 48), rotated=48
    ),
    "cos: expected contiguous, of shape .*, got \\[1, 32\\]": lambda a: a.update(
        cos=a["x"].new_zeros(1, 32), sin=a["x"].new_zeros(1, 32), rotated=32
    ),
    "sin: expected contiguous, of shape .*, got \\[2, 64\\]": lambda a: a.update(
        cos=a["x"].new_zeros(2, 32), sin=a["x"].new_zeros(2, 64), rotated=32
    ),
    "sin: expected BFloat16, got Float": lambda a: a.update(
        cos=a["x"].new_zeros(2, 32), sin=a["x"].new_zeros(2, 32).float(), rotated=32
    ),
    "rotated: expected a multiple of head_dim, 32, up to 32, got 64": lambda a: a.update(
        cos=a["x"].new_zeros(2, 32), sin=a["x"].new_zeros(2, 32), rotated=64
    ),
    "rotated: expected a multiple of head_dim, 32, up to 32, got 16": lambda a: a.update(
        cos=a["x"].new_zeros(2, 32), sin=a["x"].new_zeros(2, 32), rotated=16
    ),
    "rotated: expected 0 without cos, got 32": lambda a: a.update(rotated=32),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    arguments = case(device, torch.bfloat16, 2, 64, 32, bias=True, norm=True, residual=True)
    BAD[message](arguments)
    with pytest.raises(RuntimeError, match=f"lil::decode_linear: {message}"):
        lil_ops.decode_linear(**arguments)


def test_cuda_says_what_it_takes(device):
    if device == "cpu":
        pytest.skip("the CPU takes every dtype")
    if torch.cuda.get_device_capability()[0] < 9:
        with pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
            lil_ops.decode_linear(**case(device, torch.bfloat16, 1, 64, 32))
        return
    with pytest.raises(RuntimeError, match="x: expected on CUDA, dtype float16 or bfloat16, got Float"):
        lil_ops.decode_linear(**case(device, torch.float32, 1, 64, 32))
    with pytest.raises(RuntimeError, match="norm: expected on CUDA, None or dtype bfloat16, got Half"):
        lil_ops.decode_linear(**case(device, torch.float16, 1, 64, 32, norm=True))
    with pytest.raises(RuntimeError, match="x: expected rows that begin at multiples of 16 bytes"):
        arguments = case(device, torch.bfloat16, 1, 64, 32)
        lil_ops.decode_linear(**arguments | {"x": arguments["x"].new_zeros(65)[1:]})


def test_opcheck(device):
    skip_what_cuda_refuses(device, torch.bfloat16)
    for name in CASES:
        arguments = case(device, torch.bfloat16, 3, 64, 96, **CASES[name])
        positional = [arguments.pop(each) for each in ("x", "weight", "bias")]
        torch.library.opcheck(torch.ops.lil.decode_linear.default, positional, arguments)


def test_compiled_equals_eager(device):
    skip_what_cuda_refuses(device, torch.bfloat16)
    arguments = case(device, torch.bfloat16, 3, 64, 32, norm=True, residual=True)
    compiled = torch.compile(lambda: lil_ops.decode_linear(**arguments) * 2, fullgraph=True)
    assert torch.equal(compiled(), lil_ops.decode_linear(**arguments) * 2)
