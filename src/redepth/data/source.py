"""Where text comes from, as a recipe says it."""

from pydantic import BaseModel, ConfigDict, Field

PYTHON_DOCS = "python-docs"


class DataSource(BaseModel):
    """One source of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="python-docs, a .txt, .jsonl, .json or .parquet file, a datasets id, or task:NAME?…")
    weight: float = Field(1.0, gt=0, description="share of the training rows, relative to the other sources")
    text_column: str | None = Field(None, description="column that holds the text; the recipe's by default")
    license: str | None = Field(None, description="its licence, where the data has no column `license`")
    scratchpad: bool = Field(False, description="of a task: intermediate results are written out as text")
