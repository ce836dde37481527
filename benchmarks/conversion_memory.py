"""Peak resident memory (Linux) of a conversion against the size of its source, on a made-up Llama with random weights.

python benchmarks/conversion_memory.py --billions 1 --folder /tmp/conversion
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

MEASURE = """
import re, sys
import redepth, redepth.surgery.convert, redepth.checkpoint.republish, redepth.checkpoint.rewrite

def peak():
    # The kernel's own high-water mark of resident memory, in kB; getrusage would count the parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
redepth.convert(sys.argv[1], sys.argv[2], overwrite=True, max_shard_size=sys.argv[3])
print(before, peak())
"""


def make_source(folder: Path, billions: float, shard_gb: float) -> int:
    """A bf16 Llama checkpoint of about `billions` parameters, written shard by shard; its size in bytes."""
    width, mlp, vocabulary = 2048, 8192, 32000
    layer = 2 * width * width + 2 * width * 512 + 3 * width * mlp
    layers = max(round((billions * 1e9 - 2 * vocabulary * width) / layer), 3)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (width, width),
            prefix + "self_attn.k_proj.weight": (512, width),
            prefix + "self_attn.v_proj.weight": (512, width),
            prefix + "self_attn.o_proj.weight": (width, width),
            prefix + "mlp.gate_proj.weight": (mlp, width),
            prefix + "mlp.up_proj.weight": (mlp, width),
            prefix + "mlp.down_proj.weight": (width, mlp),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    shapes["lm_head.weight"] = (vocabulary, width)
    weight_map, held, shard, total = {}, {}, 0, 0
    for name, shape in shapes.items():
        held[name] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        total += held[name].nbytes
        weight_map[name] = f"model-{shard:05d}.safetensors"
        if sum(tensor.nbytes for tensor in held.values()) > shard_gb * 1e9 or name == "lm_head.weight":
            save_file(held, folder / weight_map[name], metadata={"format": "pt"})
            held, shard = {}, shard + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=1.0)
    parser.add_argument("--shard-gb", type=float, default=0.5, help="of the source")
    parser.add_argument("--max-shard-size", default="500MB", help="of the conversion")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    source, out = options.folder / "source", options.folder / "out"
    size = make_source(source, options.billions, options.shard_gb)
    words = [sys.executable, "-c", MEASURE, str(source), str(out), options.max_shard_size]
    before, peak = map(int, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
    shutil.rmtree(options.folder)
    print(f"source {size / 1e9:.2f} GB, shards of {options.shard_gb} GB in, {options.max_shard_size} out")
    print(
        f"process before {before / 1e6:.2f} GB, peak {peak / 1e6:.2f} GB, so the conversion {(peak - before) / 1e6:.2f} GB"
    )


if __name__ == "__main__":
    main()
