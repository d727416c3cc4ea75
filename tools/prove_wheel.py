# SPDX-License-Identifier: Apache-2.0
"""Install a wheel into an empty environment and generate there: prove_wheel.py WHEEL MODEL_DIR

Nothing of the sources is in reach: the environment is new, and the programs run in its folder. Prints the wheel's size,
what it was built with and the text that it generated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys
import fastserve
from fastserve import LLM, SamplingParams, _native

if not fastserve.__file__.startswith(sys.prefix):
    sys.exit(f"{fastserve.__file__} does not come from the wheel")
cuda = f"CUDA kernels, {len(_native.cuda_devices())} devices here" if _native.built_with_cuda else "CPU kernels only"
print(f"fastserve {fastserve.__version__}: {cuda}; instruction sets {', '.join(_native.isas())}")
with LLM(sys.argv[1]) as llm:
    answer = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
print("generated:", repr(answer.text))
if len(answer.token_ids) != 8:
    sys.exit(f"expected 8 tokens, got {answer.token_ids}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    wheel, model = args.wheel.resolve(), args.model.resolve()
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        install = ["-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
        for command in (
            [str(python), *install],
            [str(python.with_name("fastserve")), "--version"],
            [str(python), "-c", CHECK, str(model)],
        ):
            done = subprocess.run(command, cwd=folder, env=environment)
            if done.returncode != 0:
                sys.exit(f"{wheel.name} failed in an empty environment: {' '.join(command[:4])}")


if __name__ == "__main__":
    main()
