# SPDX-License-Identifier: Apache-2.0
"""Scheduling policies: who goes first. One small module each, found by its name.

A policy is a module with the pure function of `Policy`. It decides nothing else: whether the first may start is
the matter of `fastserve.admission`, and the scheduler keeps the budget, the blocks and the promise that every
running decode is part of every step.
"""

import importlib
import pkgutil
from typing import Any, Protocol, cast

from fastserve.errors import InvalidRequest
from fastserve.request import Request


class Policy(Protocol):
    def order(self, request: Request) -> tuple[Any, ...]:
        """Sort key, fixed while the request lives: smaller starts first and is preempted last.

        The scheduler breaks ties by order of arrival.
        """


def policy_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_policy(name: str) -> Policy:
    """The policy called `name`; unknown names raise `InvalidRequest` listing the known ones."""
    if name not in policy_names():
        raise InvalidRequest(f"policy={name!r} is unknown; known policies: {', '.join(policy_names())}")
    return cast(Policy, importlib.import_module(f"{__name__}.{name}"))
