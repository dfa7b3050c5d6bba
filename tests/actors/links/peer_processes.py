"""Real processes at the other end of a link, for tests that kill or stop them. Run as a script by `conftest.py`.

Reads one JSON object per line from stdin, `{"kind": ..., "behaviour": ...}`, forks a process that listens, and prints
the process's id and address. Forking after torch is imported makes a peer cost milliseconds; there are no threads yet.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from moray.actors.deadline import Deadline
from moray.actors.links import Link, LinkKind, listen
from moray.actors.links.process_group import ProcessGroupLink
from moray.actors.links.wire import MessageType, plan_payload
from moray.configs.errors import LinkError

SECRET = b"the secret of the link tests"
PATIENCE_S = 60.0


def echo(link: Link) -> None:
    """Send every frame back."""
    while True:
        frame = link.recv(deadline=Deadline.after(PATIENCE_S))
        link.send(frame.header, frame.tensors, deadline=Deadline.after(PATIENCE_S))


def hold(link: Link) -> None:
    """Never read or write, but notice when the other end is gone."""
    give_up = Deadline.after(PATIENCE_S)
    while not give_up.passed:
        link.check()
        time.sleep(0.02)


def announce_only(link: Link) -> None:
    """Announce a large frame, and never send its payload."""
    assert isinstance(link, ProcessGroupLink)
    payload = plan_payload([torch.zeros(1 << 20)])
    link._control.send(MessageType.FRAME, 0, b"", payload, deadline=Deadline.after(PATIENCE_S))
    hold(link)


BEHAVIOURS = {"echo": echo, "hold": hold, "announce_only": announce_only}


def run(kind: LinkKind, behaviour: str) -> None:
    listener = listen(kind, bind_host="127.0.0.1", secret=SECRET, identity="peer")
    address = listener.address
    print(json.dumps({"pid": os.getpid(), "address": [address.kind, address.endpoint, address.machine]}), flush=True)
    link = listener.accept(deadline=Deadline.after(PATIENCE_S))
    listener.close()
    if link is None:
        return
    try:
        BEHAVIOURS[behaviour](link)
    except LinkError:
        pass  # the test is done with this peer
    finally:
        link.close()


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            run(request["kind"], request["behaviour"])
            os._exit(0)


if __name__ == "__main__":
    main()
