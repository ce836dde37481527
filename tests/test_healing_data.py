"""Healing: packing, mixtures, phases, licences, and going on at any row."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import redepth
from redepth.data.mixture import TrainingRows, training_and_held_out
from redepth.data.rows import Place, rows_of
from redepth.data.survey import count_licenses
from redepth.data.text import READERS, open_text
from redepth.errors import RedepthError
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe, read_heal_recipe
from redepth.surgery.convert import plan_conversion
from tests.test_healing import SHORT, byte_tokenizer
from tests.zoo import random_ids


def write_letters(folder: Path, letter: str, documents: int = 30, longest: int = 40) -> str:
    """Documents of one letter, of many lengths; with a licence for every third."""
    file = folder / f"{letter}.jsonl"
    rows = [
        {"text": letter * (1 + 7 * number % longest)} | ({"license": "mit"} if number % 3 == 0 else {})
        for number in range(documents)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def take(rows: TrainingRows, count: int) -> list[dict[str, torch.Tensor]]:
    return [row for row, _ in zip(rows, range(count), strict=False)]


def letters_of(row: dict[str, torch.Tensor]) -> set[str]:
    return set(byte_tokenizer().decode(row["input_ids"]).replace("</s>", ""))


def test_packed_row_has_the_loss_of_its_documents(family: str, source: Path) -> None:
    """Attention and positions restart with each document, in every family, windows and all."""
    model = plan_conversion(source).model().train()
    lengths = (5, 11, 1, 9)
    documents = [random_ids(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = torch.cat(documents, dim=1)
    labels = packed.masked_fill(positions == 0, -100)
    together = model(packed, labels=labels, position_ids=positions, num_steps=2, loss_only=True, use_cache=False)
    alone = sum(
        (length - 1) * model(ids, labels=ids, num_steps=2, use_cache=False).loss
        for length, ids in zip(lengths, documents, strict=True)
        if length > 1
    )
    assert together.loss.item() == pytest.approx(alone.item() / (packed.numel() - len(lengths)), abs=1e-5)
    running_on = model(packed, labels=labels, num_steps=2, loss_only=True, use_cache=False)
    assert abs(running_on.loss.item() - together.loss.item()) > 1e-4


def test_rows_say_where_documents_begin(tmp_path: Path) -> None:
    recipe = HealRecipe(data=write_letters(tmp_path, "a"), sequence_length=16, eval_rows=1)
    rows, _ = training_and_held_out(byte_tokenizer(), recipe)
    for row in take(rows, 20):
        ids, positions = row["input_ids"].tolist(), row["position_ids"].tolist()
        assert positions[0] == 0
        for place in range(1, 16):
            assert positions[place] == (0 if ids[place - 1] == 2 else positions[place - 1] + 1)
        assert torch.equal(row["labels"] == -100, row["position_ids"] == 0)
    joined, _ = training_and_held_out(byte_tokenizer(), recipe.model_copy(update={"separate_documents": False}))
    assert set(take(joined, 1)[0]) == {"input_ids", "labels"}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(3, 90), max_size=30), max_size=12), st.integers(1, 9), st.integers(0, 30))
def test_rows_go_on_from_any_place(documents: list[list[int]], length: int, stop: int) -> None:
    tagged = [(Place(0, number), ids) for number, ids in enumerate(documents)]
    whole = list(rows_of(iter(tagged), length))
    flat = [token for ids in documents for token in ids]
    assert [token for ids, _, _ in whole for token in ids] == flat[: len(flat) // length * length]
    if stop < len(whole):
        place = whole[stop][2]
        rest = [
            (place, ids) if number == place.document else (Place(0, number), ids)
            for number, ids in enumerate(documents)
            if number >= place.document
        ]
        assert list(rows_of(iter(rest), length)) == whole[stop + 1 :]


def mixture(tmp_path: Path, **changes: object) -> HealRecipe:
    a, b = write_letters(tmp_path, "a"), write_letters(tmp_path, "b", documents=9)
    values = {"data": [{"data": a, "weight": 3}, {"data": b}], "sequence_length": 8, "eval_rows": 2}
    return HealRecipe(**values | {"max_steps": 100, "batch_size": 4} | changes)


def test_mixture_follows_its_weights(tmp_path: Path) -> None:
    rows, held_out = training_and_held_out(byte_tokenizer(), mixture(tmp_path))
    count = Counter("".join(sorted(letters_of(row))) for row in take(rows, 400))
    assert set(count) == {"a", "b"}
    assert 0.68 < count["a"] / 400 < 0.82
    assert [set(byte_tokenizer().decode(row).replace("</s>", "")) for row in held_out] == [{"a"}, {"b"}]


def test_phases_follow_each_other(tmp_path: Path) -> None:
    a, b, c = (write_letters(tmp_path, letter) for letter in "abc")
    phases = [{"share": 0.25, "data": a}, {"share": 0.75, "data": [{"data": b}, {"data": c}]}]
    recipe = HealRecipe(phases=phases, max_steps=10, batch_size=4, sequence_length=8, eval_rows=3)
    rows, _ = training_and_held_out(byte_tokenizer(), recipe)
    seen = ["".join(letters_of(row)) for row in take(rows, 60)]
    assert set(seen[:10]) == {"a"}
    assert set(seen[10:40]) == {"b", "c"} == set(seen[40:])
    assert recipe.data_names == f"{a}, {b}, {c}"


@pytest.mark.parametrize("stop", [1, 37, 250])
def test_rows_go_on_exactly(tmp_path: Path, stop: int) -> None:
    """Over several passes of both sources: 9 documents are soon used up."""
    recipe = mixture(tmp_path)
    unbroken = take(training_and_held_out(byte_tokenizer(), recipe)[0], 300)
    first, _ = training_and_held_out(byte_tokenizer(), recipe)
    take(first, stop + 5)  # a loader reads ahead
    position = json.loads(json.dumps(first.position(stop)))
    second, _ = training_and_held_out(byte_tokenizer(), recipe)
    second.go_to(position)
    for got, wanted in zip(take(second, 300 - stop), unbroken[stop:], strict=True):
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.fixture
def checkpoint(zoo, tmp_path: Path) -> Path:
    shutil.copytree(zoo["llama"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    redepth.convert(tmp_path / "source", tmp_path / "out", core="2:4")
    return tmp_path / "out"


def test_licences_are_kept(tmp_path: Path) -> None:
    parquet = tmp_path / "c.parquet"
    Dataset.from_dict({"text": ["c" * 40] * 4, "license": ["cc0", "mit", "mit", None]}).to_parquet(parquet)
    assert count_licenses(str(parquet), "text", None) == {"mit": 2, "cc0": 1, "not stated": 1}
    assert count_licenses(str(parquet), "text", "mit") == {"mit": 3, "cc0": 1}
    assert count_licenses(write_letters(tmp_path, "a"), "text", None) == {"not stated": 20, "mit": 10}
    text = tmp_path / "d.txt"
    text.write_text("d" * 50)
    assert count_licenses(str(text), "text", "cc-by-4.0") == {"cc-by-4.0": None}
    assert count_licenses(str(text), "text", None) == {"not stated": None}


def test_sources_reach_the_record_and_the_card(checkpoint: Path, tmp_path: Path) -> None:
    recipe = mixture(tmp_path, **SHORT | {"max_steps": 2})
    healing = heal(checkpoint, recipe)
    assert [source["licenses"] for source in healing.sources] == [
        {"not stated": 20, "mit": 10},
        {"not stated": 6, "mit": 3},
    ]
    card = (checkpoint / "README.md").read_text()
    assert "a.jsonl" in card and "mit (10 documents)" in card


def test_mistakes_in_mixtures_and_phases(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for content, message in (
        ("heal: {phases: [{share: 0.5, data: a.txt}]}", "add up to 0.5, not 1"),
        ("heal: {data: a.txt, phases: [{share: 1, data: a.txt}]}", "either data or phases"),
        ("heal: {max_minutes: 3, phases: [{share: 1, data: a.txt}]}", "max_minutes"),
        ("heal: {data: [{data: a.txt, weight: 0}]}", "weight = 0"),
        ("heal: {data: [{file: a.txt}]}", "data.0.(data|file)"),
    ):
        file.write_text(content)
        with pytest.raises(RedepthError, match=message):
            read_heal_recipe(file)
    file.write_text("heal: {phases: [{share: 1, data: a.txt}]}")
    assert read_heal_recipe(file, data="b.txt").data == "b.txt"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    recipe = HealRecipe(data=str(empty), validation=write_letters(tmp_path, "a"), sequence_length=8)
    with pytest.raises(RedepthError, match="is empty"):
        take(training_and_held_out(byte_tokenizer(), recipe)[0], 1)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(RedepthError, match="can't be read"):
        training_and_held_out(byte_tokenizer(), HealRecipe(data=str(broken)))


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD * 3 + b'{"text": "cut', "line 4: not valid JSON"),
        ("a.jsonl", GOOD + b"\n" + b"[1]\n", "line 3: a list instead of a table"),
        ("a.jsonl", GOOD + b'{"text": null}\n', "line 2: text is null"),
        ("a.jsonl", GOOD + b'{"text": 7}\n', "line 2: text is a int"),
        ("a.jsonl", GOOD + b'{"body": "x"}\n', "line 2: no column 'text', only body"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "a\\ud800"}\n', "line 2: text has half a surrogate pair at character 1"),
        ("a.jsonl", GOOD + b"[" * 100_000, "line 2: not valid JSON"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": []}]', "record 2: text is a list"),
        ("a.json", b"[1, 2", "line 1: not valid JSON"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.parquet", b"PAR1 and no more", "can't be read"),
    ],
)
def test_bad_rows_are_found_and_named_before_the_run(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """The last row as well, which training might never reach; nothing is left behind."""
    file = tmp_path / name
    file.write_bytes(content)
    before = sorted(checkpoint.iterdir())
    recipe = HealRecipe(**SHORT | {"data": str(file), "validation": write_letters(tmp_path, "v")})
    with pytest.raises(RedepthError, match=message) as said:
        heal(checkpoint, recipe)
    assert name in str(said.value) and "\n" not in str(said.value)
    assert sorted(checkpoint.iterdir()) == before


def test_bad_parquet_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["a"] * 300 + [None], "n": list(range(301))}).to_parquet(file)
    with pytest.raises(RedepthError, match="row 301: text is null"):
        count_licenses(str(file), "text", None)
    with pytest.raises(RedepthError, match="row 1: n is a int"):
        open_text(str(file), "n")
    with pytest.raises(RedepthError, match="row 1: no column 'body', only text, n"):
        open_text(str(file), "body")


@pytest.mark.parametrize("ending", READERS)
def test_byte_order_marks_are_no_text(tmp_path: Path, ending: str) -> None:
    """Some editors begin every UTF-8 file with one."""
    file = tmp_path / f"a{ending}"
    if ending == ".parquet":
        Dataset.from_dict({"text": ["b"]}).to_parquet(file)
    else:
        content = {".jsonl": '{"text": "b"}\r\n', ".json": '[{"text": "b"}]'}.get(ending, "b")
        file.write_text(content, encoding="utf-8-sig", newline="")
    assert [document["text"] for document in open_text(str(file))] == ["b"]
    assert count_licenses(str(file), "text", "mit") == {"mit": None}


def test_text_without_tokens_ends_the_reading(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "a.jsonl", byte_tokenizer()
    file.write_text('{"text": ""}\n' * 3)
    tokenizer.eos_token = None
    recipe = HealRecipe(data=str(file), validation=write_letters(tmp_path, "v"), sequence_length=8, eval_rows=1)
    with pytest.raises(RedepthError, match="a.jsonl' has no tokens"):
        take(training_and_held_out(tokenizer, recipe)[0], 1)


def test_one_source_has_one_column(tmp_path: Path) -> None:
    file = write_letters(tmp_path, "a")
    recipe = HealRecipe(data=[{"data": file}, {"data": file, "text_column": "license"}], sequence_length=8)
    with pytest.raises(RedepthError, match="two text columns, 'text' and 'license'"):
        training_and_held_out(byte_tokenizer(), recipe)
