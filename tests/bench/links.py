"""Round-trip times of the links, side by side with a bare socket pair that copies the same bytes.

    python tests/bench/links.py [--rounds 300]

One frame of N x 7168 bf16 goes to another process (for inline: to a driven end of this one) and comes back. Rounds of
all kinds are interleaved, so that a busy machine disturbs them alike; compare columns, not machines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moray.actors.deadline import Deadline
from moray.actors.links import InlineLink, Link, LinkAddress, LinkKind, dial, listen
from moray.configs.errors import PeerDiedError

SECRET = b"only for this benchmark"
TOKENS = (1, 8, 64, 512)
HIDDEN = 7168
PATIENCE_S = 30.0

RoundTrip = Callable[[torch.Tensor], None]


def echo(kind: LinkKind) -> None:
    """The other process: accept one link and send back whatever arrives."""
    torch.set_num_threads(1)
    listener = listen(kind, bind_host="127.0.0.1", secret=SECRET, identity="echo")
    address = listener.address
    print(json.dumps([address.kind, address.endpoint, address.machine]), flush=True)
    link = listener.accept(deadline=Deadline.after(PATIENCE_S))
    assert link is not None
    listener.close()
    with contextlib.closing(link), contextlib.suppress(PeerDiedError):
        while True:
            echo_one(link)


def echo_one(link: Link) -> None:
    """Send one frame back."""
    frame = link.recv(deadline=Deadline.after(PATIENCE_S))
    link.send(frame.header, frame.tensors, deadline=Deadline.after(PATIENCE_S))


def echo_bytes(fd: int) -> None:
    """The other process of the bare socket pair: 8 bytes of length, then as many bytes, back and forth."""
    with socket.socket(fileno=fd) as sock:
        buffer = bytearray(max(TOKENS) * HIDDEN * 2)
        size = bytearray(8)
        while read_into(sock, memoryview(size)):
            view = memoryview(buffer)[: int.from_bytes(size, "little")]
            read_into(sock, view)
            sock.sendall(view)


def read_into(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False at end of file."""
    while view:
        count = sock.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


@contextmanager
def child(*arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Another process of this script, which ends when its link does."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds) as process:
        try:
            yield process
        finally:
            process.wait(PATIENCE_S)


@contextmanager
def over_link(kind: LinkKind) -> Iterator[RoundTrip]:
    """Round trips through a link to another process."""
    with child("--echo", kind) as process:
        assert process.stdout is not None
        address = LinkAddress(*json.loads(process.stdout.readline()))
        link = dial(address, secret=SECRET, identity="bench", deadline=Deadline.after(PATIENCE_S))
        with contextlib.closing(link):
            yield lambda tensor: _round_trip(link, tensor)


@contextmanager
def over_inline() -> Iterator[RoundTrip]:
    """Round trips through an inline link whose other end this thread drives."""
    here, there = InlineLink.pair("bench", "echo")
    there.drive(lambda: echo_one(there))
    with contextlib.closing(here), contextlib.closing(there):
        yield lambda tensor: _round_trip(here, tensor)


@contextmanager
def over_sockets() -> Iterator[RoundTrip]:
    """Round trips of bare bytes: what two copies through the kernel cost each way."""
    here, there = socket.socketpair()
    with here, there, child("--echo-bytes", str(there.fileno()), pass_fds=(there.fileno(),)):
        there.close()

        def round_trip(tensor: torch.Tensor) -> None:
            view = memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
            here.sendall(len(view).to_bytes(8, "little"))
            here.sendall(view)
            read_into(here, view)

        try:
            yield round_trip
        finally:
            here.close()


def _round_trip(link: Link, tensor: torch.Tensor) -> None:
    link.send(b"h", [tensor], deadline=Deadline.after(PATIENCE_S))
    link.recv(deadline=Deadline.after(PATIENCE_S))


def main() -> None:
    """Print the table of medians, in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--echo", choices=["shm", "gloo"], help=argparse.SUPPRESS)
    parser.add_argument("--echo-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        return echo(arguments.echo)
    if arguments.echo_bytes is not None:
        return echo_bytes(arguments.echo_bytes)

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        ways = {
            "inline": stack.enter_context(over_inline()),
            "shm": stack.enter_context(over_link("shm")),
            "gloo": stack.enter_context(over_link("gloo")),
            "socketpair": stack.enter_context(over_sockets()),
        }
        print(f"{'N x 7168 bf16':>16}" + "".join(f"{name:>12}" for name in ways) + "   p50 in us")
        for tokens in TOKENS:
            tensor = torch.randn(tokens, HIDDEN).to(torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, round_trip in ways.items():
                    start = time.perf_counter()
                    round_trip(tensor)
                    times[name].append(time.perf_counter() - start)
            medians = (statistics.median(times[name][len(times[name]) // 10 :]) * 1e6 for name in ways)
            print(f"{tokens:>16}" + "".join(f"{median:>12.0f}" for median in medians))
    return None


if __name__ == "__main__":
    main()
