# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No example fails because the machine is slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A test file that was skipped as a whole must not go unnoticed."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr}
    for reason in sorted(one for one in reasons if "Chromium" in one):
        terminalreporter.write_line(
            f"WARNING: the page was not tested: {reason.removeprefix('Skipped: ')}", yellow=True, bold=True
        )
