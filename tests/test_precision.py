"""How true are the surest triplets: P@K by the dense truth, from matching to records, tables, the
explorer, and a reading that belongs to the records."""
import json
import math

import numpy as np
import pytest
import torch

from stdg import evaluation
from stdg.begin_run import check_validation
from stdg.data import SceneGraphs
from stdg.evaluation.core import dense_truth
from stdg.evaluation.intervals import difference, intervals, resample
from stdg.evaluation.thresholds import choose_thresholds
from stdg.explore.compare import comparison_record, precision
from stdg.graph import Prediction, SceneGraph, Vocabulary
from stdg.matching import surest_triplets, true_triplets
from stdg.metrics import Evaluator, evaluate, results_table
from stdg.model import STDG
from stdg.reading import PUBLISHED, PairPrior, Reading
from stdg.testing import loud, toy_database, toy_scene
from stdg.training.settings import Settings

CUP, TABLE, BOOK = range(3)
ON, UNDER, NEAR = range(3)
BOXES = [[40, 10, 60, 40], [0, 40, 100, 90], [70, 20, 90, 40]]
HOLDS = [[0, 1, ON], [1, 0, UNDER], [0, 2, NEAR], [2, 0, NEAR], [2, 1, ON]]


def the_room(**more): return SceneGraph(BOXES, [CUP, TABLE, BOOK], HOLDS, **more)


def said(rows, boxes=BOXES, labels=(CUP, TABLE, BOOK), scores=None):
    "A prediction of `rows` (subject, object, predicate), in this order."
    rows = np.array(rows, int).reshape(-1, 3)
    table = np.eye(3)[rows[:, 2]] * np.linspace(1, .5, len(rows))[:, None]
    return Prediction(boxes, labels, scores or [1.] * len(boxes), rows[:, :2], table)


# The definition

def test_by_hand():
    "Of five claims four are true, two of them about a copy of the cup; the fourth is about a box beside it."
    boxes = [*BOXES, [42, 10, 62, 40], [40, 25, 60, 55]]  # IoU with the cup: 0.82 and 1/3
    prediction = said([[0, 1, ON], [3, 1, ON], [0, 1, NEAR], [3, 2, NEAR], [4, 1, ON], [2, 0, NEAR]],
                      boxes, [CUP, TABLE, BOOK, CUP, CUP])
    right = [True, True, True, False, True, False, False, False, False, False]
    # one predicate a pair: cup and table are related by `on`, and `near`, less sure, is no claim
    assert true_triplets(prediction, the_room(), 'sgdet', 3).tolist() == right
    figures = evaluate([prediction], [the_room()], 'sgdet', None, 'strict', [the_room()])
    assert math.isclose(figures['P@5'], 4 / 5) and math.isclose(figures['P@10'], 4 / 10)


def slow(prediction, dense, task, top):
    "Which of the surest triplets are true, by loops and by the words of the definition."
    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
        return shared / (area(a) + area(b) - shared)
    def is_it(i, j):  # predicted i is true j
        if int(prediction.labels[i]) != int(dense.labels[j]): return False
        if task != 'sgdet': return i == j
        return iou(prediction.boxes[i].tolist(), dense.boxes[j].tolist()) >= .5
    true, out = {tuple(row) for row in dense.relations.tolist()}, []
    for (s, o), row in zip(prediction.pairs.tolist(), prediction.predicates.tolist()):
        p, n = int(np.argmax(row)), range(len(dense))
        score = 1. if task == 'predcls' else float(prediction.scores[s] * prediction.scores[o])
        if not score * row[p] > 0: continue
        right = any(is_it(s, u) and is_it(o, v) and (u, v, p) in true
                    and not dense.ignore[u] and not dense.ignore[v] for u in n for v in n)
        aside = any(dense.ignore[u] and (is_it(s, u) or is_it(o, u)) for u in n)
        if right or not aside: out.append(right)
    return (out + [False] * top)[:top]


