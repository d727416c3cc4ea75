# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bf16; downloaded and converted once per checkout."""
    from fetch_demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def demo_int4_model_dir() -> Path:
    """The same with the GGUF file's 4-bit weights, code for code."""
    from fetch_demo_model import demo_model

    return demo_model(int4=True)
