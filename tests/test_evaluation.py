"""Evaluation of anything: shared, killed and resumed, with any batch size; teachers, released
files; the runbook."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metrics import golden_cases

from stdg import matching, metrics
from stdg.checkpoint import _unused, facts, released_name
from stdg.data import SceneGraphs
from stdg.datasets.statistics import pair_prior, zero_shot_triplets
from stdg.datasets.visual_genome import Database
from stdg.depth.precompute import prepare_hha
from stdg.evaluation import core as evaluation
from stdg.evaluation import diagnostics, thresholds
from stdg.evaluation.choices import save_reading
from stdg.graph import TASKS, Prediction, SceneGraph, Vocabulary
from stdg.model import STDG
from stdg.reading import Reading
from stdg.released import any_network
from stdg.rooms.build import make_rooms
from stdg.testing import loud, toy_database

root = Path(__file__).parent.parent
NAMES = Vocabulary(['disc', 'square', '<b>'], ['near', 'on', '$under$'])
SMALL = dict(n_objects=3, n_predicates=3, pretrained=False)
UNSEEN = [[0, 1, 1], [1, 2, 2], [2, 0, 0]]



def scene(i, size=(48, 64)):
    "Three objects on noise, and some relations."
    rng = np.random.default_rng(i)
    corner = rng.integers(0, 30, (3, 2))
    pairs = np.array([(0, 1), (1, 2), (2, 0), (1, 0)])[rng.permutation(4)[:1 + i % 3]]
    graph = SceneGraph(np.c_[corner, corner + 16], rng.permutation(3),
                       np.c_[pairs, rng.integers(0, 3, len(pairs))], size)
    return graph, dict(image=rng.integers(0, 255, (*size, 3), dtype=np.uint8), image_id=100 + i)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    scenes = [scene(i) for i in range(11)]
    database = toy_database(tmp_path_factory.mktemp('noise'), scenes, [2] * 11, NAMES, 64)
    return SceneGraphs(database, 'test')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return loud(STDG('small', **SMALL))


def untimed(figures):
    return {name: value for name, value in figures.items() if name != 'seconds_per_image'}


@pytest.fixture(scope='module')
def whole(model, dataset):
    figures = untimed(evaluation.evaluate(model, dataset, zero_shot=UNSEEN, batch_size=4,
                                          progress=False))
    assert 0 < figures['predcls']['R@50'] < 1 and figures['AP50'] > 0, 'there is something to compare'
    assert figures['images'] == 11
    return figures


def test_evaluate_is_the_evaluators_fed_one_by_one(model, dataset, whole):
    evaluators = {(protocol, task): metrics.Evaluator(task, 3, UNSEEN, protocol)
                  for protocol in matching.PROTOCOLS for task in TASKS}
    boxes, truths = [], []
    for truth, found in evaluation.predictions(model, dataset, batch_size=4, progress=False):
        for (_, task), evaluator in evaluators.items(): evaluator.update(found[task], truth)
        boxes.append(found['sgdet'])
        truths.append(truth)
    for (protocol, task), evaluator in evaluators.items():
        figures = whole[task] if protocol == 'strict' else whole['reference'][task]
        assert {k: v for k, v in figures.items() if k != 'intervals'} == evaluator.compute()
    ap = metrics.average_precision(boxes, truths, 3)
    assert (whole['AP50'], whole['AP']) == (ap['AP50'], ap['AP'])


@pytest.mark.parametrize('n', (2, 3, 7))
def test_shards_change_nothing(model, dataset, whole, n):
    shares = [list(evaluation.records(model, dataset, zero_shot=UNSEEN, shard=(i, n), batch_size=4,
                                      progress=False)) for i in range(n)]
    assert [len(share) for share in shares] == [len(range(i, 11, n)) for i in range(n)]
    joined = sorted(sum(shares, []), key=lambda pair: pair[0])
    assert untimed(evaluation.figures(joined, dataset, zero_shot=UNSEEN)) == whole
    by_one = evaluation.records(model, dataset, zero_shot=UNSEEN, batch_size=4, progress=False)
    for (_, mine), (_, alone) in zip(joined, by_one, strict=True):
        assert mine.keys() == alone.keys()
        for name in alone.keys() - {'seconds'}:  # also the scores, to the last bit
            assert np.array_equal(mine[name], alone[name]), name


def test_one_task_may_be_a_text(model, dataset, whole):
    "Not a list of letters."
    one = evaluation.evaluate(model, dataset, 'predcls', protocol='strict', intervals=0, progress=False)
    assert 'sgdet' not in one and one['predcls']['R@50'] == whole['predcls']['R@50']
    (_, found), *_ = evaluation.predictions(model, dataset, 'sgdet', progress=False)
    assert list(found) == ['sgdet']
    with pytest.raises(ValueError, match="task 'sgdte'"):
        evaluation.evaluate(model, dataset, 'sgdte', progress=False)


def test_the_prior_is_counted_on_the_training_pictures(tmp_path, monkeypatch):
    "Its tables are those of a prior that counts graph by graph."
    scenes = [scene(i) for i in range(9)]
    database = toy_database(tmp_path, scenes, [0] * 6 + [2] * 3, NAMES, 64)
    seen, predict = [], metrics.FrequencyPrior.predict
    def note(prior, truth):
        seen.append(prior)
        return predict(prior, truth)
    monkeypatch.setattr(metrics.FrequencyPrior, 'predict', note)
    figures = evaluation.evaluate_prior(database, SceneGraphs(database, 'test'), intervals=0)
    plain = metrics.FrequencyPrior(3, 3).fit(graph for graph, _ in scenes[:6])
    assert figures['images'] == len(seen) == 3
    assert plain.predicates.tolist() != plain.counts.sum((0, 2)).tolist(), 'they can be told apart'
    for name in ('counts', 'pairs', 'predicates'):
        np.testing.assert_array_equal(getattr(seen[0], name), getattr(plain, name))


def test_missing_and_double_records_are_refused(model, dataset):
    records = list(evaluation.records(model, dataset, ('predcls',), progress=False))
    figures = lambda these: evaluation.figures(these, dataset, ('predcls',), intervals=0)
    twice = records[:2] + records[1:]
    with pytest.raises(ValueError, match='10 for 11 images'): figures(records[:-1])
    with pytest.raises(ValueError, match='number 0 is expected and 1 comes'): figures(records[1:])
    with pytest.raises(ValueError, match='number 2 is expected and 1 comes'): figures(twice)
    assert figures(records)['images'] == 11


def close(a, b):
    "Two nests of figures agree up to float noise; confidence intervals too."
    if isinstance(a, dict): return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return np.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize('batch_size', (1, 3, 50))
def test_batch_size_changes_nothing(model, dataset, whole, batch_size):
    figures = evaluation.evaluate(model, dataset, zero_shot=UNSEEN, batch_size=batch_size,
                                  progress=False)
    assert close(untimed(figures), whole)


def store(folder, model, dataset, **how):
    return evaluation.store(folder, model, dataset, zero_shot=UNSEEN, progress=False,
                            **dict(batch_size=4, part=2) | how)


def made(monkeypatch, most=None):
    "Counts records; after `most` the process is killed."
    count, make = [], evaluation._record
    def counting(*args):
        if len(count) == most: raise KeyboardInterrupt
        count.append(0)
        return make(*args)
    monkeypatch.setattr(evaluation, '_record', counting)
    return count


def test_a_killed_evaluation_goes_on(model, dataset, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        made(patch, 7)
        with pytest.raises(KeyboardInterrupt): store(tmp_path, model, dataset)
    parts = sorted((tmp_path/'records-parts').glob('part-*.h5'))
    assert len(parts) == 3, 'six of the seven records are kept'
    parts[1].unlink()
    with monkeypatch.context() as patch:
        count = made(patch)
        path = store(tmp_path, model, dataset, batch_size=3)
    assert len(count) == 11 - 4 and not (tmp_path/'records-parts').exists()
    figures = evaluation.figures(evaluation.stored(path), dataset, zero_shot=UNSEEN)
    assert close(untimed(figures), whole)
    assert [position for position, _ in evaluation.stored(path)] == list(range(11))


def test_shards_on_the_disk(model, dataset, whole, tmp_path, monkeypatch):
    assert [store(tmp_path, model, dataset, shard=(i, 3)) for i in (2, 0, 1)] == [None] * 3
    count = made(monkeypatch)
    path = store(tmp_path, model, dataset)
    assert store(tmp_path, model, dataset) == path and not count, 'the shards have done it all'
    assert untimed(evaluation.figures(evaluation.stored(path), dataset, zero_shot=UNSEEN)) == whole


def test_other_weights_data_and_settings_are_refused(model, dataset, tmp_path):
    torch.manual_seed(1)
    other = loud(STDG('small', **SMALL))
    fewer = SceneGraphs(dataset.database, 'test', limit=10)
    changes = [(dict(model=other), 'weights'), (dict(dataset=fewer), 'data|keys'),
               (dict(protocol='strict'), 'protocol'), (dict(released=True), 'released'),
               (dict(tasks=('predcls',)), 'tasks')]
    for finished in (False, True):
        store(tmp_path, model, dataset, **({} if finished else dict(shard=(0, 2))))
        for change, what in changes:
            said = f'{tmp_path}.*holds .* of something else: .*({what}).*remove that'
            with pytest.raises(ValueError, match=said) as error:
                store(tmp_path, **dict(model=model, dataset=dataset) | change)
            assert '\n' not in str(error.value)
    assert store(tmp_path, model, dataset, batch_size=1, part=5), 'batches and parts may change'


def test_nothing_is_left_of_a_run_that_never_started(model, dataset, tmp_path, monkeypatch):
    made(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt): store(tmp_path/'a', model, dataset)
    assert not list((tmp_path/'a').glob('*'))
    with pytest.raises(ValueError, match="protocol 'mine' is not known"):
        store(tmp_path/'b', model, dataset, protocol='mine')
    with pytest.raises(ValueError, match="reads 'hha'"):
        store(tmp_path/'b', STDG('small', 'depth', **SMALL), dataset)
    assert not (tmp_path/'b').exists()


def test_damaged_records_are_named(model, dataset, tmp_path):
    path = store(tmp_path, model, dataset)
    whole = path.read_bytes()
    at = whole.index(b'boxes/found')
    path.write_bytes(whole[:at - 40] + b'\xff' * 40 + whole[at:])
    with pytest.raises(ValueError, match=r'records\.h5'): list(evaluation.stored(path))
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r'records\.h5 is not a whole HDF5 file'):
        list(evaluation.stored(path))


def test_records_are_small():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 400, (100, 2))
    boxes, pairs = np.c_[corner, corner + 100], np.argwhere(~np.eye(100, dtype=bool))[:300]
    prediction = Prediction(boxes, rng.integers(0, 150, 100), rng.uniform(size=100), pairs,
                            rng.uniform(size=(300, 50)))
    truth = SceneGraph(boxes[:30], prediction.labels[:30],
                       np.c_[pairs[:40] % 30, rng.integers(0, 50, 40)])
    evaluators = evaluation._evaluators(Vocabulary.visual_genome(), ('sgdet',), matching.PROTOCOLS,
                                        0, [[0, 0, 0]])
    record = evaluation._record(evaluators, truth, dict(sgdet=prediction), 50)
    assert sum(a.nbytes for a in record.values()) < 6000


# Calibration

@pytest.mark.parametrize('task', TASKS)
def test_right_claims_are_the_hits_of_the_golden_images(task):
    predictions, truths, _ = golden_cases(task)
    evaluator, n = metrics.Evaluator(task, 50, protocol='strict'), 0
    for prediction, truth in zip(predictions, truths):
        scores, right = matching.claims(prediction, truth, task, 50)
        found = evaluator.record(prediction, truth)['found'][0]
        assert len(scores) <= 100
        assert right.sum() == found[2].sum() and right[:20].sum() == found[0].sum()
        if task == 'sgdet': assert np.all(np.diff(scores) <= 1e-6)
        n += right.sum()
    assert n > 50


def test_reliability_against_loops():
    rng = np.random.default_rng(0)
    scores = np.r_[rng.uniform(size=500) ** 3, 0, 1, .1, .2, .7]
    right = rng.uniform(size=len(scores)) < .4
    found, ece = diagnostics.reliability(scores, right, 10), 0.
    for b in range(10):
        inside = [i for i, s in enumerate(scores) if int(s * 10) == b or (b == 9 and s == 1)]
        assert found['count'][b] == len(inside)
        if not inside: continue
        mean = sum(scores[i] for i in inside) / len(inside)
        share = sum(right[i] for i in inside) / len(inside)
        assert math.isclose(found['score'][b], mean) and math.isclose(found['right'][b], share)
        ece += len(inside) / len(scores) * abs(mean - share)
    assert math.isclose(found['ece'], ece)


def test_of_equal_f1_the_highest_threshold_is_chosen():
    """Of two things one is found by the first claim, the other by the fourth: F1 is 2/3 after
    either, and nowhere higher. With a demanded precision the lowest threshold is chosen."""
    curve = thresholds.operating_curve([.9, .8, .7, .6], [True, False, False, True], 2)
    assert curve['f1'][0] == curve['f1'][3] == curve['f1'].max()
    assert thresholds.best_threshold(curve) == pytest.approx(
        dict(threshold=.85, precision=1, recall=.5, f1=2 / 3))
    assert thresholds.best_threshold(curve, precision=.5)['threshold'] == pytest.approx(.3)


def test_thresholds_as_they_are_kept(tmp_path):
    "Thresholds to six digits, what they reach to four; those that a file may hold go from 0 to 1."
    third = dict(threshold=np.array([1 / 3]), precision=np.array([2 / 3]), recall=np.array([1 / 7]),
                 f1=np.array([1 / 9]))
    kept = thresholds.chosen(dict(objects=third, triplets=third), 11)
    at = dict(precision=.6667, recall=.1429, f1=.1111)
    assert kept == dict(objects=.333333, triplets=.333333, images=11,
                        at=dict(objects=at, triplets=at))
    none = thresholds.chosen(dict(objects=third), 11, precision=.7)
    assert none == dict(objects=1., images=11, at=dict(objects=dict(precision=0., recall=0., f1=0.)))
    path = tmp_path/'net.safetensors'
    STDG('small', **SMALL, fpn=16, channels=16).save(path, size=64)
    for good in (0, 1, .5, 0., 1.):
        given = dict(objects=good, triplets=good)
        thresholds.save_thresholds(path, given)
        assert facts(path)['thresholds'] == given and facts(path)['size'] == 64
    for bad in (-1e-9, 1 + 1e-9, '1', None):
        for kind in ('objects', 'triplets'):
            said = f'net.safetensors: the threshold of {kind} is .*; a number from 0 to 1'
            with pytest.raises(ValueError, match=said):
                thresholds.save_thresholds(path, dict(objects=.5, triplets=.5) | {kind: bad})


def test_an_operating_curve_against_loops():
    rng = np.random.default_rng(3)
    for n in (1, 2, 30, 200):
        scores, right = rng.integers(0, 25, n) / 24, rng.uniform(size=n) < .6
        truths = int(right.sum()) + 3
        curve = thresholds.operating_curve(scores, right, truths)
        levels = sorted(set(scores.tolist()), reverse=True)
        expected = [(level + lower) / 2 for level, lower in zip(levels, [*levels[1:], 0])]
        np.testing.assert_allclose(curve['threshold'], expected)
        for i, level in enumerate(levels):
            shown = scores >= level
            hits = right[shown].sum()
            found = [curve[name][i] for name in ('precision', 'recall', 'f1')]
            p, r = hits / shown.sum(), hits / truths
            np.testing.assert_allclose(found, [p, r, 2 * p * r / (p + r) if hits else 0])
    assert len(thresholds.operating_curve([0., 1.], [True, True], 2)['f1']) == 2
    for scores in ([-.01], [1.01], [np.nan]):
        with pytest.raises(ValueError, match='from 0 to 1'):
            thresholds.operating_curve(scores, [True], 1)


def test_records_hold_the_claims(model, dataset):
    records = list(evaluation.records(model, dataset, progress=False))
    curves = diagnostics.reliabilities(records)
    for task in TASKS:
        hits = sum(record[f'strict/{task}/found'][0, 2].sum() for _, record in records)
        curve = curves[diagnostics.CLAIMS[task]]
        assert round(np.nansum(np.multiply(curve['right'], curve['count']))) == hits
    assert sum(curves['boxes']['count']) == sum(len(record['boxes/found']) for _, record in records)
    recall, relations = diagnostics.image_recalls(records, 'strict/predcls')
    figures = evaluation.figures(records, dataset, intervals=0)
    assert math.isclose(recall.mean(), figures['predcls']['R@50'])
    assert relations.tolist() == [len(dataset.truth(i).relations.unique(dim=0)) for i in range(11)]


# Other networks

@pytest.fixture(scope='module')
def rooms(tmp_path_factory):
    folder = make_rooms(tmp_path_factory.mktemp('rooms'), 6, 0, 4, size=64, workers=1)
    prepare_hha(Database(folder), progress=False)
    return Database(folder)


def test_a_released_depth_teacher_on_hha(rooms, tmp_path):
    torch.manual_seed(0)
    teacher = STDG('resnet50', 'depth', n_objects=35, n_predicates=10, pretrained=False)
    state = {released_name(k, 'depth'): v for k, v in teacher.state_dict().items()}
    state |= {k: torch.zeros(shape) for k, shape in _unused(teacher).items()}
    torch.save(dict(model=state, epoch=60), tmp_path/'epoch060.pkl')
    read = any_network(tmp_path/'epoch060.pkl', rooms.vocabulary)
    pairs = zip(teacher.state_dict().values(), read.state_dict().values())
    assert read.mode == 'depth' and all(torch.equal(a, b) for a, b in pairs)
    said = ('epoch060.pkl: it knows 35 object classes and 10 predicates, the vocabulary has 3 and '
            '3')
    with pytest.raises(ValueError, match=said): any_network(tmp_path/'epoch060.pkl', NAMES)
    with pytest.raises(ValueError, match="mode 'depth' reads 'hha'"):
        evaluation.evaluate(read, SceneGraphs(rooms, 'test'), progress=False)
    hha = SceneGraphs(rooms, 'test', ('hha',))
    mine, theirs = (untimed(evaluation.evaluate(network, hha, ('sgdet', 'predcls'),
                                                protocol='strict', intervals=20, progress=False))
                    for network in (teacher, read))
    assert mine == theirs and mine['images'] == len(hha) and 'sgcls' not in mine


def test_the_runbook(rooms, tmp_path):
    "By papermill, on a checkpoint and a database; what it says is what `evaluate` says."
    torch.manual_seed(0)
    network = loud(STDG('small', n_objects=35, n_predicates=10, pretrained=False))
    network.save(tmp_path/'some.safetensors', vocabulary=rooms.vocabulary.to_json(), size=64)
    reading = Reading(prior=.5, table=pair_prior(rooms))
    save_reading(tmp_path/'some.safetensors', reading)
    values = dict(checkpoint=tmp_path/'some.safetensors', data=rooms.folder, intervals=50, timed=1,
                  extremes=1, batch_size=3, parts=True)
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar',
               str(root/'nbs'/'evaluate.ipynb'), str(tmp_path/'out.ipynb'), '-k', 'python3']
    done = subprocess.run(command + [text for k, v in values.items() for text in ('-p', k, str(v))],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path/'some-test'/'results.json').read_text())
    dataset = SceneGraphs(rooms, 'test')
    expected = evaluation.evaluate(network, dataset, zero_shot=zero_shot_triplets(rooms),
                                   intervals=50, batch_size=3, progress=False)
    expected = json.loads(json.dumps(evaluation.finite(untimed(expected))))
    assert close(untimed(results['rows']['some']), expected)
    with_prior = evaluation.evaluate(network, dataset, ('predcls',), intervals=0, progress=False,
                                     protocol='strict', reading=reading)['predcls']['R@50']
    assert math.isclose(results['rows']['some + prior']['predcls']['R@50'], with_prior)
    assert with_prior != expected['predcls']['R@50'] and results['reading'] == reading.to_json()
    assert set(results['rows']['frequency prior']['predcls']) >= {'R@50', 'intervals'}
    assert [*results['parts']] == ['as it is', 'without the prior', 'as published']
    for part, row in (('as it is', 'some + prior'), ('without the prior', 'some'), ('as published', 'some')):
        for task in TASKS:
            assert math.isclose(results['parts'][part][task]['R@50'], results['rows'][row][task]['R@50'], abs_tol=1e-9)
    assert set(results['calibration']) == set(diagnostics.CLAIMS.values())
    assert [len(results[end]) for end in ('worst', 'best')] == [1, 1]
    assert results['worst'][0]['recall'] <= results['best'][0]['recall']
    parts = {row['part'] for row in results['timing']}
    assert parts == {'load', 'forward', 'decode', 'whole'}
    assert results['machine'] and results['images'] == len(dataset)
    assert results['checkpoint'].endswith('some.safetensors')
    files = {path.name for path in (tmp_path/'some-test').iterdir()}
    assert files >= {'records.h5', 'records.json', 'predicates.png', 'calibration.png',
                     'worst-0.png', 'best-0.png'}
