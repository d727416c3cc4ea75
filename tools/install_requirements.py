# SPDX-License-Identifier: Apache-2.0
"""Install what pyproject.toml lists for running, testing and developing, but not the project itself.

    install_requirements.py             all of that
    install_requirements.py EXTRA...    only these extras

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
requirements = [*project["dependencies"], *extras["convert"], *extras["server"], *extras["test"], *extras["dev"]]
if len(sys.argv) > 1:
    requirements = [requirement for extra in sys.argv[1:] for requirement in extras[extra]]
pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
sys.exit(subprocess.call([*pip, *requirements]))
