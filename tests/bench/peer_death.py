"""How soon a killed peer shows: time from SIGKILL to `PeerDiedError` at the end that waits in `recv`.

python tests/bench/peer_death.py [--tries 20]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from moray.actors.deadline import Deadline
from moray.actors.links import LinkAddress, dial
from moray.configs.errors import PeerDiedError

PEERS = Path(__file__).parents[1] / "actors" / "links" / "peer_processes.py"
SECRET = b"the secret of the link tests"
SETTLE_S = 0.2
"""Given to the waiting end to be really asleep when the peer dies."""


def measure(process: subprocess.Popen[str], kind: str) -> float:
    """Milliseconds for one peer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"kind": kind, "behaviour": "hold"}) + "\n")
    process.stdin.flush()
    started = json.loads(process.stdout.readline())
    link = dial(LinkAddress(*started["address"]), secret=SECRET, identity="router-0", deadline=Deadline.after(20))
    killed_at = 0.0

    def kill() -> None:
        nonlocal killed_at
        time.sleep(SETTLE_S)
        killed_at = time.monotonic()
        os.kill(started["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        link.recv(deadline=Deadline.after(20))
    except PeerDiedError:
        noticed_at = time.monotonic()
    killer.join()
    link.close()
    return (noticed_at - killed_at) * 1000


def main() -> None:
    """Print one row for each kind of link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    tries = parser.parse_args().tries
    with subprocess.Popen(
        [sys.executable, str(PEERS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peers:
        print(f"{'link':6} {'median ms':>10} {'max ms':>10}   of {tries} tries")
        for kind in ("shm", "gloo"):
            times = [measure(peers, kind) for _ in range(tries)]
            print(f"{kind:6} {statistics.median(times):10.1f} {max(times):10.1f}")
        assert peers.stdin is not None
        peers.stdin.close()


if __name__ == "__main__":
    main()
