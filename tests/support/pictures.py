"""Naming the colour of a square: a task of drawn pictures, and of videos of two of them, that is scored exactly.

verl finds the reward by ``reward.custom_reward_function.path=<this file>``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from verl_m2po.ground.files import replacing
from verl_m2po.tasks.task import SPLITS

DATA_SOURCE = "pictures"
SIZE_PIXELS = 64
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}
BACKGROUND = (90, 90, 90)
SHADE = 30
VIDEO_ONE_IN = 4
"""One row in this many is a video: the square moves from its first frame to its second."""
QUESTION = "colour?"


class Drawing(NamedTuple):
    """One row.

    Args:
        colour: the answer.
        frames: RGB, `SIZE_PIXELS` wide and high; one of a picture, two of a video.
    """

    colour: str
    frames: tuple[Image.Image, ...]

    @property
    def is_video(self) -> bool:
        """Whether it moves."""
        return len(self.frames) > 1


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward for this task: 1.0 if the whole response is the name of the colour, else 0.0.

    Args:
        data_source: Column of that name; `DATA_SOURCE`.
        solution_str: The decoded response, special tokens removed.
        ground_truth: Name of the colour.
        extra_info: Unused.
    """
    return float(solution_str.strip() == ground_truth)


def drawing(index: int, *, split: str, seed: int = 0) -> Drawing:
    """Row `index`, which depends on nothing but the arguments.

    Args:
        index: Position of the row, from 0.
        split: ``train`` or ``validation``.
        seed: A whole number, 0 or more.
    """
    stream = np.random.Philox(np.random.SeedSequence([seed, index, SPLITS.index(split)]))

    def draw(below: int) -> int:
        return int(stream.random_raw()) % below

    colour = list(COLOURS)[draw(len(COLOURS))]
    fill = tuple(min(255, max(0, value + draw(2 * SHADE) - SHADE)) for value in COLOURS[colour])
    side = SIZE_PIXELS // 4 + draw(SIZE_PIXELS // 2)
    frames = []
    for _ in range(2 if index % VIDEO_ONE_IN == VIDEO_ONE_IN - 1 else 1):
        left, top = draw(SIZE_PIXELS - side), draw(SIZE_PIXELS - side)
        image = Image.new("RGB", (SIZE_PIXELS, SIZE_PIXELS), BACKGROUND)
        ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=fill)
        frames.append(image)
    return Drawing(colour, tuple(frames))


def write_parquet(out: Path, *, train_rows: int = 1024, validation_rows: int = 64, seed: int = 0) -> dict[str, Path]:
    """Write ``train.parquet``, ``validation.parquet`` and their pictures into `out`; return the two by split.

    Args:
        out: Folder, made where it is missing; files of those names are replaced.
        train_rows: Rows to train on.
        validation_rows: Rows to validate on.
        seed: A whole number, 0 or more.
    """
    counts = {"train": train_rows, "validation": validation_rows}
    return {split: _write(Path(out).expanduser().absolute(), split, rows, seed) for split, rows in counts.items()}


def _write(out: Path, split: str, rows: int, seed: int) -> Path:
    (out / split).mkdir(parents=True, exist_ok=True)
    path = out / f"{split}.parquet"
    table = pa.Table.from_pylist([_row(out / split, index, split, seed) for index in range(rows)])
    with replacing(path) as part:
        pq.write_table(table, part)
    return path


def _row(folder: Path, index: int, split: str, seed: int) -> dict[str, Any]:
    drawn = drawing(index, split=split, seed=seed)
    files = []
    for number, frame in enumerate(drawn.frames):
        files.append(str(folder / f"{index}-{number}.png"))
        frame.save(files[-1])
    content = f"{'<video>' if drawn.is_video else '<image>'}{QUESTION}"
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": content}],
        "images": [] if drawn.is_video else files,
        "videos": [{"video": files, "min_pixels": SIZE_PIXELS**2, "max_pixels": SIZE_PIXELS**2}]
        if drawn.is_video
        else [],
        "ability": "vision",
        "reward_model": {"style": "rule", "ground_truth": drawn.colour},
        "extra_info": {"split": split, "index": index, "question": QUESTION, "answer": drawn.colour},
    }
