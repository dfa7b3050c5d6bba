"""A deployment from a file and the flags that override it, as several commands take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configs.deployment import Deployment


def deployment_with(config: Path | None, flags: Mapping[str, object], *, source: str) -> Deployment:
    """The deployment of a file, or the default one, with what flags say instead.

    Args:
        config: the file, if any.
        flags: setting, such as `experts.hosts`, -> its value; None leaves it as it is.
        source: the command, named in errors.

    Raises:
        ConfigError: together they do not describe one.
    """
    raw: dict[str, Any] = Deployment.load(config).model_dump() if config else {}
    for path, value in flags.items():
        if value is not None:
            *sections, key = path.split(".")
            target = raw
            for section in sections:
                target = target.setdefault(section, {})
            target[key] = value
    return Deployment.from_dict(raw, source=source)
