"""The page of the depth question says what its file of figures says."""
import json
from pathlib import Path

import nbformat
import pytest

from stdg.training.depth_runs import CELLS, DEPTH_FIGURES, LESSONS_OF_C, largest_and_smallest, powers
from stdg.training.experiments import StudyTable, interval, summary

ROOT = Path(__file__).resolve().parent.parent
BEHIND, FRONT, ON, NEAR = DEPTH_FIGURES[3:]
*STAGED, ORDINARY = CELLS
LEAD = STAGED[-1]  # the cell of the largest lead


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


def gap(configurations, one, other, figure):
    "(mean, low, high) of what `one` has more than `other`, seed by seed, in points."
    mine, theirs = (configurations[kind][figure]['seeds'] for kind in (one, other))
    assert mine.keys() == theirs.keys()
    return [100 * value for value in interval([mine[seed] - theirs[seed] for seed in mine])]


def text(found, sign='+'):
    "2.4 [1.5, 3.2] of such a gap."
    mean, low, high = found
    return f'{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]'


def test_the_gate(record, page):
    staged, ordinary = (record['gate'][title] for title in ('staged', 'ordinary'))
    assert f"in {staged['both']} % of {staged['pairs']} pairs" in page['gate']
    assert f"the lower edge alone in {staged['lower edge']} %" in page['gate']
    assert f"{ordinary['both']} % and {ordinary['lower edge']} % of {ordinary['pairs']}" in page['gate']
    assert [round(one[name]) for one in (staged, ordinary) for name in ('on', 'near')] == [99, 86, 99, 86]
    assert [round(one[name]) for name in ('on AP', 'near AP') for one in (staged, ordinary)] == [88, 96, 13, 44]


def test_the_tables(record, page):
    "All of the file stands on the page, of the seeds that it names."
    assert record['date'] in page['kept-results'] and record['machine'] in page['kept-results']
    for cell, part in {'kept-results': 'A', 'kept-b': 'B', 'kept-c': 'C', 'kept-replaced': 'offsets replaced'}.items():
        assert str(StudyTable(record[part])).strip() in page[cell]
    assert list(record['A']) == list(CELLS)
    seeds = {cell: set(found['depth']['AP50']['seeds']) for cell, found in record['A'].items()}
    assert {cell for cell in CELLS if seeds[cell] == set('01234')} == {STAGED[0], LEAD, ORDINARY}
    assert all(seeds[cell] == set('012') for cell in STAGED[1:-1])
    assert 'Five seeds in three cells, three in the four others' in page['kept-results']
    for part in ('B', 'C', 'offsets replaced'):
        for found in record[part].values():
            assert all(set(by_figure['AP50']['seeds']) == set('01234') for by_figure in found.values())
    for part in 'ABC': assert record[f'least difference {part} finds'] == pytest.approx(powers(record[part]))


def test_what_is_said_of_a(record, page):
    said = page['kept-results']
    behind, front = moved(record, BEHIND), moved(record, FRONT)
    leads = [one[cell] for one in (behind, front) for cell in STAGED]
    assert round(min(low for _, low, _ in leads), 1) == 3.8 and 'the lowest bound is 3.8' in said
    assert f'by {min(lead for lead, _, _ in leads):.1f} to {max(lead for lead, _, _ in leads):.1f} points' in said
    assert [round(behind[cell][0], 1) for cell in STAGED] == [5.3, 5.4, 6.8, 6.5, 6.8, 7.7]
    assert '5.3, 5.4 and 6.8 points with textures' in said and 'without them, 6.5, 6.8 and 7.7' in said
    assert f'it is {text(behind[ORDINARY], "")} and {text(front[ORDINARY])} points' in said
    least = record['least difference A finds']
    assert [round(100 * least[name], 1) for name in (BEHIND, FRONT, ON, NEAR)] == [2.5, 1.7, 13.0, 2.7]
    assert 'differences of 2.5 and 1.7 points' in said and 'find 13.0 and 2.7 points' in said


