"""Data stays data: nothing in Moray can turn bytes from a peer, a client or a file into code, and few places listen."""

from __future__ import annotations

import ast

from .source_tree import calls, is_true, sources

UNSAFE_MODULES = frozenset(
    {"cloudpickle", "copyreg", "dbm", "dill", "imp", "joblib", "marshal", "pickle", "runpy", "shelve", "xmlrpc"}
)
"""What these read can run code."""

UNSAFE_CALLS = frozenset(
    {
        "__import__",
        "compile",
        "eval",
        "exec",
        "numpy.load",
        "np.load",
        "os.popen",
        "os.system",
        "torch.load",
        "yaml.full_load",
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
    }
)

EXCUSED = {
    ("model/tiny_r1/training/arithmetic.py", "eval"): "of digits and operators that the lines above have written",
    ("model/tiny_r1/training/export.py", "torch.load"): "weights_only, of a file that the training has written",
    ("model/tiny_r1/training/train.py", "torch.load"): "weights_only, of a file that the training has written",
}

LISTENING_CALLS = frozenset(
    {"bind", "create_server", "create_unix_server", "listen", "start_server", "start_unix_server"}
)

LISTENERS = {
    ("actors/links/shm.py", "sock.bind"): "links within a machine, behind the handshake",
    ("actors/links/shm.py", "sock.listen"): "the same socket",
    ("actors/links/sockets.py", "socket.create_server"): "everything of ours over TCP, behind the handshake",
    (
        "cluster/front_door.py",
        "_lender.bind",
    ): "an abstract Unix socket that lends fronts their port, to processes of the same user",
    ("cluster/front_door.py", "_lender.listen"): "the same socket",
    ("cluster/listening.py", "sock.bind"): "looks whether a port is free, or takes the front's for `moray serve`",
    ("cluster/onprem.py", "probe.bind"): "looks whether an address is this host's; never listens",
}
"""Every place that binds a socket, and why it may. What is new here goes into docs/security.md, too."""


def test_nothing_that_is_read_can_run_code() -> None:
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module or ""]
            found |= {(name, module) for module in imported if module.partition(".")[0] in UNSAFE_MODULES}
        for function, call in calls(tree):
            if function in UNSAFE_CALLS or is_true(call, "shell") or is_true(call, "allow_pickle"):
                found.add((name, function))
    assert found == set(EXCUSED)


def test_what_torch_loads_holds_weights_alone() -> None:
    loads = [call for _, tree in sources() for function, call in calls(tree) if function == "torch.load"]
    assert loads
    assert all(is_true(call, "weights_only") for call in loads)


def test_whoever_listens_is_known() -> None:
    """A new listening socket is a decision: behind the handshake, and on the node's own address."""
    found = {
        (name, function)
        for name, tree in sources()
        for function, call in calls(tree)
        if function.rpartition(".")[2] in LISTENING_CALLS and opens_a_socket(function)
    }
    assert found == set(LISTENERS)


def opens_a_socket(function: str) -> bool:
    """Serve's `bind` of deployments, and `listen` of our own classes, have receivers of their own."""
    receiver, _, method = function.rpartition(".")
    if method == "bind":
        return receiver not in ("front", "controller")
    if method == "listen":
        return receiver not in ("", "handle", "host", "_host")
    return True


def test_the_way_to_find_them_works() -> None:
    tree = ast.parse(
        "import torch\nx = torch.load(p, weights_only=False)\nsubprocess.run(c, shell=True)\na.b.c.bind(x)"
    )
    found = dict(calls(tree))
    assert set(found) == {"torch.load", "subprocess.run", "c.bind"}
    assert not is_true(found["torch.load"], "weights_only")
    assert is_true(found["subprocess.run"], "shell")
