"""Wavefront sampling: where it has an exact counterpart it must equal it, elsewhere it must report what it is."""

import pytest
import torch
from transformers import TextIteratorStreamer

from redepth import RecurrentDepthForCausalLM
from redepth.modeling import RecurrentStack
from redepth.surgery.convert import plan_conversion
from tests.test_speculation import batch_of
from tests.zoo import random_ids

OPTIONS = {"num_steps": 6, "max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "sampler": "wavefront"}
ALONE = {"inner_steps": 6, "max_wavefront": 1}


@pytest.fixture(scope="module")
def models(zoo) -> dict[str, RecurrentDepthForCausalLM]:
    made = {}
    for name in ("llama", "gemma2", "gemma3"):
        made[name] = plan_conversion(zoo[name], "0:2", "2:4", "5:6", adapter="blend:0.4", state="noise").model()
        made[name].config.state_std = 1.0
    return made


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_one_place_at_a_time_is_plain_decoding_under_ring_1(models, name: str) -> None:
    batch = batch_of([4, 9, 6])
    plain = {key: value for key, value in OPTIONS.items() if key != "sampler"}
    wanted = models[name].generate(**batch, **plain, cache_rule="ring-1")
    output = models[name].generate(**batch, **OPTIONS, **ALONE, return_dict_in_generate=True)
    assert torch.equal(output.sequences, wanted)
    assert output.stats["passes"] == 13
    assert output.stats["core_passes"] == 3 * 13 * 6


@pytest.mark.parametrize("settings", [{}, {"headway": 3, "inner_steps": 1}, {"max_wavefront": 3, "inner_steps": 2}])
def test_rows_equal_solo_runs(models, settings: dict) -> None:
    lengths = [4, 9, 6]
    batch = batch_of(lengths)
    for model in models.values():
        together = model.generate(**batch, **OPTIONS, **settings, return_dict_in_generate=True)
        for row, length in enumerate(lengths):
            alone = model.generate(
                batch["inputs"][row : row + 1, 9 - length :], **OPTIONS, **settings, return_dict_in_generate=True
            )
            assert torch.equal(alone.sequences[0], together.sequences[row, 9 - length :])
            assert torch.equal(alone.stats["num_steps"][0], together.stats["num_steps"][row, 9 - length :])


def test_a_settled_model_agrees_in_fewer_passes(zoo) -> None:
    """Where the core's steps change nothing, every place is right at once: all agree, and many close in one pass."""
    model = plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="inject").model()
    batch = batch_of([4, 7])
    output = model.generate(
        **batch, **OPTIONS, inner_steps=1, headway=4, report_agreement=True, return_dict_in_generate=True
    )
    plain = model.generate(**batch, **{key: value for key, value in OPTIONS.items() if key != "sampler"})
    assert torch.equal(output.sequences, plain)
    assert output.stats["agreement"] == 1.0
    assert output.stats["num_steps"][:, 7:].float().mean() < 6


def test_reports_its_agreement(models) -> None:
    """Against a token-by-token count."""
    model, batch = models["llama"], batch_of([4, 9])
    output = model.generate(**batch, **OPTIONS, report_agreement=True, return_dict_in_generate=True, exit_threshold=0.5)
    same = []
    for row, length in enumerate((4, 9)):
        tokens = output.sequences[row : row + 1, 9 - length :]
        for end in range(length, tokens.shape[1]):
            with torch.no_grad():
                right = model(tokens[:, :end], num_steps=6, use_cache=False).logits[0, -1].argmax()
            same.append(float(right == tokens[0, end]))
    assert 0 < output.stats["agreement"] < 1
    assert output.stats["agreement"] == pytest.approx(sum(same) / len(same))


def test_sampling_is_seeded(models) -> None:
    model, outputs = models["gemma2"], []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model.generate(random_ids(2, 5), **OPTIONS | {"do_sample": True, "top_k": 20}))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_sampling_one_place_at_a_time_has_the_distribution(models) -> None:
    model, prompt = models["llama"], random_ids(1, 5)
    torch.manual_seed(0)
    options = OPTIONS | ALONE | {"do_sample": True, "max_new_tokens": 1, "top_k": 4}
    drawn = model.generate(prompt.expand(3000, -1), **options)[:, -1]
    with torch.no_grad():
        values, tokens = model(prompt, num_steps=6).logits[0, -1].topk(4)
    wanted = 3000 * values.softmax(-1)
    counts = torch.tensor([(drawn == token).sum() for token in tokens])
    assert counts.sum() == 3000
    assert ((counts - wanted) ** 2 / wanted).sum() < 16.3, "beyond the 99.9 % point for 3 degrees of freedom"


def test_end_of_text_streamer_and_noise(models) -> None:
    class Digits:
        def decode(self, ids, **kwargs) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model, ids = models["llama"], random_ids(1, 5)
    whole = model.generate(ids, **OPTIONS, noise_mix=0.2)
    stop = int(whole[0, 9])
    streamer = TextIteratorStreamer(Digits(), timeout=30)
    ended = model.generate(ids, **OPTIONS | {"eos_token_id": stop, "pad_token_id": 0}, noise_mix=0.2, streamer=streamer)
    assert torch.equal(ended[0], whole[0, : ended.shape[1]])
    assert ended[0, -1] == stop
    assert "".join(streamer).split() == [str(i) for i in ended[0].tolist()]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampler": "wave"}, "unknown sampler 'wave'"),
        ({"headway": 0}, "headway must be"),
        ({"inner_steps": 1.5}, "inner_steps must be"),
        ({"exit_threshold": 0.0}, "above 0"),
        ({"noise_mix": 1.0}, "below 1"),
        ({"criterion": "kl"}, "can't go with criterion"),
        ({"cache_rule": "full"}, "cache rule 'ring-1', not 'full'"),
        ({"headways": 2}, "headways"),
    ],
)
def test_mistakes_stop_before_any_compute(models, monkeypatch, kwargs: dict, message: str) -> None:
    monkeypatch.setattr(RecurrentStack, "run_layers", None)
    with pytest.raises(ValueError, match=message):
        models["llama"].generate(random_ids(1, 3), **OPTIONS | kwargs)
