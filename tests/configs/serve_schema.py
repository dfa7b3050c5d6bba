"""Serve's own schema of what `serve deploy` takes."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Ray 2.60 uses what pydantic has deprecated; warnings of others are no business of these tests.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

__all__ = ["ServeDeploySchema"]
