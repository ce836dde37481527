"""Contract 7 as a table: every bad input ends in one line that names it, with exit code 2, and leaves the tree as it was."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import redepth
from redepth.cli import main
from redepth.griffin import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from tests.test_healing import byte_tokenizer
from tests.zoo import VOCABULARY

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SMALL_HEAL = ("--sequence-length", "16", "--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "2")
Break = Callable[[Path], None]


class Case(NamedTuple):
    """`{name}` in the words is a path inside the case's own folder; `says` must be in the line."""

    words: tuple[str, ...]
    says: str
    spoil: Break | None = None


def case(line: str, says: str, spoil: Break | None = None) -> Case:
    return Case(tuple(line.split()), says, spoil)


# How a folder is spoilt; each takes the folder that holds the case's copies.


def config(folder: str, **changes: Any) -> Break:
    def spoil(root: Path) -> None:
        file = root / folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def text(file: str, content: str | bytes) -> Break:
    def spoil(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(file: str) -> Break:
    return lambda root: (root / file).unlink()


def cut(file: str, size: int) -> Break:
    return lambda root: os.truncate(root / file, (root / file).stat().st_size - size)


def tensors(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def spoil(root: Path) -> None:
        file = root / folder / "model.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file, metadata={"format": "pt"})

    return spoil


def index(folder: str, content: Any) -> Break:
    def spoil(root: Path) -> None:
        (root / folder / "model.safetensors").unlink()
        (root / folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def all_of(*spoils: Break) -> Break:
    def spoil(root: Path) -> None:
        for one in spoils:
            one(root)

    return spoil


def tokenizer(folder: str, change: Callable[[dict[str, Any]], object]) -> Break:
    def spoil(root: Path) -> None:
        file = root / folder / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


ADAPTER, HEAD = "transformer.adapter.weight", "lm_head.weight"
WIDE = torch.zeros(3, 3)

# Fields of a recurrent checkpoint's config.json, and values that no model can have; read by `redepth inspect`.
CHECKPOINT_FIELDS: dict[str, list[Any]] = {
    "vocab_size": [None, 0, -5, "many", [101], 1.5],
    "n_embd": [None, 0, -24, "wide", [24]],
    "n_heads": [None, 0, -3, "three", {}],
    "num_key_value_heads": [0, -1, 2, "one"],
    "head_dim": [0, -8, 7, "eight"],
    "intermediate_size": [None, 0, -1, "x"],
    "n_layers_in_prelude": [None, -1, "2"],
    "n_layers_in_recurrent_block": [None, 0, -2, [2]],
    "n_layers_in_coda": [None, -1, {}],
    "mean_recurrence": [None, 0, -4, "deep"],
    "block_size": [None, 0, -1, "long"],
    "norm_eps": [None, "small", -1.0],
    "norm_placement": [None, "before", 3],
    "norm_weight": ["two_plus", None],
    "activation": ["relu2", None, 5],
    "qk_norm": ["tail", 3],
    "rope_style": ["spiral", None],
    "rope_parameters": [5, [], "default", {"rope_type": "curly", "rope_theta": 100.0}],
    "rope_layers": [[True], "all", 5],
    "layer_types": [["full_attention"], "full_attention", ["mamba"] * 6],
    "conv1d_width": [None, 0, "four"],
    "query_scale": ["big", []],
    "final_logit_softcapping": ["soft", -1.0, 0.0],
    "initial_state_mode": [None, "fog", 3],
    "state_std": ["wide", -1.0],
    "state_seed": [None, "seed", 1.5],
    "cache_rule": [None, "ring-0", "rinse", 7],
    "num_steps": [0, -1, "all"],
    "depth_profile": [[], "deep", {"num_steps": 0}, {"num_steps": "x"}],
    "init_values": [[], "std", {"std": "x"}, {"embed_scale": None}],
    "tie_embeddings": ["maybe", None],
    "model_type": [None, 5, "llama9"],
}
# Fields of a source's config.json; read by `redepth convert`.
SOURCE_FIELDS: dict[str, list[Any]] = {
    "vocab_size": [None, 0, "many", 102],
    "hidden_size": [None, 0, -24, "wide", 25],
    "num_attention_heads": [None, 0, -1, "three", 5],
    "num_key_value_heads": [0, -1, 2, "one"],
    "head_dim": [0, -2, 7, "x"],
    "num_hidden_layers": [None, 0, -6, "six", 7, 2],
    "intermediate_size": [None, 0, "x", 38],
    "rms_norm_eps": [None, "small"],
    "rope_parameters": [5, {"rope_type": "curly", "rope_theta": 1.0}],
    "layer_types": [["full_attention"], "x", ["mamba"] * 6],
    "hidden_act": [None, "relu9", 3],
    "model_type": [None, "gpt17", [], 5],
    "max_position_embeddings": [None, 0, "x"],
}


def fields_of(folder: str, line: str, table: dict[str, list[Any]]) -> dict[str, Case]:
    return {
        f"{folder} {field} = {json.dumps(value)}": case(line, "", config(folder, **{field: value}))
        for field, values in table.items()
        for value in values
    }


CONVERT, LOAD = "convert {source} {out} --core 2:4 -q --no-verify", "generate {checkpoint} hi --max-new-tokens 1"
HEAL = " ".join(("heal {checkpoint} -q --data {texts}/good.jsonl", *SMALL_HEAL))

FILES = {
    f"{name} of a {folder}: {kind}": case(line, says, spoil(f"{folder}/{name}"))
    for folder, line in (("source", CONVERT), ("checkpoint", LOAD))
    for name, says in (("config.json", folder), ("model.safetensors", "model.safetensors"))
    for kind, spoil in {
        "missing": remove,
        "empty": lambda file: text(file, ""),
        "no such format": lambda file: text(file, "hello"),
        "binary": lambda file: text(file, bytes(range(256)) * 8),
        "a list": lambda file: text(file, "[]"),
        "cut short": lambda file: cut(file, 40),
    }.items()
}
WEIGHTS = {
    "checkpoint lacks a tensor": case(LOAD, ADAPTER, tensors("checkpoint", lambda all: all.pop(ADAPTER))),
    "checkpoint has one too many": case(LOAD, "more", tensors("checkpoint", lambda all: all.update(more=WIDE))),
    "checkpoint has a wrong shape": case(LOAD, ADAPTER, tensors("checkpoint", lambda all: all.update({ADAPTER: WIDE}))),
    "checkpoint has integers": case(
        LOAD, "", tensors("checkpoint", lambda all: all.update({ADAPTER: torch.zeros(3, dtype=torch.int32)}))
    ),
    "checkpoint is not a number, generate": case(
        LOAD, "nan", tensors("checkpoint", lambda all: all[ADAPTER].fill_(torch.nan))
    ),
    "checkpoint is not a number, sampling": case(
        LOAD + " --temperature 1", "nan", tensors("checkpoint", lambda all: all[ADAPTER].fill_(torch.nan))
    ),
    "checkpoint is not a number, calibrate": case(
        "calibrate {checkpoint} --data {texts}/good.jsonl --rows 2 --sequence-length 16 --most-steps 3",
        "nan",
        tensors("checkpoint", lambda all: all[ADAPTER].fill_(torch.nan)),
    ),
    "checkpoint is not a number, heal": case(
        HEAL, "nan", tensors("checkpoint", lambda all: all[ADAPTER].fill_(torch.nan))
    ),
    "source lacks a tensor": case(
        CONVERT, "q_proj", tensors("source", lambda all: all.pop("model.layers.0.self_attn.q_proj.weight"))
    ),
    "source has one too many": case(CONVERT, "more", tensors("source", lambda all: all.update(more=WIDE))),
    "source has a wrong shape": case(
        CONVERT, "q_proj", tensors("source", lambda all: all.update({"model.layers.3.self_attn.q_proj.weight": WIDE}))
    ),
} | {
    f"index of a {folder}: {json.dumps(content)}": case(line, "", index(folder, content))
    for folder, line in (("source", CONVERT), ("checkpoint", LOAD))
    for content in (
        [],
        {},
        5,
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {HEAD: "gone.safetensors"}},
        {"weight_map": {HEAD: "../../outside.safetensors"}},
        {"weight_map": {HEAD: 5}},
    )
}
TOKENIZERS = {
    f"tokenizer {kind}, {command}": case(line, "tokenizer", spoil)
    for command, line in {
        "generate": LOAD,
        "calibrate": "calibrate {checkpoint} --data {texts}/good.jsonl --rows 2 --sequence-length 16 --most-steps 3",
        "heal": HEAL,
        "chat": "chat {checkpoint}",
        "serve": "serve {checkpoint} --port 0",
    }.items()
    for kind, spoil in {
        "broken": text("checkpoint/tokenizer.json", "{"),
        "a list": text("checkpoint/tokenizer.json", "[]"),
        "empty": text("checkpoint/tokenizer.json", ""),
        "without a model": tokenizer("checkpoint", lambda content: content.pop("model")),
        "missing": all_of(remove("checkpoint/tokenizer.json"), remove("checkpoint/tokenizer_config.json")),
    }.items()
} | {
    "no tokenizer, in plain words": case(
        "serve {checkpoint} --port 0",
        "has no tokenizer; put tokenizer.json",
        all_of(remove("checkpoint/tokenizer.json"), remove("checkpoint/tokenizer_config.json")),
    ),
    "more tokens than the vocabulary": case(
        "generate {checkpoint} hi~",
        "vocabulary",
        tokenizer("checkpoint", lambda c: c["model"]["vocab"].update({"~": 500})),
    ),
    "chat without a template": case("chat {plain}", "template"),
    "chat with a broken template": case(
        "chat {checkpoint}", "template", text("checkpoint/chat_template.jinja", "{% for %}")
    ),
    "chat with a template that raises": case(
        "chat {checkpoint}", "template", text("checkpoint/chat_template.jinja", "{{ raise_exception('no') }}")
    ),
    "chat with a template of nothing": case(
        "chat {checkpoint}", "template", text("checkpoint/chat_template.jinja", "{{ '' }}")
    ),
    "a depth in the config that nobody can want": case(LOAD, "num_steps", config("checkpoint", num_steps=10**9)),
    "no words": Case(("generate", "{checkpoint}", ""), "empty"),
}
RECIPES = (
    {
        f"recipe.yaml {kind}, {line.split()[0]}": case(line, "recipe.yaml", text("checkpoint/recipe.yaml", content))
        for line in ("verify {checkpoint}", "inspect {checkpoint}", HEAL)
        for kind, content in {
            "broken": "convert: [",
            "with tabs": "convert:\n\t- 5",
            "a list": "- convert",
            "a word": "convert",
            "binary": b"\xff\xfe\x00\x01",
            "of words": "convert: yes",
            "partial": "convert: {source: x}",
            "with a list for a range": "convert: {source: s, prelude: [0], core: 5, coda: null, adapter: 7, state: 3}",
        }.items()
    }
    | {
        f"heal recipe {kind}": case(
            " ".join((HEAL, "--recipe {texts}/recipe.yaml")), "recipe", text("texts/recipe.yaml", content)
        )
        for kind, content in {
            "broken": "heal: [",
            "empty": "",
            "a list": "- heal",
            "a word": "heal",
            "without its section": "convert: {}",
            "of a list": "heal: [1]",
            "of nothing": "heal:",
            "with an unknown key": "heal: {speed: 3}",
            "with a number for a word": "heal: {optimizer: 3}",
            "with a word for a number": "heal: {eval_rows: many}",
            "below": "heal: {eval_rows: 0}",
            "with keys that are numbers": "heal: {1: 2}",
            "binary": b"\xff\xfe\x00\x01",
            "with a tag": "heal: !!python/object:os.system {}",
            "with a date": "heal: {text_column: 2020-01-01}",
            "endless": "heal: {learning_rate: .inf, weight_decay: .nan}",
        }.items()
    }
    | {
        f"retrofit recipe {kind}": case(
            "retrofit {texts}/recipe.yaml {out}", "recipe", text("texts/recipe.yaml", content)
        )
        for kind, content in {
            "broken": "convert: [",
            "empty": "",
            "a list": "[]",
            "without a source": "convert: {core: '2:4'}",
            "with a strange section": "convert: {source: smollm2-135m}\nheel: {}",
            "with lists": "convert: []\nheal: []",
            "with nothing": "convert:\nheal:\n",
        }.items()
    }
)
DATA = {
    f"data {kind}, {line.split()[0]}": case(line.replace("NAME", name), says, text(f"texts/{name}", content))
    for line in (
        " ".join(("heal {checkpoint} -q --data {texts}/NAME", *SMALL_HEAL)),
        "calibrate {checkpoint} --data {texts}/NAME --rows 2 --sequence-length 16 --most-steps 3",
        "plan {source} --data {texts}/NAME --rows 2 --sequence-length 16 --core-layers 2",
    )
    for kind, (name, says, content) in {
        "empty": ("empty.jsonl", "empty.jsonl", ""),
        "broken": ("broken.jsonl", "line 1", "{"),
        "of lists": ("lists.jsonl", "lists.jsonl", "[1]\n"),
        "without the column": ("column.jsonl", "text", '{"words": "x"}\n'),
        "null": ("null.jsonl", "null", '{"text": null}\n'),
        "of numbers": ("numbers.jsonl", "numbers.jsonl", '{"text": 5}\n'),
        "not UTF-8": ("latin.txt", "UTF-8", b"\xe9\xe8\xff" * 50),
        "too short": ("short.txt", "short", "a"),
        "no parquet": ("text.parquet", "text.parquet", "hello"),
        "of an unknown kind": ("text.csv", "csv", "text\nhello\n"),
        "blank": ("blank.txt", "", "   \n"),
    }.items()
}
NUMBERS = {
    line: case(line, says)
    for line, says in (
        ("generate {checkpoint} hi --num-steps 0", "num_steps"),
        ("generate {checkpoint} hi --num-steps -1", "num_steps"),
        ("generate {checkpoint} hi --num-steps 1.5", "num-steps"),
        ("generate {checkpoint} hi --num-steps deep", "num-steps"),
        ("generate {checkpoint} hi --num-steps 1000000000", "num_steps"),
        ("generate {checkpoint} hi --num-steps 99999999999999999999999", "num"),
        ("generate {checkpoint} hi --max-new-tokens 0", "max-new-tokens"),
        ("generate {checkpoint} hi --max-new-tokens -3", "max-new-tokens"),
        ("generate {checkpoint} hi --temperature -1", "temperature"),
        ("generate {checkpoint} hi --temperature nan", "temperature"),
        ("generate {checkpoint} hi --temperature inf", "temperature"),
        ("generate {checkpoint} hi --temperature 1 --top-p 0", "top-p"),
        ("generate {checkpoint} hi --temperature 1 --top-p 2", "top-p"),
        ("generate {checkpoint} hi --temperature 1 --top-p nan", "top-p"),
        ("generate {checkpoint} hi --temperature 1 --seed 99999999999999999999999", "seed"),
        ("generate {checkpoint} hi --criterion kl --exit-threshold nan", "exit_threshold"),
        ("generate {checkpoint} hi --criterion kl --exit-threshold 0", "exit_threshold"),
        ("generate {checkpoint} hi --num-steps 4 --draft-steps 0", "draft_steps"),
        ("generate {checkpoint} hi --num-steps 4 --draft-steps 2 --draft-tokens 0", "draft_tokens"),
        ("generate {checkpoint} hi --sampler wavefront --headway 0", "headway"),
        ("generate {checkpoint} hi --sampler wavefront --noise-mix nan", "noise_mix"),
        ("generate {checkpoint} hi --sampler wavefront --noise-mix 2", "noise_mix"),
        ("generate {checkpoint} hi --cache-rule ring--1", "cache rule"),
        ("generate {checkpoint} hi --cache-rule ring-0", "cache rule"),
        ("generate {checkpoint} hi --dtype int8", "dtype"),
        ("generate {checkpoint} hi --dtype float99", "dtype"),
        ("chat {checkpoint} --num-steps 0", "num_steps"),
        ("chat {checkpoint} --num-steps 1000000000", "num_steps"),
        ("chat {checkpoint} --max-new-tokens 0", "max-new-tokens"),
        ("inspect {checkpoint} --num-steps 0", "num_steps"),
        ("calibrate {checkpoint} --sequence-length 16 --rows 0", "rows"),
        ("calibrate {checkpoint} --sequence-length 0", "sequence-length"),
        ("calibrate {checkpoint} --sequence-length -16", "sequence-length"),
        ("calibrate {checkpoint} --sequence-length 16 --most-steps 0", "most"),
        ("calibrate {checkpoint} --sequence-length 16 --most-steps 1000000000", "most"),
        ("plan {source} --sequence-length 16 --core-layers 0", "core-layers"),
        ("plan {source} --sequence-length 16 --core-layers -1", "core-layers"),
        ("plan {source} --sequence-length 16 --rows 0", "rows"),
        ("plan {source} --sequence-length 16 --tolerance nan", "tolerance"),
        ("plan {source} --sequence-length 16 --adapter blend:nan", "blend:nan"),
        ("convert {source} {out} --core 4:2", "4:2"),
        ("convert {source} {out} --core 2", "2"),
        ("convert {source} {out} --core two", "two"),
        ("convert {source} {out} --core 2:99", "99"),
        ("convert {source} {out} --core -4:-2 --prelude 0:5", ""),
        ("convert {source} {out} --adapter blend:2", "blend:2"),
        ("convert {source} {out} --adapter blend:x", "blend:x"),
        ("convert {source} {out} --adapter inject --state fog", "fog"),
        ("convert {source} {out} --dtype int4", "int4"),
        ("convert {source} {out} --seed 99999999999999999999999 --adapter random", "seed"),
        ("convert {source} {out} --max-shard-size infGB", "infGB"),
        ("convert {source} {out} --max-shard-size nanGB", "nanGB"),
        ("convert {source} {out} --max-shard-size 0MB", "0MB"),
        ("convert {source} {out} --max-shard-size -1GB", "-1GB"),
        ("convert {source} {out} --max-shard-size 5", "5"),
        ("convert {source} {out} --max-shard-size 1e999GB", "1e999GB"),
        ("new {out} --preset pico", "pico"),
        ("new {out} --dtype int8", "int8"),
        ("new {out} --tokenizer {empty}", "tokenizer"),
        ("new {out} --seed 99999999999999999999999", "seed"),
        (HEAL + " --learning-rate nan", "learning_rate"),
        (HEAL + " --learning-rate inf", "learning_rate"),
        (HEAL + " --weight-decay nan", "weight_decay"),
        (HEAL + " --mean-recurrence 0", "mean_recurrence"),
        (HEAL + " --mean-recurrence nan", "mean_recurrence"),
        (HEAL + " --mean-recurrence 1e9", "mean_recurrence"),
        (HEAL + " --eval-depths 0", "eval_depths"),
        (HEAL + " --eval-depths ,", "eval_depths"),
        (HEAL + " --eval-depths 1000000000", "eval_depths"),
        (HEAL + " --micro-batch-size 3", "micro_batch_size"),
        (HEAL + " --warmup 1.5", "warmup"),
        (HEAL + " --optimizer sgdx", "sgdx"),
        (HEAL + " --report-to nonsense", "nonsense"),
        (HEAL + " --seed 99999999999999999999999", "seed"),
        (HEAL + " --validation {texts}/none.jsonl", "none.jsonl"),
        (HEAL + " --text-column words", "words"),
        (HEAL + " --teacher {empty} --distill 0.5", ""),
    )
}
EVAL = "eval {checkpoint} --out {out} --data-dir {texts} --tasks"
EVALUATIONS = {
    line: case(line, says, spoil)
    for line, says, spoil in (
        (f"{EVAL} arc_eazy", "did you mean 'arc_easy'", None),
        (f"{EVAL} sciq", "sciq.jsonl", None),
        (f"{EVAL} sciq --num-steps 0", "num-steps", None),
        (f"{EVAL} sciq --num-steps 1,deep", "num-steps", None),
        (f"{EVAL} sciq --num-steps 99999999", "max_num_steps", None),
        (f"{EVAL} sciq --limit 0", "limit", None),
        (f"{EVAL} sciq --batch-size 0", "batch_size", None),
        (f"{EVAL} sciq --criterion fog", "fog", None),
        (f"{EVAL} sciq --exit-threshold much", "exit-threshold", None),
        (f"{EVAL} sciq --compare {{root}}/nowhere", "nowhere", None),
        (f"{EVAL} sciq --compare {{griffin}}:2", "recurrent_gemma", None),
        (f"{EVAL} sciq --device banana", "banana", None),
        (f"{EVAL} sciq --num-fewshot -1", "num-fewshot", None),
        (f"{EVAL} sciq --preset giraffe", "giraffe", None),
        (f"{EVAL} sciq --preset huginn --num-fewshot 2", "num_fewshot", None),
        (f"{EVAL} boolq --preset huginn", "boolq", None),
        (f"{EVAL} task:iterat", "iterate", None),
        (f"{EVAL} mmlu", "mmlu", None),
        (f"{EVAL} text:{{texts}}/none.jsonl", "none.jsonl", None),
        (f"{EVAL} text:{{texts}}/good.jsonl?rows=0", "rows", None),
        (f"{EVAL} text:{{texts}}/good.jsonl?length=4000", "4000", None),
        (f"{EVAL} text:{{texts}}/good.jsonl --compare {{source}}", "tokenizer", remove("source/tokenizer.json")),
        (f"{EVAL} sciq --out {{file}}", "file", None),
        (f"{EVAL} sciq --out {{texts}}", "texts", None),
        ("eval {checkpoint}", "no task", None),
        ("eval {source} --tasks sciq --out {out}", "recurrent", None),
        ("eval {root}/nowhere --tasks sciq --out {out}", "does not exist", None),
        ("eval {checkpoint} --tasks sciq --out {out} --data-dir {file}", "file", None),
        (f"{EVAL} sciq", "tokenizer", all_of(text("texts/sciq.jsonl", "{}"), text("checkpoint/tokenizer.json", "{"))),
        (f"{EVAL} sciq ", "sciq", text("texts/sciq.jsonl", "{")),
        (f"{EVAL}  sciq", "support", text("texts/sciq.jsonl", '{"question": "x"}\n')),
        (f"{EVAL} gsm8k", "tokens", text("texts/gsm8k.jsonl", '{"question": "x", "answer": "#### 1"}\n' * 9)),
        ("analyze {checkpoint} --out {out}", "prompts or data", None),
        ("analyze {checkpoint} --out {out} --prompt a", "at least 2", None),
        ("analyze {checkpoint} --out {out} --prompt hello --data {texts}/good.jsonl", "prompts or data", None),
        ("analyze {checkpoint} --out {out} --prompt hello --num-steps 3", "at least 7", None),
        ("analyze {checkpoint} --out {out} --data {texts}/none.jsonl", "none.jsonl", None),
        ("analyze {checkpoint} --out {out} --data {texts}/good.jsonl --rows 0", "rows", None),
        ("analyze {checkpoint} --out {out} --data {texts}/good.jsonl --sequence-length 1", "sequence_length", None),
        ("analyze {checkpoint} --out {out} --data {texts}/good.jsonl --sequence-length 400", "400", None),
        ("analyze {checkpoint} --out {texts} --prompt hello", "exists", None),
        ("analyze {checkpoint} --out {out} --prompt hello --compare {root}/nowhere", "nowhere", None),
        ("analyze {checkpoint} --out {out} --prompt hello", "tokenizer", text("checkpoint/tokenizer.json", "{")),
        ("analyze {source} --out {out} --prompt hello", "recurrent", None),
        ("publish {checkpoint} no/such/name", "no/such/name", None),
        ("publish {checkpoint} you/model", "not healed", None),
        ("publish {empty} you/model", "config.json", None),
    )
}
DEVICES = {
    f"{command} on {device}": case(f"{line} --device {device}", device)
    for command, line in {
        "generate": LOAD,
        "chat": "chat {checkpoint}",
        "calibrate": "calibrate {checkpoint} --data {texts}/good.jsonl --rows 2 --sequence-length 16 --most-steps 3",
    }.items()
    for device in ("cuda", "cuda:9", "mps", "meta", "banana", "cpu:x", "7", "xpu", "hip")
    if device != "cuda" or not torch.cuda.is_available()
}
FOLDERS = {
    "convert into a file": case(CONVERT.replace("{out}", "{file}"), "file"),
    "convert below a file": case(CONVERT.replace("{out}", "{file}/out"), "file"),
    "convert into the source": case(CONVERT.replace("{out}", "{source}") + " --overwrite", "source"),
    "convert below the source": case(CONVERT.replace("{out}", "{source}/out"), "source"),
    "convert above the source": case(CONVERT.replace("{out}", "{root}") + " --overwrite", ""),
    "convert into a full folder": case(CONVERT.replace("{out}", "{texts}"), "exists"),
    "convert into a stranger's folder": case(CONVERT.replace("{out}", "{texts}") + " --overwrite", "redepth"),
    "convert a file": case("convert {file} {out}", "file"),
    "convert an empty folder": case("convert {empty} {out}", "config.json"),
    "convert nothing": case("convert {root}/nowhere {out}", "does not exist"),
    "convert a checkpoint with a plan": case("convert {checkpoint} {out} --core 1:2", "recurrent"),
    "new into a file": case("new {file}", "file"),
    "new below a file": case("new {file}/out", "file"),
    "new into a full folder": case("new {texts}", "exists"),
    "new into a stranger's folder": case("new {texts} --overwrite", "redepth"),
    "heal to a file": case(HEAL + " --to {file}", "file"),
    "heal below a file": case(HEAL + " --to {file}/out", "file"),
    "heal a source": case(HEAL.replace("{checkpoint}", "{source}"), "recurrent"),
    "heal an empty folder": case(HEAL.replace("{checkpoint}", "{empty}"), "config.json"),
    "heal nothing": case(HEAL.replace("{checkpoint}", "{root}/nowhere"), "does not exist"),
    "heal what is recurrent in time alone": case(HEAL.replace("{checkpoint}", "{griffin}"), "recurrent_gemma"),
    "verify a source": case("verify {source}", ""),
    "verify against another": case("verify {checkpoint} --against {griffin}", ""),
    "verify against nothing": case("verify {checkpoint} --against {root}/nowhere", "does not exist"),
    "verify an empty folder": case("verify {empty}", ""),
    "verify a file": case("verify {file}", "file"),
    "inspect a file": case("inspect {file}", "file"),
    "inspect what is recurrent in time alone": case("inspect {griffin}", "recurrent_gemma"),
    "chat with what is recurrent in time alone": case("chat {griffin}", "recurrent_gemma"),
    "generate at a depth from what has none": case("generate {griffin} hi --num-steps 2", ""),
    "calibrate what is recurrent in time alone": case("calibrate {griffin} --sequence-length 16", "recurrent_gemma"),
    "calibrate a hub id": case("calibrate someone/model", "folder"),
    "retrofit with no recipe": case("retrofit {root}/none.yaml {out}", "none.yaml"),
    "retrofit with a folder": case("retrofit {texts} {out}", "texts"),
    "heal with a folder as recipe": case(HEAL + " --recipe {texts}", "texts"),
    "heal on a folder": case(" ".join(("heal {checkpoint} --data {texts}", *SMALL_HEAL)), "texts"),
    "a wrong command": case("frobnicate {source}", "frobnicate"),
    "a wrong flag": case("convert {source} {out} --cores 1:2", "--cores"),
    "a flag without its value": case("convert {source} {out} --core", "--core"),
    "no argument": case("convert", "SOURCE"),
    "one argument too many": case("inspect {checkpoint} {checkpoint}", ""),
    "convert where nothing can be made": case(CONVERT.replace("{out}", "/proc/out"), "/proc/out"),
    "new where nothing can be made": case("new /proc/out", "/proc/out"),
    "convert below a device": case(CONVERT.replace("{out}", "/dev/null/out"), "/dev/null"),
    "retrofit into a file": case(
        "retrofit {texts}/recipe.yaml {file}",
        "file",
        text("texts/recipe.yaml", "convert: {source: source, core: '2:4'}\nheal: {sequence_length: 16}\n"),
    ),
    "a name with a null byte": case("inspect \0", ""),
    "a very long name": case("inspect /" + "x" * 5000, ""),
}
CASES = {
    **fields_of("checkpoint", "inspect {checkpoint}", CHECKPOINT_FIELDS),
    **fields_of("source", CONVERT, SOURCE_FIELDS),
    **FILES,
    **WEIGHTS,
    **TOKENIZERS,
    **RECIPES,
    **DATA,
    **NUMBERS,
    **EVALUATIONS,
    **DEVICES,
    **FOLDERS,
}


@pytest.fixture(scope="module")
def house(zoo, tmp_path_factory) -> Path:
    """What the cases start from: a source, checkpoints of both kinds, texts."""
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(zoo["qwen3"], root / "source")
    words = byte_tokenizer()
    words.save_pretrained(root / "source")
    redepth.convert(root / "source", root / "plain", core="2:4")
    words.chat_template = TEMPLATE
    words.save_pretrained(root / "source")
    redepth.convert(root / "source", root / "checkpoint", core="2:4")
    griffin = RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3
    )
    RecurrentGemmaForCausalLM(griffin).save_pretrained(root / "griffin")
    words.save_pretrained(root / "griffin")
    (root / "texts").mkdir()
    (root / "texts" / "good.jsonl").write_text('{"text": "over and over and over and over"}\n' * 30)
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    return root


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def run(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a case's words on copies of what it names, and gives the exit code and the lines of standard error."""

    def run(one: Case) -> tuple[int, list[str]]:
        named = " ".join(one.words)
        for part in house.iterdir():
            if f"{{{part.name}}}" in named:
                shutil.copytree(part, tmp_path / part.name) if part.is_dir() else shutil.copy(part, tmp_path)
        if one.spoil is not None:
            one.spoil(tmp_path)
        before = tree(tmp_path)
        places = {name: str(tmp_path / name) for name in ("source", "checkpoint", "plain", "griffin", "texts", "empty")}
        places |= {"root": str(tmp_path), "out": str(tmp_path / "out"), "file": str(tmp_path / "file")}
        words = [word.format(**places) for word in one.words]
        said = iter(["hello", "/quit"])
        monkeypatch.setattr("sys.argv", ["redepth", *words])
        monkeypatch.setattr("builtins.input", lambda prompt: next(said))
        # Gathering Python's own documentation takes seconds, and no case is about it.
        monkeypatch.setattr("redepth.surgery.verify.python_docs", lambda held_out: ["depth after depth. " * 40])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert tree(tmp_path) == before
        return stop.value.code, lines

    return run


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line(run, name: str) -> None:
    code, lines = run(CASES[name])
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("redepth: ")
    assert CASES[name].says.lower() in lines[0].lower()


WRITERS = {
    "convert": CONVERT,
    "new": "new {out} -q",
    "verify": "verify {checkpoint} --against {source} -q",
    "calibrate": "calibrate {checkpoint} -q --data {texts}/good.jsonl --rows 2 --sequence-length 16 --most-steps 3",
    "convert again": "convert {checkpoint} {out} -q",
}


# Commands that write weights fail at any size; what the others write is small.
FULL_AT = {command: (0, 300) if command in ("verify", "calibrate") else (0, 300, 3_000, 30_000) for command in WRITERS}


@pytest.mark.parametrize(("command", "size"), [(command, size) for command, sizes in FULL_AT.items() for size in sizes])
def test_a_full_disk_ends_in_one_line(run, command: str, size: int) -> None:
    """No file can grow beyond `size` bytes."""

    def fill(root: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    one = case(WRITERS[command], "", fill)
    try:
        code, lines = run(one)
    finally:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert (code, len(lines)) == (2, 1), lines


@pytest.mark.parametrize("command", [*WRITERS, "heal"])
def test_a_folder_that_can_not_be_written_is_named(run, tmp_path: Path, monkeypatch, command: str) -> None:
    line = WRITERS.get(command, HEAL)
    make = os.mkdir

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith((str(tmp_path / "out"), str(tmp_path / "checkpoint"))):
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **kwargs)

    def protect(root: Path) -> None:
        monkeypatch.setattr(os, "mkdir", refuse)

    code, lines = run(case(line, "", protect))
    assert (code, len(lines)) == (2, 1), lines
    assert str(tmp_path) in lines[0]


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 200


def test_a_bug_says_that_it_is_one(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redepth.api.read_config", lambda *args, **kwargs: 1 // 0)
    code, (line,) = run(case(LOAD, ""))
    assert code == 1
    assert "this is a bug of redepth, ZeroDivisionError" in line
    report = Path(next(word for word in line.split() if "redepth-bug-" in word).rstrip(","))
    assert "Traceback" in report.read_text()
    report.unlink()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 1)])
def test_interrupts_and_closed_pipes_are_quiet(run, monkeypatch: pytest.MonkeyPatch, error, code: int) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("redepth.api.read_config", fail)
    assert run(case(LOAD, "")) == (code, [])
