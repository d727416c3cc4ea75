# SPDX-License-Identifier: Apache-2.0
"""Install what pyproject.toml lists for running, testing and developing, but not the project itself.

The project is installed by `make native`, whose build takes minutes and must not run twice.
"""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from setuptools._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
requirements = [*project["dependencies"], *extras["convert"], *extras["test"], *extras["dev"]]
pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
sys.exit(subprocess.call([*pip, *requirements]))