def random_case(rng, task, n=6, pairs=14, ignored=0):
    corner = rng.integers(0, 30, (n, 2))
    boxes = np.column_stack([corner, corner + rng.integers(10, 40, (n, 2))]).astype(float)
    ends = np.argwhere(~np.eye(n, dtype=bool))
    held = np.column_stack([ends, rng.integers(0, 3, len(ends))])
    dense = SceneGraph(boxes, rng.integers(0, 2, n), held, ignore=rng.permutation(n) < ignored)
    m = n if task != 'sgdet' else 2 * n
    which = rng.permutation(np.argwhere(~np.eye(m, dtype=bool)))[:pairs]
    of = np.arange(n) if task != 'sgdet' else rng.integers(0, n, m)
    labels = dense.labels.numpy()[of]
    if task == 'sgcls': labels = np.where(rng.uniform(size=n) < .3, 1 - labels, labels)
    moved = boxes[of] + (rng.integers(-4, 5, (m, 4)) if task == 'sgdet' else 0)
    table = rng.uniform(size=(len(which), 3)) * (rng.uniform(size=(len(which), 1)) < .8)
    return Prediction(moved, labels, rng.uniform(size=m), which, table), dense


@pytest.mark.parametrize('task', ['sgdet', 'sgcls', 'predcls'])
@pytest.mark.parametrize('ignored', [0, 2])
def test_as_a_slow_loop_finds_it(task, ignored):
    total = 0
    for seed in range(60):
        prediction, dense = random_case(np.random.default_rng(seed), task, ignored=ignored)
        found = true_triplets(prediction, dense, task, 3)
        assert found.tolist() == slow(prediction, dense, task, 10), seed
        triplets, right = surest_triplets(prediction, dense, task, 3, 5)
        assert (right == found[:len(right)]).all() and len(triplets) == len(right) <= 5
        total += found.sum()
    assert total > 40


def test_the_order_is_that_of_the_prediction():
    "A reading may rank pairs otherwise than by the product of all scores; its list is what is shown."
    last = said([[1, 0, NEAR], [0, 1, ON]], scores=[.1, .1, .9])
    assert true_triplets(last, the_room(), 'sgdet', 3, 2).tolist() == [False, True]


def test_no_extra_pixel():
    dense = SceneGraph([[0, 0, 10, 10], [30, 0, 40, 10]], [CUP, CUP], [[0, 1, NEAR]])
    for height, right in ((5, True), (4.9, False)):  # with an extra pixel 5.9 / 11 would do
        prediction = said([[0, 1, NEAR]], [[0, 0, 10, height], [30, 0, 40, 10]], [CUP, CUP])
        assert true_triplets(prediction, dense, 'sgdet', 3)[0] == right


@pytest.mark.parametrize('prediction', [
    Prediction([], [], [], [], torch.zeros(0, 3)), said([]),
    Prediction(BOXES, [0, 1, 2], [1, 1, 1], [[0, 1]], torch.zeros(1, 3)),
    Prediction(BOXES, [0, 1, 2], [0, 1, 1], [[0, 1]], torch.ones(1, 3)), said([[0, 1, UNDER]]),
    said([[0, 0, NEAR]])], ids='nothing boxes-alone no-score no-object wrong itself'.split())
def test_nothing_right(prediction):
    assert true_triplets(prediction, the_room(), 'sgdet', 3).tolist() == [False] * 10
    figures = evaluate([prediction], [the_room()], 'sgdet', None, 'strict', [the_room()])
    assert figures['P@5'] == 0 and figures['dense_images'] == 1


def test_fewer_than_k_are_misses():
    figures = evaluate([said(HOLDS[:2])], [the_room()], 'sgdet', None, 'strict', [the_room()])
    assert math.isclose(figures['P@5'], 2 / 5) and math.isclose(figures['P@10'], 2 / 10)


def test_ignored_objects_are_neither_right_nor_wrong():
    "What is said of the book is left out, and the next claims take its place."
    dense = the_room(ignore=[False, False, True])
    rows = [[2, 1, ON], [2, 1, ON], [2, 0, UNDER], [0, 1, ON], [1, 0, NEAR]]
    assert true_triplets(said(rows), dense, 'sgdet', 3, 3).tolist() == [True, False, False]
    triplets, right = surest_triplets(said(rows), dense, 'sgdet', 3)
    assert triplets.tolist() == [[0, 1, ON], [1, 0, NEAR]] and right.tolist() == [True, False]


