"""The page: its parts, and the whole of it in a headless browser (slow)."""

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import redepth
from redepth.data.tasks.roots import Roots
from redepth.modeling import DepthPolicy
from redepth.playground.inside import inside_html, look_inside
from redepth.playground.problems import is_right, make_example, task_names
from redepth.playground.shading import (
    FIRST_DARK,
    INK_ON_DARK,
    INK_ON_LIGHT,
    SHADES,
    Unit,
    answer_html,
    legend_html,
    shade_of,
)
from redepth.playground.sides import flops_in_words
from redepth.serving.limits import Limits
from redepth.serving.served import Served
from tests.served import make_served, tiny_model, wait_until
from tests.zoo import random_ids

IMAGES = Path(__file__).parent.parent / "docs" / "images"
CHROMIUM = "/usr/bin/chromium"
QUIET_BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def model(zoo) -> Any:
    return tiny_model(zoo)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_shades_are_told_apart_by_lightness_and_can_be_read() -> None:
    lightness = [luminance(shade) for shade in SHADES]
    assert lightness == sorted(lightness, reverse=True)
    assert all(contrast(one, other) > 1.15 for one, other in itertools.pairwise(SHADES))
    for number, shade in enumerate(SHADES):
        assert contrast(shade, INK_ON_DARK if number >= FIRST_DARK else INK_ON_LIGHT) >= 4.5


def test_shades_cover_all_depths() -> None:
    for most in (1, 2, 7, 16, 64):
        shades = [shade_of(steps, most) for steps in range(1, most + 1)]
        assert shades == sorted(shades)
        assert shades[0] == 0
        assert most == 1 or shades[-1] == len(SHADES) - 1
        said = [int(number) for number in re.findall(r"\d+", re.sub(r"<[^>]*>", " ", legend_html(most)))]
        assert said[0] == 1
        assert said[-1] == most


def test_tokens_are_escaped_and_say_their_steps() -> None:
    html = answer_html([Unit("<b>&\n", 0, (3,)), Unit("é", 2, (1, 2)), Unit("", 3, (1,))], 4, "answer A")
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;↵" in html
    assert 'data-steps="1 + 2 steps"' in html
    assert "end of the answer, 1 step" in html
    assert html.count('tabindex="0"') == 1


@pytest.mark.parametrize(
    "policy", [{"num_steps": 6}, {"num_steps": 9, "criterion": "latent-diff", "exit_threshold": 0.5}]
)
def test_a_look_inside_is_what_the_model_says_at_every_step(model, policy) -> None:
    """The slow reference ends the last token's loop after each step, behind tokens that ran as the policy says."""
    ids = random_ids(1, 7)[0].tolist()
    chosen = DepthPolicy.resolve(model.config, **policy)
    served = make_served(model)
    inside = look_inside(model, served.tokenizer, ids, chosen)
    assert len(inside.top) == chosen.num_steps == len(inside.kl_to_last)
    assert inside.kl_to_last[-1] == pytest.approx(0, abs=1e-6)
    assert len(inside.to_last) == len(inside.plane) == chosen.num_steps + 1
    assert (inside.ending is None) == (chosen.num_steps < 7)
    row = torch.tensor([ids])
    for step in range(1, chosen.num_steps + 1):
        with torch.no_grad():
            cache = model(row[:, :-1], policy=chosen, use_cache=True).past_key_values
            logits = model(row[:, -1:], past_key_values=cache, num_steps=step).logits[0, -1]
        best = logits.softmax(-1).max(-1)
        text, share = inside.top[step - 1][0]
        assert text == served.tokenizer.decode([int(best.indices)])
        assert share == pytest.approx(float(best.values), abs=1e-5)
    html = inside_html(inside, "<x>", 2)
    assert "&lt;x&gt;" in html
    assert html.count("<tr") == chosen.num_steps + 1
    assert html.count("aria-current") == 1


def test_problems_have_the_difficulty_that_was_asked_for() -> None:
    own = Roots(depth=(0, 4), nodes=8)
    for difficulty in (1, 4, 5):
        made = make_example("roots", difficulty, own, seed=3)
        assert made.difficulty == difficulty
        links = dict(word.split(">") for word in made.prompt.split()[1:-1])
        at = made.prompt.split()[-1]
        for _ in range(difficulty):
            at = links[at]
        assert at == made.right
    for name in task_names(None):
        made = make_example(name, 3, seed=1)
        assert made.difficulty == 3
        assert made.right
        assert made == make_example(name, 3, seed=1)
    with pytest.raises(ValueError, match="unknown"):
        make_example("nothing", 3)


