"""The native library: found beside this module, loaded once, its C interface described for ctypes.

It is built when the package is installed (`ext-modules` in pyproject.toml) and has no part of torch or Python in it. Where no
compiler was there, the package installs without it, and `native()` says so once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import threading
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

logger = logging.getLogger("moray.kernels")

SPIN_US = 300
"""How long an idle compute thread looks for work before it sleeps, giving its core to whoever else wants it: the time between
two calls of one step. A thread that sleeps takes up to 0.5 ms to come back on a virtual machine, as long as a layer."""


class Instructions(IntEnum):
    """Which instructions the kernels use; a better one has a higher number."""

    GENERIC = 1
    AVX2 = 2
    AVX512 = 3
    AVX512_BF16 = 4
    AMX = 5


class Matrix(Structure):
    """`moray_matrix`."""

    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int32),
        ("cols", c_int32),
        ("kind", c_int32),
        ("reserved", c_int32),
    ]


class Mlp(Structure):
    """`moray_mlp`."""

    _fields_ = [("gate_up", Matrix), ("down", Matrix)]


class Layer(Structure):
    """`moray_layer`."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "heads", "nope", "rope", "value", "q_rank", "kv_rank")),
        *((name, c_int32) for name in ("experts", "top_k", "groups", "kept_groups", "softmax", "normalise")),
        *((name, c_float) for name in ("eps", "softmax_scale", "routed_scale")),
        *((name, c_void_p) for name in ("attention_norm", "q_norm", "kv_norm", "feed_forward_norm")),
        *((name, Matrix) for name in ("q_a", "q_b", "kv_a", "o", "gate")),
        ("gate_bias", c_void_p),
        ("key_up", POINTER(Matrix)),
        ("value_up", POINTER(Matrix)),
    ]


