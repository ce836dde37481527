"""Recording and patching by (layer, step): what is captured is what ran, and a patch of nothing changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import redepth
from redepth import RedepthError
from tests.zoo import random_ids

PLAN: dict[str, Any] = {"prelude": "0:2", "core": "2:4", "coda": "4:6"}
R = 5


@pytest.fixture(scope="module")
def models(zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny recurrent models by family, converted once."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            out = tmp_path_factory.mktemp("converted") / family
            redepth.convert(zoo[family], out, **PLAN, adapter="blend:0.5")
            made[family] = redepth.load(out, dtype="float32")
        return made[family]

    return get


def test_what_is_recorded_is_what_ran(family: str, models: Any) -> None:
    model, ids = models(family), random_ids(2, 9)
    with redepth.record(model, parts=("state", "layer", "mlp", "attention", "embedded", "logits")) as rec:
        output = model(ids, num_steps=R, output_hidden_states=True)
    states = list(model.states_by_step(ids, R))
    assert rec.rows == 2
    for row in range(2):
        trajectory = rec.trajectory(row)
        assert trajectory.shape == (9, R + 1, 24)
        torch.testing.assert_close(trajectory, torch.stack([state[row] for state in states], dim=1))
        # The residual stream after every layer, in the order in which transformers gives it.
        stream = [rec.get("layer", 0, layer, row) for layer in (0, 1)]
        stream += [rec.get("layer", step, layer, row) for step in range(1, R + 1) for layer in (2, 3)]
        stream += [rec.get("layer", 0, layer, row) for layer in (4, 5)]
        for mine, theirs in zip(stream, output.hidden_states[1:], strict=True):
            assert torch.equal(mine, theirs[row])
        assert torch.equal(rec.get("state", R, row=row), rec.get("layer", R, 3, row))
        torch.testing.assert_close(rec.get("logits", R, row=row), output.logits[row])
        wanted = model.predict_from_latents(states[2]).logits[row]
        torch.testing.assert_close(rec.get("logits", 2, row=row), wanted)
    assert rec.steps_run(1).tolist() == [R] * 9


def test_padded_rows_are_left_out_and_equal_their_solo_run(family: str, models: Any) -> None:
    model, ids = models(family), random_ids(2, 8)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        where = slice(0, 3) if side == "left" else slice(5, 8)
        padded = ids.clone()
        mask[1, where], padded[1, where] = 0, 0
        kept = mask[1].bool()
        with redepth.record(model, parts=("state", "mlp")) as batch:
            model(padded, attention_mask=mask, num_steps=3)
        with redepth.record(model, parts=("state", "mlp")) as solo:
            model(padded[1:][:, kept], num_steps=3)
        assert batch.trajectory(0).shape[0] == 8
        assert batch.trajectory(1).shape[0] == 5
        torch.testing.assert_close(batch.trajectory(1), solo.trajectory(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.get("mlp", 2, 3, row=1), solo.get("mlp", 2, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "griffin"])
def test_under_generate_a_text_is_one_row(family: str, models: Any) -> None:
    model, ids = models(family), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with redepth.record(model) as rec:
        grown = model.generate(
            ids, attention_mask=mask, num_steps=3, max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
    assert rec.rows == 2
    # The last token was chosen and never run.
    assert [len(rec.steps_run(row)) for row in range(2)] == [8, 10]
    with redepth.record(model) as whole:
        model(grown[1:, :-1], num_steps=3)
    torch.testing.assert_close(rec.trajectory(1), whole.trajectory(0), atol=1e-4, rtol=1e-4)


def test_tokens_that_left_the_loop_have_no_state_beyond_it(models: Any) -> None:
    model, ids = models("llama"), random_ids(2, 7)
    with redepth.record(model) as rec:
        output = model(ids, num_steps=6, criterion="latent-diff", exit_threshold=0.5)
    steps = output.stats["num_steps"]
    assert steps.min() < steps.max()
    for row in range(2):
        assert rec.steps_run(row).tolist() == steps[row].tolist()
        gone = rec.get("state", int(steps.max()), row=row).isnan().all(-1) if steps[row].max() == steps.max() else None
        if gone is not None:
            assert gone.tolist() == (steps[row] < steps.max()).tolist()


def test_attention_maps_are_probabilities_that_make_the_output(models: Any) -> None:
    model, ids = models("llama"), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for given, use_cache in ((None, False), (mask, False), (mask, True)):
        with redepth.record(model, parts=("attention-map",), layers=[2], steps=[1, 2]) as rec:
            model(ids, attention_mask=given, num_steps=2, use_cache=use_cache)
        maps = rec.get("attention-map", 2, 2, row=1)
        tokens = 6 if given is None else 4
        assert maps.shape == (tokens, 3, tokens)
        torch.testing.assert_close(maps.sum(-1), torch.ones(tokens, 3))
        assert (maps.triu(1).amax((0, 1)) >= 0).all()
        assert all(float(maps[t, :, t + 1 :].sum()) == 0 for t in range(tokens))
    # Written out: the probabilities mix the values into what the attention gave.
    with redepth.record(model, parts=("attention-map", "attention", "layer"), steps=[1]) as rec:
        model(ids, num_steps=1)
    block = model.transformer.core_block[1]
    values = block.attn.Wqkv(block.norm_1(rec.get("layer", 1, 2)))[:, -block.attn.kv_width :]
    mixed = torch.einsum("thj,jk->thk", rec.get("attention-map", 1, 3), values)
    torch.testing.assert_close(block.attn.proj(mixed.flatten(1)), rec.get("attention", 1, 3))


def test_attention_maps_grow_under_generate(models: Any) -> None:
    model, ids = models("llama"), random_ids(1, 4)
    with redepth.record(model, parts=("attention-map",), layers=[3]) as rec:
        model.generate(ids, num_steps=2, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    maps = rec.get("attention-map", 2, 3)
    assert maps.shape == (6, 3, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(6, 3))


def test_what_outgrows_the_memory_goes_to_disk(models: Any, tmp_path: Path) -> None:
    model, ids = models("llama"), random_ids(2, 6)
    parts = ("state", "layer", "mlp")
    with redepth.record(model, parts=parts) as memory:
        model(ids, num_steps=4)
    with redepth.record(model, parts=parts, most_bytes=3000, folder=tmp_path / "rec") as disk:
        model(ids, num_steps=4)
    assert len(list((tmp_path / "rec").glob("*.safetensors"))) > 2
    assert disk.keys() == memory.keys()
    for key in memory.keys():  # noqa: SIM118
        for row in range(2):
            assert torch.equal(memory.get(*_places(key), row), disk.get(*_places(key), row))
    with redepth.record(model, most_bytes=0) as temporary:
        model(ids, num_steps=2)
    folder = temporary.folder
    assert folder is not None and folder.exists()
    assert torch.equal(temporary.trajectory(), memory.trajectory()[:, :3])
    del temporary
    assert not folder.exists()


def _places(key: Any) -> tuple[str, int, int | None]:
    return key.part, key.step, key.layer


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "griffin"])
def test_a_patch_of_nothing_changes_nothing_bit_for_bit(family: str, models: Any) -> None:
    model, ids = models(family), random_ids(2, 7)
    plain = model(ids, num_steps=R).logits
    parts = ("state", "layer", "mlp", "attention")
    with redepth.record(model, parts=parts) as rec:
        assert torch.equal(model(ids, num_steps=R).logits, plain)
    with redepth.patch(model, "state", 7.0, step=2, tokens=[]):
        assert torch.equal(model(ids, num_steps=R).logits, plain)
    for part in parts:
        layer = None if part == "state" else 3
        own = rec.get(part, 2, layer, row=1)
        with redepth.patch(model, part, own, step=2, layer=layer, rows=1):
            assert torch.equal(model(ids, num_steps=R).logits, plain)
    assert model.transformer.watchers == ()
    assert torch.equal(model(ids, num_steps=R).logits, plain)


def test_a_later_step_in_an_earlier_place(models: Any) -> None:
    model, ids = models("llama"), random_ids(1, 7)
    with redepth.record(model) as rec:
        deep = model(ids, num_steps=6).logits
    # The last state put after the first step of a pass of one step: the deep logits, as the coda has no step.
    with redepth.patch(model, "state", rec.get("state", 6), step=1):
        shallow = model(ids, num_steps=1).logits
    torch.testing.assert_close(shallow, deep)
    # Another text's state at one token moves that token and those after it, and none before.
    with redepth.record(model) as other:
        model(random_ids(1, 7, seed=5), num_steps=6)
    with redepth.patch(model, "state", other.get("state", 3)[4:5], step=3, tokens=[4]):
        moved = model(ids, num_steps=6).logits
    changed = (moved - deep).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 3


def test_a_patch_under_generate_and_padding_finds_its_token(models: Any) -> None:
    model, ids = models("llama"), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with (
        redepth.patch(model, "mlp", 0.0, layer=2, tokens=[5]),
        redepth.record(model, parts=("mlp",), layers=[2]) as rec,
    ):
        model.generate(ids, attention_mask=mask, num_steps=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for row in range(2):
        zero = (rec.get("mlp", 1, 2, row) == 0).all(-1)
        assert zero.nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parts": ("stat",)}, "did you mean 'state'"),
        ({"parts": ()}, "parts names nothing"),
        ({"layers": [6]}, "0 to 5"),
        ({"steps": []}, "names nothing"),
        ({"steps": [-1]}, "whole numbers"),
        ({"steps": [2, 9]}, "step 9 .* num_steps is 4"),
    ],
)
def test_a_record_of_what_never_runs_ends_before_any_compute(models: Any, arguments: Any, said: str) -> None:
    model = models("llama")
    ran = []
    handle = model.transformer.prelude[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(RedepthError, match=said), redepth.record(model, **arguments):
            model(random_ids(1, 4), num_steps=4)
    finally:
        handle.remove()
    assert not ran
    assert model.transformer.watchers == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"part": "logits", "value": 0.0}, "part 'logits' is not one of"),
        ({"part": "mlp", "value": 0.0}, "needs a layer"),
        ({"part": "state", "value": 0.0}, "needs a step"),
        ({"part": "state", "value": torch.zeros(4, 7), "step": 1}, r"shape \[4, 7\]"),
        ({"part": "state", "value": torch.zeros(2, 24), "step": 1, "tokens": [1]}, "of 2 tokens, but 1"),
        ({"part": "state", "value": torch.zeros(3, 24), "step": 1}, r"of 3 tokens, but the rows have \[4\]"),
        ({"part": "state", "value": 0.0, "step": 8}, "step 8 .* num_steps is 4"),
        ({"part": "state", "value": 0.0, "step": 1, "rows": 1}, "row 1 .* has 1"),
        ({"part": "state", "value": 0.0, "step": 1, "tokens": [9]}, "never applied to token 9"),
    ],
)
def test_a_patch_that_has_no_place_ends_in_one_line(models: Any, arguments: Any, said: str) -> None:
    model = models("llama")
    with pytest.raises(RedepthError, match=said) as raised, redepth.patch(model, **arguments):
        model(random_ids(1, 4), num_steps=4)
    assert "\n" not in str(raised.value)


def test_what_can_not_be_followed_is_refused(models: Any) -> None:
    model, ids = models("llama"), random_ids(1, 4)
    with redepth.record(model) as rec:
        with pytest.raises(ValueError, match="plain decoding"):
            model.generate(ids, num_steps=4, draft_steps=1, max_new_tokens=4)
        with pytest.raises(ValueError, match="num_beams out"):
            model.generate(ids, num_steps=4, num_beams=2, max_new_tokens=4)
        with pytest.raises(RedepthError, match="was not recorded; 0 rows"):
            rec.get("state", 1)
        model(ids, num_steps=3)
        with pytest.raises(RedepthError, match="mlp of layer 2 at step 1 was not recorded; add 'mlp' to parts"):
            rec.get("mlp", 1, 2)
        with pytest.raises(RedepthError, match="its steps are 0, 1, 2, 3"):
            rec.get("state", 4)
    model.train()
    with pytest.raises(RedepthError, match="eval"), redepth.record(model):
        model(ids, num_steps=2)
    model.eval()
    with pytest.raises(RedepthError, match="Linear has no steps"), redepth.record(torch.nn.Linear(2, 2)):
        pass
