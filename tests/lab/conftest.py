"""Small text, a cache of its own, one thread: what keeps the lab's tests fast on a busy machine."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spectrim.lab.config import DataConfig, EvaluationConfig, ModelConfig, TrainConfig

WORDS = ("the", "of", "and", "to", "union", "congress", "public", "people", "peace", "law", "year", "country", "nation")


def write_text(path: Path, words: int, seed: int) -> Path:
    """Text that is nobody's, with line ends, the same for the same seed."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(max(1, words // 12))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files for the pictures beside a page, which tests/lab/reports look at: drawing them takes nearly half of
    what a small comparison takes."""

    def touch(folder: Path, stem: str, *_: object) -> None:
        for suffix in ("png", "svg"):
            (folder / f"{stem}.{suffix}").touch()

    monkeypatch.setattr("spectrim.lab.reports.pictures.write", touch)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents of 600 words."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(8):
        write_text(folder / f"{index}.txt", 600, seed=index)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache that all tests share: equal text is tokenized once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_config(text_folder: Path) -> TrainConfig:
    """A run that takes a second: a tiny model, six steps, an evaluation after every second one."""
    return TrainConfig(
        recipe="adamw",
        steps=6,
        checkpoint_every=2,
        data=DataConfig(sources=(str(text_folder),), vocabulary_size=300, batch_size=2, sequence_length=16),
        model=ModelConfig(preset="tiny"),
        evaluation=EvaluationConfig(times=3, batches=1),
    )
