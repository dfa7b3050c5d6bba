"""What the parts of a step cost, as the simulation asks for it: one interface, with models for GPUs and for CPUs behind it."""

from __future__ import annotations

from typing import Protocol


class CostModel(Protocol):
    """Seconds that one piece of work takes where nothing else is in its way.

    Contention, queues and what overlaps what are the engine's business.
    """

    @property
    def overlap(self) -> bool:
        """Whether two micro-batches hide the exchange of one behind the computing of the other."""
        ...

    @property
    def cores(self) -> float | None:
        """So many cores are shared by all processes; None where each has a device of its own."""
        ...

    @property
    def crowded(self) -> float:
        """How much of `cores` is left while more processes have something to do than there are; else of no meaning."""
        ...

    @property
    def wake_s(self) -> float:
        """Time on the clock, and no work, until a process that sleeps goes on with what another hands to it, where they share
        cores; on devices it is part of the exchange."""
        ...

    def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:
        """A router once a step, outside the layers: scheduling, embedding, dense MLPs, head, sampling, Python.

        Args:
            tokens: in the step.
            decoding: sequences of it that have one token each.
            sampled: rows that logits are computed for.
            kv_positions: sum over all tokens of the positions each attends to.
        """
        ...

    def router_layer(self, tokens: int, kv_positions: int, kv_rows: int, longest: int) -> float:
        """One layer on a router: attention, norms, gate and packing, without shared experts.

        Args:
            tokens, kv_positions: as in `router_step`.
            kv_rows: sum over the step's sequences of the positions that are read, each once: for one token a sequence the
                same as `kv_positions`, for a chunk of a prompt far less.
            longest: positions of the longest of them.
        """
        ...

    def shared_experts(self, tokens: int) -> float:
        """The shared experts of one MoE layer; they overlap with the routed ones."""
        ...

    def host_layer(self, rows: int, experts: int) -> float:
        """One expert host in one MoE layer.

        Args:
            rows: token-expert pairs it computes.
            experts: distinct experts among them.
        """
        ...

    def exchange(self, sent: int, received: int, hosts: int) -> float:
        """One router's dispatch (`received` = 0) or combine (`sent` = 0) of one layer on its links, beyond the computing.

        Where `cores` is given it is computing of the router, else it leaves the router's device free.

        Args:
            sent, received: bytes of all its frames.
            hosts: how many it talks to.
        """
        ...

    def front(self, tokens: int) -> float:
        """The front for what one step produced: so many tokens."""
        ...

    def request(self, prompt: int) -> float:
        """The front for taking in a request with a prompt of so many tokens, before a router hears of it."""
        ...
