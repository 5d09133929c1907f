import importlib
import sys
from pathlib import Path

import pytest
import torch

from lil_ops import _library


@pytest.fixture(scope="module")
def one_thread():
    """For many small operations, to which threads only bring waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench():
    """Imports a module of bench/ by its name."""
    folder = str(Path(__file__).resolve().parents[1] / "bench")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


def pytest_generate_tests(metafunc):
    """A test that takes ``device`` runs on the CPU, and on CUDA where its module's OPERATOR(S) have kernels there."""
    if "device" in metafunc.fixturenames:
        module = metafunc.module
        operators = getattr(module, "OPERATORS", None) or [module.OPERATOR]
        on_cuda = _library.cuda_loaded and torch.cuda.is_available()
        on_cuda = on_cuda and all(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"lil::{operator}", "CUDA") for operator in operators
        )
        metafunc.parametrize("device", ["cpu", "cuda"] if on_cuda else ["cpu"])
