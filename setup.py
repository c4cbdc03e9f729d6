"""Drives CMake and Ninja. Everything else about the package stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds `bantamweight._C`; an editable install builds once into build/ and again only what changed."""

    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(source),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DBANTAMWEIGHT_CUDA={os.environ.get('BANTAMWEIGHT_CUDA', 'AUTO')}",
            *os.environ.get("BANTAMWEIGHT_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


setup(ext_modules=[Extension("bantamweight._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
