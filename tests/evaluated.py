"""What the tests of evaluation share: rows of lm-eval's tasks, and two small models with a tokenizer."""

import json
import shutil
from pathlib import Path

import redepth
from tests.test_healing import byte_tokenizer

QUESTIONS = ["what is red", "is ice hot", "who eats", "where is up", "why"]


def write_rows(folder: Path) -> Path:
    """Rows of four tasks in their hub schemas."""
    contents = {
        "arc_easy": [
            {
                "question": q,
                "choices": {"text": [q[-3:], "no", "yes it is"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i, q in enumerate(QUESTIONS)
        ],
        "sciq": [
            {
                "support": "",
                "question": q,
                "distractor1": "a",
                "distractor2": "bc",
                "distractor3": "d",
                "correct_answer": q[:4],
            }
            for q in QUESTIONS
        ],
        "lambada_openai": [{"text": f"over the {q} end{i}"} for i, q in enumerate(QUESTIONS)],
        "gsm8k": [{"question": q, "answer": f"so\n#### {i}"} for i, q in enumerate(QUESTIONS)],
    }
    for name, content in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def make_models(zoo: dict[str, Path], root: Path) -> Path:
    """A source, and a recurrent checkpoint made of it, which read 512 tokens."""
    shutil.copytree(zoo["qwen3"], root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    config = json.loads((root / "source" / "config.json").read_text())
    (root / "source" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    redepth.convert(root / "source", root / "recurrent", core="2:4", adapter="blend:0.5", state="embed")
    return root
