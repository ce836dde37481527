"""The commands as a user runs them: a good run, a wrong one, and the help."""

import contextlib
import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from redepth.cli import console, main
from tests.test_healing import byte_tokenizer


@pytest.fixture(scope="module")
def source(zoo, tmp_path_factory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("cli") / "source"
    shutil.copytree(zoo["qwen3"], folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    import redepth

    out = source.parent / "recurrent"
    redepth.convert(source, out, core="2:4")
    return out


@pytest.fixture
def redepth_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["redepth", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


COMMANDS = (
    "plan",
    "convert",
    "verify",
    "inspect",
    "heal",
    "calibrate",
    "retrofit",
    "generate",
    "chat",
    "play",
    "serve",
    "new",
    "eval",
    "analyze",
    "publish",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(redepth_command, name: str) -> None:
    code, out, _ = redepth_command(name, "--help")
    assert code == 0
    assert f"Example: redepth {name}" in out


def test_dry_run_prints_the_price_and_writes_nothing(redepth_command, source: Path, tmp_path: Path) -> None:
    code, out, _ = redepth_command(
        "convert", source, tmp_path / "out", "--core", "3:4", "--coda", "5:6", "--dry-run", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert report["dropped_layers"] == [4]
    assert set(report["forward_flops_per_token"]) == {"1", "4", "8", "16", "32"}
    assert report["parameters"]["total"] == sum(
        count for part, count in report["parameters"].items() if part != "total"
    )
    assert list(tmp_path.iterdir()) == []
    code, out, _ = redepth_command("convert", source, "--dry-run")
    assert "forward FLOPs per token" in out


def test_plan_proposes_what_convert_takes(redepth_command, source: Path, tmp_path: Path) -> None:
    words = ("plan", source, "--rows", 5, "--sequence-length", 16, "--core-layers", 2, "--drop-layers", 1)
    code, out, _ = redepth_command(*words, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["tokens"] == 5 * 16
    assert len(report["layers"]) == 6
    assert all(len(one["dropped_layers"]) == 1 for one in report["dropping"])
    best = report["whole"][0]
    assert best["dropped_layers"] == []
    assert report["command"] == f"redepth convert {source} OUT --core {best['core']} --adapter {best['adapter']}"
    convert_words = [str(tmp_path / "out") if word == "OUT" else word for word in report["command"].split()[1:]]
    assert redepth_command(*convert_words, "-q")[0] == 0

    code, out, _ = redepth_command(*words)
    assert code == 0
    assert "influence" in out
    assert "1 layers dropped" in out
    assert report["command"] in out.replace("\n", "")
    code, out, _ = redepth_command(*words, "--adapter", "blend:0.5", "-q")
    assert out.startswith("redepth convert")
    assert out.count("\n") == 1


def test_convert_verifies_and_reports(redepth_command, source: Path, tmp_path: Path) -> None:
    code, out, _ = redepth_command("convert", source, tmp_path / "out", "--core", "2:4", "--json")
    assert code == 0
    assert json.loads(out)["verification"]["passed"]
    code, out, _ = redepth_command("verify", tmp_path / "out", "--against", source)
    assert code == 0
    assert "differs" in out


def test_a_source_keeps_its_architecture(redepth_command, tmp_path: Path) -> None:
    file = Path(__file__).parent / "golden" / "griffin-tiny" / "griffin-tiny.pt"
    assert redepth_command("convert", file, tmp_path / "out", "--keep-architecture")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "recurrent_gemma"
    code, _, err = redepth_command("convert", file, tmp_path / "other", "--keep-architecture", "--core", "1:2")
    assert code == 2
    assert "--keep-architecture does no surgery" in err


def test_failed_verification_is_an_exit_code(redepth_command, source: Path, zoo, tmp_path: Path) -> None:
    redepth_command("convert", source, tmp_path / "out", "--core", "2:4", "--no-verify", "-q")
    code, _, err = redepth_command("verify", tmp_path / "out", "--against", zoo["llama"], "-q")
    assert code == 2
    assert err.count("\n") == 1


def test_heal_and_generate(redepth_command, source: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "out"
    redepth_command("convert", source, out_folder, "--core", "2:4", "--no-verify", "-q")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "heal: {sequence_length: 16, batch_size: 2, micro_batch_size: 2, eval_rows: 2, eval_depths: [1, 3]}"
    )
    code, out, _ = redepth_command("heal", out_folder, "--recipe", recipe, "--max-steps", 2, "--json")
    assert code == 0
    assert set(json.loads(out)["loss_after"]) == {"1", "3"}
    code, out, _ = redepth_command("generate", out_folder, "a depth", "--num-steps", 2, "--max-new-tokens", 4)
    assert code == 0
    assert "a depth" in out
    words = ("generate", out_folder, "a depth", "--num-steps", 8, "--max-new-tokens", 4, "--criterion", "latent-diff")
    code, out, err = redepth_command(*words, "--exit-threshold", 0.5)
    assert code == 0
    assert "steps a token on average" in err
    assert 2 <= json.loads(redepth_command(*words, "--json")[1])["mean_steps"]["8"] <= 8
    code, out, err = redepth_command(*words, "--show-steps")
    assert code == 0
    assert "steps:" in err
    words = words[:-2]
    code, out, err = redepth_command(*words, "--draft-steps", 2)
    assert "drafted tokens kept" in err
    code, out, err = redepth_command(*words, "--sampler", "wavefront", "--headway", 2, "--json")
    assert 0 <= json.loads(out)["stats"]["8"]["agreement"] <= 1
    assert code == 0
    plain, warm = (redepth_command(*words, *more, "--json") for more in ((), ("--continuous-compute",)))
    assert plain[0] == warm[0] == 0
    code, out, _ = redepth_command(
        "generate", out_folder, "a depth", "--num-steps", 1, "--num-steps", 4, "--max-new-tokens", 4, "--json"
    )
    assert set(json.loads(out)["continuations"]) == {"1", "4"}
    code, out, err = redepth_command("generate", out_folder, "a depth " * 15, "--num-steps", 1, "--max-new-tokens", 40)
    assert code == 0
    assert "where the model's room does" in err
    code, out, _ = redepth_command(
        "generate", out_folder, "a depth", "--num-steps", 1, "--num-steps", 4, "--temperature", 1
    )
    assert "r = 4" in out


def test_calibrate(redepth_command, source: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "out"
    redepth_command("convert", source, out_folder, "--core", "2:4", "--no-verify", "-q")
    small = ("--rows", 2, "--sequence-length", 32, "--most-steps", 5)
    code, out, _ = redepth_command("calibrate", out_folder, *small)
    assert code == 0
    assert "default from now on" in out
    assert len(json.loads(redepth_command("calibrate", out_folder, *small, "--json")[1])["loss"]) == 5
    assert "calibrated on 64 tokens" in redepth_command("inspect", out_folder)[1]
    assert "Measured on 64 tokens" in (out_folder / "README.md").read_text()


def talk(redepth_command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *lines) -> tuple[list[str], str]:
    """What a chat asks for, line by line, and all that it prints; an exception among the lines is raised at the prompt."""
    waiting, prompts = iter([*lines, "/quit"]), []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", ask)
    code, out, _ = redepth_command("chat", checkpoint, "--max-new-tokens", 3)
    assert code == 0
    return prompts, out


def test_chat(redepth_command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("hello", "/steps 3", "/steps 0", "/steps x", "/nonsense", "/clear", "again")
    prompts, out = talk(redepth_command, checkpoint, monkeypatch, *lines)
    assert prompts[0] == "[r = 1] > "
    assert prompts[-1] == "[r = 3] > "
    for told in ("at least 1", "whole number, got 'x'", "/nonsense is unknown"):
        assert told in out


def test_chat_changes_the_exit_test_and_shows_what_it_did(redepth_command, checkpoint, monkeypatch) -> None:
    lines = ("/steps 4", "/exit kl 1e9", "hello", "/show", "/exit nothing", "/exit off", KeyboardInterrupt(), "/help")
    prompts, out = talk(redepth_command, checkpoint, monkeypatch, *lines)
    assert prompts[2] == "[r ≤ 4, kl] > "
    assert prompts[-1] == "[r = 4] > "
    assert "num_steps=4 criterion=kl exit_threshold=1000000000.0" in out
    assert "mean 2.0 over 3 tokens" in out  # such a threshold lets every token go at the first comparison
    assert "unknown exit criterion 'nothing'" in out
    assert "/exit TEST" in out


def test_chat_stops_an_answer_at_ctrl_c_and_goes_on(redepth_command, checkpoint, monkeypatch) -> None:
    """The signal arrives while the first token is made: the answer ends with it, the chat does not."""
    from transformers import TextStreamer

    put, pressed = TextStreamer.put, []

    def press(self, value) -> None:
        put(self, value)
        if not pressed:
            pressed.append(signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(TextStreamer, "put", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the key
    try:
        _, out = talk(redepth_command, checkpoint, monkeypatch, "hello", "/show", "again", "/show")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "over 1 tokens" in out
    assert "over 3 tokens" in out


def test_chat_survives_what_is_too_long(redepth_command, checkpoint, monkeypatch) -> None:
    prompts, out = talk(redepth_command, checkpoint, monkeypatch, "x" * 200, "hello")
    assert "/clear forgets" in out
    assert len(prompts) == 3


def test_inspect_new_and_republish(redepth_command, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = redepth_command("inspect", checkpoint)
    assert code == 0
    assert "converted by redepth" in out
    code, out, _ = redepth_command("inspect", checkpoint, "--num-steps", 3, "--json")
    assert list(json.loads(out)["cache_bytes_per_token"]) == ["3"]
    code, out, _ = redepth_command("new", tmp_path / "fresh", "--tokenizer", checkpoint, "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["core"] > 0
    code, out, _ = redepth_command("new", "--preset", "huginn-3.5b", "--dry-run")
    assert "embedding" in out
    code, out, _ = redepth_command("convert", tmp_path / "fresh", tmp_path / "again", "--dtype", "bfloat16")
    assert code == 0
    assert "bfloat16" in redepth_command("inspect", tmp_path / "again")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "nobody/nothing/at-all"], "does not exist"),
        (["plan", "{source}", "--core-layers", "5"], "--core-layers 5 doesn't fit: the source has 6 layers"),
        (["plan", "{source}", "--drop-layers", "4"], "--drop-layers 4 doesn't fit"),
        (["plan", "{source}", "--adapter", "blend:7"], "'blend:7' is unknown"),
        (["plan", "{source}"], "--sequence-length 256 is more than the 128 tokens"),
        (["plan", "{source}", "--data", "none.txt", "--sequence-length", "16"], "'none.txt' does not exist"),
        (["plan", "{source}", "--data", "{short}", "--sequence-length", "64"], "shorter than one row of 64 tokens"),
        (["plan", "{source}", "--precision", "int3"], "'int3' is unknown"),
        (["plan", "{checkpoint}"], "recurrent already"),
        (["convert", "{source}", "{out}", "--core", "2:99"], "has 6 layers"),
        (["convert", "{source}"], "OUT is missing"),
        (["convert", "{source}", "{checkpoint}"], "already exists"),
        (["verify", "{source}"], "not made by redepth convert"),
        (["heal", "{source}"], "not a recurrent one"),
        (["heal", "{checkpoint}", "--recipe", "none.yaml"], "none.yaml does not exist"),
        (["heal", "{checkpoint}", "--data", "none.jsonl", "--sequence-length", "16"], "'none.jsonl' does not exist"),
        (["heal", "{checkpoint}"], "512 is more than the 128 tokens"),
        (["heal", "{checkpoint}", "--learning-rate", "-1"], "learning_rate"),
        (["generate", "{out}", "hi"], "does not exist"),
        (["generate", "{source}", "hi"], "not a recurrent one"),
        (["generate", "{checkpoint}", "hi", "--num-steps", "0"], "at least 1"),
        (["generate", "{checkpoint}", "hi", "--cache-rule", "ring"], "unknown cache rule 'ring'"),
        (["generate", "{checkpoint}", "hi", "--temperature", "-1"], "--temperature"),
        (["generate", "{checkpoint}", "hi", "--num-steps", "4", "--criterion", "kll"], "did you mean 'kl'"),
        (["generate", "{checkpoint}", "hi", "--criterion", "kl", "--exit-threshold", "-1"], "above 0"),
        (["generate", "{checkpoint}", "hi", "--criterion", "kl", "--exit-threshold", "99%"], "run redepth calibrate"),
        (["generate", "{checkpoint}", "hi", "--num-steps", "4", "--criterion", "kl", "--min-steps", "5"], "min_steps"),
        (["generate", "{checkpoint}", "hi", "--min-steps", "5"], "--min-steps needs --criterion"),
        (["generate", "{checkpoint}", "hi", "--num-steps", "4", "--draft-steps", "4"], "draft_steps must be between"),
        (["generate", "{checkpoint}", "hi", "--headway", "2"], "--headway needs --sampler wavefront"),
        (["generate", "{checkpoint}", "hi", "--sampler", "wave"], "unknown sampler"),
        (["generate", "{checkpoint}", "hi", "--sampler", "wavefront", "--criterion", "kl"], "can't go with criterion"),
        (["inspect", "{checkpoint}", "--cache-rule", "lates"], "did you mean 'latest'"),
        (["calibrate", "{out}"], "does not exist"),
        (["calibrate", "{source}"], "not a recurrent one"),
        (["calibrate", "{checkpoint}"], "256 is more than the 128"),
        (["calibrate", "{checkpoint}", "--most-steps", "1"], "at least 2"),
        (["calibrate", "{checkpoint}", "--sequence-length", "32", "--data", "none.txt"], "'none.txt' does not exist"),
        (["generate", "{checkpoint}", "hello " * 40], "128 this model allows"),
        (["chat", "{checkpoint}", "--num-steps", "-3"], "at least 1"),
        (["inspect", "{source}"], "not a recurrent one"),
        (["inspect", "{checkpoint}", "--num-steps", "0"], "at least 1"),
        (["new", "{out}", "--preset", "pico"], "preset 'pico' is unknown"),
        (["new"], "OUT is missing"),
        (["convert", "{checkpoint}", "{out}", "--core", "2:4"], "recurrent already"),
    ],
)
def test_mistakes_end_in_one_line(redepth_command, source, checkpoint, tmp_path: Path, words, message) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    places = {"source": source, "checkpoint": checkpoint, "out": tmp_path / "out", "short": short}
    code, _, err = redepth_command(*(word.format(**places) for word in words))
    assert code == 2
    assert message in err
    assert err.startswith("redepth: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_options_exit_with_two(redepth_command) -> None:
    assert redepth_command("convert", "--cores", "1:2")[0] == 2


def test_heal_dry_run_says_what_it_will_be_and_leaves_nothing(redepth_command, checkpoint: Path) -> None:
    before = sorted(checkpoint.rglob("*"))
    words = ("heal", checkpoint, "--dry-run", "--sequence-length", "16", "--max-steps", "5", "--eval-depths", "1,3")
    code, out, _ = redepth_command(*words, "--train", "core+adapter", "--no-separate-documents", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["tokens"] == 5 * 8 * 16
    assert set(plan["trainable"]) == {"core", "adapter"}
    assert set(plan["loss_before"]) == {"1", "3"}
    code, out, _ = redepth_command(*words)
    assert code == 0
    assert all(word in out for word in ("FLOPs", "GiB", "minutes", "parameters", "r = 3"))
    assert sorted(checkpoint.rglob("*")) == before


def test_every_key_of_the_recipe_is_a_flag(redepth_command) -> None:
    from redepth.healing.recipe import HealRecipe

    _, out, _ = redepth_command("heal", "--help")
    shown = "".join(out.split())
    for key, field in HealRecipe.model_fields.items():
        assert field.description
        flag = f"--{key.replace('_', '-')}"
        assert key in ("phases", "stages") or flag in shown or f"{flag[:15]}" in shown, key


def test_heal_mistakes_leave_nothing(redepth_command, checkpoint: Path) -> None:
    for words, message in (
        (("--report-to", "nonsense"), "report_to 'nonsense'"),
        (("--optimizer", "adamw_bnb_8bit"), "bitsandbytes"),
        (("--eval-depths", "0,4"), "none below 1"),
        (("--curriculum", "steep"), "curriculum = 'steep'"),
        (("--teacher", "nowhere/at/all", "--distill", "0.5"), "does not exist"),
    ):
        code, _, err = redepth_command("heal", checkpoint, "--sequence-length", "16", *words)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert message in err
    assert not (checkpoint / "healing").exists()


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr(console, "remarks", Console(file=log))
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with contextlib.suppress(KeyboardInterrupt), console.progress_bar(quiet=False) as update:
        for second in range(100):
            clock[0] = float(second)
            update("training", second / 200, f"step {second}")
        update("evaluate", 0.0)
        update("evaluate", 1.0)
        update("calibrate", 0.5)
        raise KeyboardInterrupt
    assert log.getvalue().splitlines() == [
        "training 15 %: step 30",
        "training 30 %: step 60",
        "training 45 %: step 90",
        "evaluate 100 %",
        "training 50 %: step 99",
        "calibrate 50 %",
    ]


def test_quiet_progress_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(console, "remarks", Console(file=log))
    with console.progress_bar(quiet=True) as update:
        update("training", 1.0)
    assert log.getvalue() == ""
