"""Placement, controller, spawning, supervision and the command line: the only room that imports ray."""

import os

# Every process of a cluster imports this before torch and ray, which read these once, when they are loaded. Set here and
# not in a Ray runtime environment, which would keep Ray from using the workers it has started in advance.
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin while they wait starve a machine's other processes
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # left unset, `ray.init` turns on token auth and writes to ~/.ray
# Left unset, a thread of Serve's that asks Ray something once more after the end has Ray start a whole cluster for it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
