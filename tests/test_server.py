"""The server from outside, by the real openai client and by raw HTTP."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redepth.cli import main
from redepth.modeling import DepthPolicy
from redepth.serving.engine import Engine
from redepth.serving.limits import Limits
from redepth.serving.request import Sampling
from redepth.serving.served import Served
from redepth.serving.sockets import listen
from tests.served import TEMPLATE, make_served, running, tiny_model, wait_until
from tests.test_healing import byte_tokenizer

PROMPT = "Depth is "


@pytest.fixture(scope="module")
def model(zoo) -> Any:
    return tiny_model(zoo)


@pytest.fixture(scope="module")
def served(model) -> Served:
    return make_served(model, limits={"num_steps": 9, "new_tokens": 40, "body_bytes": 4000, "prompt_tokens": 80})


@pytest.fixture(scope="module")
def url(served: Served):
    with running(served) as where:
        yield where


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return client_of(url)


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def slow_reference(served: Served, prompt: str, new: int, **policy: Any) -> tuple[str, list[int]]:
    """Text and steps of greedy decoding by the model's own `generate`."""
    ids = torch.tensor([served.tokenizer(prompt)["input_ids"]])
    chosen = DepthPolicy.resolve(served.model.config, **policy)
    output = served.model.generate(
        ids, policy=chosen, max_new_tokens=new, do_sample=False, return_dict_in_generate=True
    )
    text = served.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return text, output.stats["num_steps"][0, ids.shape[1] - 1 :].tolist()


POLICIES = [
    {},
    {"num_steps": 5},
    {"num_steps": 8, "criterion": "latent-diff", "exit_threshold": 0.5},
    {"num_steps": 8, "criterion": "kl", "exit_threshold": 0.3, "min_steps": 3},
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_completion_is_generates_own(client, served, policy) -> None:
    text, steps = slow_reference(served, PROMPT, 6, **policy)
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, extra_body=policy)
    choice = got.choices[0]
    assert (choice.text, choice.steps) == (text, steps)
    assert choice.finish_reason == "length"
    assert got.usage.completion_tokens == 6
    assert got.usage.prompt_tokens == len(PROMPT)
    assert got.redepth["steps"] == sum(steps)
    assert got.redepth["policy"] == str(DepthPolicy.resolve(served.model.config, **policy))


@pytest.mark.parametrize("policy", POLICIES[1:3], ids=str)
def test_a_stream_says_the_same_as_the_whole(client, policy) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 8,
        "temperature": 0.7,
        "seed": 3,
        "n": 2,
        "extra_body": policy,
    }
    whole = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **asked)
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
        stream=True,
        stream_options={"include_usage": True},
        **asked,
    )
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].redepth == whole.redepth
    assert chunks[0].choices[0].delta.role == "assistant"
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [taken for each in mine for taken in each.steps] == choice.steps
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_a_seed_gives_the_same_answer_and_n_counts_it_up(client) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.5}
    two = client.completions.create(seed=7, n=2, **asked)
    assert [choice.text for choice in two.choices] == [
        client.completions.create(seed=seed, **asked).choices[0].text for seed in (7, 8)
    ]
    assert client.completions.create(**asked).choices[0].text != client.completions.create(**asked).choices[0].text


def test_stop_strings_end_the_text_and_stay_out(client, served) -> None:
    text, _ = slow_reference(served, PROMPT, 12)
    stop = text[4:6]
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    got = client.completions.create(stop=[stop, "never said"], **asked).choices[0]
    assert got.text == text[: text.index(stop)]
    assert got.finish_reason == "stop"
    assert len(got.steps) == text.index(stop) + 2
    parts = [chunk.choices[0] for chunk in client.completions.create(stop=stop, stream=True, **asked)]
    assert "".join(part.text for part in parts) == got.text
    wait_until(lambda: served.runner.engine.rows == 0)


