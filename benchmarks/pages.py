"""Measured tables inside the pages of docs/, between two comments that name the benchmark."""

from pathlib import Path

END = "<!-- end of the measured table -->"


def replace_table(page: Path, benchmark: str, table: str) -> None:
    """Put `table` between the page's comments for `benchmark`, the name of its file.

    Raises:
        SystemExit: for a page without them.
    """
    begin = f"<!-- measured by benchmarks/{benchmark} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise SystemExit(f"{page} has no place for the table; put {begin} and {END} into it")
    page.write_text(f"{before}{begin}\n{table}\n{END}{after}", encoding="utf-8")
