"""The page: prompt, depth, answers side by side, problems to try, and the look inside a token."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr

from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy
from redepth.serving.answers import Batch
from redepth.serving.limits import Refusal
from redepth.serving.request import Sampling
from redepth.serving.served import Served
from redepth.serving.sockets import listen

from .inside import inside_html, look_inside
from .problems import HARDEST, Example, make_example, task_names, trained_task
from .shading import answer_html, legend_html, style_sheet
from .sides import FIXED, TESTS, Side, parameter_counts, policy_of, stats_html

MOST_CHARACTERS = 8000
MOST_NEW_TOKENS = 512
MOST_INSIDE_TOKENS = 1024
REDRAW_SECONDS = 0.1
CONTINUE, REPLY = "continue the text", "reply to a message"
EXAMPLES = ("The capital of France is", "Depth is", "Once upon a time there was a robot who")
HEAD = """<div class="rd-head"><h1>How deep does it think?</h1><p>{names}. Each token is shaded by the steps it took;
hover, tap or walk through the text with the arrow keys, and open a token to see what every step would have said.</p></div>"""


def theme() -> Any:
    """Fonts of the reader's own machine, so that nothing is fetched."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def style() -> str:
    return style_sheet() + files("redepth.playground").joinpath("page.css").read_text("utf-8")


