"""Train a small Griffin from scratch on Python's own documentation, and let it write.

    python examples/train_griffin.py                 # about three minutes
    python examples/train_griffin.py --seconds 60
    python examples/train_griffin.py --save ./griffin    # for redepth convert ./griffin ./griffin-deep

The text is what `help()` prints for the language's topics and what the standard library says of itself, so no download
is needed. Tokens are bytes. One byte in twenty of the text is held out for the loss that is shown.
"""

import argparse
import importlib
import inspect
import math
import sys
import time
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from redepth.griffin.model import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

# fmt: off
MODULES = [
    "argparse", "asyncio", "base64", "bisect", "calendar", "cmath", "collections", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "dis",
    "email.message", "enum", "fractions", "functools", "glob", "gzip", "hashlib", "heapq", "html", "http.client",
    "importlib", "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "mimetypes", "multiprocessing",
    "operator", "os", "pathlib", "pickle", "platform", "pprint", "queue", "random", "re", "sched", "secrets",
    "selectors", "shelve", "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string",
    "struct", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "types",
    "typing", "unittest", "urllib.parse", "uuid", "weakref", "xml.etree.ElementTree", "zipfile",
]
# fmt: on


def built_in_text() -> str:
    """Every documentation topic, then the docstrings of the standard library's public classes and functions."""
    parts = [text for _, text in sorted(topics.topics.items())]
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module, *(value for key, value in sorted(vars(module).items()) if not key.startswith("_"))]
        for member in members:
            if not (inspect.isclass(member) or inspect.isroutine(member) or inspect.ismodule(member)):
                continue
            things = [member]
            if inspect.isclass(member):
                things += [value for key, value in sorted(vars(member).items()) if callable(value) and key[0] != "_"]
            for thing in things:
                text = inspect.getdoc(thing)
                if text:
                    parts.append(f"{getattr(thing, '__name__', name)}: {text}")
    return "\n\n".join(dict.fromkeys(parts))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the text's bytes; 0, which never occurs, ends a document."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0], eos_token=letters[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=170.0, help="time for training")
    parser.add_argument("--prompt", default="The for statement is used to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write model and tokenizer there")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    data = torch.frombuffer(bytearray(built_in_text().encode()), dtype=torch.uint8).long()
    held_out = len(data) // 20
    train, test = data[:-held_out], data[-held_out:]
    model = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=768,
            num_attention_heads=4,
            num_key_value_heads=1,
            num_hidden_layers=6,
            attention_window_size=128,
            # Bytes need no special token; 0 never occurs in the text.
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(train):,} bytes to learn from, {len(test):,} held out, {size / 1e6:.1f} M parameters")

    batch, length, peak = 4, 256, 4e-3
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.95)
    )

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        rows = test[: len(test) // 1_024 * 1_024].view(-1, 1_024)[:16]
        loss = model(rows, labels=rows, use_cache=False).loss.item()
        model.train()
        return loss

    first = last = held_out_loss()
    print(f"step     0  held-out loss {first:.3f} nats a byte ({math.log(256):.3f} is blind guessing)", flush=True)
    started, step, shown = time.perf_counter(), 0, 0.0
    while (spent := time.perf_counter() - started) < options.seconds:
        # The rate follows the clock, so that a slower machine trains less and not worse.
        rate = peak * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * (1 + math.cos(math.pi * spent / options.seconds)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - length, (batch,))
        rows = torch.stack([train[start : start + length] for start in starts])
        loss = model(rows, labels=rows, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if spent - shown > options.seconds / 10:
            shown, last = spent, held_out_loss()
            print(
                f"step {step:5d}  held-out loss {last:.3f}  training loss {loss.item():.3f}  {spent:.0f} s", flush=True
            )
    last = held_out_loss()
    print(f"step {step:5d}  held-out loss {last:.3f}  {step * batch * length / options.seconds:,.0f} bytes a second")

    model.eval()
    prompt = torch.tensor([list(options.prompt.encode())])
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=400, do_sample=True, temperature=0.7, top_k=40
    )
    print("\n" + bytes(written[0].tolist()).decode(errors="replace"))
    if options.save is not None:
        model.save_pretrained(options.save)
        byte_tokenizer().save_pretrained(options.save)
    if last >= first:
        sys.exit("the loss did not fall")


if __name__ == "__main__":
    main()
