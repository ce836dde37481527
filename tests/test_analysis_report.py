"""redepth analyze: what is written, that its figures are those of the model, and what it refuses."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

import redepth
from redepth import RedepthError
from redepth.analysis import analyze as verb
from redepth.analysis import plots
from redepth.analysis.analyze import analyze
from redepth.analysis.measure import measure_course, stretch_by_step
from redepth.analysis.summary import ATTENTION_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, verdict
from redepth.analysis.texts import Text, next_tokens
from tests.test_healing import byte_tokenizer

R = 8
PROMPTS = ["the brown fox", "<script>alert(1)</script> & $x$"]
DOCS = Path(__file__).parents[1] / "docs" / "analysis.md"


@pytest.fixture(scope="module")
def checkpoint(zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recurrent checkpoint with a tokenizer, its source beside it."""
    folder = tmp_path_factory.mktemp("analysis")
    source = folder / "source"
    source.mkdir()
    for file in zoo["llama"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    byte_tokenizer().save_pretrained(source)
    redepth.convert(source, folder / "tiny", prelude="0:2", core="2:4", coda="4:6", dtype="float32")
    return folder / "tiny"


@pytest.fixture(scope="module")
def analysis(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    out = checkpoint.parent / "seen"
    source = checkpoint.parent / "source"
    return out, analyze(checkpoint, PROMPTS, out=out, num_steps=R, compare=source)


def test_the_figures_are_those_of_plain_passes(checkpoint: Path, analysis: tuple[Path, dict[str, Any]]) -> None:
    _, summary = analysis
    model, tokenizer = redepth.load(checkpoint), byte_tokenizer()
    rows = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    tokens = sum(row.shape[1] - 1 for row in rows)
    with torch.no_grad():
        for depth in (1, 3, R):
            outputs = [model(row, num_steps=depth).logits[0, :-1] for row in rows]
            total = sum(
                F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
                for logits, row in zip(outputs, rows, strict=True)
            )
            assert summary["figures"]["loss"][depth - 1] == pytest.approx(total / tokens, abs=1e-4)
    assert sum(summary["figures"]["endings"].values()) == pytest.approx(1, abs=1e-3)
    assert summary["figures"]["tokens"] == sum(row.shape[1] for row in rows)
    assert summary["verdict"] == verdict(summary["figures"])
    # The source is what the conversion equals at one step.
    assert summary["compare"]["figures"]["loss"][0] == pytest.approx(summary["figures"]["loss"][0], abs=1e-3)


def test_tables_have_documented_columns(analysis: tuple[Path, dict[str, Any]]) -> None:
    out, summary = analysis
    docs = DOCS.read_text(encoding="utf-8")
    for name, columns in (("tokens", TOKEN_COLUMNS), ("steps", STEP_COLUMNS), ("attention", ATTENTION_COLUMNS)):
        table = pq.read_table(out / f"{name}.parquet")
        assert set(columns) <= set(table.column_names)
        for field in table.schema:
            assert field.metadata[b"description"]
            assert f"`{field.name}`" in docs or field.name.startswith("exit_"), field.name
    steps = pq.read_table(out / "steps.parquet").to_pandas()
    assert len(steps) == summary["figures"]["tokens"] * (R + 1)
    assert steps.entropy.isna().sum() == summary["figures"]["tokens"]
    means = steps[steps.step > 0].groupby("step").loss.mean().to_numpy()
    np.testing.assert_allclose(means, summary["figures"]["loss"], atol=1e-4)
    attention = pq.read_table(out / "attention.parquet").to_pandas()
    np.testing.assert_allclose(attention.groupby(["text", "layer", "step"]).probability.sum(), 1, atol=1e-5)
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["verdict"] == summary["verdict"]


class Page(HTMLParser):
    """Collects what a page would load, its anchors, and the elements left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.loads += [
            str(values[name])
            for name in ("src", "href", "xlink:href")
            if values.get(name) and not str(values[name]).startswith(("#", "data:"))
        ]
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a" and str(values.get("href")).startswith("#"):
            self.links.append(str(values["href"])[1:])


def test_the_report_needs_nothing_and_says_all(analysis: tuple[Path, dict[str, Any]]) -> None:
    out, summary = analysis
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loads == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert summary["verdict"] in text.replace("&#39;", "'")
    assert (
        text.count("<svg") == len(list((out / "pictures").glob("*.svg"))) == len(list((out / "pictures").glob("*.png")))
    )
    assert plots.INK not in text.split("</style>", 1)[1]
    assert "<script>alert" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [len(one) for one in data] == [len(byte_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]
    assert all(len(token["steps"]) == R for one in data for token in one)


def test_the_stretch_is_that_of_the_written_out_jacobian(checkpoint: Path) -> None:
    model = redepth.load(checkpoint)
    ids = [5, 6, 7]
    found = stretch_by_step(model, ids, 2, [2])[2]
    model.set_attn_implementation("eager")
    stack = model.transformer
    with torch.no_grad():
        context = stack.context(stack.embed(torch.tensor([ids])))
        embedded = stack.run_prelude(stack.embed(torch.tensor([ids])), context)
        state = stack.step(embedded, stack.initial_state(embedded, context.position_ids, None), context, 1)
    jacobian = torch.autograd.functional.jacobian(lambda s: stack.step(embedded, s, context, 2), state)
    size = state.numel()
    exact = float(torch.linalg.matrix_norm(jacobian.reshape(size, size), 2))
    assert found.largest == pytest.approx(exact, rel=0.05)
    assert found.largest <= exact * 1.001


def test_a_model_that_is_at_rest_is_seen_as_such(checkpoint: Path) -> None:
    model = redepth.load(checkpoint)
    with torch.no_grad():
        model.transformer.adapter.weight[:, : model.config.n_embd] = 0  # the state is never read
    course = measure_course(model, Text([5, 6, 7, 8], list("abcd"), next_tokens([5, 6, 7, 8])), R)
    assert (course.endings.names == "fixed point").all()
    assert (course.settled <= 1).all()
    assert (course.predictions.final_from == 1).all()
    assert not course.predictions.flips.any()
    assert (course.spread[:, 1:] < -5).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "either prompts or data"),
        ({"data": "python-docs"}, "either prompts or data"),
        ({"num_steps": 3}, "at least 7"),
        ({"prompts": ["a"]}, "has 1 tokens"),
        ({"prompts": ["a" * 500]}, "500 tokens .* 128"),
        ({"checkpoint": "source"}, "not a recurrent one"),
        ({"checkpoint": "missing"}, "does not exist"),
        ({"compare": "missing"}, "no readable configuration"),
    ],
)
def test_bad_input_ends_in_one_line_before_any_compute(
    checkpoint: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "load", lambda *_: pytest.fail("weights were read"))
    out = checkpoint.parent / "never"
    given: dict[str, Any] = {"checkpoint": "tiny", "prompts": ["ab"], "out": out, "num_steps": R} | changes
    for name in ("checkpoint", "compare"):
        if given.get(name) is not None:
            given[name] = checkpoint.parent / given[name]
    with pytest.raises(RedepthError, match=said) as raised:
        analyze(given.pop("checkpoint"), **given)
    assert "\n" not in str(raised.value)
    assert not out.exists()


def test_pictures_do_not_depend_on_the_user_s_style(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"text.color": "red", "axes.labelcolor": "red"}):
        figure = plots.plot_exits({"kl": np.array([2, 3, 3])}, 4)
        plots.save_picture(figure, tmp_path / "exits")
    svg = (tmp_path / "exits.svg").read_text(encoding="utf-8")
    assert plots.INK in svg
    assert "#ff0000" not in svg
    assert "currentColor" in plots.inline_svg(figure, "exits")


def test_a_line_that_only_one_panel_has_is_named() -> None:
    figure = plots.plot_by_step(
        {"loss": {"looped": [2.0, 1.0], "static": [1.5, 1.5]}, "agreement": {"looped": [0.5, 1.0]}}
    )
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["looped", "static"]
