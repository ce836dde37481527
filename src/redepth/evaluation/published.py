"""Figures that others have published, to stand beside one's own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NORMALISED, PLAIN = "acc_norm", "acc"


@dataclass(frozen=True)
class PublishedRow:
    """
    Attributes:
        depth: `r=4`; empty for a model without a loop.
        per_cent: in the order of the table's tasks.
    """

    model: str
    depth: str
    per_cent: tuple[float, ...]


@dataclass(frozen=True)
class PublishedTable:
    """
    Attributes:
        source: where the figures stand.
        metrics: by task of lm-eval, the metric that was published.
    """

    source: str
    metrics: Mapping[str, str]
    rows: tuple[PublishedRow, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Its tables of mathematics give two figures an entry, in an order that its caption and its text disagree on; they are left
# out here.
HUGINN = PublishedTable(
    "Geiping et al. 2025, arXiv:2502.05171v2, table 1",
    {
        "arc_easy": NORMALISED,
        "arc_challenge": NORMALISED,
        "hellaswag": NORMALISED,
        "mmlu": PLAIN,
        "openbookqa": NORMALISED,
        "piqa": NORMALISED,
        "sciq": NORMALISED,
        "winogrande": PLAIN,
    },
    (
        PublishedRow("Huginn-0125", "r=4", (49.07, 27.99, 43.46, 23.39, 28.20, 64.96, 80.00, 55.24)),
        PublishedRow("Huginn-0125", "r=8", (65.11, 35.15, 58.54, 25.29, 35.40, 73.45, 92.10, 55.64)),
        PublishedRow("Huginn-0125", "r=16", (69.49, 37.71, 64.67, 31.25, 37.60, 75.79, 93.90, 57.77)),
        PublishedRow("Huginn-0125", "r=32", (69.91, 38.23, 65.21, 31.38, 38.80, 76.22, 93.50, 59.43)),
        PublishedRow("Amber", "", (65.70, 37.20, 72.54, 26.77, 41.00, 78.73, 88.50, 63.22)),
        PublishedRow("Pythia-2.8b", "", (58.00, 32.51, 59.17, 25.05, 35.40, 73.29, 83.60, 57.85)),
        PublishedRow("Pythia-6.9b", "", (60.48, 34.64, 63.32, 25.74, 37.20, 75.79, 82.90, 61.40)),
        PublishedRow("Pythia-12b", "", (63.22, 34.64, 66.72, 24.01, 35.40, 75.84, 84.40, 63.06)),
        PublishedRow("OLMo-1B", "", (57.28, 30.72, 63.00, 24.33, 36.40, 75.24, 78.70, 59.19)),
        PublishedRow("OLMo-7B", "", (68.81, 40.27, 75.52, 28.39, 42.20, 80.03, 88.50, 67.09)),
        PublishedRow("OLMo-7B-0424", "", (75.13, 45.05, 77.24, 47.46, 41.60, 80.09, 96.00, 68.19)),
        PublishedRow("OLMo-7B-0724", "", (74.28, 43.43, 77.76, 50.18, 41.60, 80.69, 95.70, 67.17)),
        PublishedRow("OLMo-2-1124-7B", "", (82.79, 57.42, 80.50, 60.56, 46.20, 81.18, 96.40, 74.74)),
    ),
)