def test_what_does_not_fit_is_refused():
    more = SceneGraph(BOXES, [0, 1, 2], [[0, 1, 7]])
    for wrong, why in ((lambda: true_triplets(said([[0, 1, ON]]), more, 'sgdet', 3), 'holds predicate 7'),
                       (lambda: true_triplets(said([], BOXES[:2], [0, 1]), the_room(), 'predcls', 3),
                        'made on the true boxes'),
                       (lambda: true_triplets(said([[0, 1, ON]], scores=[math.nan, 1, 1]), the_room(),
                                              'sgdet', 3), 'NaN or infinite')):
        with pytest.raises(ValueError, match=why): wrong()


# The figure and its interval

def test_pictures_without_any_relation_are_left_out():
    bare = SceneGraph(BOXES, [CUP, TABLE, BOOK], [])
    evaluator = Evaluator('sgdet', 3, protocol='strict', keep=True)
    for truth in (the_room(), bare, the_room()): evaluator.update(said(HOLDS[:1]), truth, truth)
    assert evaluator.compute()['dense_images'] == 2 and math.isclose(evaluator.compute()['P@5'], 1 / 5)
    assert intervals(evaluator, 20)['P@5'] == pytest.approx([1 / 5, 1 / 5])
    alone = Evaluator('sgdet', 3, protocol='strict')
    alone.update(said(HOLDS), bare, bare)
    assert math.isnan(alone.compute()['P@5']) and 'P@5' not in evaluation.finite(alone.compute())


def test_intervals_are_those_of_the_mean():
    rng, evaluator, other = np.random.default_rng(0), *(Evaluator('sgdet', 3, protocol='strict', keep=True)
                                                        for _ in range(2))
    for _ in range(60):
        good, bad = (rng.permutation(HOLDS)[:rng.integers(1, 6)] for _ in range(2))
        evaluator.update(said(good), the_room(), the_room())
        other.update(said(bad[:1]), the_room(), the_room())
    shares = np.stack(evaluator.kept_surest)[:, :5].mean(1)
    drawn = resample(evaluator, 300)['P@5']
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 100)
    assert np.allclose(drawn[:100], weights @ shares / 60), 'the draws of R@K'
    assert abs(drawn.std() - shares.std() / 60 ** .5) < .2 * drawn.std()
    low, high = intervals(evaluator, 300)['P@5']
    assert low < evaluator.compute()['P@5'] < high
    assert difference(evaluator, other, 100)['P@5'][0] > 0
    plain = Evaluator('sgdet', 3, protocol='strict', keep=True)
    for _ in range(60): plain.update(said(HOLDS[:1]), the_room())
    assert 'P@5' not in intervals(plain, 20) and 'P@5' not in difference(evaluator, plain, 20)


# Records of a database with dense truth, and of one without

SMALL = dict(n_objects=2, n_predicates=2, pretrained=False)
QUIET = dict(progress=False, batch_size=2)


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "A database that knows what holds, one that does not, and a network that says a lot."
    folder = tmp_path_factory.mktemp('toys')
    scenes = [toy_scene(i) for i in range(5)]
    holds = [[[0, 1, 0], [0, 1, 1], [1, 0, 1]]] * 4 + [[[0, 1, 0]]]
    dense = toy_database(folder/'rooms', scenes, [2] * 5, dense=holds)
    plain = toy_database(folder/'plain', scenes, [2] * 5)
    torch.manual_seed(0)
    return folder, dense, plain, loud(STDG('small', **SMALL))


@pytest.fixture(scope='module')
def direct(toys):
    _, dense, _, model = toys
    return evaluation.evaluate(model, SceneGraphs(dense, 'test'), intervals=50, **QUIET)


def untimed(results): return {k: v for k, v in results.items() if k != 'seconds_per_image'}