class Page:
    """The page of one model or two.

    Args:
        models: one, or two to compare; their runners are running.
    """

    def __init__(self, models: Sequence[Served]) -> None:
        self.models = list(models)
        self.counts = parameter_counts(models)
        self.own_task = next(filter(None, (trained_task(served.checkpoint) for served in models)), None)
        self.most_steps = max(served.most_steps for served in models)

    def build(self) -> Any:
        """The Blocks, ready to launch."""
        names = [served.name for served in self.models]
        first = self.models[0]
        script = files("redepth.playground").joinpath("tokens.js").read_text("utf-8")
        with gr.Blocks(title="redepth", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(HEAD.format(names=" and ".join(names)))
            prompt = gr.Textbox(
                label="Prompt (Shift+Enter asks)",
                value=EXAMPLES[0] if self.own_task is None else "",
                lines=2,
                max_lines=10,
                max_length=MOST_CHARACTERS,
                elem_id="prompt",
            )
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
                compare = gr.Checkbox(label="Compare two", value=len(names) > 1, elem_id="compare", min_width=120)
            example = gr.State(None)
            problem, problem_note = self._problems(prompt, example)
            sides = []
            with gr.Row(equal_height=False):
                for number in range(2):
                    sides.append(self._side(number, script))
            legend = gr.HTML(legend_html(first.most_steps), elem_id="legend")
            inside = gr.HTML("", elem_id="inside")
            with gr.Accordion("More settings", open=False):
                how = gr.Radio([CONTINUE, REPLY], value=self._usual_way(), label="What to do with the prompt")
                new_tokens = gr.Slider(1, MOST_NEW_TOKENS, value=64, step=1, label="Most new tokens")
                temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: always the likeliest token)")
                seed = gr.Number(value=0, minimum=0, maximum=2**32 - 1, precision=0, label="Seed")
            compare.change(
                lambda on: gr.update(visible=on),
                compare,
                sides[1]["column"],
                api_visibility="private",
                show_progress="hidden",
            )
            asked = [prompt, how, new_tokens, temperature, seed, compare, example]
            controls = [side[name] for side in sides for name in ("model", "depth", "test", "threshold")]
            shown = [side[name] for side in sides for name in ("answer", "stats", "state")]
            running: list[Any] = [
                trigger(self.ask, asked + controls, [*shown, legend, inside], api_visibility="private", show_progress="hidden",
                        concurrency_limit=4, concurrency_id="ask")
                for trigger in (ask.click, prompt.submit)
            ]  # fmt: skip
            stop.click(None, cancels=running, api_visibility="private")
            # A prompt that was typed is no problem whose answer is known.
            prompt.input(
                lambda: (None, ""), None, [example, problem_note], api_visibility="private", show_progress="hidden"
            )
            for side in sides:
                side["answer"].select(
                    self.open_token, side["state"], inside, api_visibility="private", show_progress="minimal",
                    concurrency_limit=2, concurrency_id="inside",
                )  # fmt: skip
            del problem
        return blocks.queue(max_size=32)

    def _usual_way(self) -> str:
        return REPLY if self.own_task is None and self.models[0].tokenizer.chat_template else CONTINUE

    def _side(self, number: int, script: str) -> dict[str, Any]:
        """The controls and the answer of one side."""
        names = [served.name for served in self.models]
        letter, mine = "AB"[number], self.models[min(number, len(names) - 1)]
        usual = min(mine.model.config.default_num_steps, mine.most_steps)
        with gr.Column(visible=number == 0 or len(names) > 1, min_width=300, elem_id=f"side-{letter}") as column:
            model = gr.Dropdown(names, value=mine.name, label=f"{letter}: model", visible=len(names) > 1)
            depth = gr.Slider(
                1,
                self.most_steps,
                value=usual if number == 0 or len(names) > 1 else 1,
                step=1,
                label=f"{letter}: depth (num_steps)",
                elem_id=f"depth-{letter}",
            )
            with gr.Row():
                test = gr.Dropdown(list(TESTS), value=FIXED, label="Exit test", min_width=150, elem_id=f"test-{letter}")
                threshold = gr.Textbox("", label="Threshold (empty: its default)", max_length=20, min_width=120)
            answer = gr.HTML(
                answer_html([], 1, f"answer {letter}"), js_on_load=script, elem_id=f"answer-{letter}", container=False
            )
            stats = gr.HTML(stats_html(""), elem_id=f"stats-{letter}")
        return {
            "column": column, "model": model, "depth": depth, "test": test, "threshold": threshold,
            "answer": answer, "stats": stats, "state": gr.State(None),
        }  # fmt: skip

    def _problems(self, prompt: Any, example: Any) -> tuple[Any, Any]:
        """Problems to try: their task, difficulty, and a button that makes one."""
        names = task_names(self.own_task)
        hardest = self.own_task.range_of("harder")[1] if self.own_task is not None else HARDEST
        with gr.Accordion("Reasoning problems to try", open=self.own_task is not None, elem_id="problems"):
            with gr.Row():
                task = gr.Dropdown(names, value=names[0], label="Task", visible=len(names) > 1, min_width=120)
                difficulty = gr.Slider(
                    1, hardest, value=min(4, hardest), step=1, label="Difficulty (steps it needs)", elem_id="difficulty"
                )
                button = gr.Button("New problem", elem_id="problem", min_width=120)
            note = gr.Markdown("", elem_id="problem-note")
        button.click(
            self.new_problem,
            [task, difficulty],
            [prompt, example, note],
            api_visibility="private",
            show_progress="hidden",
        )
        return button, note

    def new_problem(self, task: str, difficulty: float) -> tuple[str, Example, str]:
        try:
            made = make_example(task, int(difficulty), self.own_task)
        except RedepthError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return made.prompt, made, f"difficulty {made.difficulty}; the answer is marked right or wrong"

    async def ask(
        self,
        prompt: str,
        how: str,
        new_tokens: float,
        temperature: float,
        seed: float,
        compare: bool,
        example: Example | None,
        *controls: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answer on one side or both, as the tokens come."""
        try:
            settings = [controls[:4], controls[4:]][: 2 if compare else 1]
            as_message = how == REPLY and example is None
            wanted = [self._wanted(prompt, as_message, *each) for each in settings]
            most = max(policy.num_steps for _, policy, _ in wanted)
            batch = Batch(self.models[0].limits.seconds)
            sides = []
            for served, policy, ids in wanted:
                room = served.room_for(ids, None, int(new_tokens))
                sampling = Sampling(
                    max_new_tokens=min(room, example.new_tokens if example is not None else room),
                    temperature=float(temperature),
                    seed=int(seed),
                )
                answer = batch.add(served, ids, policy, sampling, continues=not as_message)
                sides.append(Side(served, self.counts[self.models.index(served)], answer, most))
            drawn_at = 0.0
            yield self._shown(sides, most, example)
            async for number, piece in batch.pieces():
                sides[number].take(piece)
                if time.perf_counter() - drawn_at > REDRAW_SECONDS:
                    drawn_at = time.perf_counter()
                    yield self._shown(sides, most, example)
            yield self._shown(sides, most, example)
        except (Refusal, RedepthError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def _wanted(
        self, prompt: str, as_message: bool, model: str, depth: float, test: str, threshold: str
    ) -> tuple[Served, DepthPolicy, list[int]]:
        """Who answers, how deep, and what is asked, in ids."""
        served = next(each for each in self.models if each.name == model)
        prompt = prompt or ""
        if len(prompt) > MOST_CHARACTERS:
            raise Refusal(f"the prompt has {len(prompt)} characters, but {MOST_CHARACTERS} are allowed; shorten it")
        if not prompt.strip():
            raise Refusal("the prompt is empty; type something, or take a problem")
        ids = served.render([{"role": "user", "content": prompt}]) if as_message else served.encode(prompt)
        return served, policy_of(served, depth, test, threshold or ""), ids

    def _shown(self, sides: list[Side], most: int, example: Example | None) -> tuple[Any, ...]:
        shown: list[Any] = []
        for number in range(2):
            if number < len(sides):
                side = sides[number]
                shown += [side.html(f"answer {'AB'[number]}"), side.stats(example), side]
            else:
                shown += [answer_html([], 1, "answer B"), stats_html(""), None]
        return (*shown, legend_html(most), "")

    async def open_token(self, side: Side | None, event: gr.EventData) -> str:
        """The look inside the token that was chosen."""
        if side is None:
            return ""
        try:
            ids, text, steps = side.chosen(int(event.place))
            if len(ids) > MOST_INSIDE_TOKENS:
                raise Refusal(f"only the first {MOST_INSIDE_TOKENS} tokens can be looked into")
            served, policy = side.served, side.answer.policy
            looking = served.runner.between_ticks(lambda: look_inside(served.model, served.tokenizer, ids, policy))
            return inside_html(await asyncio.wrap_future(looking), text, steps)
        except (Refusal, RedepthError, AttributeError) as error:
            raise gr.Error(str(error), print_exception=False) from None


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        RedepthError: where it is taken.
    """
    with listen(host, port) as taken:
        return taken.getsockname()[1]


def launch(
    models: Sequence[Served], host: str, port: int, *, wait: bool = True, on_start: Callable[[str], Any] | None = None
) -> Any:
    """Start the runners and the page.

    Args:
        wait: until Ctrl-C; else the launched Blocks are returned, to be closed by the caller.
        on_start: called with the page's address.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for served in models:
        served.runner.start()
    blocks = Page(models).build()
    try:
        _, where, _ = blocks.launch(
            server_name=host,
            server_port=port,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme(),
            css=style(),
            prevent_thread_lock=True,
        )
        if on_start is not None:
            on_start(where.rstrip("/"))
        if wait:
            blocks.block_thread()
    finally:
        if wait:
            for served in models:
                served.runner.close()
    return blocks
