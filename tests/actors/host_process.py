"""Expert hosts in processes of their own, for tests that need real ones. Run as a script.

Reads the arguments as one JSON object from stdin, prints where it listens and what it has loaded as one JSON line, and
serves until stdin ends.
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
    dtype = getattr(torch, arguments["dtype"])
    compute = Compute(torch.device("cpu"), dtype, arguments["keep_fp8"], packed=arguments["packed"])
    host = ExpertHost(arguments["host_id"], compute=compute)
    read = host.load(Path(arguments["checkpoint"]), arguments["slots"], epoch=arguments["epoch"])
    addresses = [
        host.listen(kind, bind_host="127.0.0.1", secret=bytes.fromhex(arguments["secret"]))
        for kind in arguments["kinds"]
    ]
    loaded = {
        "addresses": [[a.kind, a.endpoint, a.machine] for a in addresses],
        "data_bytes_read": read.data,
        "resident_bytes": host.report().resident_bytes,
    }
    print(json.dumps(loaded), flush=True)
    sys.stdin.read()
    host.stop()


if __name__ == "__main__":
    main()
