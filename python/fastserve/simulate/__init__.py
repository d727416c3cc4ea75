# SPDX-License-Identifier: Apache-2.0
"""The engine without a device: the same scheduler, pool and policies, and a virtual clock. Imports no torch."""
