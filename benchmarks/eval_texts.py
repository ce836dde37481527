"""Greedy texts for lm-eval's tasks, drafted and plain: seconds, and whether they are the same.

    OMP_NUM_THREADS=1 python benchmarks/eval_texts.py ./smollm2-recurrent EVAL_FOLDER

Wall-clock seconds of lm-eval's requests, two turns that alternate. EVAL_FOLDER holds gsm8k.jsonl in its hub schema.
"""

import argparse
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval.evaluator import evaluate
from transformers import AutoTokenizer

import redepth
from redepth.evaluation import harness
from redepth.evaluation.asking import flat, set_examples
from redepth.evaluation.quiet import quiet
from redepth.evaluation.stock_tasks import load_tasks


def texts(lm: Any, tasks: Any, limit: int) -> tuple[list[Any], float]:
    for task in tasks["tasks"].values():
        set_examples(task, 0)
    start = time.perf_counter()
    with quiet():
        results: Any = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    took = time.perf_counter() - start
    return [sample["resps"] for samples in results["samples"].values() for sample in samples], took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder of NAME.jsonl files")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--limit", type=int, default=2, help="documents")
    parser.add_argument("--tokens", type=int, default=48, help="of a text, at most")
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    model, tokenizer = redepth.load(options.checkpoint), AutoTokenizer.from_pretrained(options.checkpoint)
    short = {
        options.task: {
            "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": options.tokens}
        }
    }
    tasks = flat(load_tasks([options.task], options.data, short))
    for num_steps in options.num_steps:
        lm: Any = harness.RedepthLM(model, tokenizer=tokenizer, batch_size=options.batch_size, num_steps=num_steps)
        drafted, plain = [], []
        for _ in range(2):
            said, took = texts(lm, tasks, options.limit)
            drafted.append(took)
            with mock.patch.object(harness, "drafted", lambda policy, config: policy):
                expected, took = texts(lm, tasks, options.limit)
            plain.append(took)
        print(
            f"r = {num_steps}: drafted {drafted[0]:.1f} and {drafted[1]:.1f} s, plain {plain[0]:.1f} and {plain[1]:.1f} s; "
            f"{sum(one == two for one, two in zip(said, expected, strict=True))} of {len(said)} texts the same; "
            f"{torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main()
