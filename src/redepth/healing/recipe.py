"""What a healing run does: one table of keys, defaults and meanings, filled by a YAML file and then by flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from redepth.data.source import PYTHON_DOCS, DataSource, is_task
from redepth.errors import RedepthError, first_line, one_line

DepthSampling = Literal["log-normal-poisson", "fixed", "difficulty", "up-to-difficulty", "earned"]
Curve = Literal["constant", "linear", "one-minus-sqrt"]
Group = Literal["prelude", "core", "coda"]
DEEPEST = 1024  # steps, in every key that counts them
Table = TypeVar("Table", bound=BaseModel)


class Phase(BaseModel):
    """One stretch of the run, with data of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    share: float = Field(gt=0, le=1, description="share of the optimiser steps")
    data: str | tuple[DataSource, ...] = Field(description="a source, or a mixture")


class Stage(BaseModel):
    """One stretch of the run, with its own limit on how hard problems are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(gt=0, le=1, description="share of the optimiser steps")
    difficulty: int = Field(ge=0, description="of the hardest problems")


class HealRecipe(BaseModel):
    """Every key of the section `heal`; each field says what it means, here and in `redepth heal --help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str | tuple[DataSource, ...] = Field(
        "python-docs",
        description="python-docs, a .txt, .jsonl, .json or .parquet file, a datasets id, or task:NAME?option=value; in YAML "
        "also a list of sources",
    )
    phases: tuple[Phase, ...] = Field((), description="stretches of the run with data of their own, instead of data")
    text_column: str = Field("text", description="column of jsonl, parquet and hub data that holds the text")
    license: str | None = Field(None, description="the data's licence, where it has no column `license`")
    validation: str | None = Field(None, description="held-out text; the data's first documents by default")
    separate_documents: bool = Field(
        True, description="packed documents do not see each other: attention and positions restart with each of them"
    )
    questions: int = Field(8, ge=1, description="questions in each text of a task")
    stages: tuple[Stage, ...] = Field((), description="stretches of the run by the difficulty of a task's problems")
    answer_weight: float = Field(1.0, gt=0, description="of a task's answer token in the loss, beside a token of text")
    sequence_length: int = Field(512, ge=8, description="tokens in a row")
    batch_size: int = Field(8, ge=1, description="rows in an optimiser step, over all processes")
    micro_batch_size: int = Field(4, ge=1, description="largest number of rows in a process's memory at once")
    max_steps: int = Field(500, ge=1, le=10**9, description="optimiser steps")
    max_minutes: float | None = Field(
        None, gt=0, description="end after this time if that comes first; schedules then run on time"
    )

    optimizer: str = Field(
        "adamw", description="adamw; muon (matrices; AdamW for the rest); or a name that Trainer's optim takes"
    )
    learning_rate: float = Field(5e-5, gt=0, description="AdamW's rate")
    muon_learning_rate: float = Field(1e-3, gt=0, description="Muon's rate")
    adapter_rate_factor: float = Field(1.0, gt=0, description="the adapter's rate, in AdamW's rates")
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="how long AdamW remembers the size of gradients; short runs may want 0.95"
    )
    weight_decay: float = Field(0.0, ge=0, description="of the optimiser")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the run over which the rate rises")
    decay: float = Field(0.3, ge=0, le=1, description="share of the run over which the rate falls")

    mean_recurrence: float = Field(4.0, ge=1, le=DEEPEST, description="mean of the sampled number of steps at the end")
    depth_sampling: DepthSampling = Field(
        "log-normal-poisson",
        description="how a step's depth is drawn around the mean; fixed runs the mean itself; difficulty runs as many steps as "
        "the stage's hardest problems need, and steps_beyond more; up-to-difficulty draws evenly up to there; earned draws "
        "up to a depth that grows by one whenever the loss of the answers there is below learned_loss",
    )
    steps_beyond: int = Field(2, ge=0, description="steps past what the hardest problems need, so that more don't hurt")
    learned_loss: float = Field(0.25, gt=0, description="nats an answer at which earned goes one step deeper")
    newest_share: float = Field(0.4, ge=0, lt=1, description="under earned, how often the newest depth is run itself")
    supervision: Literal["last", "every-step", "sampled-steps"] = Field(
        "last",
        description="which steps' predictions have a loss: the last, each that carries a gradient, or the last "
        "supervised_steps of them",
    )
    supervised_steps: int = Field(2, ge=1, description="steps in a row that sampled-steps asks")
    step_targets: Literal["answer", "own-result"] = Field(
        "answer", description="a supervised step's label: the right answer, or the task's intermediate result after it"
    )
    step_weight_growth: float = Field(
        1.0, gt=0, description="a supervised step's weight, in the weights of the one before"
    )
    curriculum: Curve = Field(
        "one-minus-sqrt", description="how the mean reaches its value: constant, linear, one-minus-sqrt"
    )
    curriculum_start: float = Field(1.0, ge=1, description="the mean at the start")
    curriculum_fraction: float = Field(0.5, gt=0, le=1, description="share of the run after which the mean stays")
    backprop_depth: int = Field(8, ge=1, le=DEEPEST, description="how many of the last steps carry a gradient")
    backprop_curriculum: Curve = Field("constant", description="how that number reaches its value, as for the mean")
    backprop_start: int = Field(1, ge=1, description="that number at the start")
    backprop_fraction: float = Field(0.5, gt=0, le=1, description="share of the run after which it stays")

    train: Literal["all", "core", "adapter", "core+adapter", "lora"] = Field(
        "all", description="which parameters train; lora: low-rank updates, and the adapter in full"
    )
    lora_groups: tuple[Group, ...] = Field(("core",), description="groups of layers that get LoRA")
    lora_rank: int = Field(16, ge=1, description="rank of LoRA's updates")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA's updates are scaled by alpha / rank")
    distill: float = Field(
        0.0, ge=0, le=1, description="weight of the teacher's KL in the loss; the rest is the text's"
    )
    temperature: float = Field(1.0, gt=0, description="softens teacher and student in the KL")
    teacher: str | None = Field(None, description="model to distil from; the source of the conversion by default")

    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto is bf16 where the processor has it")
    activation_checkpointing: Literal["none", "layer", "step"] = Field(
        "none", description="what is computed again in the backward pass, to save memory"
    )
    compile: bool = Field(False, description="torch.compile for each layer")
    spike_factor: float = Field(
        10.0, gt=1, description="a step is skipped where loss or gradient norm exceeds its running median times this"
    )
    max_skipped: int = Field(10, ge=1, description="steps skipped in a row that end the run")
    eval_depths: tuple[int, ...] = Field((1, 2, 4, 8, 16), description="numbers of steps of the held-out losses")
    eval_rows: int = Field(16, ge=1, description="held-out rows")
    eval_every: int | None = Field(None, ge=1, description="optimiser steps between held-out losses during the run")
    save_every: int = Field(100, ge=1, description="optimiser steps between checkpoints to resume from")
    report_to: str = Field(
        "auto", description="trackers, comma-separated, as Trainer's report_to; auto is TensorBoard where installed"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data order, the sampled depths and the noise")

    @field_validator("eval_depths", "lora_groups", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Flags give lists as `1,4,16`."""
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "HealRecipe":
        if self.phases:
            if "data" in self.model_fields_set:
                raise ValueError("give either data or phases, not both")
            if abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
                raise ValueError(f"the shares of the phases add up to {sum(p.share for p in self.phases):g}, not 1")
            if self.max_minutes is not None:
                raise ValueError("phases are shares of max_steps, so they can't go with max_minutes")
        if self.stages:
            if abs(sum(stage.share for stage in self.stages) - 1) > 1e-6:
                raise ValueError(f"the shares of the stages add up to {sum(s.share for s in self.stages):g}, not 1")
            if self.max_minutes is not None:
                raise ValueError("stages are shares of max_steps, so they can't go with max_minutes")
        specs = [source.data for _, sources in self.timetable() for source in sources]
        if not any(map(is_task, specs)):
            for key in ("stages", "step_targets", "questions", "answer_weight"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is for tasks, but no data is one; name it as task:NAME")
            if self.depth_sampling not in ("log-normal-poisson", "fixed"):
                raise ValueError(f"depth_sampling {self.depth_sampling} is for tasks, but no data is one")
        elif not self.separate_documents:
            raise ValueError("problems of a task must not see each other; leave separate_documents on")
        if self.adapter_rate_factor != 1 and self.optimizer == "muon":
            raise ValueError("adapter_rate_factor is AdamW's, but the optimizer is muon")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if not self.eval_depths or min(self.eval_depths) < 1 or max(self.eval_depths) > DEEPEST:
            raise ValueError(f"eval_depths needs at least one number, none below 1 or above {DEEPEST}")
        names = {source.data for _, sources in self.timetable() for source in sources}
        if not names:
            raise ValueError("data names no source")
        if self.validation in names - {PYTHON_DOCS}:
            raise ValueError(f"validation {self.validation!r} is trained on; name other text, or leave it out")
        return self

    def seed_of(self, number: int) -> int:
        """The seed of one step's or row's own draw, so that it does not depend on what was drawn before."""
        return self.seed * 1_000_003 + number

    def timetable(self) -> list[tuple[float, tuple[DataSource, ...]]]:
        """(end as a share of the run, sources) of each phase; a run without phases has one."""
        table, end = [], 0.0
        for share, data in [(phase.share, phase.data) for phase in self.phases] or [(1.0, self.data)]:
            end += share
            sources = (DataSource(data=data),) if isinstance(data, str) else data
            filled = {"text_column": self.text_column, "license": self.license}
            table.append(
                (
                    end,
                    tuple(
                        source.model_copy(
                            update={key: value for key, value in filled.items() if getattr(source, key) is None}
                        )
                        for source in sources
                    ),
                )
            )
        return table

    def stage_ends(self) -> list[tuple[float, int | None]]:
        """(end as a share of the run, difficulty of the hardest problems) of each stage; None without a limit."""
        table: list[tuple[float, int | None]] = []
        end = 0.0
        for stage in self.stages:
            end += stage.share
            table.append((end, stage.difficulty))
        return table or [(1.0, None)]

    @property
    def data_names(self) -> str:
        """The sources by name, for records and cards."""
        return ", ".join(dict.fromkeys(source.data for _, sources in self.timetable() for source in sources))


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The sections of a recipe file.

    Raises:
        RedepthError: for a missing file, or one that is not a table.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RedepthError(f"recipe {file} does not exist; see recipes/ for examples") from None
    except OSError as error:
        raise RedepthError(f"recipe {file} can't be read: {error.strerror or first_line(error)}") from None
    except UnicodeDecodeError:
        raise RedepthError(f"recipe {file} is not UTF-8; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 13 is a ValueError
        raise RedepthError(f"recipe {file} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RedepthError(f"recipe {file} has no sections; see recipes/ for examples")
    return content


def fill(table: type[Table], values: Any, where: str) -> Table:
    """A recipe table from what a file holds.

    Raises:
        RedepthError: in one line, naming `where`, the key and its value.
    """
    try:
        return table.model_validate(values)
    except ValidationError as error:
        # Of a union's members, the one whose error lies deepest in the value is the one that was meant.
        first = max(error.errors(), key=lambda entry: len(entry["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise RedepthError(f"{where}: {said}") from None
        key = ".".join(str(part) for part in first["loc"] if part not in ("str", "tuple[DataSource, ...]"))
        raise RedepthError(f"{where}: {key} = {shortened(first['input'])}: {said}") from None


def shortened(value: Any, most: int = 80) -> str:
    """How an error shows a value, which may be a whole document."""
    shown = repr(value)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def read_heal_recipe(file: str | Path | None = None, **changes: Any) -> HealRecipe:
    """The recipe in the `heal` section of a YAML file, with `changes` (those that are not None) laid over it.

    Raises:
        RedepthError: for a missing file or section, an unknown key, or a value that does not fit.
    """
    if file is None:
        return fill(HealRecipe, laid_over({}, changes), "healing recipe")
    runs = heal_runs(read_yaml(file), file)
    if len(runs) > 1:
        raise RedepthError(
            f"recipe {file} has {len(runs)} runs in its section 'heal'; redepth retrofit does them in turn"
        )
    return fill(HealRecipe, laid_over(runs[0], changes), str(file))


def heal_runs(content: dict[str, Any], file: str | Path) -> list[dict[str, Any]]:
    """The section `heal` of a recipe: the table of one run, or a list of them, to be done in turn.

    Raises:
        RedepthError: where there is none.
    """
    section = content.get("heal")
    runs: list[Any] = section if isinstance(section, list) else [section]
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise RedepthError(f"recipe {file} has no section 'heal'; put the healing settings under it")
    return runs


def laid_over(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with those of `changes` that are not None; new data takes the place of phases."""
    given = {key: value for key, value in changes.items() if value is not None}
    if "data" in given:
        values = {key: value for key, value in values.items() if key != "phases"}
    return values | given