def test_what_is_said_of_objects_and_of_other_relations(record, page):
    said, boxes, given = page['kept-results'], moved(record, 'AP50'), moved(record, 'predcls/R@50')
    plain, bare = STAGED[:3], STAGED[3:]
    first = record['A'][STAGED[0]]
    assert 'AP50 42.7, depth 33.4' in said
    assert [round(100 * first[kind]['AP50']['mean'], 1) for kind in ('colours', 'depth')] == [42.7, 33.4]
    assert all(boxes[cell][1] > 0 for cell in bare) and 'by 2.0 to 5.6 points' in said
    assert [round(f(boxes[cell][0] for cell in bare), 1) for f in (min, max)] == [2.0, 5.6]
    assert 'by 3.0 to 3.8 points' in said and all(given[cell][1] > 0 for cell in STAGED)
    assert [round(f(given[cell][0] for cell in STAGED), 1) for f in (min, max)] == [3.0, 3.8]
    clear = {cell for name in (ON, NEAR) for cell, (_, low, high) in moved(record, name).items() if low > 0 or high < 0}
    assert clear == {bare[-1], ORDINARY} and '5.4 points, and in ordinary rooms, 6.5' in said
    assert [round(moved(record, ON)[cell][0], 1) for cell in (bare[-1], ORDINARY)] == [5.4, 6.5]
    for cell, twin in zip(plain, bare):
        one, other = (record['A'][each]['depth']['AP50']['seeds'] for each in (cell, twin))
        assert all(one[seed] == other[seed] for seed in one.keys() & other.keys())
    most, least = largest_and_smallest(record['A'])
    assert f'in *{most}*, where it is largest, and in *{least}*, where it is smallest' in said


def test_what_is_said_of_b(record, page):
    said, b = page['kept-b'], record['B']
    assert list(b) == [LEAD, ORDINARY]
    gains = {cell: {figure: gap(found, 'taught by depth', 'colours', figure) for figure in DEPTH_FIGURES}
             for cell, found in b.items()}
    assert f"AP50 by {text(gains[LEAD]['AP50'])} and {text(gains[ORDINARY]['AP50'])} points" in said
    for teacher in ('colours', 'clean colours'):  # so have the students of both teachers of colours
        assert all(gap(found, f'taught by {teacher}', 'colours', 'AP50')[1] > 0 for found in b.values())
    most, least = (text(gains[cell][BEHIND]) for cell in b)
    assert f'*behind* {most} of a lead of 7.7 and {least} of a lead of 1.8' in said
    assert f"*in front of* {text(gains[LEAD][FRONT])} of 7.6 and {text(gains[ORDINARY][FRONT])} of 0.9" in said
    assert [round(moved(record, name)[cell][0], 1) for name in (BEHIND, FRONT) for cell in b] == [7.7, 1.8, 7.6, .9]
    for figure in ('AP50', BEHIND, FRONT):  # the gains of the two cells, seed by seed
        of = [[b[cell][kind][figure]['seeds'] for kind in ('taught by depth', 'colours')] for cell in b]
        between = interval([of[0][0][seed] - of[0][1][seed] - of[1][0][seed] + of[1][1][seed] for seed in '01234'])
        between = [100 * value for value in between]
        assert text(between) in said and between[1] < 0 < between[2], 'H2 fails'
    for other, name in (('taught by clean colours', 'clean'), ('taught by colours', 'plain')):
        found = [gap(b[LEAD], 'taught by depth', other, figure) for figure in (BEHIND, FRONT, 'AP50')]
        assert f"{name} colours by {', '.join(text(one) for one in found[:2])} and {text(found[2])}" in said
        assert all(low < 0 < high for _, low, high in found), 'H3 fails'
    found = gap(b[ORDINARY], 'taught by colours', 'taught by depth', 'AP50')
    assert f'{text(found)} points of AP50' in said and found[1] > 0
    found = gap(b[ORDINARY], 'taught by depth', 'taught by colours', 'predcls/R@50')
    assert f'{text(found)} of R@50 on given boxes' in said and found[1] > 0
    chance = [gap(b[cell], 'taught by random', 'colours', 'AP50') for cell in b]
    assert f'{text(chance[0])} and {text(chance[1])} points of AP50' in said
    assert f"*behind* loses by it, {text(gap(b[ORDINARY], 'taught by random', 'colours', BEHIND))}" in said
    given = [gap(b[LEAD], f'taught by {teacher}', 'colours', 'predcls/R@50')
             for teacher in ('random', 'colours', 'depth', 'clean colours')]
    assert f'as much as by any other, {text(given[0])}' in said and {round(mean) for mean, _, _ in given} == {1}
    least = record['least difference B finds']
    assert [round(100 * least[name], 1) for name in ('AP50', BEHIND, FRONT)] == [1.2, 1.3, 1.2]
    assert 'find 1.3 points of *behind*, 1.2 of *in front of* and of AP50' in said
    seeds = {kind: {figure: one['seeds'] for figure, one in by_figure.items()} for kind, by_figure in b[LEAD].items()}
    again = summary({LEAD: seeds}, 'taught by depth')[LEAD]['colours']['AP50']['difference']
    assert again['mean'] == pytest.approx(record['B, against depth'][LEAD]['colours']['AP50']['difference']['mean'])


