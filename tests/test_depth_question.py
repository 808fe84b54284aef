"""The page of the depth question says what its file of figures says."""
import json
from pathlib import Path

import nbformat
import pytest

from stdg.training.depth_runs import CELLS, DEPTH_FIGURES, largest_and_smallest, powers
from stdg.training.experiments import StudyTable

ROOT = Path(__file__).resolve().parent.parent
BEHIND, FRONT, ON, NEAR = DEPTH_FIGURES[3:]


@pytest.fixture(scope='module')
def record(): return json.loads((ROOT/'figures'/'depth.json').read_text())


@pytest.fixture(scope='module')
def page():
    "The texts of the page by the name of their cell."
    return {cell.id: cell.source for cell in nbformat.read(ROOT/'nbs'/'depth_question.ipynb', as_version=4).cells}


def moved(record, figure):
    "{cell: (mean, low, high)} of the difference of depth to colours in experiment A, in points."
    differences = {cell: found['depth'][figure]['difference'] for cell, found in record['A'].items()}
    return {cell: [100 * one['mean'], *(100 * bound for bound in one['interval'])] for cell, one in differences.items()}


def test_the_gate(record, page):
    staged, ordinary = (record['gate'][title] for title in ('staged', 'ordinary'))
    assert f"in {staged['both']} % of {staged['pairs']} pairs" in page['gate']
    assert f"the lower edge alone in {staged['lower edge']} %" in page['gate']
    assert f"{ordinary['both']} % and {ordinary['lower edge']} % of {ordinary['pairs']}" in page['gate']
    assert [round(one[name]) for one in (staged, ordinary) for name in ('on', 'near')] == [99, 86, 99, 86]
    assert [round(one[name]) for name in ('on AP', 'near AP') for one in (staged, ordinary)] == [88, 96, 13, 44]


def test_what_is_said_of_a(record, page):
    said = page['kept-results']
    assert str(StudyTable(record['A'])).strip() in said and record['date'] in said and record['machine'] in said
    assert list(record['A']) == list(CELLS)
    assert set(record['A'][next(iter(CELLS))]['depth']['AP50']['seeds']) == set('012')
    behind, front = moved(record, BEHIND), moved(record, FRONT)
    *staged, ordinary = CELLS
    leads = [one[cell] for one in (behind, front) for cell in staged]
    assert round(min(low for _, low, _ in leads), 1) == 2.3 and 'the lowest bound of one is 2.3' in said
    assert [round(f(lead for lead, _, _ in leads), 1) for f in (min, max)] == [4.5, 7.8]
    assert 'by 4.5 to 7.8 points' in said
    assert [round(behind[cell][0], 1) for cell in staged] == [4.9, 5.4, 6.8, 6.5, 6.8, 7.6]
    assert '4.9, 5.4 and 6.8 points with textures' in said and 'without them, 6.5, 6.8 and 7.6' in said
    there = behind[ordinary], front[ordinary]
    assert 'it is 1.9 and 0.8 points' in said and [round(one[0], 1) for one in there] == [1.9, .8]
    assert all(low < 0 < high for _, low, high in there)
    least = record['least difference A finds']
    assert least == pytest.approx(powers(record['A']))
    assert [round(100 * least[name], 1) for name in (BEHIND, FRONT, ON, NEAR)] == [3.0, 2.6, 11.6, 3.1]
    assert 'differences of 3.0 and 2.6 points' in said and 'find 11.6 and 3.1 points' in said


def test_what_is_said_of_objects_and_of_other_relations(record, page):
    said, boxes, given = page['kept-results'], moved(record, 'AP50'), moved(record, 'predcls/R@50')
    *staged, ordinary = CELLS
    plain, bare = staged[:3], staged[3:]
    first = record['A'][staged[0]]
    assert 'AP50 43.0, depth 32.8' in said
    assert [round(100 * first[kind]['AP50']['mean'], 1) for kind in ('colours', 'depth')] == [43.0, 32.8]
    assert all(boxes[cell][1] > 0 for cell in bare) and 'by 2.0 to 5.4 points' in said
    assert [round(f(boxes[cell][0] for cell in bare), 1) for f in (min, max)] == [2.0, 5.4]
    assert 'by 2.9 to 4.0 points' in said and all(given[cell][1] > 0 for cell in staged)
    assert [round(f(given[cell][0] for cell in staged), 1) for f in (min, max)] == [2.9, 4.0]
    clear = {cell for name in (ON, NEAR) for cell, (_, low, high) in moved(record, name).items() if low > 0 or high < 0}
    assert clear == {bare[-1], ordinary} and '5.9 points, and in ordinary rooms, 6.7' in said
    assert [round(moved(record, ON)[cell][0], 1) for cell in (bare[-1], ordinary)] == [5.9, 6.7]
    for cell, twin in zip(plain, bare):
        assert record['A'][cell]['depth']['AP50']['seeds'] == record['A'][twin]['depth']['AP50']['seeds']


def test_what_follows(record, page):
    "B is run where the page says; until it is, the page says that it is not."
    said = page['kept-results']
    most, least = largest_and_smallest(record['A'])
    assert f'in *{most}*, where it is largest, and in *{least}*, where it is smallest' in said
    for part in 'BC': assert (part in record) != ('**B and C have not been run yet.**' in said)


def test_the_readme_says_the_same(record):
    readme = (ROOT/'README.md').read_text()
    *staged, _ = CELLS
    leads = [moved(record, name)[cell][0] for name in (BEHIND, FRONT) for cell in staged]
    assert f'by {min(leads):.1f} to {max(leads):.1f} points of average precision' in readme
    assert ('B' in record) != ('whether the lead is handed down, has not been run yet' in readme)
