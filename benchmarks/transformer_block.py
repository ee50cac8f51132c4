"""A transformer block of full width on the CPU: would packed weights make it faster?

    python -m benchmarks.transformer_block [--threads 2] [--tokens 768] [--rounds 4]

Computes a single block of FLUX.1 (width 3072, random weights, 2.5 GB of memory) in float32, in
bfloat16, and in bfloat16 with the packed linear layers of `fast`, in turns. Prints the speedups
over float32 (the shortest of all rounds) and the relative deviations from it.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from fidelora.accel.packed import PackedLinear

_WIDTH, _HEADS, _TEXT_TOKENS = 3072, 24, 256


def _block(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    block: nn.Module = FluxSingleTransformerBlock(_WIDTH, _HEADS, _WIDTH // _HEADS)
    return block.to(dtype).eval()


def _packed(block: nn.Module) -> nn.Module:
    for parent in list(block.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                packed = PackedLinear(child, torch.bfloat16)
                packed.set_weight(lambda dtype, weight=child.weight: weight.to(dtype))  # type: ignore[misc]
                setattr(parent, name, packed)
    return block


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    image = torch.randn(1, options.tokens - _TEXT_TOKENS, _WIDTH)
    text, time_embedding = torch.randn(1, _TEXT_TOKENS, _WIDTH), torch.randn(1, _WIDTH)
    angles = torch.rand(options.tokens, _WIDTH // _HEADS)
    blocks = {
        "float32": (_block(torch.float32), torch.float32),
        "bfloat16": (_block(torch.bfloat16), torch.bfloat16),
        "packed bfloat16": (_packed(_block(torch.bfloat16)), torch.bfloat16),
    }
    best = dict.fromkeys(blocks, float("inf"))
    results: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, (block, dtype) in blocks.items():
            start = time.perf_counter()
            with torch.inference_mode():
                output = block(
                    hidden_states=image.to(dtype),
                    encoder_hidden_states=text.to(dtype),
                    temb=time_embedding.to(dtype),
                    image_rotary_emb=(angles.cos(), angles.sin()),
                )
            best[name] = min(best[name], time.perf_counter() - start)
            results[name] = torch.cat(output, dim=1).float()
    whole = results["float32"]
    for name, seconds in best.items():
        deviation = float((results[name] - whole).norm() / whole.norm())
        print(f"{name}: {best['float32'] / seconds:.2f} x, deviation {deviation:.2%}")
    same = torch.equal(results["bfloat16"], results["packed bfloat16"])
    print(f"bits of bfloat16 and packed bfloat16: {'the same' if same else 'different'}")


if __name__ == "__main__":
    main()