def test_right_and_wrong() -> None:
    assert is_right(" 12.\n", "12")
    assert is_right("B", "B")
    assert not is_right("123", "12")
    assert not is_right("", "12")
    assert not is_right("So 12", "12")


def test_prices_in_words() -> None:
    assert [flops_in_words(value) for value in (12, 968_832, 9.66e9)] == ["12 FLOPs", "969 kFLOPs", "9.66 GFLOPs"]


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET_BROWSER)
        yield opened
        opened.close()


@contextmanager
def open_page(models: list[Served]) -> Iterator[str]:
    pytest.importorskip("gradio")
    from redepth.playground.page import free_port, launch

    found: list[str] = []
    blocks = launch(models, "127.0.0.1", free_port("127.0.0.1", 0), wait=False, on_start=found.append)
    try:
        yield found[0]
    finally:
        blocks.close()
        for each in models:
            each.runner.close()


@pytest.fixture(scope="module")
def models(model) -> list[Served]:
    return [make_served(model, limits={"num_steps": 12}, name=name) for name in ("tiny", "other")]


@pytest.fixture(scope="module")
def url(models: list[Served]):
    with open_page(models) as where:
        yield where


@pytest.fixture
def page(browser, url: str, request):
    """The page as a desktop sees it; what it asks of other machines, and what fails in it, fails the test."""
    wide = getattr(request, "param", True)
    size = {"width": 1200, "height": 900} if wide else {"width": 360, "height": 780}
    opened = browser.new_page(viewport=size, has_touch=not wide)
    foreign: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda asked: foreign.append(asked.url) if not at_home(asked.url, url) else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(60_000)
    opened.goto(url)
    opened.wait_for_selector("#ask")
    yield opened
    opened.close()
    assert foreign == []
    assert errors == []


def at_home(asked: str, url: str) -> bool:
    return asked.startswith((url, url.replace("http", "ws", 1), "data:", "blob:"))


def fill(page: Any, selector: str, value: str) -> None:
    """A slider's number, or a text."""
    box = page.locator(selector).first
    box.fill(value)
    box.press("Tab")


def ask(page: Any) -> None:
    page.click("#ask")
    page.wait_for_function("/tokens? ·/.test(document.querySelector('#stats-A').innerText)")


def steps_shown(page: Any, side: str = "A") -> list[str]:
    return page.locator(f"#answer-{side} .rd-token").evaluate_all("all => all.map(one => one.dataset.steps)")


def settled(page: Any, side: str = "A") -> list[str]:
    """The steps of an answer that does not grow any more, those of a token without text beside the next one's."""
    before = None
    while (now := steps_shown(page, side)) != before or not now:
        before = now
        time.sleep(1)
    return [taken for unit in now for taken in re.findall(r"\d+", unit)]


@pytest.mark.slow
def test_the_slider_sets_the_steps_and_the_exit_test_varies_them(page) -> None:
    page.uncheck("#compare input")
    fill(page, "#prompt textarea", "hello")
    fill(page, "#depth-A input[type=number]", "3")
    ask(page)
    assert settled(page) == ["3"] * 64
    assert "64 tokens · 3.0 steps each" in page.inner_text("#stats-A")
    assert page.locator("#side-B").is_hidden()
    fill(page, "#depth-A input[type=number]", "12")
    page.click("#test-A input")
    page.get_by_role("option", name="latent-diff").click()
    page.locator("#side-A").get_by_label("Threshold").fill("0.6")
    page.keyboard.press("Tab")
    ask(page)
    page.wait_for_function("!/64 tokens · 3.0/.test(document.querySelector('#stats-A').innerText)")
    assert len(set(settled(page))) > 1


@pytest.mark.slow
def test_two_answers_side_by_side_and_a_look_inside_by_keyboard(page) -> None:
    fill(page, "#prompt textarea", "hello")
    fill(page, "#depth-A input[type=number]", "2")
    fill(page, "#depth-B input[type=number]", "9")
    page.focus("#prompt textarea")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("#answer-B .rd-token")
    assert set(settled(page)) == {"2"}
    assert set(settled(page, "B")) == {"9"}
    page.focus("#answer-B .rd-token[tabindex='0']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#inside table")
    assert page.locator("#inside tbody tr").count() == 9
    assert page.locator("#answer-B .rd-token").nth(1).get_attribute("aria-pressed") == "true"
    chosen = page.locator("#inside h3 code").inner_text()
    assert page.locator("#inside tbody tr").last.locator("code").first.inner_text() == chosen


