"""The sections of a deployment that say what the controller changes by itself."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a deployment: no other keys than these, no values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _check_order(section: BaseModel, low: str, high: str, *, equal: bool) -> None:
    """Refuse a lower limit above the upper one, or, without `equal`, at it."""
    below, above = getattr(section, low), getattr(section, high)
    if below > above or (below == above and not equal):
        raise ValueError(f"{low} = {below} must be {'at most' if equal else 'below'} {high} = {above}")


class ExpertScaling(Section):
    """When the number of expert hosts changes, or experts move, without being asked: the written policy of
    `cluster/autoscaler.py`.

    Utilisation is the share of the time that the hosts compute, their mean. More hosts: when it was above
    `high_utilisation` throughout `up_after_s`, as many at once as bring it down to the middle between the thresholds. One
    host fewer: when it was below `low_utilisation` throughout `down_after_s` and the others would stay below that middle.
    Experts move: when the balance was below `rebalance_below` throughout `up_after_s` and the plan wins something.

    Attributes:
        enabled: whether it is done at all; without, nothing below matters.
        min_hosts, max_hosts: never fewer, never more. What `experts.min_replicas` and the model's memory need comes first.
        high_utilisation, low_utilisation: thresholds, from 0 to 1.
        rebalance_below: mean over maximum of the hosts' loads, from 0 (never) to 1.
        up_after_s, down_after_s: how long a condition must hold without a break.
        cooldown_s: after a change of the hosts or of the placement, whoever asked for it, nothing here for so long.
    """

    enabled: bool = False
    min_hosts: int = Field(default=1, ge=1)
    max_hosts: int = Field(default=8, ge=1)
    high_utilisation: float = Field(default=0.8, gt=0, le=1)
    low_utilisation: float = Field(default=0.3, ge=0, lt=1)
    rebalance_below: float = Field(default=0.8, ge=0, le=1)
    up_after_s: float = Field(default=30.0, ge=0)
    down_after_s: float = Field(default=300.0, ge=0)
    cooldown_s: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self, "min_hosts", "max_hosts", equal=True)
        _check_order(self, "low_utilisation", "high_utilisation", equal=False)
        return self


class RouterScaling(Section):
    """When the number of routers changes without being asked: the written policy of `cluster/autoscaler.py`.

    More routers: when more than `waiting_per_router` requests waited for each, or more of the KV pages than `high_kv_use`
    were in use, throughout `up_after_s`: as many at once as the requests that wait and the pages need, at most twice as
    many as there are. One router fewer: when none waited and less than `low_kv_use` of the pages, and of the running
    requests there may be, was in use throughout `down_after_s`, and what the others would have to take over leaves them
    below the middle between the thresholds.

    Attributes:
        enabled: whether it is done at all; without, nothing below matters.
        min_routers, max_routers: never fewer, never more.
        waiting_per_router: requests.
        high_kv_use, low_kv_use: thresholds, from 0 to 1.
        up_after_s, down_after_s: how long a condition must hold without a break.
        cooldown_s: after a change of the routers, whoever asked for it, nothing here for so long.
    """

    enabled: bool = False
    min_routers: int = Field(default=1, ge=1)
    max_routers: int = Field(default=4, ge=1)
    waiting_per_router: float = Field(default=4.0, ge=0)
    high_kv_use: float = Field(default=0.9, gt=0, le=1)
    low_kv_use: float = Field(default=0.3, ge=0, lt=1)
    up_after_s: float = Field(default=15.0, ge=0)
    down_after_s: float = Field(default=300.0, ge=0)
    cooldown_s: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self, "min_routers", "max_routers", equal=True)
        _check_order(self, "low_kv_use", "high_kv_use", equal=False)
        return self


class Autoscale(Section):
    """What the controller changes by itself; nothing unless it is enabled. Ray's autoscaler adds the nodes it takes."""

    experts: ExpertScaling = ExpertScaling()
    routers: RouterScaling = RouterScaling()
