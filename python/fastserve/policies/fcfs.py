# SPDX-License-Identifier: Apache-2.0
"""First come, first served."""

from typing import Any

from fastserve.request import Request


def order(request: Request) -> tuple[Any, ...]:
    return ()
