"""What recording every state costs: a plain pass beside a recorded one, in turns, in processor time.

    OMP_NUM_THREADS=1 python benchmarks/recording.py ./smollm2-recurrent --tokens 512 --num-steps 32 --rounds 3

Prints the shortest of each, their ratio, and the ratio with layers and mlp outputs recorded besides.
"""

import argparse
import time
from contextlib import nullcontext
from typing import Any

import torch

import redepth


def seconds(model: Any, ids: torch.Tensor, num_steps: int, parts: tuple[str, ...]) -> float:
    """Processor seconds of one pass."""
    watch = redepth.record(model, parts=parts) if parts else nullcontext()
    begin = time.process_time()
    with torch.no_grad(), watch:
        model(ids, num_steps=num_steps, use_cache=False)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model: Any = redepth.load(arguments.checkpoint)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, arguments.tokens), generator=generator)
    kinds: dict[str, tuple[str, ...]] = {
        "plain": (),
        "state": ("state",),
        "state, layer, mlp": ("state", "layer", "mlp"),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    seconds(model, ids, 2, ())
    for _ in range(arguments.rounds):
        for name, parts in kinds.items():
            taken[name].append(seconds(model, ids, arguments.num_steps, parts))
    plain = min(taken["plain"])
    for name, values in taken.items():
        print(f"{name:<18} {min(values):8.3f} s  {min(values) / plain:.3f} x")


if __name__ == "__main__":
    main()