def test_all_three_tasks_have_it(toys, direct):
    _, dense, _, model = toys
    dataset = SceneGraphs(dense, 'test')
    assert dense.has_dense and len(dense_truth(dataset, 0).relations) == 3
    for task in ('sgdet', 'sgcls', 'predcls'):
        found = [by_task[task] for _, by_task in evaluation.predictions(model, dataset, task, **QUIET)]
        shares = [np.mean(slow(one, dense_truth(dataset, i), task, 5)) for i, one in enumerate(found)]
        assert math.isclose(direct[task]['P@5'], np.mean(shares)), task
        low, high = direct[task]['intervals']['P@5']
        assert low <= direct[task]['P@5'] <= high and direct[task]['dense_images'] == 5
    assert 0 < direct['predcls']['P@5'] <= 2 / 5, 'two pairs have two claims'
    assert not any('P@' in name for name in direct['reference']['sgdet'])


def test_shards_and_the_store_are_the_direct_way(toys, direct):
    folder, dense, _, model = toys
    dataset = SceneGraphs(dense, 'test')
    shares = [list(evaluation.records(model, dataset, shard=(i, 2), **QUIET)) for i in (1, 0)]
    joined = sorted(sum(shares, []), key=lambda pair: pair[0])
    assert untimed(evaluation.figures(joined, dataset, intervals=50)) == untimed(direct)
    ask = lambda **how: evaluation.store(folder/'kept', model, dataset, part=2, **QUIET, **how)
    assert ask(shard=(0, 2)) is None
    path = ask()
    assert untimed(evaluation.figures(evaluation.stored(path), dataset, intervals=50)) == untimed(direct)
    shares = evaluation.image_precision(evaluation.stored(path), 'strict/predcls')
    assert math.isclose(shares.mean(), direct['predcls']['P@5'])
    known = json.loads(path.with_name('records.json').read_text())
    path.with_name('records.json').write_text(json.dumps(known | dict(dense='another')))
    with pytest.raises(ValueError, match='something else: dense another .asked: '): ask()


def test_records_of_an_earlier_version_are_read(toys, direct):
    "They know nothing of the dense truth: then there is no such figure; and none of a mixture."
    folder, dense, _, model = toys
    dataset = SceneGraphs(dense, 'test')
    old = lambda record: {name: v for name, v in record.items() if not name.endswith('/surest')}
    made = list(evaluation.records(model, dataset, **QUIET))
    earlier = evaluation.figures([(i, old(record)) for i, record in made], dataset, intervals=50)
    drop = lambda figures: {k: drop(v) if isinstance(v, dict) else v for k, v in figures.items()
                            if 'P@' not in k and k != 'dense_images'}
    assert untimed(earlier) == untimed(drop(direct)) != untimed(direct)
    with pytest.raises(ValueError, match='4 of 5 say which triplets .*two versions'):
        evaluation.figures([*made[:4], (4, old(made[4][1]))], dataset)
    path = evaluation.store(folder/'early', model, dataset, **QUIET)
    known = json.loads(path.with_name('records.json').read_text())
    assert known.pop('dense') and 'reading' not in known
    path.with_name('records.json').write_text(json.dumps(known))
    assert evaluation.store(folder/'early', model, dataset, **QUIET) == path


def test_without_dense_truth_there_is_no_such_figure(toys):
    _, _, plain, model = toys
    dataset = SceneGraphs(plain, 'test')
    assert not plain.has_dense and dense_truth(dataset, 0) is None
    results = evaluation.evaluate(model, dataset, intervals=20, **QUIET)
    prior = evaluation.evaluate_prior(plain, dataset, intervals=20)
    for figures in (results['sgdet'], results['predcls'], prior['predcls']):
        assert not any('P@' in name or 'dense' in name for name in (*figures, *figures['intervals']))
    assert 'P@' not in str(results_table(dict(ours=results)))
    with pytest.raises(ValueError, match='no dense truth, or they are of an earlier'):
        evaluation.image_precision(evaluation.records(model, dataset, **QUIET))
    with pytest.raises(ValueError, match='plain has no dense truth'): evaluation.surest_table(model, dataset)


