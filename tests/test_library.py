"""The installation: what build_info says, each instruction set's kernels, and what an import needs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, FLOAT8, HEAD_DIMS, TOLERANCE, paged, queries, relative_error, without_nan

import lil_ops
from lil_ops import reference

TESTS = Path(__file__).parent


def run(code, **environment):
    """What a new Python process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd=TESTS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_build_info():
    info = lil_ops.build_info()
    expected = {
        "lil_ops": str, "python": str, "torch": str, "torch_cuda": str | None, "cxx_compiler": str,
        "cuda_version": str | None, "cuda_archs": list, "isas": list, "isa": str, "cuda_library": str, "threads": int,
        "devices": list,
    }  # fmt: skip
    assert set(info) == set(expected)
    assert all(isinstance(info[key], kind) for key, kind in expected.items())
    assert info["lil_ops"] == lil_ops.__version__ and info["torch"] == torch.__version__
    assert info["isa"] in info["isas"] and "generic" in info["isas"]
    # Built by nvcc and for some GPU, or neither.
    assert (info["cuda_version"] is None) == (info["cuda_archs"] == []) == info["cuda_library"].startswith("not built")
    assert info["devices"][0] == "cpu" and len(info["devices"]) == 1 + torch.cuda.device_count()
    assert json.loads(json.dumps(info)) == info


def errors_against_the_reference():
    """Every kernel that is compiled for each instruction set, in all dtypes; runs in a process of its own."""
    errors = []
    pairs = [*((dtype, dtype) for dtype in (*DTYPES, FLOAT8)), (torch.bfloat16, FLOAT8)]
    for (dtype, summary_dtype), mode, head_dim in itertools.product(pairs, ["minmax", "meanstd"], HEAD_DIMS):
        cache = paged("cpu", [140, 1, 97], head_dim=head_dim, dtype=dtype, summary_mode=mode,
                      summary_dtype=summary_dtype, scales="page" if dtype == FLOAT8 else None)  # fmt: skip
        wide = torch.bfloat16 if dtype == FLOAT8 else dtype
        q, k, v = (queries("cpu", 3, heads, head_dim, wide, seed) for seed, heads in enumerate((10, 2, 2)))
        v = v * 100 if dtype == FLOAT8 else v  # some saturate
        tables, scales = (cache.page_table, cache.seq_lens), cache.scales
        scoring = {"summary_mode": mode, "k_scale": cache.k_scale}
        buffers = cache.k, cache.v, cache.summary
        appended = reference.append_kv(*buffers, k, v, *tables, summary_mode=mode, **scales)
        lil_ops.append_kv(*buffers, k, v, *tables, summary_mode=mode, **scales)
        exact = 3 if mode == "minmax" else 2
        scores = lil_ops.score_pages(q, cache.summary, *tables, 16, **scoring)
        want_scores = reference.score_pages(q, cache.summary, *tables, 16, **scoring)
        budget = 16, 128
        pages = lil_ops.select_pages(scores, cache.seq_lens, *budget, sink=4, recent=20)
        chosen = reference.select_pages(scores, cache.seq_lens, *budget, sink=4, recent=20)
        masses = {"page_mass": torch.empty(3, 10, 8), "token_mass": torch.empty(3, 10, 128)}
        out, lse = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, *pages, **scales, **masses)
        want_out, want_lse = reference.sparse_decode(q, cache.k, cache.v, *tables, *chosen, **scales)
        want_masses = reference.attention_mass(q, cache.k, *tables, *chosen, k_scale=cache.k_scale)
        losing = lse, scores, cache.seq_lens, 16, *pages
        loss, want_loss = lil_ops.information_loss(*losing), reference.information_loss(*losing)
        right = {
            "append_kv": all(
                torch.equal(without_nan(a).float(), without_nan(b).float())
                for a, b in zip(buffers[:exact], appended[:exact], strict=True)
            )
            and relative_error(*(without_nan(t[2]) for t in (buffers, appended))) < TOLERANCE[wide],
            "score_pages": relative_error(scores, want_scores) < 1e-5,
            "select_pages": all(map(torch.equal, pages, chosen)),
            "sparse_decode": relative_error(out, want_out) < TOLERANCE[wide]
            and relative_error(lse, want_lse) < 1e-5
            and all(relative_error(*both) < 1e-5 for both in zip(masses.values(), want_masses, strict=True)),
            "information_loss": relative_error(loss, want_loss) < 1e-5,
        }
        case = f"{dtype}, {summary_dtype}, {mode}, head_dim {head_dim}"
        errors += [f"{operator}, {case}" for operator, ok in right.items() if not ok]
    return errors


@pytest.mark.parametrize("isa", lil_ops.build_info()["isas"])
def test_each_instruction_set(isa):
    isas, best = (lil_ops.build_info()[key] for key in ("isas", "isa"))
    if isas.index(isa) > isas.index(best):
        pytest.skip(f"this processor has no {isa}")
    code = (
        "import json, lil_ops, test_library; "
        "print(json.dumps([lil_ops.build_info()['isa'], test_library.errors_against_the_reference()]))"
    )
    assert run(code, LIL_CPU_ISA=isa) == [isa, []]


def test_an_empty_instruction_set_means_the_best():
    code = "import json, lil_ops; print(json.dumps(lil_ops.build_info()['isa']))"
    assert run(code, LIL_CPU_ISA="") == run(f"import os; os.environ.pop('LIL_CPU_ISA', None); {code}")


def test_an_unknown_instruction_set_is_told():
    code = """
import json, torch, lil_ops
scores, seq_lens = torch.zeros(1, 1, 4), torch.ones(1, dtype=torch.int32)
told = []
for use in (lambda: lil_ops.select_pages(scores, seq_lens, 16, 64), lil_ops.build_info):
    try:
        use()
    except RuntimeError as error:
        told.append(str(error))
print(json.dumps(told))
"""
    assert run(code, LIL_CPU_ISA="sse9") == ["lil_ops: LIL_CPU_ISA: expected generic, avx2 or avx512, got 'sse9'"] * 2


def test_the_core_imports_neither_transformers_nor_the_cli():
    code = "import json, sys, lil_ops; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    assert not {"transformers", "safetensors", "gguf", "typer", "rich"} & set(run(code))


def test_a_missing_extra_is_told():
    code = """
import json, sys
sys.modules["transformers"] = None  # as if it were not installed
import lil_ops
told = []
for name in ("DecodeLoop", "Engine", "LilCache", "generate", "load_model"):
    for statement in (f"lil_ops.{name}", f"from lil_ops import {name}"):
        try:
            exec(statement)
        except ImportError as error:
            told.append(str(error) == f"lil_ops.{name} needs transformers: pip install lil-ops[hf]")
print(json.dumps(told))
"""
    assert run(code) == [True] * 10


def test_every_public_name_is_there():
    assert all(getattr(lil_ops, name) is not None for name in lil_ops.__all__)
    with pytest.raises(AttributeError, match="module 'lil_ops' has no attribute 'nothing'"):
        lil_ops.nothing  # noqa: B018
