"""The page about heads says what its file of figures says."""
import json
from pathlib import Path

import nbformat
import pytest

from stdg.evaluation.frozen import FIGURES, HEADS
from stdg.training import pair_runs
from stdg.training.experiments import StudyTable, interval

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def record(): return json.loads((ROOT/'figures'/'heads.json').read_text())


@pytest.fixture(scope='module')
def said():
    page = nbformat.read(ROOT/'nbs'/'heads.ipynb', as_version=4)
    return next(cell.source for cell in page.cells if cell.id == 'kept-results')


def moved(configurations, one, other, figure):
    "(mean, low, high) of what `one` has more than `other`, seed by seed, in points."
    mine, theirs = (configurations[name][figure]['seeds'] for name in (one, other))
    assert mine.keys() == theirs.keys()
    return [100 * value for value in interval([mine[seed] - theirs[seed] for seed in mine])]


def test_the_tables(record, said):
    assert record['date'] in said
    for part in ('found', 'frozen'): assert str(StudyTable(record[part])).strip() in said
    found, frozen = record['found']['control'], record['frozen']['head']
    assert list(found) == [title for title in pair_runs.HEADS if 'balance' not in title]
    assert {*frozen} == {*HEADS} - {'finer'} and 'The finer level was not tried' in said
    assert all(set(head[figure]['seeds']) == set('012') for head in frozen.values() for figure in FIGURES)
    assert all(set(head['AP50']['seeds']) == set('01') for head in found.values()) and 'Two seeds of the five' in said


def test_fields_or_pairs(record, said):
    found = record['found']['control']
    gains = [moved(found, 'pairs', 'fields', figure)[0] for figure in ('sgdet/R@50', 'sgdet/P@5', 'predcls/R@50')]
    for gain in gains: assert f'{gain:.1f} points' in said
    mean, low, high = moved(found, 'pairs', 'fields', 'AP50')
    assert low < 0 < high and 'No difference in the objects that are found can be told' in said
    for figure, place in (('sgdet/R@50', 'the first of these gains was'), ('sgdet/P@5', 'the second')):
        one, other = (100 * (found['pairs'][figure]['seeds'][seed] - found['fields'][figure]['seeds'][seed])
                      for seed in '01')
        assert f'{place} {one:.1f} and {other:.1f}' in said
        assert moved(found, 'pairs', 'fields', figure)[1] < 0, 'as the page says'
    readme = (ROOT/'README.md').read_text()
    for name, figure in (('SGDet R@50', 'sgdet/R@50'), ('P@5', 'sgdet/P@5'), ('PredCls R@50', 'predcls/R@50'),
                         ('AP50', 'AP50')):
        mine, theirs = (100 * found[head][figure]['mean'] for head in ('pairs', 'fields'))
        assert f'{name} {mine:.1f} instead of {theirs:.1f}' in readme


def test_what_pays(record, said):
    frozen = record['frozen']['head']
    recall, mean_recall = ({title: moved(frozen, title, 'map', figure) for title in frozen if title != 'map'}
                           for figure in ('R@50', 'mR@50'))
    seen = -recall['nothing'][0]
    assert .5 < seen < 1.5 and "what is seen adds about a point of R@50" in said
    for title in ('each level', 'union'):
        assert all(low < 0 < high for _, low, high in (recall[title], mean_recall[title])), title
    assert mean_recall['each level'][0] < -1
    for title in ('balance 0.5', 'balance 1'):
        assert f'{mean_recall[title][0]:+.1f} and {recall[title][0]:+.1f}' in said
    assert mean_recall['balance 1'][1] > 0
