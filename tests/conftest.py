import torch

from lil_ops import _library


def pytest_generate_tests(metafunc):
    """A test that takes ``device`` runs on the CPU, and on CUDA where its module's OPERATOR has a kernel there."""
    if "device" in metafunc.fixturenames:
        name = f"lil::{metafunc.module.OPERATOR}"
        on_cuda = _library.cuda_loaded and torch.cuda.is_available()
        on_cuda = on_cuda and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        metafunc.parametrize("device", ["cpu", "cuda"] if on_cuda else ["cpu"])
