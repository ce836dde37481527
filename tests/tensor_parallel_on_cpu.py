"""A checkpoint with its weights spread over the processes of a run on gloo, beside the whole one."""

import sys

import torch
from transformers.distributed.configuration_utils import DistributedConfig

import redepth
from tests.tolerance import tolerance
from tests.zoo import random_ids

STEPS = 3
CLOSE = tolerance(layers=4 + 2 * STEPS)


def main(folder: str) -> None:
    whole = redepth.RecurrentDepthForCausalLM.from_pretrained(folder).eval()
    spread = redepth.RecurrentDepthForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    spread.eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(spread(ids, num_steps=STEPS).logits, whole(ids, num_steps=STEPS).logits, **CLOSE)
        for more in ({}, {"criterion": "kl"}, {"draft_steps": 1}):
            asked = {"num_steps": STEPS, "max_new_tokens": 6, "do_sample": False, **more}
            assert torch.equal(spread.generate(ids, **asked), whole.generate(ids, **asked)), more
    for model in (spread.train(), whole.train()):
        model(ids, labels=ids, num_steps=STEPS).loss.backward()
    for part in ("prelude", "core_block", "coda"):
        for name in ("attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj"):
            path = f"transformer.{part}.0.{name}"
            sharded = spread.get_submodule(path).weight
            wanted = whole.get_submodule(path).weight.grad
            assert sharded.to_local().numel() < wanted.numel(), f"{path} is not spread"
            torch.testing.assert_close(sharded.grad.full_tensor(), wanted, **CLOSE)


if __name__ == "__main__":
    main(sys.argv[1])
