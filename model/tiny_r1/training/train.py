"""Train tiny-r1 from nothing on the CPU: `python -m moray.model.tiny_r1.training.train --out runs/tiny-r1`.

Starts one process per `--processes`, each with one thread and its share of the batch, averaging gradients over gloo:
on two cores that is faster than one process with two threads. Writes a checkpoint every `--save-every` steps and
continues from it when started again with the same `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F  # noqa: N812 (the name everyone uses)

from .batches import Batch, Packer
from .config import Shape
from .elementwise import KERNELS
from .network import Moe, TinyR1
from .optimizer import Muon, adamw, average_gradients, split_parameters
from .quantize import fake_quantize
from .tasks import MIXTURE
from .vocabulary import build_tokenizer, save_tokenizer

# glibc hands large blocks back to the kernel and pages them in again at every step; keeping them is 1.5x faster.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Plan:
    """The arguments of a run; see the help texts of `main`."""

    out: Path
    steps: int
    minutes: float
    rows: int
    length: int
    processes: int
    threads: int
    muon_rate: float
    adam_rate: float
    weight_decay: float
    warmup: int
    decay_from: float
    mtp_weight: float
    bias_rate: float
    quantize_from: float
    save_every: int
    seed: int
    mixture: dict[str, float]
    bfloat16: bool
    compiled: bool

    def progress(self, step: int, minutes: float) -> float:
        """How much of the run is over, 0 to 1: by the clock where minutes are given, otherwise by steps."""
        return minutes / self.minutes if self.minutes else step / self.steps

    def rate(self, step: int, progress: float) -> float:
        """Share of the learning rate: linear warm-up, flat, linear down to 2%."""
        down = min(1.0, 1.0 - 0.98 * (progress - self.decay_from) / (1.0 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup) * max(0.0, down)


def losses(model: TinyR1, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the next-token and the MTP loss over the learnt tokens, and how many next tokens were right."""
    context = model.context(batch.positions, batch.mask)
    hidden = model(batch.tokens, context, dtype=dtype)
    logits = model.lm_head(hidden).float().flatten(0, 1)
    target = batch.targets.flatten()
    each = F.cross_entropy(logits, target, ignore_index=-100, reduction="none")
    main = (each * batch.weights.flatten()).sum()
    second_logits = model.predict_second(hidden, batch.tokens.roll(-1, 1), context).float().flatten(0, 1)
    second = F.cross_entropy(second_logits, batch.second_targets.flatten(), ignore_index=-100, reduction="sum")
    return main, second, (logits.argmax(-1) == target).sum()


def save(path: Path, model: TinyR1, step: int, minutes: float, muon: Muon, adam: torch.optim.Optimizer) -> None:
    """Write a checkpoint; the file appears whole or not at all."""
    state = {"step": step, "minutes": minutes, "model": model.state_dict(), "muon": muon.state_dict()}
    state["adam"] = adam.state_dict()
    partial = path.with_suffix(f".partial{dist.get_rank() if dist.is_initialized() else 0}")
    torch.save(state, partial)
    partial.replace(path)


