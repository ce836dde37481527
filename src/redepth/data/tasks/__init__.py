"""Procedural reasoning: problems without end, offline and seeded, whose answers have a difficulty and steps.

A task makes problems of three splits: `train`; `held-out`, of the same difficulty and never met in training, whatever the
seeds, since a hash of the problem's content decides its side; and `harder`, of more difficulty than training asks. It
renders them as text for any tokenizer (`Task.texts`: which characters are answers, how difficult each is, and what to say
there after every step), with the intermediate results written out (`Task.scratchpads`), and, where it derives from
`ArrayTask`, as compact ids for small models (`ArrayTask.batch`, `ArrayTask.scratchpad_batch`). Step i's label is the
intermediate result after i steps, and the answer from the last step on: a fixed point.

`open_task("task:roots?depth=0-6&nodes=16")` opens one by its spec. A user's own is a dataclass that derives from `Task` or
`ArrayTask`, opened as `task:package.module:Class?option=value`; its fields are its options. docs/tasks.md has an example.
`TextEncoder` turns texts into ids and labels for a tokenizer.
"""

from .arrays import ArrayTask, Problems
from .encode import IGNORED, EncodedTexts, TextEncoder
from .protocol import SPLITS, Answer, ScratchpadBatch, Split, Task, TaskBatch, TaskText
from .specs import TASKS, is_import_path, is_task, open_task

__all__ = [
    "IGNORED",
    "SPLITS",
    "TASKS",
    "Answer",
    "ArrayTask",
    "EncodedTexts",
    "Problems",
    "ScratchpadBatch",
    "Split",
    "Task",
    "TaskBatch",
    "TaskText",
    "TextEncoder",
    "is_import_path",
    "is_task",
    "open_task",
]
