"""`--accumulate auto`: the fewest micro-batches that fit into the memory of the GPU."""

import json

import pytest

from semidetr_lite.errors import UserError
from semidetr_lite.training import loop, memory
from semidetr_lite.training.loop import Run
from semidetr_lite.training.memory import choose_micro_batches, possible_micro_batches
from semidetr_lite.training.settings import change, new_config
from tests.test_train import go, small, splits  # noqa: F401


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "processes", "counts"),
    [
        (8, 32, 1, [8, 4, 2, 1]),
        (6, 9, 1, [3, 1]),
        (16, 0, 1, [16, 8, 4, 2, 1]),
        (8, 32, 2, [8, 4, 2]),
        (8, 32, 3, [8]),
    ],
)
def test_micro_batches_of_equal_size_and_mix(monkeypatch, labelled, unlabelled, processes, counts):
    monkeypatch.setattr(memory, "world_size", lambda: processes)
    assert possible_micro_batches(labelled, unlabelled) == counts


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(500, 1), (400, 1), (395, 2), (225, 2), (200, 4), (140, 4), (120, 8), (1, 8)],
)
def test_the_fewest_that_fit_and_none_that_does_not(free, chosen):
    """An image takes 8 of the memory, gradients 20; a tenth of what is free stays free."""
    tried = []

    def largest_step(count):
        tried.append(count)
        return 20 + 8 * 40 // count, free

    assert choose_micro_batches([8, 4, 2, 1], largest_step) == chosen
    assert all(20 + 8 * 40 / count <= 0.9 * free for count in tried[1:])


def test_the_process_with_the_least_memory_decides(monkeypatch):
    monkeypatch.setattr(memory, "all_gather", lambda value: [value, True])
    assert choose_micro_batches([8, 4, 2, 1], lambda count: (1, 10**9)) == 8


def test_on_a_cpu_it_is_one(splits, tmp_path):
    run = Run(small(accumulate="auto"), tmp_path / "run", splits=splits, workers=0, quiet=True)
    assert run.config.runtime.accumulate == 1 == run.engine.num_micro_batches


def test_it_is_chosen_once_stored_and_kept_on_resume(splits, tmp_path, monkeypatch):
    """A CPU plays a GPU whose memory the largest step in two micro-batches just fits."""
    resolve, asked = loop._resolve_runtime, []

    def as_on_a_gpu(config, device):
        accumulate = config.runtime.accumulate
        return change(resolve(config, device), accumulate=accumulate)

    monkeypatch.setattr(loop, "_resolve_runtime", as_on_a_gpu)
    config = small(batch_size=4, unlabelled_batch_size=8, accumulate="auto", steps=2)
    fits_from = {4: (100, 230), 2: (190, 230)}
    engines = []

    def by_count(work):
        count = engines[-1].num_micro_batches
        asked.append(count)
        return fits_from[count]

    monkeypatch.setattr(loop, "gpu_memory_of", by_count)
    build = Run._build

    def building(self, state):
        build(self, state)
        engines.append(self.engine)

    monkeypatch.setattr(Run, "_build", building)
    run = Run(config, tmp_path / "run", splits=splits, workers=0, quiet=True)
    assert run.config.runtime.accumulate == 4  # until it is tried: the safest
    run.run()
    assert asked == [4, 2] and run.engine.num_micro_batches == 2
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["runtime"]["accumulate"] == 2
    resumed = Run(None, tmp_path / "run", resume=True, splits=splits, workers=0, quiet=True)
    assert resumed.engine.num_micro_batches == 2
    loop.train_or_resume(config, tmp_path / "run", workers=0, quiet=True)  # finished: no fault
    assert asked == [4, 2]


def test_a_number_that_cannot_be_names_its_option():
    for wrong in (0, "many"):
        with pytest.raises(UserError, match="^--accumulate: "):
            new_config(accumulate=wrong)
    assert new_config(accumulate="auto").runtime.accumulate == "auto"
