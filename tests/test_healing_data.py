"""Healing: packing, mixtures, phases, licences, and going on at any row."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import redepth
from redepth.data.rows import (
    DataSource,
    Place,
    TrainingRows,
    licenses_of,
    rows_of,
    training_and_held_out,
)
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


def test_licences_are_kept(tmp_path: Path) -> None:
    parquet = tmp_path / "c.parquet"
    Dataset.from_dict({"text": ["c" * 40] * 4, "license": ["cc0", "mit", "mit", None]}).to_parquet(parquet)
    assert licenses_of(DataSource(data=str(parquet))) == {"mit": 2, "cc0": 1}
    assert licenses_of(DataSource(data=write_letters(tmp_path, "a"))) == {"mit": 10}
    (tmp_path / "d.txt").write_text("d" * 50)
    assert licenses_of(DataSource(data=str(tmp_path / "d.txt"), license="cc-by-4.0")) == {"cc-by-4.0": None}
    assert licenses_of(DataSource(data=str(tmp_path / "d.txt"))) == {"not stated": None}


def test_sources_reach_the_record_and_the_card(zoo, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(zoo["llama"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    redepth.convert(tmp_path / "source", tmp_path / "out", core="2:4")
    recipe = mixture(tmp_path, **SHORT | {"max_steps": 2})
    healing = heal(tmp_path / "out", recipe)
    assert [source["licenses"] for source in healing.sources] == [{"mit": 10}, {"mit": 3}]
    card = (tmp_path / "out" / "README.md").read_text()
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
