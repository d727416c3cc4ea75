# SPDX-License-Identifier: Apache-2.0
"""Lower `priority` first; first come, first served among equals.

A steady stream of urgent requests can hold back the others for as long as it lasts: that is what was asked
for.
"""

from typing import Any

from fastserve.request import Request


def order(request: Request) -> tuple[Any, ...]:
    return (request.priority,)
