# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench`: measurements of engines and servers."""
