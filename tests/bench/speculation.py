"""What drafting with the MTP layer is worth: tokens a step, and time beside decoding without it.

    python tests/bench/speculation.py [MODEL] [--streams 1,4,16] [--rounds 7] [--drafts 1,2,3] [--dtype bfloat16]

Everything runs in this process, in local mode: one engine for each way, all fed the same questions in turn (A B C A B C), so
that a busy machine disturbs them alike. Printed are medians of the rounds' ratios; the tokens are compared, too. `auto` is
what a server does by default: it drafts while steps show that it pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from moray.actors.messages import RouterStats
from moray.cluster.local import LLM

QUESTIONS = (
    "What is 17 + 25?",
    "Tom has 45 marbles and gives 18 to Ann. How many are left?",
    "What is 34 * 12?",
    "Sort 35, 3, 91, 14.",
    "Which is larger, 345 or 354?",
    "What is 904 - 377?",
    "Solve 3x + 4 = 19.",
    "What is 96 / 8?",
)


class Way:
    """One engine, and what its rounds took."""

    def __init__(self, name: str, model: str, **settings: Any) -> None:
        self.name = name
        self.llm = LLM(model, **settings)
        self.seconds: list[float] = []
        self.tokens: list[list[int]] = []
        self.before = self.stats

    @property
    def stats(self) -> RouterStats:
        return self.llm.cluster.router.stats()

    def start(self) -> None:
        """Forget what was measured."""
        self.seconds, self.before = [], self.stats

    def round(self, questions: list[str], tokens: int) -> None:
        began = time.perf_counter()
        answers = self.llm.generate(questions, temperature=0.0, max_tokens=tokens)
        self.seconds.append(time.perf_counter() - began)
        self.tokens = [answer.token_ids for answer in answers]

    def row(self, plain: Way, streams: int) -> str:
        now, before = self.stats, self.before
        generated, steps = now.generated_tokens - before.generated_tokens, now.steps - before.steps
        drafted, accepted = (
            now.drafted_tokens - before.drafted_tokens,
            now.accepted_tokens - before.accepted_tokens,
        )
        ratios = [mine / theirs for mine, theirs in zip(plain.seconds, self.seconds, strict=True)]
        right = f"{accepted / drafted:5.0%}" if drafted else "    -"
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        rate = generated / sum(self.seconds)
        per_step = generated / steps
        return (
            f"{streams:7} {self.name:8} {per_step:11.2f} {right:>12} {rate:10.0f} "
            f"{statistics.median(ratios):9.2f} {spread:>11}  {'yes' if self.tokens == plain.tokens else 'NO'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-r1")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--drafts", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    def way(name: str, **routers: Any) -> Way:
        routers |= {"cpus": options.threads}
        return Way(name, options.model, experts=1, verify="headers", dtype=options.dtype, routers=routers)

    ways = [way("off", speculate="off"), way("auto", speculate="auto")]
    ways += [way(f"on, {n}", speculate="on", draft_tokens=int(n)) for n in options.drafts.split(",")]
    print("streams way      tokens/step drafts right   tokens/s     speed      spread  same tokens")
    for streams in map(int, options.streams.split(",")):
        for number in range(options.rounds + 1):
            if number == 1:  # the first is to warm up
                for each in ways:
                    each.start()
            asked = [QUESTIONS[(number + stream) % len(QUESTIONS)] for stream in range(streams)]
            for each in ways:
                each.round(asked, options.tokens)
        for each in ways:
            print(each.row(ways[0], streams))
    for each in ways:
        each.llm.cluster.close()


if __name__ == "__main__":
    main()