@pytest.mark.slow
def test_a_checkpoint_without_a_tokenizer_is_told_in_a_line(model, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    model.save_pretrained(tmp_path)
    with pytest.raises(redepth.RedepthError, match="has no tokenizer; put"):
        redepth.play(tmp_path, port=0)


@pytest.mark.slow
def test_problems_are_marked_and_mistakes_are_told(page) -> None:
    page.click("#problems button")
    page.click("#problem")
    page.wait_for_function("/difficulty 4/.test(document.querySelector('#problem-note').innerText)")
    ask(page)
    page.wait_for_selector("#stats-A .rd-mark")
    assert "wrong: it is" in page.inner_text("#stats-A")  # a random model knows nothing
    fill(page, "#prompt textarea", " ")
    page.click("#ask")
    page.wait_for_selector("text=the prompt is empty")
    fill(page, "#prompt textarea", "x" * 500)
    page.click("#ask")
    page.wait_for_selector("text=are allowed; shorten it")


@pytest.mark.slow
@pytest.mark.parametrize("page", [False], indirect=True)
def test_a_narrow_screen_needs_no_sideways_scrolling(page) -> None:
    fill(page, "#prompt textarea", "hello")
    ask(page)
    settled(page)
    page.locator("#answer-A .rd-token").nth(3).tap()
    page.wait_for_selector("#inside table")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shown = page.evaluate("getComputedStyle(document.querySelectorAll('#answer-A .rd-token')[3], '::after').content")
    assert "step" in shown


@pytest.mark.slow
def test_stop_ends_an_answer_and_frees_its_row(page, models: list[Served], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = models[0].runner.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    page.uncheck("#compare input")
    fill(page, "#prompt textarea", "hello")
    fill(page, "#depth-A input[type=number]", "12")
    ask(page)
    page.click("#stop")
    wait_until(lambda: not engine.has_work)
    assert 0 < len(settled(page)) < 64


@pytest.mark.slow
def test_pictures_for_the_docs(browser) -> None:
    """REDEPTH_DEMO=demo, the folder that `make demo` leaves, has docs/images drawn anew; look at them."""
    demo = os.environ.get("REDEPTH_DEMO")
    if not demo:
        pytest.skip("REDEPTH_DEMO names no folder")
    limits = Limits(num_steps=16)
    room = {"max_rows": 4, "max_tokens": 4096}
    looped, static, text = (Served.load(Path(demo) / name, limits, **room) for name in ("looped", "static", "smollm2"))
    with open_page([looped, static]) as url:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(url)
        fill(page, "#difficulty input[type=number]", "6")
        page.click("#problem")
        page.wait_for_function("/difficulty 6/.test(document.querySelector('#problem-note').innerText)")
        fill(page, "#depth-A input[type=number]", "9")
        ask(page)
        page.wait_for_selector("#stats-B .rd-mark")
        page.locator("#answer-A .rd-token").first.click()
        page.wait_for_selector("#inside table")
        page.screenshot(path=IMAGES / "play-problem.png", full_page=True)
        page.close()
    with open_page([text]) as url:
        for name, size in (("play-text.png", (1100, 800)), ("play-phone.png", (390, 844))):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.set_default_timeout(240_000)
            page.goto(url)
            page.wait_for_selector("#ask")
            fill(page, "#prompt textarea", "Why is the sky blue?")
            fill(page, "#depth-A input[type=number]", "12")
            page.click("#test-A input")
            page.get_by_role("option", name="kl", exact=True).click()
            page.locator("#side-A").get_by_label("Threshold").fill("0.0003")
            page.keyboard.press("Tab")
            if name == "play-text.png":
                page.check("#compare input")
                fill(page, "#depth-B input[type=number]", "1")
            ask(page)
            page.wait_for_selector("#answer-A .rd-token:nth-child(40)")
            settled(page)
            page.locator("#answer-A .rd-token").nth(2).click()
            page.wait_for_selector("#inside table")
            page.screenshot(path=IMAGES / name, full_page=name == "play-text.png")
            page.close()
