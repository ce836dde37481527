"""The model card of a recurrent checkpoint, in the hub's format, made from the records in its folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from .folder import (
    CARD_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    HEALING_FILE,
    QUANTIZATION_FILE,
    RECIPE_FILE,
    VERIFICATION_FILE,
    read_json,
    read_recipe,
)

# What the card says of a healing recipe; recipe.yaml has all of it.
RECIPE_KEYS = ("max_steps", "batch_size", "sequence_length", "optimizer", "learning_rate", "mean_recurrence", "train")

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Depth is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, num_steps={num_steps}, max_new_tokens=40)[0]))
```"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plan_section(convert: dict[str, Any], base_model: str) -> str:
    commit = f" (commit `{convert['revision']}`)" if convert.get("revision") else ""
    rows = [[group, f"`{convert[group]}`"] for group in ("prelude", "core", "coda")]
    return (
        f"Made from `{base_model}`{commit} by `redepth convert` (adapter `{convert['adapter']}`, initial state "
        f"`{convert['state']}`).\n\n" + _table(["part", "source layers"], rows)
    )


def _verification_section(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "Not verified yet; `redepth verify` compares the conversion with its source and fills in this section."
    rows = [
        [
            check["name"],
            str(check["num_steps"]),
            f"{check['mse']:.2e}",
            f"{check['largest_difference']:.2e}",
            f"{check['kl']:.2e}",
            f"{check['top1_agreement']:.2%}",
            check["verdict"],
        ]
        for check in verification["checks"]
    ]
    header = ["check", "r", "logits MSE", "largest difference", "KL (nats)", "top-1 agreement", "verdict"]
    return f"Logits in fp32 on {verification['num_tokens']} tokens of {verification['text']}.\n\n" + _table(
        header, rows
    )


def _healing_section(healing: dict[str, Any] | None, recipes: list[dict[str, Any]]) -> str:
    """Every run by itself, in order: text and recipe, losses, licences."""
    if healing is None:
        return "Not healed: the weights are the source's, only rearranged."
    runs = [*healing.get("earlier", []), healing]
    parts = []
    for number, run in enumerate(runs, 1):
        depths = list(run["loss_after"])
        rows = [
            [label, *(f"{losses[depth]:.3f}" for depth in depths)]
            for label, losses in (("before", run["loss_before"]), ("after", run["loss_after"]))
        ]
        began = f"Run {number} of {len(runs)}: healed" if len(runs) > 1 else "Healed"
        settings = recipes[number - 1] if len(recipes) == len(runs) else {}
        told = ", ".join(f"{key} {settings[key]}" for key in RECIPE_KEYS if key in settings)
        parts.append(
            f"{began} on {run['tokens']:,} tokens of {run['data']}{f' ({told})' if told else ''}. Held-out loss (nats per "
            "token) by number of steps r:\n\n"
            + _table(["", *(f"r = {depth}" for depth in depths)], rows)
            + _text_licences(run.get("sources", []))
        )
    return "\n\n".join(parts)


def _depth_section(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return "Not calibrated; `redepth calibrate` measures what each step buys and fills in this section."
    depths = [depth for depth in (1, 2, 4, 8, 16, 32) if depth <= len(profile["loss"])]
    rows = [
        ["loss (nats per token)", *(f"{profile['loss'][depth - 1]:.3f}" for depth in depths)],
        ["same pick as the deepest", *(f"{profile['agreement'][depth - 1]:.1%}" for depth in depths)],
    ]
    least, most = profile["valid_range"]
    return (
        f"Runs {profile['num_steps']} steps where none are given; sound from {least} to {most}. Measured on "
        f"{profile['tokens']:,} tokens of {profile['data']}:\n\n"
        + _table(["", *(f"r = {depth}" for depth in depths)], rows)
    )


def _evaluation_section(evaluation: dict[str, Any]) -> str:
    rows = [[f"r = {depth}", f"{loss:.3f}"] for depth, loss in evaluation["loss"].items()]
    if evaluation["source_loss"] is not None:
        rows.append(["the source", f"{evaluation['source_loss']:.3f}"])
    return f"Loss on {evaluation['tokens']:,} tokens, {evaluation['data']}, in nats per token:\n\n" + _table(
        ["steps", "loss"], rows
    )


def _quantization_section(found: dict[str, Any]) -> str:
    rows = [
        [
            f"r = {depth}",
            f"{at['loss_before']:.3f}",
            f"{at['loss']:.3f}",
            f"{at['kl']:.1e}",
            f"{at['top1_agreement']:.1%}",
        ]
        for depth, at in found["depths"].items()
    ]
    return (
        f"Weights in {found['bits']} bits, {found['kind']}, in {found['groups']}, by `redepth quantize`. Beside the same "
        f"weights unquantised, in fp32, on {found['tokens']:,} tokens of {found['data']}:\n\n"
        + _table(["steps", "loss before", "loss", "KL (nats)", "same pick"], rows)
        + "\n\nThe figures of the other sections are of the weights before."
    )


def _text_licences(sources: list[dict[str, Any]]) -> str:
    """What the model was healed on, source by source, with its licences."""

    def told(licenses: dict[str, int | None]) -> str:
        return ", ".join(
            name if documents is None else f"{name} ({documents:,} documents)" for name, documents in licenses.items()
        )

    rows = {source["data"]: [f"`{source['data']}`", told(source["licenses"])] for source in sources}
    return "\n\n" + _table(["training text", "licence"], list(rows.values())) if rows else ""


def write_card(folder: Path, name: str | None = None, base: Path | None = None, outdated: Iterable[str] = ()) -> None:
    """Write README.md from the folder's config, recipe, verification, healing and evaluation records.

    The card of a checkpoint that redepth did not convert is its owner's and stays as it is.

    Args:
        name: what the folder will be called, where it is not called so yet.
        base: the checkpoint that `folder` holds new files for; what `folder` lacks is read there.
        outdated: names of records in `base` that hold no longer.
    """

    def holder(file: str) -> Path:
        lacks = not (folder / file).exists() and file not in outdated
        return base if base is not None and lacks else folder

    def record(file: str) -> Any | None:
        return read_json(holder(file) / file)

    recipe = read_recipe(holder(RECIPE_FILE))
    if "convert" not in recipe:
        return
    origin = {"base_model": None, "license": None} | recipe.get("source", {})
    heal = recipe.get("heal", [])
    config = AutoConfig.from_pretrained(holder(CONFIG_FILE), trust_remote_code=False)
    base_model = origin["base_model"] or Path(recipe["convert"]["source"]).name
    data = ModelCardData(
        license=origin["license"] or "unknown",
        base_model=origin["base_model"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["redepth", "recurrent-depth", "huginn_raven"],
    )
    licence = origin["license"] or "not stated by the source; ask its owner before you share this"
    sections = [
        f"# {base_model}, depth-recurrent",
        "A language model that loops its core as often as you ask: `num_steps` is the number of passes.",
        USAGE.format(name=name or (base or folder).resolve().name, num_steps=config.default_num_steps),
        "## Plan\n\n" + _plan_section(recipe["convert"], base_model),
        "## Verification\n\n" + _verification_section(record(VERIFICATION_FILE)),
        "## Healing\n\n" + _healing_section(record(HEALING_FILE), heal if isinstance(heal, list) else [heal]),
        "## Depth\n\n" + _depth_section(config.depth_profile),
        f"## Licence\n\nThe source's: {licence}.",
    ]
    quantization = record(QUANTIZATION_FILE)
    if quantization is not None:
        sections.insert(-1, "## Quantisation\n\n" + _quantization_section(quantization))
    evaluation = record(EVALUATION_FILE)
    if evaluation is not None:
        sections.insert(-1, "## Evaluation\n\n" + _evaluation_section(evaluation))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(folder / CARD_FILE)
