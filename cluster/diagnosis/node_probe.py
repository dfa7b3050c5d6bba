"""What an examination runs on each node: a plain class, on a cluster made a Ray actor by `ray_probes.py`.

Nothing heavy is imported at the top, and only plain data goes in and out: see `facts.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .link_meter import LinkServer


class NodeProbe:
    """Looks at the node it runs on. Its methods may be called at the same time."""

    def __init__(self) -> None:
        self._server: LinkServer | None = None

    def collect(self, wish: dict[str, Any]) -> dict[str, Any]:
        """The facts of this node, as `NodeFacts.to_dict`; `wish` has the fields of `collect.Wish`."""
        from .collect import Wish, collect

        return collect(Wish(**wish)).to_dict()

    def listen(self, address: str, node: str, secret: bytes) -> str:
        """Have this node be measured at this address of its own; returns host:port."""
        from .link_meter import LinkServer

        self._server = LinkServer(address, secret=secret, node=node)
        return self._server.endpoint

    def measure(self, endpoint: str, source: str, target: str, secret: bytes, seconds: float) -> dict[str, Any]:
        """Measure the way to another node, as `LinkSpeed` in plain data; or `problem` and why it could not be."""
        from ...configs.errors import LinkError
        from .link_meter import measure_link

        try:
            found = measure_link(endpoint, source=source, target=target, secret=secret, seconds=seconds)
        except LinkError as error:
            return {"problem": str(error)}
        return asdict(found)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is not None:
            self._server.close()
