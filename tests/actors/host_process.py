"""Expert hosts in processes of their own, for tests that need real ones. Run as a script.

Reads the arguments as one JSON object from stdin, prints the addresses it listens on as one JSON line, and serves until
stdin ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from moray.actors.expert_host import ExpertHost
from moray.model.compute import Compute


def main() -> None:
    torch.set_num_threads(1)
    arguments = json.loads(sys.stdin.readline())
    host = ExpertHost(arguments["host_id"], compute=Compute.on_cpu(getattr(torch, arguments["dtype"])))
    host.load(Path(arguments["checkpoint"]), arguments["slots"], epoch=arguments["epoch"])
    addresses = [
        host.listen(kind, bind_host="127.0.0.1", secret=bytes.fromhex(arguments["secret"]))
        for kind in arguments["kinds"]
    ]
    print(json.dumps([[a.kind, a.endpoint, a.machine] for a in addresses]), flush=True)
    sys.stdin.read()
    host.stop()


if __name__ == "__main__":
    main()