def train(rank: int, plan: Plan) -> None:
    """One process of the run."""
    torch.set_num_threads(plan.threads)
    if plan.processes > 1:
        method = (plan.out / "rendezvous").absolute().as_uri()
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=plan.processes)
    torch.manual_seed(plan.seed)
    dtype = torch.bfloat16 if plan.bfloat16 else torch.float32
    shape = Shape()
    model = TinyR1(shape)
    matrices, rest = split_parameters(model)
    muon, adam = Muon(matrices, plan.weight_decay), adamw(rest, plan.adam_rate)
    checkpoint = plan.out / f"checkpoint{rank}.pt"
    first, minutes = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first, minutes = state["step"], state.get("minutes", 0.0)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
    if plan.compiled:
        KERNELS.compile()
    tokenizer = Tokenizer.from_file(str(plan.out / "tokenizer.json"))
    packer = Packer(tokenizer, random.Random(f"{plan.seed} {rank} {first}"), plan.length, plan.mixture)
    moes = [m for m in model.modules() if isinstance(m, Moe)]
    started = time.monotonic()
    model.train()
    step = first
    clock = torch.tensor([minutes])  # minutes trained so far, by the clock of process 0 so that all agree
    while (progress := plan.progress(step, float(clock))) < 1.0:
        if progress >= plan.quantize_from:
            KERNELS.weight_filter = fake_quantize
        batch = packer.batch(plan.rows)
        main, second, right = losses(model, batch, dtype)
        learnt = torch.tensor([float(batch.weights.sum()), float((batch.targets >= 0).sum())])
        model.zero_grad(set_to_none=True)
        ((main + plan.mtp_weight * second) / learnt[0]).backward()
        counts = torch.stack([moe.counts for moe in moes])
        numbers = torch.tensor([float(main.detach()), float(second.detach()), float(right)])
        clock = torch.tensor([minutes + (time.monotonic() - started) / 60 if rank == 0 else 0.0])
        average_gradients(model, [counts, numbers, learnt, clock])
        norm = torch.nn.utils.clip_grad_norm_(list(rest.values()), 1.0)
        for moe, count in zip(moes, counts, strict=True):
            moe.gate.e_score_correction_bias += plan.bias_rate * torch.sign(count.mean() - count)
            moe.counts.zero_()
        rate = plan.rate(step, progress)
        for group in adam.param_groups:
            group["lr"] = plan.adam_rate * rate
        adam.step()
        muon.step(plan.muon_rate * rate)
        step += 1
        if rank == 0 and (step % 10 == 0 or step <= 3):
            per_token = numbers / torch.stack((learnt[0], learnt[1], learnt[1]))
            elapsed = time.monotonic() - started
            tokens = (step - first) * plan.rows * plan.length * plan.processes
            balance = float((counts.amax(1) / counts.mean(1)).max())
            print(
                f"{time.strftime('%H:%M:%S')} step {step} ({progress:.1%}) loss {per_token[0]:.4f} mtp {per_token[1]:.4f} "
                f"right {per_token[2]:.4f} rate {rate:.3f} norm {float(norm):.2f} max/mean load {balance:.2f} "
                f"{tokens / elapsed:.0f} tok/s, {float(clock):.1f} minutes",
                flush=True,
            )
        if step % plan.save_every == 0:
            save(checkpoint, model, step, float(clock), muon, adam)
    save(checkpoint, model, step, float(clock), muon, adam)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_arguments(arguments: list[str] | None = None) -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer and the checkpoints")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps in all, earlier ones included")
    parser.add_argument("--minutes", type=float, default=0.0, help="train by the clock instead of by steps")
    parser.add_argument("--rows", type=int, default=24, help="packed rows a step, over all processes")
    parser.add_argument("--length", type=int, default=352, help="tokens of a row")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--muon-rate", type=float, default=0.012)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--decay-from", type=float, default=0.3, help="share of the run after which the rate falls")
    parser.add_argument("--mtp-weight", type=float, default=0.2)
    parser.add_argument("--bias-rate", type=float, default=3e-3, help="step of the gate's correction bias")
    parser.add_argument(
        "--quantize-from", type=float, default=0.6, help="share of the run after which weights are seen as FP8"
    )
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixture", type=json.loads, default=MIXTURE, help="JSON: share of each task")
    parser.add_argument("--float32", action="store_true", help="compute in float32 instead of bfloat16")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(arguments)
    return Plan(
        out=args.out, steps=args.steps, minutes=args.minutes, rows=max(1, args.rows // args.processes), length=args.length,
        processes=args.processes, threads=args.threads, muon_rate=args.muon_rate, adam_rate=args.adam_rate,
        weight_decay=args.weight_decay, warmup=args.warmup, decay_from=args.decay_from, mtp_weight=args.mtp_weight,
        bias_rate=args.bias_rate, quantize_from=args.quantize_from, save_every=args.save_every, seed=args.seed,
        mixture=args.mixture, bfloat16=not args.float32, compiled=not args.no_compile,
    )  # fmt: skip


def main() -> None:
    """Entry point: restarts itself once so that the allocator settings take effect."""
    plan = parse_arguments()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, "-m", "moray.model.tiny_r1.training.train", *sys.argv[1:]])
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / "rendezvous").unlink(missing_ok=True)
    if not (plan.out / "tokenizer.json").exists():
        save_tokenizer(build_tokenizer(plan.seed), plan.out, Shape().max_position_embeddings)
    print(f"training {plan}", flush=True)
    if plan.processes == 1:
        train(0, plan)
    else:
        start_processes(train, args=(plan,), nprocs=plan.processes, start_method="spawn")


if __name__ == "__main__":
    main()
