"""Greedy accuracy of an exported folder on held-out operands in held-out phrasings.

`python -m moray.model.tiny_r1.training.evaluate --folder model/tiny_r1` prints a table and exits with 1 if a task is
below 95%. `--ask "What is 17 + 25?"` shows one reply.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .elementwise import KERNELS
from .export import load_model
from .network import Cache, TinyR1
from .quantize import quantize_activations
from .tasks import TASKS, THINK_END, Example, draw, is_right
from .vocabulary import EOS, PAD, render

REQUIRED = 0.95
MAX_NEW_TOKENS = 450


@dataclass(frozen=True)
class Score:
    """One task's result."""

    task: str
    questions: int
    right: int
    unfinished: int  # replies without </think> or without an end
    mean_tokens: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.questions


@torch.inference_mode()
def generate(
    model: TinyR1, prompts: Sequence[Sequence[int]], end: int, pad: int, limit: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Greedy continuations of a batch of prompts, without the end token. Prompts are padded on the left."""
    width = max(map(len, prompts))
    start = torch.tensor([width - len(p) for p in prompts])
    tokens = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    positions = (torch.arange(width) - start.unsqueeze(1)).clamp(min=0)
    visible = torch.arange(width) >= start.unsqueeze(1)  # [B, S]
    mask = visible.unsqueeze(1) & torch.ones(width, width, dtype=torch.bool).tril() | torch.eye(width, dtype=torch.bool)
    caches = [Cache(width + limit) for _ in model.layers[:-1]]
    live = torch.arange(len(prompts))
    replies: list[list[int]] = [[] for _ in prompts]
    context = model.context(positions, mask.unsqueeze(1))
    for _ in range(limit):
        hidden = model(tokens, context, caches)
        chosen = model.lm_head(hidden[:, -1]).argmax(-1)
        going = chosen != end
        for row, token in zip(live[going].tolist(), chosen[going].tolist(), strict=True):
            replies[row].append(token)
        if not bool(going.any()):
            break
        kept = going.nonzero().squeeze(1)
        if len(kept) < len(live):
            for cache in caches:
                cache.keep(kept)
        live, start, tokens = live[kept], start[kept], chosen[kept].unsqueeze(1)
        length = caches[0].length + 1
        seen = torch.arange(length) >= start.unsqueeze(1)
        context = model.context((length - 1 - start).unsqueeze(1), seen[:, None, None, :])
    else:
        for row in live.tolist():
            replies[row].append(pad)  # marks a reply that did not end
    return replies


def answer(model: TinyR1, tokenizer: Tokenizer, examples: Sequence[Example], batch: int = 64) -> list[tuple[str, int]]:
    """(reply text, its tokens) of each example, in order."""
    end, pad = (tokenizer.encode(token).ids[0] for token in (EOS, PAD))
    prompts = [tokenizer.encode(render(e.messages)).ids for e in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, tuple[str, int]] = {}
    for first in range(0, len(order), batch):
        chunk = order[first : first + batch]
        for index, reply in zip(chunk, generate(model, [prompts[i] for i in chunk], end, pad), strict=True):
            text = tokenizer.decode(reply, skip_special_tokens=False)
            found[index] = (text, len(reply))
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def mtp_agreement(model: TinyR1, tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    """How often the MTP layer's guess is the main model's next greedy token, over greedy replies."""
    agreed = guessed = 0
    for example, (reply, _) in zip(examples, answer(model, tokenizer, examples), strict=True):
        prompt = tokenizer.encode(render(example.messages)).ids
        tokens = torch.tensor([prompt + tokenizer.encode(reply).ids])
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        context = model.context(torch.arange(length).unsqueeze(0), mask[None, None])
        hidden = model(tokens, context)
        main = model.lm_head(hidden).argmax(-1)[0]
        guess = model.predict_second(hidden, tokens.roll(-1, 1), context).argmax(-1)[0]
        # The guess at i, which knows token i + 1, against the main model's choice at i + 1.
        same = guess[len(prompt) - 1 : length - 1] == main[len(prompt) : length]
        agreed, guessed = agreed + int(same.sum()), guessed + len(same)
    return agreed / max(1, guessed)


def held_out_examples(task: str, count: int, seed: int) -> list[Example]:
    """Distinct questions of a task, operands and phrasing held out."""
    rng = random.Random(f"held out {seed} {task}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = draw(rng, task, held_out=True, context=rng.random() < 0.5)
        examples.setdefault(json.dumps(example.messages), example)
    return list(examples.values())


def evaluate(
    model: TinyR1, tokenizer: Tokenizer, tasks: Sequence[str], count: int, seed: int, show_wrong: int = 0
) -> list[Score]:
    """Score each task."""
    scores = []
    for task in tasks:
        examples = held_out_examples(task, count, seed)
        replies = answer(model, tokenizer, examples)
        ended = [THINK_END in text and PAD not in text for text, _ in replies]
        good = [fine and is_right(e, text) for e, (text, _), fine in zip(examples, replies, ended, strict=True)]
        tokens = sum(length for _, length in replies) / count
        scores.append(Score(task, count, sum(good), count - sum(ended), round(tokens, 1)))
        wrong = [i for i in range(count) if not good[i]]
        for i in wrong[:show_wrong]:
            asked = [m["content"] for m in examples[i].messages]
            print(f"--- {task}, expected {examples[i].expected}: {asked}\n{replies[i][0]}", file=sys.stderr)
    return scores


def write_fixed_set(path: Path, per_task: int, seed: int) -> None:
    """Write a small fixed set of held-out questions for tests of a server."""
    with path.open("w", encoding="utf-8") as file:
        for task in TASKS:
            for example in held_out_examples(task, per_task, seed):
                row = {"task": task, "messages": list(example.messages), "expected": example.expected}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_fixed_set(path: Path) -> list[Example]:
    """Read what `write_fixed_set` wrote; thought and answer are left empty."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Example(row["task"], tuple(row["messages"]), "", "", row["expected"]) for row in rows]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an exported model")
    parser.add_argument("--count", type=int, default=200, help="questions of each task")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--activations-fp8", action="store_true", help="quantise activations 1x128 as a GPU would")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print N wrong replies of each task")
    parser.add_argument("--mtp", action="store_true", help="print how often the MTP layer guesses right instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION", help="show the replies to these instead")
    parser.add_argument(
        "--write-fixed-set", type=Path, metavar="FILE", help="write the fixed questions for tests instead"
    )
    args = parser.parse_args()
    if args.write_fixed_set:
        write_fixed_set(args.write_fixed_set, 25, seed=1)
        return
    torch.set_num_threads(args.threads)
    model = load_model(args.folder)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    if args.activations_fp8:
        KERNELS.activation_filter = quantize_activations
    if args.ask:
        examples = [Example("", ({"role": "user", "content": text},), "", "", "") for text in args.ask]
        for text, (reply, _) in zip(args.ask, answer(model, tokenizer, examples), strict=True):
            print(f"> {text}\n{reply}\n")
        return
    if args.mtp:
        for task in args.tasks:
            share = mtp_agreement(model, tokenizer, held_out_examples(task, args.count, args.seed))
            print(f"{task:<16}{share:>8.3f}")
        return
    started = time.monotonic()
    scores = evaluate(model, tokenizer, args.tasks, args.count, args.seed, args.show_wrong)
    if args.json:
        print(json.dumps([asdict(s) | {"accuracy": s.accuracy} for s in scores], indent=2))
    else:
        print(f"{'task':<16}{'right':>8}{'of':>6}{'accuracy':>10}{'unfinished':>12}{'tokens':>8}")
        for s in scores:
            print(f"{s.task:<16}{s.right:>8}{s.questions:>6}{s.accuracy:>10.3f}{s.unfinished:>12}{s.mean_tokens:>8.1f}")
        print(f"{time.monotonic() - started:.0f} s")
    sys.exit(0 if all(s.accuracy >= REQUIRED for s in scores) else 1)


if __name__ == "__main__":
    main()
