"""What scheduling costs: `python tests/bench/scheduler.py`.

Microseconds of CPU time a step of `Scheduler` alone (schedule, record what was computed), for steps that only decode and for
steps under a queue that never ends, with prompts coming in as answers end. The cost of a sequence must not depend on how many
there are: the last column is to stay about the same. Also what hashing a long prompt costs, which a request pays once.
"""

from __future__ import annotations

import argparse
import random
import time

from moray.actors.messages import GenerateRequest
from moray.actors.scheduler import Scheduler
from moray.model.pages import PagePool, prefix_hashes
from moray.model.sampling import SamplingParams

PAGE = 32


def made(sequences: int) -> Scheduler:
    return Scheduler(PagePool(sequences * 64, PAGE), token_budget=max(512, 2 * sequences), max_running=sequences)


def step(scheduler: Scheduler) -> int:
    chunks = scheduler.schedule()
    for chunk in chunks:
        scheduler.advance(chunk, 7 if chunk.samples else None)
        sequence = chunk.sequence
        if sequence.generated >= sequence.request.sampling.max_tokens:
            scheduler.remove(sequence)
    return len(chunks)


def timed(scheduler: Scheduler, steps: int, arrivals: random.Random | None) -> float:
    """Seconds a step."""
    number, spent = 0, 0.0
    for _ in range(steps):
        while arrivals is not None and len(scheduler.waiting) < 16:
            prompt = [1000 * number + i for i in range(arrivals.randint(32, 256))]
            scheduler.add(GenerateRequest(f"q{number}", prompt, SamplingParams(arrivals.randint(32, 256))))
            number += 1
        began = time.process_time()
        step(scheduler)
        spent += time.process_time() - began
    return spent / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    print(f"{'sequences':>10} {'decoding us':>12} {'overload us':>12} {'steps/s':>9} {'us a sequence':>14}")
    for sequences in (1, 8, 32, 64, 256, 1024):
        decoding = made(sequences)
        for number in range(sequences):
            decoding.add(GenerateRequest(str(number), [number] * 100, SamplingParams(10**6)))
        while any(sequence.remaining > 1 for sequence in decoding.running) or decoding.waiting:
            step(decoding)
        alone = timed(decoding, options.steps, None)
        queued = made(sequences)
        timed(queued, options.steps, random.Random(0))
        under_load = timed(queued, options.steps, random.Random(1))
        print(
            f"{sequences:10} {1e6 * alone:12.1f} {1e6 * under_load:12.1f} {1 / under_load:9.0f} "
            f"{1e6 * alone / sequences:14.2f}"
        )
    tokens = list(range(100_000))
    began = time.process_time()
    prefix_hashes(tokens, PAGE)
    print(f"hashes of a prompt of {len(tokens)} tokens: {1e3 * (time.process_time() - began):.1f} ms")


if __name__ == "__main__":
    main()