class Batch(Structure):
    """`moray_batch`."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "segments", "page_size", "row")),
        *((name, c_void_p) for name in ("segment", "tables", "cache_rows", "rotation")),
    ]


class NativeLibrary:
    """The functions of `moray_cpu.h`. Pointers are plain integers, as `Tensor.data_ptr` gives them.

    ctypes releases the interpreter's lock while one runs.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self.path = path
        self._best = declared(library, "moray_cpu_best", c_int)
        self._use = declared(library, "moray_cpu_use", c_int, c_int)
        self._used = declared(library, "moray_cpu_used", c_int)
        self._amx = declared(library, "moray_cpu_amx", c_int)
        self._set_threads = declared(library, "moray_set_threads", c_int, c_int, c_int)
        self._threads = declared(library, "moray_threads", c_int)
        self.packed_bytes = declared(library, "moray_packed_bytes", c_int64, c_int32, c_int32, c_int32)
        self.pack = declared(
            library, "moray_pack", None, c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p
        )  # source, stride, rows, columns, kind, packed
        self.linear = declared(library, "moray_linear", None, c_void_p, c_int32, c_void_p, c_void_p, c_int)
        self.rms_norm = declared(
            library, "moray_rms_norm", None, c_void_p, c_int32, c_int32, c_void_p, c_float, c_void_p
        )  # x, rows, width, weight, eps, out
        self.rows = declared(
            library, "moray_rows", c_int, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_void_p
        )  # table, rows, bytes of one, numbers, how many, out
        self.place = declared(
            library,
            "moray_place",
            c_int,
            *(c_void_p, c_int32, c_void_p, c_int32),  # segments, how many, tables, page size
            *(c_void_p, c_int64, c_int32),  # rotations, positions, elements of one
            *(c_void_p, c_void_p),  # cache rows, rotation
        )
        self.swiglu = declared(library, "moray_swiglu", None, c_void_p, c_int32, c_void_p, c_void_p)
        self.grouped_mlp = declared(
            library,
            "moray_grouped_mlp",
            c_int,
            *(c_void_p, c_int32, c_void_p, c_void_p, c_int32),  # hidden states, tokens, rows, slots, pairs
            *(c_void_p, c_int32, c_void_p),  # MLPs, slots, out
        )
        self.attention = declared(library, "moray_attention", None, *(c_void_p,) * 7)
        self.latents = declared(library, "moray_latents", None, *(c_void_p,) * 4)
        self.add = declared(library, "moray_add", None, c_void_p, c_void_p, c_void_p, c_int64)
        self.combine = declared(library, "moray_combine", None, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p)
        # For native code of others.
        self.grouped_mlp_address = ctypes.cast(self.grouped_mlp, c_void_p).value
        self.attention_address = ctypes.cast(self.attention, c_void_p).value
        self.swiglu_address = ctypes.cast(self.swiglu, c_void_p).value
        self.add_address = ctypes.cast(self.add, c_void_p).value
        self.combine_address = ctypes.cast(self.combine, c_void_p).value
        self.sample = declared(
            library, "moray_sample", None, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p
        )  # logits, stride, rows, vocabulary, table of rows, tokens
        self.use(self.best)
        if self._amx() < 0:
            logger.warning(
                "event=amx_not_used: AMX of this processor computed a wrong product when it was tried; %s computes instead. "
                "Please report it, with what `lscpu` prints",
                self.best.name,
            )

    @property
    def best(self) -> Instructions:
        """The best that this machine has."""
        return Instructions(self._best())

    @property
    def used(self) -> Instructions:
        """What the kernels use now."""
        return Instructions(self._used())

    def use(self, instructions: Instructions) -> None:
        """Use these instructions from now on: for tests and measurements, the best are chosen by themselves.

        Raises:
            ValueError: this machine does not have them.
        """
        if self._use(int(instructions)):
            raise ValueError(f"{instructions.name}: this machine's best are {self.best.name}")

    @property
    def threads(self) -> int:
        """Threads that a call uses."""
        threads: int = self._threads()
        return threads

    def set_threads(self, threads: int, *, spin_us: int = SPIN_US) -> None:
        """Use so many threads in each call from now on.

        Raises:
            ValueError: not 1 to 256 threads, or a spin that is negative or longer than a second.
        """
        if self._set_threads(threads, spin_us):
            raise ValueError(f"{threads} threads that spin for {spin_us} us: must be 1 to 256, and 0 to 1000000")


def declared(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A library's function with the types of its result and arguments."""
    function = library[name]
    function.restype, function.argtypes = result, arguments
    return function


_lock = threading.Lock()


def native() -> NativeLibrary | None:
    """The library, or None where the package was installed without it, which is said once."""
    with _lock:
        return _load()


@functools.cache
def _load() -> NativeLibrary | None:
    found = importlib.util.find_spec("._native", __package__)
    if found is None or found.origin is None:
        logger.warning(
            "event=no_native_kernels: Moray was installed without its CPU kernels, since there was no C++ compiler; "
            "torch computes instead, several times slower. Install a compiler (g++ or clang++), then Moray again."
        )
        return None
    return NativeLibrary(found.origin)


def set_threads(threads: int, *, packed: bool, spin_us: int = SPIN_US) -> None:
    """Have this process compute with so many threads: in the kernels, if there are any, and in torch unless weights are packed.

    Then torch has only small things left to do, and its threads, which look for work for milliseconds after each of them, would
    take the cores from the kernels' (a step of 32 tokens took 1.6 times as long). Those of the kernels look for it
    for `spin_us` before they sleep.
    """
    import torch  # which the rest of this module does without: a process that only asks what is here need not load it

    torch.set_num_threads(1 if packed else threads)
    if (library := native()) is not None:
        library.set_threads(threads, spin_us=spin_us)


def loaded() -> NativeLibrary:
    """The library, for whoever has packed weights, which nobody has without it."""
    library = native()
    assert library is not None, "packed weights without the library that packs them"
    return library
