"""Builds the native parts with CMake and ninja: liblil_cpu.so, liblil_cuda.so (where nvcc is found) and lil_ops._C.

Environment: LIL_CUDA_ARCHS (CMake list such as "80;90"; "OFF" skips CUDA; see cuda_archs for the default),
CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80;86;89;90;100;120"


def cuda_archs(torch) -> str:
    """This machine's GPUs, or every architecture where there is none.

    One alone where torch has no CUDA: the library is then compiled to show that it does, and nothing there loads it.
    """
    if torch.version.cuda is None:
        return "90"
    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}{minor}" for major, minor in sorted(capabilities))
    return CUDA_ARCHS


class CMakeBuild(build_ext):
    """CMake builds into build/<python>-torch<version>/lib; the results are copied to where setuptools wants them."""

    def run(self) -> None:
        try:
            import pybind11
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                f"lil-ops builds against the torch you run with, and {error.name} is not installed here. Install torch "
                "and pybind11 first, then: pip install --no-build-isolation ."
            ) from error
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        libraries = build / "lib"
        configure = [
            "cmake",
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DLIL_PACKAGE_DIR={libraries}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLIL_TORCH_INCLUDE={';'.join(include_paths())}",
            f"-DLIL_TORCH_LIB={';'.join(library_paths())}",
            f"-DLIL_CUDA_ARCHS={os.environ.get('LIL_CUDA_ARCHS') or cuda_archs(torch)}",
        ]  # fmt: skip
        # The cmake and ninja that pip installed beside this Python come before the system's, which may be too old.
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        package = ROOT / "lil_ops" if self.inplace or self.editable_mode else Path(self.build_lib) / "lil_ops"
        package.mkdir(parents=True, exist_ok=True)
        if not (libraries / "liblil_cuda.so").exists():
            (package / "liblil_cuda.so").unlink(missing_ok=True)  # an earlier build's, from before CUDA was turned off
        for library in libraries.glob("*.so"):
            # A library that a process has loaded must not change under it: replace the file, do not write into it.
            shutil.copy2(library, package / f"{library.name}.new")
            os.replace(package / f"{library.name}.new", package / library.name)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("lil_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
