"""Write a training checkpoint in the published DeepSeek-V3 layout, FP8 (or BF16), and read such a folder back.

`python -m moray.model.tiny_r1.training.export --run runs/tiny-r1 --out model/tiny_r1`
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Shape, published_config
from .network import TinyR1
from .quantize import dequantize, quantize
from .vocabulary import EOS, build_tokenizer, save_tokenizer

# Kept in BF16 as in the published checkpoint; every other matrix goes to FP8.
_BF16_SUFFIXES = (
    "embed_tokens.weight",
    "lm_head.weight",
    "shared_head.head.weight",
    "norm.weight",
    "gate.weight",
    "eh_proj.weight",
)


def published_tensors(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Float32 tensors under published names: experts unstacked, the MTP layer with its own embedding and head."""
    tensors: dict[str, Tensor] = {}
    mtp = f"model.layers.{shape.num_hidden_layers}"
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up":
            for expert, (gate, up) in enumerate(tensor.reshape(len(tensor), 2, -1, tensor.shape[-1])):
                tensors[f"model.{prefix}.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"model.{prefix}.experts.{expert}.up_proj.weight"] = up
        elif last == "down":
            for expert, down in enumerate(tensor):
                tensors[f"model.{prefix}.experts.{expert}.down_proj.weight"] = down
        elif name == "lm_head.weight":
            tensors[name] = tensor
        else:
            tensors["model." + name.replace("shared_head_norm", "shared_head.norm")] = tensor
    tensors[f"{mtp}.embed_tokens.weight"] = state["embed_tokens.weight"]
    tensors[f"{mtp}.shared_head.head.weight"] = state["lm_head.weight"]
    return tensors


def network_state(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The reverse of `published_tensors`."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name or name.endswith(
            (f"{shape.num_hidden_layers}.embed_tokens.weight", "shared_head.head.weight")
        ):
            continue
        state[name.removeprefix("model.").replace("shared_head.norm", "shared_head_norm")] = tensor
    for layer in range(shape.first_k_dense_replace, shape.num_hidden_layers + 1):
        mlp = f"layers.{layer}.mlp"

        def part(expert: int, kind: str, mlp: str = mlp) -> Tensor:
            return tensors[f"model.{mlp}.experts.{expert}.{kind}.weight"]

        experts = range(shape.n_routed_experts)
        state[f"{mlp}.gate_up"] = torch.stack([torch.cat((part(e, "gate_proj"), part(e, "up_proj"))) for e in experts])
        state[f"{mlp}.down"] = torch.stack([part(e, "down_proj") for e in experts])
    return state


def write_weights(state: dict[str, Tensor], shape: Shape, folder: Path, fp8: bool) -> int:
    """Write model.safetensors; returns its size in bytes."""
    stored: dict[str, Tensor] = {}
    for name, tensor in published_tensors(state, shape).items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor.float()
        elif tensor.ndim < 2 or name.endswith(_BF16_SUFFIXES) or not fp8:
            stored[name] = tensor.bfloat16()
        else:
            stored[name], stored[f"{name}_scale_inv"] = quantize(tensor)
    path = folder / "model.safetensors"
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in sorted(stored.items())}, path, metadata={"format": "pt"}
    )
    return path.stat().st_size


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors in float32 under their published names, FP8 dequantised."""
    stored = load_file(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scales = stored.get(f"{name}_scale_inv")
        tensors[name] = tensor.float() if scales is None else dequantize(tensor, scales)
    return tensors


def load_model(folder: Path) -> TinyR1:
    """The network of an exported folder, in float32."""
    model = TinyR1(Shape())
    model.load_state_dict(network_state(read_weights(folder), model.shape))
    return model.eval()


def write_folder(state: dict[str, Tensor], tokenizer_folder: Path | None, folder: Path, fp8: bool = True) -> int:
    """Write everything a server reads; without a tokenizer folder the tokenizer is trained anew."""
    shape = Shape()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(shape, fp8), indent=2) + "\n")
    generation = {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if tokenizer_folder is None:
        save_tokenizer(build_tokenizer(), folder, shape.max_position_embeddings)
    elif tokenizer_folder != folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_folder / name, folder / name)
    return write_weights(state, shape, folder, fp8)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a training run; left out: random weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bf16", action="store_true", help="store BF16 instead of FP8")
    args = parser.parse_args()
    torch.manual_seed(0)
    state = TinyR1(Shape()).state_dict()
    step = 0
    if args.run is not None:
        checkpoint = torch.load(args.run / "checkpoint0.pt", weights_only=True)
        state, step = checkpoint["model"], checkpoint["step"]
    size = write_folder(state, args.run, args.out, fp8=not args.bf16)
    print(f"step {step}: wrote {args.out}, weights {size / 1e6:.1f} MB; end token {EOS}")


if __name__ == "__main__":
    main()
