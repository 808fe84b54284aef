"""The evaluator on test sets of any size: shared by processes with equal figures, in memory that does not
grow; and AP counted image by image, against pycocotools."""
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdg.evaluation import scale
from stdg.evaluation.box_precision import BoxPrecision
from stdg.evaluation.core import figures
from stdg.metrics import precision_of
from stdg.training.costs import feeding, feeding_table


def test_two_processes_give_the_figures_of_one():
    "Real processes make the records of a test set, and another counts them: not a bit differs."
    said, scenes = scale.measured(9, shards=2, intervals=10), scale.InventedScenes(9)
    alone = figures(scenes.records(range(9)), scenes, intervals=10)
    alone.pop('seconds_per_image')
    assert str(said['figures']) == str(alone)
    assert 0 < alone['AP50'] < 1 and 0 < alone['sgdet']['R@50'] < 1
    assert said['images'] == 9 and said['shards'] == 2 and said['seconds'] > said['counting_s'] > 0
    assert said['mb'] > 100, 'Python and PyTorch alone are more'


@pytest.mark.parametrize('shards, most', [(1, 300.), (2, 900.)])
def test_memory_is_of_the_process_that_held_most(monkeypatch, capsys, shards, most):
    "Those that make records count, too; alone a process has none to wait for."
    class Made:
        def __init__(self, command): pass
        def wait(self): return 0
    monkeypatch.setattr(scale.subprocess, 'Popen', Made)
    monkeypatch.setattr(scale, '_counted', lambda *given: dict(mb=300.))
    monkeypatch.setattr(scale, 'peak_of_children', lambda: 900.)
    scale.main(['9', '--shards', str(shards)])
    assert json.loads(capsys.readouterr().out)['mb'] == most


def test_memory_does_not_grow_with_images():
    """Twice as many images need no more memory than the rows that wait to be written, 1.2 kB an image until
    there are 1,000, and not what their tables take. (What is kept for intervals grows; none are asked for.)"""
    few = [record for _, record in scale.InventedScenes(20).records(range(20))]

    def peak(images):
        again = ((i, {name: values.copy() for name, values in few[i % 20].items()}) for i in range(images))
        tracemalloc.start()
        found = figures(again, scale.InventedScenes(images), ('sgdet',), protocol='strict', intervals=0)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found['images'] == images
        return held

    one, two = peak(300), peak(600)
    assert two - one < 500_000 < 300 * few[0]['boxes/found'].nbytes


def boxes(rng, n, classes, values):
    corner = rng.integers(0, 20, (n, 2))
    extent = rng.integers(0, 12, (n, 2))  # some without area
    return np.column_stack([corner, corner + extent, rng.integers(0, classes, n), values]).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([1, 7, 1000]))
def test_precision_is_that_of_pycocotools(seed, classes, block):
    "Crowded images, equal scores, boxes without area, classes that are missing: the same numbers, exactly."
    rng = np.random.default_rng(seed)
    precision, tables = BoxPrecision(classes + 1, block), []
    for n, m in rng.integers(0, 25, (6, 2)):
        tables.append((boxes(rng, n, classes, rng.integers(0, 4, n) / 4),
                       boxes(rng, m, classes, rng.random(m) < .3)))
        precision.add(*tables[-1])
    assert str(precision.compute()) == str(precision_of(*zip(*tables), classes + 1))


def test_more_than_a_hundred_of_a_class():
    "pycocotools counts the hundred surest of a class in an image."
    rng = np.random.default_rng(0)
    found, true = boxes(rng, 300, 2, rng.random(300)), boxes(rng, 40, 2, np.zeros(40))
    precision = BoxPrecision(2)
    precision.add(found, true)
    wanted = precision_of([found], [true], 2)
    assert str(precision.compute()) == str(wanted) and 0 < wanted['AP'] < 1


def test_what_eight_cards_need():
    "Eight cards of 334 pictures a second, 50 a core, 226 kB each: 2,672 pictures, 54 cores, 604 MB/s."
    layouts = dict(published=(50., 226.), rooms=(200., 40.))
    rows = feeding(layouts, {'ResNet-50': 334.})
    assert rows[0] == dict(network='ResNet-50', layout='published', gpus=8, pictures=2672., cores=54,
                           megabytes=pytest.approx(603.9, abs=.1))
    assert rows[1]['cores'] == 14 and rows[1]['megabytes'] == pytest.approx(106.88)
    assert feeding(layouts, {'x': 334.}, gpus=1)[0]['cores'] == 7
    table = feeding_table(rows)
    assert '| ResNet-50, published | 2,672 | 54 | 604 |' in table.splitlines()
    with pytest.raises(ValueError, match="layout 'published': 0 pictures a second"):
        feeding(dict(published=(0, 226.)), {'ResNet-50': 334.})
