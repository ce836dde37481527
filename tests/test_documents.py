"""Several documents in a row, as packed data has them: each equals its solo run, with and without a cache or a mask."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LENGTHS = (5, 1, 7, 3)
NAMES = ("llama", "gemma2", "gemma3", "griffin", "hawk", "smollm3")


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    return {name: plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="blend:0.4").model() for name in NAMES}


def packed() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Tokens and positions of two rows of documents, and the documents."""
    rows = [
        [random_ids(1, n, seed=10 * row + n) for n in lengths] for row, lengths in enumerate((LENGTHS, LENGTHS[::-1]))
    ]
    positions = [torch.cat([torch.arange(document.shape[1]) for document in row]) for row in rows]
    ids = torch.cat([torch.cat(row, dim=1) for row in rows])
    return ids, torch.stack(positions), [document for row in rows for document in row]


@torch.no_grad()
def solo(model, documents: list[torch.Tensor], **keywords) -> torch.Tensor:
    logits = [model(document, num_steps=3, use_cache=False, **keywords).logits[0] for document in documents]
    return torch.cat(logits).unflatten(0, (2, -1))


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_solo(models, name: str) -> None:
    model = models[name]
    ids, positions, documents = packed()
    wanted = solo(model, documents)
    for keywords in (
        {},
        {"use_cache": False},
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": torch.ones_like(ids), "use_cache": False},
        {"cache_rule": "latest"},
    ):
        with torch.no_grad():
            got = model(ids, position_ids=positions, num_steps=3, **keywords).logits
        torch.testing.assert_close(got, wanted, **CLOSE, msg=f"{name} {list(keywords)}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["full", "latest"])
def test_packed_in_pieces_equals_solo(models, name: str, rule: str) -> None:
    """Documents that end in one pass and begin in another; from the second pass on the cache holds several."""
    model = models[name]
    ids, positions, documents = packed()
    for cuts in ([6, 10], [3, 8, 5], [13, 1, 1, 1]):
        cache = RecurrentDepthCache(model.config, rule)
        parts = []
        for part, places in zip(ids.split(cuts, 1), positions.split(cuts, 1), strict=True):
            with torch.no_grad():
                parts.append(model(part, position_ids=places, num_steps=3, past_key_values=cache).logits)
        got = torch.cat(parts, dim=1)
        # One token alone can't begin a document.
        kept = 13 if 1 in cuts else 16
        torch.testing.assert_close(got[:1, :kept], solo(model, documents)[:1, :kept], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "griffin"])
def test_adaptive_exit_in_packed_rows(models, name: str) -> None:
    model = models[name]
    ids, positions, documents = packed()
    keywords = {"criterion": "latent-diff", "exit_threshold": 0.3}
    with torch.no_grad():
        got = model(ids, position_ids=positions, num_steps=3, **keywords).logits
    torch.testing.assert_close(got, solo(model, documents, **keywords), **CLOSE)


def test_going_on_from_a_packed_prompt(models) -> None:
    """New tokens belong to the last document; a crop and a new order of the rows keep what belongs where."""
    model = models["llama"]
    ids, positions, documents = packed()
    options = {"num_steps": 3, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    got = model.generate(ids, position_ids=positions, attention_mask=torch.ones_like(ids), **options)[:, 16:]
    for row in range(2):
        last = documents[4 * row + 3]
        assert torch.equal(model.generate(last, **options)[0, last.shape[1] :], got[row])
    cache = RecurrentDepthCache(model.config, "full")
    with torch.no_grad():
        model(ids, position_ids=positions, num_steps=3, past_key_values=cache)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        again = model(ids[[1, 0], 14:], position_ids=positions[[1, 0], 14:], num_steps=3, past_key_values=cache).logits
    torch.testing.assert_close(again, solo(model, documents)[[1, 0], 14:], **CLOSE)
    with pytest.raises(ValueError, match="several documents"):
        model.generate(ids, position_ids=positions, **options, draft_steps=1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_documents_beside_padding(models, name: str) -> None:
    model = models[name]
    ids, positions, documents = packed()
    pad = torch.zeros(2, 2, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    for use_cache in (True, False):
        with torch.no_grad():
            got = model(
                torch.cat([pad, ids], dim=1),
                attention_mask=mask,
                position_ids=torch.cat([pad, positions], dim=1),
                num_steps=3,
                use_cache=use_cache,
            ).logits[:, 2:]
        torch.testing.assert_close(got, solo(model, documents), **CLOSE)


def test_room_is_counted_in_positions(models, monkeypatch) -> None:
    """A packed row may be longer than `block_size`, a document may not; transformers' collator makes such rows."""
    model = models["llama"]
    monkeypatch.setattr(model.config, "block_size", 7)
    documents = [random_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": document} for document in documents])
    losses = [model(**batch, num_steps=2, use_cache=False).loss]
    shifted = {name: value for name, value in batch.items() if name != "labels"}
    shift_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for loss_only in (False, True):
        losses.append(
            model(**shifted, shift_labels=shift_labels, num_steps=2, use_cache=False, loss_only=loss_only).loss
        )
    rows = [torch.tensor([document]) for document in documents if len(document) > 1]
    summed = sum(model(row, labels=row, num_steps=2).loss * (row.shape[1] - 1) for row in rows)
    for loss in losses:
        torch.testing.assert_close(loss, summed / sum(row.shape[1] - 1 for row in rows), **CLOSE)
    with pytest.raises(ValueError, match="8 tokens are more than the 7"):
        model(random_ids(1, 8), num_steps=1)
    left_padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    model(random_ids(1, 8), attention_mask=left_padded, num_steps=1)
