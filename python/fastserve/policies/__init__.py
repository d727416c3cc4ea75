# SPDX-License-Identifier: Apache-2.0
"""Scheduling policies: who goes first, and who may start. One small module each, found by its name.

A policy is a module with the two pure functions of `Policy`. It decides nothing else: the scheduler keeps the
budget, the blocks and the promise that every running decode is part of every step.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from fastserve.errors import InvalidRequest
from fastserve.request import Request


@dataclass(frozen=True, slots=True)
class Memory:
    """KV cache blocks, seen by a request that wants to start."""

    num_needed: int  # new blocks until its first output token, after what the prefix cache gives
    num_available: int  # free now, or cached and unused
    num_blocks: int  # the whole cache


class Policy(Protocol):
    def order(self, request: Request) -> tuple[Any, ...]:
        """Sort key, fixed while the request lives: smaller starts first and is preempted last.

        The scheduler breaks ties by order of arrival.
        """

    def admit(self, candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
        """Whether the first of the waiting requests may start now. Not asked when nothing runs: then it
        may."""


def policy_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_policy(name: str) -> Policy:
    """The policy called `name`; unknown names raise `InvalidRequest` listing the known ones."""
    if name not in policy_names():
        raise InvalidRequest(f"policy={name!r} is unknown; known policies: {', '.join(policy_names())}")
    return cast(Policy, importlib.import_module(f"{__name__}.{name}"))
