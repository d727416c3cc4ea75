# SPDX-License-Identifier: Apache-2.0
"""torch's library may be loaded before torch is imported, and loading an engine leaves Python's collector as it was."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve import ModelLoadError
from fastserve.engine.load import load_engine
from fastserve.torch_ahead import load_torch_ahead
from tiny_models import make_tiny_checkpoint


def run_python(text: str) -> str:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_library_is_loaded_without_torch_and_torch_works_with_it() -> None:
    text = """
import sys
from fastserve.torch_ahead import load_torch_ahead
load_torch_ahead().join()
assert "torch" not in sys.modules
assert "libtorch_cpu" in open("/proc/self/maps").read()
import torch
print(float((torch.ones(3, 3) @ torch.ones(3)).sum()))
"""
    assert run_python(text) == "9.0\n"


def test_a_process_that_ends_at_once_ends_well() -> None:
    run_python("from fastserve.torch_ahead import load_torch_ahead; load_torch_ahead()")


def test_nothing_is_loaded_where_torch_is_there() -> None:
    assert load_torch_ahead() is None


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_loading_leaves_the_collector_as_it_was(tmp_path: Path, enabled: bool, exists: bool) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model") if exists else tmp_path / "none"
    was, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        if exists:
            load_engine(folder, None, skip_tokenizer_init=True, options={"num_blocks": 4}).close()
        else:
            with pytest.raises(ModelLoadError, match="not a folder"):
                load_engine(folder, None, skip_tokenizer_init=False, options={})
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == frozen
    finally:
        (gc.enable if was else gc.disable)()
