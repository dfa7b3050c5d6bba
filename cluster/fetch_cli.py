"""`moray fetch`: bring a model to this machine before it is served, or check again what is here."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.fetching.fetch import Fetched


def add_fetch(commands: Any) -> None:
    """Add `fetch` to the command's sub-parsers."""
    fetch = commands.add_parser(
        "fetch",
        help="fetch a model to this machine",
        description="Bring a model here from the hub, object storage or a web server: what is needed of it, checked, and going "
        "on where an earlier fetch broke off. `moray serve SOURCE` does the same on each node by itself.",
    )
    fetch.add_argument(
        "source", metavar="SOURCE", help="hf://org/name[@revision], s3://bucket/prefix, gs://..., https://..."
    )
    where = fetch.add_mutually_exclusive_group()
    where.add_argument("--to", type=Path, metavar="DIR", help="this very directory, to be served by its path")
    where.add_argument(
        "--weights-dir",
        type=Path,
        metavar="DIR",
        help="below this directory, as a deployment's weights_dir (default ~/.cache/moray/models)",
    )
    fetch.add_argument("--metadata", action="store_true", help="everything but the weights")
    fetch.add_argument("--verify", action="store_true", help="hash what is here again; fetch again what is damaged")
    fetch.set_defaults(run=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from ..configs.model_url import ModelUrl
    from ..model.fetching.fetch import default_weights_dir, fetch

    if not sys.stderr.isatty():
        logging.getLogger("moray").setLevel(logging.INFO)  # the heartbeat in place of the bar
    fetched = fetch(
        ModelUrl.parse(options.source),
        (options.weights_dir or default_weights_dir()).expanduser().absolute(),
        to=None if options.to is None else options.to.expanduser().absolute(),
        parts="metadata" if options.metadata else "all",
        verify=options.verify,
    )
    for line in described(fetched):
        print(f"moray: {line}")
    return 0


def described(fetched: Fetched) -> list[str]:
    """What there is to say of a fetch, in lines."""
    came = f"{fetched.transferred / 1e9:.3f} GB came now" if fetched.transferred else "all of it was here"
    lines = [f"{fetched.url}: {fetched.files} files, {fetched.nbytes / 1e9:.3f} GB, {came}"]
    hashed = [f"{count} by {kind}" for kind, count in sorted(fetched.checked.items()) if kind != "size"]
    if hashed:
        lines.append(f"checked: {', '.join(hashed)}")
    if unhashed := fetched.checked.get("size"):
        lines.append(
            f"{unhashed} of {fetched.files} files could be checked by their size only: there is no checksum of them at the "
            "source; a SHA256SUMS file beside them, as `sha256sum *` writes it, would be one"
        )
    if fetched.repaired:
        lines.append(f"were damaged here and are fetched again: {', '.join(fetched.repaired)}")
    return [*lines, f"in {fetched.path}"]
