"""What must be done before torch is imported, on a machine that has torch and a GPU; on another one nothing happens.

Its libraries are loaded, and the driver set up, while the packages of a service are still being imported. Importing
holds the interpreter, and takes one processor; the dynamic linker and the driver need neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import threading
from pathlib import Path

LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_LOCAL))  # as torch's own import does
# What the packages of a service have in shared libraries of their own. The linker has one lock, and works for half a
# second on torch's: whoever wants one of these meanwhile waits for it, and keeps the interpreter. By the names that all
# import: who imports `_asyncio` before `asyncio` has its tasks from one of the two and asks the other for them.
OWN_LIBRARIES = (
    "asyncio", "bisect", "bz2", "contextvars", "csv", "decimal", "hashlib", "json", "lzma",
    "multiprocessing.connection", "pickle", "queue", "random", "ssl", "statistics", "uuid", "xml.etree.ElementTree",
    "zoneinfo", "grp", "mmap", "resource", "unicodedata", "zlib", "uvloop", "httptools",
    "Crypto.Cipher.AES", "Crypto.Cipher.ChaCha20_Poly1305", "Crypto.Cipher._mode_gcm", "_argon2_cffi_bindings",
)  # fmt: skip
DRIVER = "libcuda.so.1"
DEVICE = Path("/dev/nvidiactl")
# How torch manages memory, its own variables: it reads one of them when it is imported.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# Host memory is pinned by torch's threads, not by the driver's one, which takes three to four times as long.
PINNED_BY_THREADS = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


def load_ahead() -> threading.Thread | None:
    """Import what links libraries itself, then begin, in a thread; None where there is nothing to load.

    A fault is for whoever needs the library to meet.
    Has torch pin host memory with several threads, unless its variables say how it is to manage memory.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations or not DEVICE.exists():
        return None
    if os.environ.keys().isdisjoint(ALLOCATOR):
        os.environ[ALLOCATOR[0]] = PINNED_BY_THREADS
    _link_own()
    folder = Path(torch.submodule_search_locations[0]) / "lib"
    thread = threading.Thread(target=_load, args=(folder,), name="libraries", daemon=True)
    thread.start()
    return thread


def _link_own() -> None:
    for name in OWN_LIBRARIES:
        with contextlib.suppress(ImportError):  # it is not there, or not in this version
            importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):
        # At its first use it asks the linker for a symbol.
        importlib.import_module("pydantic_core").SchemaSerializer({"type": "any"})


def _load(folder: Path) -> None:
    # Called as any function of C is, without the interpreter's lock; `ctypes.CDLL` would keep it.
    load = ctypes.CDLL(None).dlopen
    load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    driver = load(DRIVER.encode(), os.RTLD_LOCAL | os.RTLD_NOW)
    setting_up = threading.Thread(target=_set_up, name="driver", daemon=True)
    if driver:
        setting_up.start()
    for name, how in LIBRARIES:
        if not load(str(folder / name).encode(), how | os.RTLD_NOW):
            return


def _set_up() -> None:
    ctypes.CDLL(DRIVER).cuInit(0)
