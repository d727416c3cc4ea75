# SPDX-License-Identifier: Apache-2.0
"""The engine loop: schedule a step, run it, take the tokens."""
