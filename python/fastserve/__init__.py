# SPDX-License-Identifier: Apache-2.0
"""fastserve: an LLM inference engine for people who serve many requests.

Importing fastserve imports neither torch nor the native module: both come with the first use of a name below.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastserve.async_llm import AsyncLLM
    from fastserve.config import EngineConfig, RequestOutputKind, SamplingParams, StructuredOutputs
    from fastserve.errors import EngineDead, FastserveError, InvalidRequest, ModelLoadError, QueueFull
    from fastserve.llm import LLM
    from fastserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "RequestOutputKind": "config",
    "SamplingParams": "config",
    "StructuredOutputs": "config",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "EngineDead": "errors",
    "FastserveError": "errors",
    "InvalidRequest": "errors",
    "ModelLoadError": "errors",
    "QueueFull": "errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineDead",
    "FastserveError",
    "InvalidRequest",
    "Logprob",
    "ModelLoadError",
    "QueueFull",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastserve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"fastserve.{_HOMES[name]}"), name)