def test_what_is_said_of_c(record, page):
    said, c = page['kept-c'], record['C'][LEAD]
    assert set(c) >= {f'taught by {lesson}' for lesson in LESSONS_OF_C}
    beside = lambda kind, figure: gap(c, f'taught by {kind}', 'taught by depth', figure)
    for figure in ('AP50', 'predcls/R@50', BEHIND):
        _, low, high = found = beside('mean field', figure)
        assert text(found) in said and low < 0 < high, 'H4 fails'
    assert f'{text(beside("mean field", FRONT))} of *in front of*' in said and beside('mean field', FRONT)[2] < 0
    assert f"{-beside('mean field', 'AP50')[1]:.1f} points of AP50 at most" in said
    clear = {kind for kind in LESSONS_OF_C if (found := beside(kind, 'AP50'))[1] > 0 or found[2] < 0}
    for kind in LESSONS_OF_C:
        if kind != 'mean field': assert f"{text(beside(kind, 'AP50'))}" in said
    assert clear == {'relation alone', 'second convolutions', 'features', 'weight 0.1', 'weight 10'}
    over = [gap(c, 'taught by weight 10', 'colours', figure) for figure in (BEHIND, FRONT)]
    assert f'{text(over[0])} of *behind* and {text(over[1])} of *in front of*' in said
    assert all(low > 0 for _, low, _ in over) and 'the one lesson after which *behind* is clearly better' in said
    found = gap(c, 'taught by features', 'colours', 'AP50')
    assert f'{text(found)} over the untaught student' in said and found[1] < 0 < found[2]
    gained = [kind for kind in LESSONS_OF_C if gap(c, f'taught by {kind}', 'colours', BEHIND)[1] > 0]
    assert gained == ['weight 10']
    least = [f'{100 * record["least difference C finds"][figure]:.1f}' for figure in ('AP50', BEHIND, FRONT)]
    assert f'find {least[0]} points of AP50 and {least[1]} and {least[2]} of *behind* and *in front of*' in said


def test_the_answer_and_the_readme_say_the_same(record, page):
    readme, b, c = (ROOT/'README.md').read_text(), record['B'][LEAD], record['C'][LEAD]
    leads = [moved(record, name)[cell][0] for name in (BEHIND, FRONT) for cell in STAGED]
    assert f'by {min(leads):.1f} to {max(leads):.1f} points of average precision' in readme
    assert 5 < min(leads) and max(leads) < 8 and 'by five to eight points' in page['answer']
    mean, low, high = gap(b, 'taught by depth', 'colours', BEHIND)
    assert f'where the teacher leads by {moved(record, BEHIND)[LEAD][0]:.1f} points' in readme
    assert f'ahead of the untaught one by {mean:.1f} [{low:.1f}, {high:.1f}]' in readme
    gains = [gap(record['B'][cell], 'taught by depth', 'colours', 'AP50')[0] for cell in record['B']]
    assert f'Being taught is worth {gains[0]:.1f} points of AP50 there' in readme
    assert all(2 < gain < 3 for gain in gains) and 'two to three points of AP50' in page['answer']
    for teacher in ('colours', 'clean colours', 'mean field'):  # as much as depth, as far as the seeds tell
        _, low, high = gap(c, f'taught by {teacher}', 'taught by depth', 'AP50')
        assert low < 0 < high
    assert 'H2, H3 and H4 do not hold' in page['answer-first']


def test_what_is_said_of_other_offsets(record, page):
    said, found = page['kept-replaced'], record['offsets replaced'][LEAD]
    beside = {(kind, figure): gap(found, kind, 'own', figure)
              for kind in found if kind != 'own' for figure in DEPTH_FIGURES}
    for kind in ('mean field', "another picture's", "the teacher's"):
        assert text(beside[kind, 'AP50']) in said and beside[kind, 'AP50'][2] < 0
    low, high = beside["the teacher's", 'predcls/R@50'][1:]
    assert text(beside["the teacher's", 'predcls/R@50']) in said and low < 0 < high
    theirs = [beside["the teacher's", figure] for figure in (BEHIND, FRONT)]
    assert f'{text(theirs[0])} and {text(theirs[1])}' in said
    assert all(low < 0 < high for _, low, high in theirs)
    others = [mean for (kind, figure), (mean, _, _) in beside.items() if figure in (BEHIND, FRONT) and kind != 'zero']
    assert min(others) > -1 and 'no offsets but zeros' in said
