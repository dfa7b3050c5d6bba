"""Moray serves DeepSeek-R1 and its family with the routed experts in actors of their own, on Ray.

The face of the package is small: `LLM` is local mode (one process, no Ray) for scripts and tests; everything else is the
`moray` command and the Serve application in `moray.cluster.serve_app`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cluster.local import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> object:
    """Import `LLM` on first use: `import moray` alone must not cost torch's two seconds."""
    if name == "LLM":
        from .cluster.local import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
