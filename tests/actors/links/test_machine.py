from __future__ import annotations

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import LinkAddress, LinkKind, Site, choose_kind, dial, listen, machine_identity
from moray.configs.errors import ConfigError

SECRET = b"the secret of the link tests"


@pytest.mark.parametrize(
    ("there", "here_cuda", "there_cuda", "kind"),
    [("a", False, False, "shm"), ("b", True, True, "nccl"), ("b", True, False, "gloo"), ("b", False, False, "gloo")],
)
def test_auto(there: str, here_cuda: bool, there_cuda: bool, kind: LinkKind) -> None:
    assert choose_kind("auto", here=Site("a", here_cuda), there=Site(there, there_cuda)) == kind


def test_what_is_asked_for_is_kept_or_refused() -> None:
    cpu, other, gpu = Site("a", False), Site("b", False), Site("b", True)
    assert choose_kind("gloo", here=cpu, there=cpu) == "gloo"
    assert choose_kind("shm", here=cpu, there=cpu) == "shm"
    with pytest.raises(ConfigError, match="shm link cannot join a and b"):
        choose_kind("shm", here=cpu, there=other)
    with pytest.raises(ConfigError, match="needs a GPU on both ends"):
        choose_kind("nccl", here=cpu, there=gpu)


def test_this_process_has_an_identity() -> None:
    boot_id, _, namespace = machine_identity().partition("/")
    assert len(boot_id) == 36
    assert namespace.isdigit()
    assert Site.here("cpu") == Site(machine_identity(), False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_nccl_without_a_gpu_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="use gloo or shm"):
        listen("nccl", bind_host="127.0.0.1", secret=SECRET, identity="expert-host-0")
    with pytest.raises(ConfigError, match="use gloo or shm"):
        dial(LinkAddress("nccl", "127.0.0.1:1"), secret=SECRET, identity="r", deadline=Deadline.after(5))