def test_the_table_ends_with_it(direct):
    head, _, row = str(results_table(dict(ours=direct))).split('| SGDet')[1].splitlines()[:3]
    assert head.endswith('| AP50 | P@5 | P@10 |')
    assert row.endswith(f"{100 * direct['sgdet']['P@5']:.1f} | {100 * direct['sgdet']['P@10']:.1f} |")


def test_a_run_can_choose_by_it_only_where_it_is_known(toys):
    _, dense, plain, _ = toys
    settings = Settings(validate_every=1, best='sgdet/P@5')
    with pytest.raises(ValueError, match='plain has no dense truth, so there is no sgdet/P@5'):
        check_validation(settings, plain)
    with pytest.raises(ValueError, match='rooms has no validation pictures'): check_validation(settings, dense)


# A reading belongs to the records

def test_a_prior_is_used_and_noted(toys):
    folder, dense, _, model = toys
    dataset = SceneGraphs(dense, 'test')
    counts = np.zeros((2, 2, 2))
    counts[..., 1] = 8
    table = PairPrior(counts, np.full((2, 2), 8))
    reading = Reading(prior=2., table=table)
    found = [one['predcls'] for _, one in evaluation.predictions(model, dataset, 'predcls',
                                                                 reading=reading, **QUIET)]
    assert {int(p) for one in found for p in one.predicates.argmax(1)} == {1}
    ask = lambda how: evaluation.store(folder/'read', model, dataset, 'predcls', reading=how, **QUIET)
    path = ask(reading)
    assert ask(Reading(prior=2., table=PairPrior(counts, np.full((2, 2), 8)))) == path
    others = (PUBLISHED, reading.without_prior(), Reading(prior=1., table=table), Reading('lines'),
              Reading(prior=2., table=PairPrior(counts, np.full((2, 2), 9))))
    for other in others:
        with pytest.raises(ValueError, match='records of something else: reading'): ask(other)
    same = evaluation.store(folder/'same', model, dataset, 'predcls', **QUIET)
    assert evaluation.store(folder/'same', model, dataset, 'predcls',
                            reading=Reading(), **QUIET) == same
    with pytest.raises(ValueError, match='something else: reading None'):
        evaluation.store(folder/'same', model, dataset, 'predcls', reading=reading, **QUIET)


def test_thresholds_are_chosen_with_the_scores_of_the_reading(toys):
    _, dense, _, model = toys
    dataset = SceneGraphs(dense, 'test')
    table = PairPrior(np.ones((2, 2, 2)), np.full((2, 2), 10))
    plain = choose_thresholds(model, dataset, **QUIET)
    weighed = choose_thresholds(model, dataset, reading=Reading(prior=2., table=table), **QUIET)
    assert weighed['objects'] == plain['objects'] and weighed['triplets'] < plain['triplets'] / 4


def test_scores_above_one_are_sure(toys):
    "A table in which a pair carries a predicate twice lifts scores above 1: they are taken for sure."
    _, dense, _, model = toys
    table = PairPrior(np.full((2, 2, 2), 18), np.full((2, 2), 9))
    reading = Reading(prior=2., table=table)
    made = list(evaluation.records(model, SceneGraphs(dense, 'test'), 'predcls', reading=reading, **QUIET))
    assert max(record['predcls/score'].max() for _, record in made) == 1
    assert evaluation.reliabilities(made)['PredCls predicates']['count'][-1] > 0


# The explorer

@pytest.mark.parametrize('task', ['sgdet', 'predcls'])
def test_the_explorer_counts_as_evaluation_does(task):
    for seed in range(20):
        prediction, dense = random_case(np.random.default_rng(seed), task)
        prediction.size, truth = (80, 80), SceneGraph(dense.boxes, dense.labels, dense.relations[:2])
        every = dense.relations.numpy()
        record = comparison_record(prediction, Vocabulary(list('abc'), list('xyz')), truth, every, task)
        right = true_triplets(prediction, dense, task, 3)
        assert record['precision'] == [right[:5].mean(), right.mean()]
        assert precision(prediction, truth, every, task) == dict(
            zip((5, 10), record['precision']))
        if task == 'sgdet':
            assert [t['holds'] for t in record['triplets']][:10] == right.tolist()[:len(record['triplets'])]
