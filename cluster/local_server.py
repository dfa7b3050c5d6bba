"""`moray serve --local`: the whole cluster and the HTTP front in one process, without Ray."""

from __future__ import annotations

import contextlib
import threading
import time

import uvicorn

from ..configs.deployment import Deployment
from ..configs.errors import ClusterError
from .listening import check_port, url_of

_LISTEN_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


class LocalServer:
    """The whole cluster and the front in this process."""

    session = ""
    ray_address = ""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._undo = contextlib.ExitStack()
        self.url = url_of(deployment.front.host, deployment.front.port)

    def start(self) -> None:
        """Load everything and begin to listen.

        Raises:
            MorayError: it could not be started; call `stop` all the same.
        """
        from ..actors.front.app import create_app
        from ..actors.local_engine import LocalEngine
        from .assembly import front_settings
        from .local import LocalCluster

        front = self._deployment.front
        check_port(front.host, front.port)
        settings = front_settings(self._deployment, front_id="front-0", behind_proxy=False)
        cluster = LocalCluster(self._deployment)
        self._undo.callback(cluster.close)
        cluster.router.start()
        app = create_app(LocalEngine(cluster.router, cluster.status), cluster.model, settings)
        config = uvicorn.Config(
            app,
            host=front.host,
            port=front.port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=1,  # streams that go on are cut: who stops the server has decided that
        )
        http = uvicorn.Server(config)
        # In a thread uvicorn leaves signals alone, which are ours.
        thread = threading.Thread(target=http.run, name="uvicorn", daemon=True)
        thread.start()
        self._undo.callback(_stop_http, http, thread)
        deadline = time.monotonic() + _LISTEN_TIMEOUT_S
        while not http.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise ClusterError(f"the HTTP server did not start on {self.url}; see the messages above")
            time.sleep(0.01)

    def check(self) -> None:
        """Everything here lives and dies with this process."""

    def stop(self) -> None:
        """Stop listening, then the cluster."""
        self._undo.close()


def _stop_http(http: uvicorn.Server, thread: threading.Thread) -> None:
    http.should_exit = True
    thread.join(timeout=_STOP_TIMEOUT_S)
