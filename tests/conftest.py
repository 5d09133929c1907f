import torch

from lil_ops import _library


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
