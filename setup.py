"""Builds the native parts with CMake and ninja: liblil_cpu.so, liblil_cuda.so (where nvcc is found) and lil_ops._C.

Environment: LIL_CUDA_ARCHS (CMake list, default "80;86;89;90;100;120"; "OFF" skips CUDA), CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
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
        build.mkdir(parents=True, exist_ok=True)
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake",
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DLIL_PACKAGE_DIR={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLIL_TORCH_INCLUDE={';'.join(include_paths())}",
            f"-DLIL_TORCH_LIB={';'.join(library_paths())}",
            f"-DLIL_CUDA_ARCHS={os.environ.get('LIL_CUDA_ARCHS', '80;86;89;90;100;120')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("lil_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
