"""The native half of routers and expert hosts, described for ctypes: see `native/moray_actors.h`.

It is built when the package is installed (`ext-modules` in pyproject.toml), beside the CPU kernels, and has no part of torch or
Python in it. Where it is missing, Python serves every frame, which `actors_library()` says once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import threading
from ctypes import POINTER, Array, Structure, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from enum import IntEnum

from ..kernels.cpu.library import declared

logger = logging.getLogger("moray.actors")

_PACKET_BYTES = 128
_SLOTS = 3


class Outcome(IntEnum):
    """How a native call has ended; see the header."""

    QUIET = 0
    LEFT = 1
    UNSENT = 2
    FAILED = 3
    DONE = 4


class LinkState(Structure):
    """`moray_link`."""

    sent: int
    received: int
    arrived: int
    slots: Array[c_uint8]

    _fields_ = [
        *((name, c_int32) for name in ("fd", "error", "spin_rest", "spin_next_rest")),
        *((name, c_uint64) for name in ("sent", "received", "arrived")),
        *((name, c_void_p) for name in ("released_here", "peer_waits", "released_by_peer", "incoming", "outgoing")),
        *((name, c_uint64) for name in ("incoming_slot_bytes", "outgoing_slot_bytes")),
        ("packet_bytes", c_int32),
        ("packet", c_uint8 * _PACKET_BYTES),
        ("slots", c_uint8 * _SLOTS),
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


class Asked(Structure):
    """`moray_asked`."""

    _fields_ = [
        ("link", c_void_p),  # of a LinkState
        ("sequence", c_uint64),
        *((name, c_int32) for name in ("begin", "end", "sent", "answered")),
        *((name, c_int64) for name in ("answer_ns", "sent_ns")),
        ("packet", c_uint8 * _PACKET_BYTES),
        ("reply", c_void_p),
    ]


class NativeRoutes(Structure):
    """`moray_routes`."""

    most: int

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "count")),
        *((name, c_int32) for name in ("most", "all_experts", "width", "hosts")),
    ]


class Exchange(Structure):
    """`moray_exchange`."""

    _fields_ = [
        *((name, c_void_p) for name in ("hidden_states", "experts", "weights")),
        *((name, c_int32) for name in ("tokens", "hidden", "top_k", "layer")),
        ("epoch", c_uint32),
        ("routes", NativeRoutes),
        *((name, c_int32) for name in ("spin_rest", "spin_next_rest")),
        ("sequence", c_uint64),
        ("asked", POINTER(Asked)),
        *((name, c_void_p) for name in ("replicas", "sorted", "row_of_token", "outputs", "combine")),
    ]


class RunLayer(Structure):
    """`moray_run_layer`."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention", "cache", "mlp")),
        *((name, c_int32) for name in ("number", "routed")),
        ("routes", NativeRoutes),
        ("load", c_void_p),
    ]


class Stage(IntEnum):
    """Where a layer is."""

    ATTEND = 0
    SHARE = 1
    ASK = 2
    COLLECT = 3
    ADD = 4


class Run(Structure):
    """`moray_run`."""

    _fields_ = [
        ("layers", POINTER(RunLayer)),
        *((name, c_int32) for name in ("count", "layer", "stage", "asked")),
        *((name, c_void_p) for name in ("batch", "hidden", "normed", "experts", "weights", "shared", "routed")),
        ("exchange", POINTER(Exchange)),
        *((name, c_int32) for name in ("wait_us", "leave_asking")),
        *((name, c_int64) for name in ("waited_ns", "last_wait_ns")),
        *((name, c_void_p) for name in ("answered", "attention", "swiglu", "add")),
    ]


class ActorsLibrary:
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
        self.choose_replicas = declared(
            library, "moray_choose_replicas", c_int, c_void_p, c_int32, POINTER(NativeRoutes), c_void_p
        )  # experts, pairs, routes, replicas
        self.ask_experts = declared(library, "moray_ask_experts", c_int, POINTER(Exchange))
        self.collect_experts = declared(
            library, "moray_collect_experts", c_int, POINTER(Exchange), c_int32, c_void_p, c_void_p
        )  # exchange, microseconds, out, load
        self.run_layers = declared(library, "moray_run_layers", c_int, POINTER(Run))


_lock = threading.Lock()


def actors_library() -> ActorsLibrary | None:
    """The library, or None where the package was installed without it, which is said once."""
    with _lock:
        return _load()


@functools.cache
def _load() -> ActorsLibrary | None:
    found = importlib.util.find_spec("._native", __package__)
    if found is None or found.origin is None:
        logger.warning(
            "event=no_native_actors: Moray was installed without the native half of its routers and expert hosts, since there "
            "was no C++ compiler; Python sends and serves every frame, which costs each layer of a step more CPU time. Install "
            "a compiler (g++ or clang++), then Moray again."
        )
        return None
    return ActorsLibrary(found.origin)
