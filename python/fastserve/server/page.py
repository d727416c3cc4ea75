# SPDX-License-Identifier: Apache-2.0
"""Where the built-in page is."""

from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
