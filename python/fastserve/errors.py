# SPDX-License-Identifier: Apache-2.0
"""The errors a user of fastserve can meet. Each says what was given, what is allowed and what to do."""


class FastserveError(Exception):
    """Base class of all errors raised by fastserve."""


class InvalidRequest(FastserveError, ValueError):
    """A prompt or a parameter is not acceptable; only this request is affected."""


class QueueFull(FastserveError):
    """The bounded waiting queue has no place; try again later."""


class ModelLoadError(FastserveError, ValueError):
    """A model folder is missing something, or its files contradict themselves."""


class EngineDead(FastserveError):
    """The engine stopped after an internal failure; the cause is chained."""
