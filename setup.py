# SPDX-License-Identifier: Apache-2.0
"""Builds the extension module `fastserve._native` with CMake and ninja. All metadata is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake for the one module; `pip install -e .` puts it beside the Python sources.

    The build tree (build/, or FASTSERVE_BUILD_TREE) is kept between runs, so a second run compiles only what changed.
    Extra CMake arguments come from the environment variable CMAKE_ARGS, the number of jobs from
    CMAKE_BUILD_PARALLEL_LEVEL.
    """

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        default_tree = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build_tree = Path(os.environ.get("FASTSERVE_BUILD_TREE", default_tree)).resolve()
        build_tree.mkdir(parents=True, exist_ok=True)
        cmake = [sys.executable, "-m", "cmake"]
        subprocess.run(
            [
                *cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_tree),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DFASTSERVE_OUTPUT_DIR={output}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run([*cmake, "--build", str(build_tree), "-j", jobs], check=True)


setup(ext_modules=[Extension("fastserve._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
