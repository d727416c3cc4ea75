# SPDX-License-Identifier: Apache-2.0
"""Model architectures, one file each, found by the `architectures` tuple of their model class."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from fastserve.errors import ModelLoadError


@cache
def known_architectures() -> dict[str, type[Any]]:
    """Architecture name (as in config.json) -> model class."""
    known: dict[str, type[Any]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        model_class = importlib.import_module(f"{__name__}.{module_info.name}").Model
        known.update(dict.fromkeys(model_class.architectures, model_class))
    return known


def model_class_for(architecture: str) -> type[Any]:
    """Raises ModelLoadError naming the known architectures."""
    known = known_architectures()
    if architecture not in known:
        raise ModelLoadError(f"architecture {architecture!r} is not known; known are {', '.join(sorted(known))}")
    return known[architecture]
