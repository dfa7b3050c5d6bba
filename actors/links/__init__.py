"""Links: how hidden states travel between a router and an expert host. The contract is in `base`.

    inline          within one process                                      tensors by reference (cloned)
    shm             within one machine                                      shared memory + a Unix socket
    gloo, nccl      between machines, CPU to CPU and GPU to GPU             torch process groups + a TCP socket

`handshake` and `acceptor` are also for other channels between Moray's processes.

Nothing is imported before it is asked for: a front, which needs the handshake alone, then comes up without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import FRAMES_IN_FLIGHT, MAX_HEADER_BYTES, Frame, Link, LinkAddress, LinkKind, Listener
    from .factory import dial, listen
    from .inline import InlineLink
    from .machine import Site, choose_kind, machine_identity

__all__ = [
    "FRAMES_IN_FLIGHT",
    "MAX_HEADER_BYTES",
    "Frame",
    "InlineLink",
    "Link",
    "LinkAddress",
    "LinkKind",
    "Listener",
    "Site",
    "choose_kind",
    "dial",
    "listen",
    "machine_identity",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import base, factory, inline, machine

    return next(getattr(module, name) for module in (base, factory, inline, machine) if hasattr(module, name))
