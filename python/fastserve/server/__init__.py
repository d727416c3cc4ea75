# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible HTTP server. It needs `pip install fastserve[server]`; nothing outside imports it early."""
