"""Which processes can share a shm link, and which kind of link two processes should use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ...configs.errors import ConfigError
from .base import LinkKind


@cache
def machine_identity() -> str:
    """Equal in two processes exactly if they can share a shm link.

    That takes the same kernel (its boot id) and the same network namespace, in which abstract Unix sockets live. Memory
    needs nothing in common: file descriptors pass between containers whose /dev/shm differ.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where one end of a link runs.

    Attributes:
        machine: its `machine_identity()`.
        cuda: whether its hidden states are on a GPU.
    """

    machine: str
    cuda: bool

    @classmethod
    def here(cls, device: torch.device | str) -> Site:
        """The site of this process, computing on `device`."""
        return cls(machine_identity(), torch.device(device).type == "cuda")


def choose_kind(wanted: LinkKind | Literal["auto"], *, here: Site, there: Site) -> LinkKind:
    """The kind of link for two ends. "auto": shm on one machine, else nccl if both ends have GPUs, else gloo.

    Raises:
        ConfigError: the kind that is asked for cannot join these two.
    """
    same_machine = here.machine == there.machine
    if wanted == "auto":
        if same_machine:
            return "shm"
        return "nccl" if here.cuda and there.cuda else "gloo"
    if wanted == "shm" and not same_machine:
        raise ConfigError(f"a shm link cannot join {here.machine} and {there.machine}: use auto, gloo or nccl")
    if wanted == "nccl" and not (here.cuda and there.cuda):
        raise ConfigError("an nccl link needs a GPU on both ends: use auto or gloo")
    return wanted
