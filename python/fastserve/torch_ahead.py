# SPDX-License-Identifier: Apache-2.0
"""torch's library, loaded by the system while Python does something else.

Importing torch takes a second of one core. A fifth of that is the dynamic linker's and the library's own constructors',
which need no Python: they run on another core meanwhile. What else loads libraries at that time has to wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from pathlib import Path

LIBRARY = "lib/libtorch_cpu.so"


def load_torch_ahead() -> threading.Thread | None:
    """Starts it, unless torch is there. That it may fail does not matter: importing torch says what is wrong."""
    if "torch" in sys.modules:
        return None
    # Not a daemon: a process that ends early waits, or the library would be set up and taken down at the same time.
    thread = threading.Thread(target=_load, name="fastserve torch ahead")
    thread.start()
    return thread


def _load() -> None:
    with contextlib.suppress(Exception):
        found = importlib.util.find_spec("torch")
        if found is None or not found.submodule_search_locations:
            return
        path = Path(found.submodule_search_locations[0]) / LIBRARY
        # Not ctypes.CDLL, which may keep the interpreter's lock; a function called through ctypes never does.
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        dlopen(os.fsencode(path), os.RTLD_LAZY | os.RTLD_LOCAL)
