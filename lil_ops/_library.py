"""Loads the native libraries and tells what was built."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent

try:
    torch.ops.load_library(PACKAGE / "liblil_cpu.so")
except OSError as error:
    raise ImportError(
        f"lil_ops: the native library {PACKAGE / 'liblil_cpu.so'} did not load ({error}). Build it with torch "
        "installed first: pip install --no-build-isolation ."
    ) from error

_cuda_library = PACKAGE / "liblil_cuda.so"
cuda_loaded = torch.version.cuda is not None and _cuda_library.exists()
if cuda_loaded:
    torch.ops.load_library(_cuda_library)


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use in this process: avx512, avx2 or generic.

    The environment variable LIL_CPU_ISA, read at the first call of a kernel, asks for a lesser one than the best.
    Raises RuntimeError, as the operators do, where it has another value.
    """
    name, error = ctypes.CDLL(str(PACKAGE / "liblil_cpu.so")).lil_cpu_isa, ctypes.c_char_p()
    name.restype = ctypes.c_char_p
    isa = name(ctypes.byref(error))
    if isa is None:
        raise RuntimeError(error.value.decode())
    return isa.decode()


def check_errors(device: torch.device | str | None = None) -> None:
    """Wait for a CUDA device (None: every device), then raise what its kernels found out of range since the last check.

    Kernels skip what is out of range (a length, a page id, a count) and note the first such value in a word on the
    device, which this reads and clears. Raises RuntimeError with the operator's own message. Without CUDA kernels it
    does nothing: on the CPU the operators raise such errors themselves.
    """
    if not cuda_loaded or not torch.cuda.is_available():
        return
    take = ctypes.CDLL(str(_cuda_library)).lil_cuda_take_error
    take.restype = ctypes.c_char_p
    devices = range(torch.cuda.device_count())
    if device is not None:
        one = torch.device(device)
        if one.type != "cuda":
            return
        devices = [torch.cuda.current_device() if one.index is None else one.index]
    for index in devices:
        if message := take(index):
            raise RuntimeError(message.decode())


def build_info() -> dict:
    """Versions, architectures, instruction sets and devices of this installation, as plain values.

    ``cuda_library``: "loaded", "built, not loaded (this torch has no CUDA)" or "not built (no nvcc, or turned off)".
    """
    from lil_ops import _C, __version__

    facts = _C.build_facts()
    if cuda_loaded:
        cuda = "loaded"
    else:
        cuda = (
            "built, not loaded (this torch has no CUDA)"
            if _cuda_library.exists()
            else "not built (no nvcc, or turned off)"
        )
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "lil_ops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        **facts,
        "isa": cpu_isa(),
        "cuda_library": cuda,
        "threads": torch.get_num_threads(),
        "devices": devices,
    }
