# SPDX-License-Identifier: Apache-2.0
"""fastserve: an LLM inference engine for people who serve many requests."""

__version__ = "0.1.0"
