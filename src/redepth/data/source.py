"""Where text comes from, as a recipe says it."""

from pydantic import BaseModel, ConfigDict, Field

PYTHON_DOCS = "python-docs"
TASK_PREFIX = "task:"


def is_task(data: str) -> bool:
    """Whether a name of data is a task's spec."""
    return data.startswith(TASK_PREFIX)


class DataSource(BaseModel):
    """One source of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="python-docs, a .txt, .jsonl, .json or .parquet file, a datasets id, or task:NAME?…")
    weight: float = Field(1.0, gt=0, description="share of the training rows, relative to the other sources")
    text_column: str | None = Field(None, description="column that holds the text; the recipe's by default")
    license: str | None = Field(None, description="its licence, where the data has no column `license`")
    scratchpad: bool = Field(False, description="of a task: intermediate results are written out as text")