def test_logprobs_are_the_models_own(client, served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 0, "extra_body": {"num_steps": 4}}
    got = client.completions.create(prompt=PROMPT, logprobs=2, **asked).choices[0]
    ids = torch.tensor([served.tokenizer(PROMPT + got.text)["input_ids"]])
    with torch.no_grad():
        scores = served.model(ids, num_steps=4).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    best = scores.max(-1).values
    assert got.logprobs.token_logprobs == pytest.approx(best.tolist(), abs=1e-4)
    assert got.logprobs.tokens == list(got.text)
    assert [len(top) for top in got.logprobs.top_logprobs] == [2, 2, 2]
    assert got.logprobs.text_offset == [0, 1, 2]
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, **asked
    ).choices[0]
    assert [entry.token for entry in chat.logprobs.content] == list(chat.message.content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in chat.logprobs.content)
    assert bytes(chat.logprobs.content[0].bytes).decode() == chat.message.content[0]


def test_a_completion_keeps_its_first_space_and_a_chat_has_none(model) -> None:
    """Words of a tokenizer that carry their space, which it drops at the beginning of what it decodes."""
    words = Tokenizer(models.WordLevel({f"▁{number}": number for number in range(model.config.vocab_size)}, "▁0"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    served = make_served(model)
    served.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    with running(served) as url:
        said = client_of(url).completions.create(prompt="5 6", logprobs=1, **asked).choices[0]
        chat = client_of(url).chat.completions.create(messages=[{"role": "user", "content": "5"}], **asked).choices[0]
    assert said.text.startswith(" ") and "".join(said.logprobs.tokens) == said.text
    assert said.logprobs.text_offset[1] == len(said.logprobs.tokens[0])
    assert len(chat.message.content.split()) == 3 and not chat.message.content.startswith(" ")


def test_prompts_may_be_ids_and_several(client, served) -> None:
    ids = [served.tokenizer(text)["input_ids"] for text in ("one", "two and more")]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    both = client.completions.create(prompt=ids, **asked)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == sum(map(len, ids))
    for choice, text in zip(both.choices, ("one", "two and more"), strict=True):
        assert choice.text == client.completions.create(prompt=text, **asked).choices[0].text


def test_models(client) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "redepth"
    with pytest.raises(openai.NotFoundError, match="has 'tiny'"):
        client.models.retrieve("other")


COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
# (what differs from COMPLETION, what the message says, which field it is about)
MISTAKES = [
    ({"num_steps": 0}, "num_steps", "num_steps"),
    ({"num_steps": 10}, "allows 9", "num_steps"),
    ({"num_steps": "4"}, "integer", "num_steps"),
    ({"criterion": "nothing"}, "unknown exit criterion 'nothing'", "criterion"),
    ({"criterion": "os:getcwd"}, "import path", "criterion"),
    ({"exit_threshold": 0.1}, "needs a criterion", "exit_threshold"),
    ({"criterion": "kl", "exit_threshold": "99%"}, "no threshold", "exit_threshold"),
    ({"criterion": "kl", "exit_threshold": -1}, "above 0", "exit_threshold"),
    ({"criterion": "kl", "num_steps": 4, "min_steps": 5}, "between 1 and num_steps", "min_steps"),
    ({"draft_steps": 2}, "draft_steps is not supported", "draft_steps"),
    ({"temperature": 3}, "less than or equal to 2", "temperature"),
    ({"top_p": 0}, "greater than 0", "top_p"),
    ({"n": 0}, "greater than or equal to 1", "n"),
    ({"max_tokens": 41}, "allows 40", "max_tokens"),
    ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    ({"stop": ["a"] * 5}, "at most 4", None),
    ({"prompt": ""}, "at least 1", None),
    ({"prompt": "x" * 81}, "81 tokens, but 80 are allowed", "prompt"),
    ({"prompt": [5, 101]}, "token id 101", "prompt"),
    ({"prompt": [-1]}, "token id -1", "prompt"),
    ({"num_step": 3}, "did you mean 'num_steps'", None),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", None),
    ({"echo": True}, "echo is not supported", None),
    ({"stream_options": {"include_usage": True}}, "needs stream", "stream_options"),
    ({"logprobs": 6}, "less than or equal to 5", "logprobs"),
    ({"model": "other"}, "no model 'other'", "model"),
]


@pytest.mark.parametrize(("changes", "says", "param"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_told_in_the_protocols_form(
    url: str, changes: dict[str, Any], says: str, param: str | None
) -> None:
    answer = httpx.post(f"{url}/v1/completions", json=COMPLETION | changes)
    error = answer.json()["error"]
    assert answer.status_code == (404 if "model" in changes else 400)
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_other_mistakes(url: str, client) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    for path, body, status in (("completions", b"{", 400), ("completions", b"[]", 400), ("nothing", b"{}", 404)):
        answer = httpx.post(f"{url}/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    assert httpx.post(f"{url}/v1/completions", content=b" " * 5000).json()["error"]["code"] == "body_too_large"


def test_what_changes_nothing_is_named(url: str) -> None:
    neutral = {"frequency_penalty": 0.0, "user": "me", "metadata": {"a": "b"}, "logit_bias": None, "store": None}
    assert httpx.post(f"{url}/v1/completions", json=COMPLETION | neutral).json()["redepth"]["ignored"] == [
        "metadata",
        "user",
    ]


def test_the_room_of_the_model_limits_the_answer(client) -> None:
    with pytest.raises(openai.BadRequestError, match="are allowed") as caught:
        client.completions.create(model="tiny", prompt="x" * 90)
    assert caught.value.code == "context_length_exceeded"
    got = client.completions.create(model="tiny", prompt="x" * 80, temperature=0)
    assert got.usage.completion_tokens == 16
    got = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert got.usage.completion_tokens == 40


def test_health_and_metrics(url: str, client) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, extra_body={"num_steps": 3})
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").status_code == 200
    page = httpx.get(f"{url}/metrics").text
    for name in (
        "requests_waiting",
        "rows_running",
        "steps_total",
        "tokens_total",
        "steps_per_token_bucket",
        "pool_tokens",
    ):
        assert f"redepth_{name}" in page, name
    assert 'outcome="ok",route="/v1/completions"' in page


def test_the_key(model) -> None:
    with running(make_served(model), api_key="secret") as url:
        assert client_of(url, "secret").models.list().data[0].id == "tiny"
        for key in ("wrong", "secre", "secretx"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client_of(url, key).models.list()
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


class Slow:
    """An engine whose ticks wait to be let through, or fail."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.gate = threading.Semaphore(0)
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> Any:
        self.gate.acquire()
        if self.fails:
            raise RuntimeError("a fault of the engine")
        return self.engine.step()

    def go(self) -> None:
        self.gate.release(10**6)


@pytest.fixture
def slow(model):
    engine = Slow(Engine(model, max_rows=2, max_tokens=512))
    served = make_served(model, engine=engine, limits={"queue": 2, "seconds": 60, "new_tokens": 100})
    with running(served) as url:
        yield engine, served, url
        engine.go()


def in_thread(ask: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(ask())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_a_full_queue_refuses(slow) -> None:
    engine, served, url = slow
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
    waiting = [in_thread(lambda: client_of(url).completions.create(**asked)) for _ in range(2)]
    wait_until(lambda: served.runner.engine.waiting == 2)
    with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as caught:
        client_of(url).completions.create(**asked)
    assert caught.value.response.headers["retry-after"] == "1"
    engine.go()
    for thread, found in waiting:
        thread.join(30)
        assert len(found[0].choices[0].steps) <= 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(slow, stream: bool) -> None:
    engine, served, url = slow
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "stream": stream, "logit_bias": {}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until(lambda: not served.runner._listeners)
    engine.go()
    wait_until(lambda: not engine.has_work)
    assert engine.tokens_done < 100
    assert 'outcome="client_gone"' in httpx.get(f"{url}/metrics").text


def test_time_is_limited(model) -> None:
    engine = Slow(Engine(model, max_rows=2, max_tokens=512))
    with running(make_served(model, engine=engine, limits={"seconds": 0.3})) as url:
        with pytest.raises(openai.InternalServerError, match="not complete after 0.3 s") as caught:
            client_of(url).completions.create(**COMPLETION)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="not complete after"):
            list(client_of(url).completions.create(**COMPLETION, stream=True))
        engine.go()
        wait_until(lambda: not engine.has_work)


def test_a_fault_ends_those_in_flight_and_no_others(slow) -> None:
    engine, served, url = slow
    thread, found = in_thread(lambda: client_of(url).completions.create(**COMPLETION))
    wait_until(lambda: served.runner.engine.waiting == 1)
    engine.fails = True
    engine.gate.release()
    thread.join(30)
    assert isinstance(found[0], openai.InternalServerError)
    assert "a fault of the engine" not in str(found[0])
    engine.fails = False
    engine.go()
    assert client_of(url).completions.create(**COMPLETION).choices[0].text
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_listener_that_fails_ends_its_own_request(model) -> None:
    """Such as one whose event loop is closed."""
    served = make_served(model)
    runner = served.runner
    runner.start()
    done = threading.Event()
    said: list[Any] = []

    def fails(event: Any) -> None:
        raise RuntimeError("nobody listens")

    def listens(event: Any) -> None:
        said.append(event)
        if event.finish:
            done.set()

    policy = served.policy(num_steps=2)
    runner.submit([5, 6, 7], policy, Sampling(max_new_tokens=50), fails)
    runner.submit([5, 6, 7], policy, Sampling(max_new_tokens=5, stop_ids=()), listens)
    assert done.wait(30)
    assert [event.finish for event in said] == [None] * 4 + ["length"]
    wait_until(lambda: not runner.engine.has_work)
    assert runner.engine.tokens_done < 50
    runner.close()


def test_work_between_ticks(model) -> None:
    served = make_served(model)
    served.runner.start()
    assert served.runner.between_ticks(lambda: threading.current_thread().name).result(10) == "redepth-engine"
    with pytest.raises(ZeroDivisionError):
        served.runner.between_ticks(lambda: 1 / 0).result(10)
    served.runner.close()
    assert not served.runner.is_ready


def test_the_end_drains(model) -> None:
    """What was accepted is answered to its end; nothing new is taken."""
    served = make_served(model)
    with running(served) as url:
        stream = client_of(url).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=60, stream=True, seed=1, temperature=0
        )
        first = next(stream)
        found: list[Any] = [first]
        thread = threading.Thread(target=lambda: found.extend(stream))
        thread.start()
    thread.join(90)
    assert found[-1].choices[0].finish_reason in ("stop", "length")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_the_command_serves_until_it_is_told_to_end(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of a stream: the stream goes on to its end, and then the command does, with exit code 0."""
    model.save_pretrained(tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url, found = f"http://127.0.0.1:{port}", []

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.ConnectError:
            return False

    def talk() -> None:
        wait_until(is_ready)
        try:
            stream = client_of(url).completions.create(model="deep", prompt="a", max_tokens=50, stream=True)
            found.append(next(stream))
            os.kill(os.getpid(), signal.SIGTERM)
            found.extend(stream)
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)
            raise

    thread = threading.Thread(target=talk)
    thread.start()
    monkeypatch.setattr("sys.argv", ["redepth", "serve", str(tmp_path / "out"), "--port", str(port), "--name", "deep"])
    with pytest.raises(SystemExit) as ended:
        main()
    thread.join()
    assert ended.value.code == 0
    assert found[-1].choices[0].finish_reason == "length"
    assert sum(len(chunk.choices[0].steps) for chunk in found) == 50


def test_a_port_that_is_taken_is_named(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["redepth", "serve", str(tmp_path), "--port", str(port)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    assert f"can't listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_the_protocol_holds(model) -> None:
    """What schemathesis makes of the server's own page: no crash, and no answer of another status or form than it says.

    That valid data is accepted is not asked: what a model has room for is not in the page.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    statuses: set[int] = set()
    with running(make_served(model, limits={"new_tokens": 3})) as url:
        for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def holds(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"
                statuses.add(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

            holds()
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert {200, 400} <= statuses
    assert not any(status >= 500 for status in statuses)


def test_limits_must_be_possible() -> None:
    with pytest.raises(ValueError, match="limit on queue must be above 0"):
        Limits(queue=0)


def test_the_page_of_the_protocol_is_json(url: str) -> None:
    page = httpx.get(f"{url}/openapi.json").json()
    assert set(page["paths"]) >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/health",
        "/ready",
        "/metrics",
    }
    assert json.dumps(page["paths"]["/v1/completions"]["post"]["responses"]["429"]).count("ErrorBody")
