# SPDX-License-Identifier: Apache-2.0
"""Weights on their way in: safetensors checkpoints, and GGUF files converted to them."""
