"""The native half of an expert host, described for ctypes: see `native/moray_actors.h`.

It is built when the package is installed (`ext-modules` in pyproject.toml), beside the CPU kernels, and has no part of torch or
Python in it. Where it is missing, Python serves every frame, which `host_library()` says once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import threading
from ctypes import POINTER, Structure, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from enum import IntEnum

from ..kernels.cpu.library import declared

logger = logging.getLogger("moray.expert_host")

_PACKET_BYTES = 128


class Outcome(IntEnum):
    """How a call of `serve_experts` has ended; see the header."""

    QUIET = 0
    LEFT = 1
    UNSENT = 2
    FAILED = 3


class LinkState(Structure):
    """`moray_link`."""

    _fields_ = [
        *((name, c_int32) for name in ("fd", "error", "spin_rest", "spin_next_rest")),
        *((name, c_uint64) for name in ("sent", "received", "arrived")),
        *((name, c_void_p) for name in ("released_here", "peer_waits", "released_by_peer", "incoming", "outgoing")),
        *((name, c_uint64) for name in ("incoming_slot_bytes", "outgoing_slot_bytes")),
        ("packet_bytes", c_int32),
        ("packet", c_uint8 * _PACKET_BYTES),
    ]


class LayerExperts(Structure):
    """`moray_layer_experts`."""

    _fields_ = [
        ("epoch", c_uint32),
        *((name, c_int32) for name in ("layer", "hidden", "num_slots")),
        ("mlps", c_void_p),
    ]


class Table(Structure):
    """`moray_expert_table`."""

    _fields_ = [
        ("layers", POINTER(LayerExperts)),
        ("count", c_int32),
        ("superseded", c_int32),
        ("experts", c_void_p),
    ]


class HostLibrary:
    """The functions of `moray_actors.h`. Structures are given by address; a turn is one.

    ctypes releases the interpreter's lock while one runs.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self.new_turn = declared(library, "moray_turn_new", c_void_p)
        self.free_turn = declared(library, "moray_turn_free", None, c_void_p)
        self.take_turn = declared(library, "moray_turn_take", c_int, c_void_p, c_int32)
        self.give_turn_back = declared(library, "moray_turn_give_back", None, c_void_p)
        self.busy_ns = declared(library, "moray_turn_busy_ns", c_int64, c_void_p)
        self.pairs = declared(library, "moray_turn_pairs", c_int64, c_void_p)
        self.frames = declared(library, "moray_turn_frames", c_int64, c_void_p)
        self.serve_experts = declared(
            library, "moray_serve_experts", c_int, POINTER(LinkState), POINTER(Table), c_void_p, c_int32
        )


_lock = threading.Lock()


def host_library() -> HostLibrary | None:
    """The library, or None where the package was installed without it, which is said once."""
    with _lock:
        return _load()


@functools.cache
def _load() -> HostLibrary | None:
    found = importlib.util.find_spec("._native", __package__)
    if found is None or found.origin is None:
        logger.warning(
            "event=no_native_host_loop: Moray was installed without the native half of its expert hosts, since there was "
            "no C++ compiler; Python serves routers instead, which costs each request more CPU time. Install a compiler "
            "(g++ or clang++), then Moray again."
        )
        return None
    return HostLibrary(found.origin)
