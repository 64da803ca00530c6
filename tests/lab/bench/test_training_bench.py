from pathlib import Path

import pytest

from spectrim.lab.bench.training_bench import bench_training, default_shares, lines


def test_the_parts_of_a_step_are_within_it_and_rates_belong_together(text_folder: Path, cache_dir: Path) -> None:
    row = bench_training(
        preset="tiny",
        recipe="adamw",
        steps=6,
        batch_size=2,
        sequence_length=16,
        sources=(str(text_folder),),
        cache_dir=cache_dir,
    )
    assert row.steps == 4
    assert row.tokens_per_step == 32
    assert row.ratio == pytest.approx(row.lab_tokens_per_second / row.bare_tokens_per_second)
    assert row.evaluation_ms > 0
    assert row.checkpoint_ms > 0
    # What the bare loop takes is not counted as the lab's.
    step_ms = 1000 * row.tokens_per_step / row.lab_tokens_per_second
    assert 0 < row.logging_ms < step_ms
    assert 0 < row.overhead < 1
    assert sum(default_shares(row).values()) == pytest.approx(1)
    assert "tokens/s" in "\n".join(lines(row))
