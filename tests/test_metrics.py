"""`stdg.metrics` against golden figures and against a plain evaluator written out in loops."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdg.graph import TASKS, Prediction, SceneGraph
from stdg.matching import match, pixel_iou, row_key
from stdg.metrics import Evaluator, FrequencyPrior, average_precision, evaluate, results_table

GOLDEN = Path(__file__).parent / 'golden'


def golden_cases(task):
    """Predictions, truths and the zero-shot list of the golden images; the files number from 1 and
    keep a background column."""
    z = np.load(GOLDEN / 'metrics.npz')
    kind = 'sgdet' if task == 'sgdet' else 'gtbox'
    objects = 'sgdet' if task == 'sgdet' else 'gt'
    cut = lambda name, lengths: np.split(z[name], np.cumsum(z[lengths])[:-1])
    boxes, labels = cut('gt_boxes', 'n_gt_objects'), cut('gt_labels', 'n_gt_objects')
    relations = cut('gt_relations', 'n_gt_relations')
    truths = [SceneGraph(box, label - 1, relation - [0, 0, 1])
              for box, label, relation in zip(boxes, labels, relations)]
    pairs = cut(f'{kind}_pairs', f'n_{kind}_pairs')
    predicates = cut(f'{kind}_predicates', f'n_{kind}_pairs')
    lengths = f'n_{objects}_objects'
    boxes = cut(f'{objects}_boxes', lengths)
    labels = cut('gt_labels' if task == 'predcls' else f'{task}_labels', lengths)
    if task == 'predcls': scores = [np.ones(len(b)) for b in boxes]
    else: scores = cut(f'{task}_scores', lengths)
    predictions = [Prediction(box, label - 1, score, pair, predicate[:, 1:])
                   for box, label, score, pair, predicate
                   in zip(boxes, labels, scores, pairs, predicates)]
    return predictions, truths, z['zero_shot_triplets'] - 1


@pytest.mark.parametrize('task', TASKS)
def test_golden_figures(task):
    expected = json.loads((GOLDEN / 'metrics.json').read_text())[task]
    predictions, truths, zero_shot = golden_cases(task)
    figures = evaluate(predictions, truths, task, zero_shot)
    assert set(figures) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize('task', TASKS)
def test_golden_figures_do_not_depend_on_order_or_repetition(task):
    predictions, truths, zero_shot = golden_cases(task)
    once, many = evaluate(predictions, truths, task, zero_shot), Evaluator(task, 50, zero_shot)
    for prediction, truth in list(zip(predictions, truths))[::-1] * 3:
        many.update(prediction, truth)
    for name, value in many.compute().items():
        np.testing.assert_allclose(value, once[name], rtol=0, atol=1e-12, err_msg=name)


def test_memory_does_not_grow():
    predictions, truths, zero_shot = golden_cases('sgcls')
    evaluator = Evaluator('sgcls', 50, zero_shot)
    def held(): return sum(np.asarray(value).nbytes for value in vars(evaluator).values())
    before = held()
    for prediction, truth in zip(predictions, truths): evaluator.update(prediction, truth)
    assert held() == before and evaluator.images == 40


# The definition, in loops

def plain_iou(a, b):
    a, b = [np.float32(x) for x in a], [np.float32(x) for x in b]
    one = np.float32(1)
    w, h = min(a[2], b[2]) - max(a[0], b[0]) + one, min(a[3], b[3]) - max(a[1], b[1]) + one
    if w <= 0 or h <= 0: return 0.
    area = [(x[2] - x[0] + one) * (x[3] - x[1] + one) for x in (a, b)]
    return w * h / (area[0] + area[1] - w * h)


def plain_hits(boxes, labels, triplets, truth):
    "For each of `triplets` the set of relations of `truth` that it hits."
    def same(mine, theirs):
        overlap = plain_iou(boxes[mine].tolist(), truth.boxes[theirs].tolist())
        return labels[mine] == truth.labels[theirs] and overlap >= .5
    relations = truth.relations.tolist()
    return [{j for j, (s, o, p) in enumerate(relations) if p == pp and same(ps, s) and same(po, o)}
            for ps, po, pp in triplets]


def plain_evaluate(predictions, truths, task, zero_shot, n_predicates):
    lists, hit, total = {}, {k: 0 for k in (20, 50, 100)}, 0
    for prediction, truth in zip(predictions, truths):
        boxes, labels, scores = prediction.boxes, prediction.labels, prediction.scores
        if task != 'sgdet': boxes = truth.boxes
        if task == 'predcls': labels, scores = truth.labels, torch.ones(len(truth))
        pairs, table = prediction.pairs.tolist(), prediction.predicates
        if not pairs and len(boxes):
            pairs, table = [[len(boxes) - 1] * 2], torch.zeros(1, n_predicates)
        best = [(s, o, int(row.argmax())) for (s, o), row in zip(pairs, table)]
        every = [(-float(scores[s] * scores[o] * row[p]), (s, o, p))
                 for (s, o), row in zip(pairs, table) for p in range(n_predicates)]
        free = [triplet for _, triplet in sorted(every, key=lambda entry: entry[0])][:100]
        relations = truth.relations.tolist()
        named = [(int(truth.labels[s]), int(truth.labels[o]), p) in zero_shot
                 for s, o, p in relations]
        total += len(relations)
        for kind, triplets in (('', best), ('ng-', free)):
            hits = plain_hits(boxes, labels, triplets, truth)
            for k in (20, 50, 100):
                found = set().union(*hits[:k])
                lists.setdefault(f'{kind}R@{k}', []).append(len(found) / len(relations))
                if any(named):
                    share = sum(named[j] for j in found) / sum(named)
                    lists.setdefault(f'{kind}zR@{k}', []).append(share)
                for p in {p for *_, p in relations}:
                    of_p = {j for j, r in enumerate(relations) if r[2] == p}
                    share = len(found & of_p) / len(of_p)
                    lists.setdefault((f'{kind}mR@{k}', p), []).append(share)
        annotated = [t for t in best if any(t[:2] == (s, o) for s, o, _ in relations)]
        hits = plain_hits(boxes, labels, annotated, truth)
        for k in hit: hit[k] += len(set().union(*hits[:k]))
    figures = {name: np.mean(values) for name, values in lists.items() if isinstance(name, str)}
    for kind in ('', 'ng-'):
        for k in hit:
            means = [np.mean(lists.get((f'{kind}mR@{k}', p), 0)) for p in range(n_predicates)]
            figures[f'{kind}mR@{k}'] = sum(means) / n_predicates
    if task != 'sgdet': figures.update({f'A@{k}': hit[k] / total for k in hit})
    return figures


@st.composite
def scenes(draw, n_predicates=7, classes=2):
    """An image with few classes and crowded boxes, so that hits, repeated claims, ties and empty
    predictions abound."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, r = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    q = draw(st.sampled_from([0, 1, 5, 30, 130]))
    def boxes(n):
        corner = rng.integers(0, 12, (n, 2)).astype(np.float32)
        return np.column_stack([corner, corner + rng.integers(5, 14, (n, 2))])
    truth = SceneGraph(boxes(n), rng.integers(0, classes, n),
                       np.column_stack([rng.integers(0, n, (r, 2)),
                                        rng.integers(0, n_predicates, r)]))
    scores = rng.integers(0, 4, (q, n_predicates)) / np.float32(4)
    order = np.argsort(-scores.max(1), kind='stable')
    labels = np.where(rng.uniform(size=n) < .7, truth.labels, rng.integers(0, classes, n))
    prediction = Prediction(truth.boxes.numpy() + rng.integers(0, 3, (n, 1)), labels,
                            rng.integers(1, 5, n) / np.float32(4),
                            rng.integers(0, n, (q, 2))[order], scores[order])
    return prediction, truth


@settings(max_examples=60, deadline=None)
@given(cases=st.lists(scenes(), min_size=1, max_size=4), task=st.sampled_from(TASKS))
def test_agrees_with_the_definition(cases, task):
    predictions, truths = zip(*cases)
    zero_shot = [(0, 0, p) for p in range(4)] + [(1, 0, 2), (0, 1, 6)]
    figures = evaluate(predictions, truths, task, zero_shot)
    expected = plain_evaluate(predictions, truths, task, zero_shot,
                              predictions[0].predicates.shape[1])
    for name in figures:
        if name.startswith('per_predicate'): continue
        np.testing.assert_allclose(figures[name], expected.get(name, math.nan), rtol=0, atol=1e-9,
                                   err_msg=name)


@settings(max_examples=30, deadline=None)
@given(case=scenes())
def test_match_agrees_with_the_definition(case):
    prediction, truth = case
    triplets = np.column_stack([prediction.pairs, prediction.predicates.argmax(1)])
    table = match(truth, prediction, triplets)
    assert table.shape == (len(truth.relations), len(triplets))
    plain = plain_hits(prediction.boxes, prediction.labels, triplets.tolist(), truth)
    assert [set(np.nonzero(column)[0].tolist()) for column in table.T] == plain


def test_overlap_at_the_threshold_counts():
    assert pixel_iou(np.float32([[0, 0, 9, 9]]), np.float32([[0, 0, 9, 19]])).item() == .5
    truth = SceneGraph([[0, 0, 9, 9], [50, 0, 59, 9]], [0, 1], [[0, 1, 0]])
    prediction = Prediction([[0, 0, 9, 19], [50, 0, 59, 9]], [0, 1], [1, 1], [[0, 1]], [[1.]])
    assert evaluate([prediction], [truth], 'sgdet')['R@20'] == 1


def test_ranks_are_exact():
    "A relation first hit at position 20 is missed at K = 20 and found at K = 50."
    boxes = [[100 * i, 0, 100 * i + 50, 50] for i in range(12)]
    truth = SceneGraph(boxes, range(12), [[10, 11, 0]])
    others = [[s, o] for s in range(6) for o in range(6) if s != o][:20]
    prediction = Prediction(boxes, range(12), np.ones(12), others + [[10, 11]],
                            np.linspace(1, .5, 21)[:, None])
    figures = evaluate([prediction], [truth], 'sgdet')
    assert (figures['R@20'], figures['R@50']) == (0, 1)
    assert (figures['ng-R@20'], figures['ng-R@50']) == (0, 1)
    # among annotated pairs it is the first
    assert evaluate([prediction], [truth], 'predcls')['A@20'] == 1


def test_empty_predictions_count_as_nothing_found():
    predictions, truths, zero_shot = golden_cases('sgdet')
    nothing = Prediction([], [], [], [], torch.zeros(0, 50))
    full = evaluate(predictions, truths, 'sgdet', zero_shot)
    half = evaluate(predictions + [nothing] * 40, truths * 2, 'sgdet', zero_shot)
    for name in ('R@20', 'ng-R@100', 'mR@50', 'ng-mR@20', 'zR@50', 'ng-zR@100'):
        assert math.isclose(half[name], full[name] / 2, rel_tol=1e-12)
    untyped = Prediction([], [], [], [], [])
    figures = evaluate([untyped], truths[:1], 'sgdet')
    assert figures['R@20'] == 0 and figures['mR@20'] == 0


def test_clear_errors():
    predictions, truths, _ = golden_cases('sgdet')
    with pytest.raises(ValueError, match='40 predictions for 39 truths'):
        evaluate(predictions, truths[1:], 'sgdet')
    with pytest.raises(ValueError, match='39 predictions for 40 truths'):
        average_precision(predictions[1:], truths, 150)
    with pytest.raises(ValueError, match='must be made on the true boxes'):
        evaluate(predictions, truths, 'sgcls')
    with pytest.raises(ValueError, match='scores 50 predicates, 51 are expected'):
        Evaluator('sgdet', 51).update(predictions[0], truths[0])
    with pytest.raises(ValueError, match='holds predicate 7, but there are 2'):
        Evaluator('sgdet', 2).update(Prediction([], [], [], [], []),
                                     SceneGraph([[0, 0, 1, 1]], [0], [[0, 0, 7]]))
    with pytest.raises(ValueError, match='holds predicate 2, but there are 2, numbered from 0'):
        Evaluator('sgdet', 2).update(Prediction([], [], [], [], []),
                                     SceneGraph([[0, 0, 1, 1]], [0], [[0, 0, 2]]))
    with pytest.raises(ValueError, match='choose one of predcls, sgcls, sgdet'):
        evaluate(predictions, truths, 'detection')
    with pytest.raises(ValueError, match='choose one of reference, strict'):
        evaluate(predictions, truths, 'sgdet', protocol='literature')
    with pytest.raises(ValueError, match='a Prediction holds label .*, but there are 20 classes'):
        average_precision(predictions, [SceneGraph([], [], [])] * 40, 20)
    with pytest.raises(ValueError, match='zero_shot: shape'):
        Evaluator('sgdet', 50, zero_shot=[[1, 2], [3, 4], [5, 6]])


# Average precision

def test_average_precision_of_the_truth_is_one(capsys):
    _, truths, _ = golden_cases('sgdet')
    perfect = [Prediction(t.boxes, t.labels, np.ones(len(t)), [], torch.zeros(0, 50))
               for t in truths]
    ap = average_precision(perfect, truths, 150)
    assert math.isclose(ap['AP50'], 1) and math.isclose(ap['AP'], 1)
    assert len(ap['AP50_per_class']) == 150
    assert capsys.readouterr().out == ''


def test_average_precision_by_hand():
    """Right, wrong, right for three objects: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0,
    read at 101 recalls."""
    truth = SceneGraph([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [0, 0, 0], [])
    prediction = Prediction([[0, 0, 10, 10], [60, 60, 70, 70], [20, 0, 30, 10]], [0, 0, 0],
                            [.9, .8, .7], [], torch.zeros(0, 1))
    expected = (34 + 33 * 2 / 3) / 101
    assert math.isclose(average_precision([prediction], [truth], 1)['AP50'], expected)
    doubled = Prediction(torch.cat([prediction.boxes[:1], prediction.boxes]), [0] * 4,
                         [.95, .9, .8, .7], [], torch.zeros(0, 1))
    assert average_precision([doubled], [truth], 1)['AP50'] < expected


@pytest.mark.parametrize('axis', (0, 1))
def test_average_precision_of_a_shifted_box(axis):
    """A box with an overlap of 0.52 is right at the first of the ten thresholds, 0.5; one with 0.57
    at the first two. Far from the origin, along either axis."""
    for share, thresholds in ((.52, 1), (.57, 2), (.48, 0)):
        box = torch.tensor([[70., 40., 90., 60.]])
        shift = torch.zeros(4)
        shift[axis::2] = 20 * (1 - share) / (1 + share)
        found = average_precision([Prediction(box + shift, [0], [.9], [], [])],
                                  [SceneGraph(box, [0], [])], 1)
        assert found['AP50'] == pytest.approx(float(thresholds > 0))
        assert found['AP'] == pytest.approx(thresholds / 10)
        assert found['AP50_per_class'] == pytest.approx([float(thresholds > 0)])


def test_ignored_objects_are_neither_asked_for_nor_punished():
    truth = SceneGraph([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0], [], ignore=[False, True])
    for boxes in ([[0, 0, 10, 10]], [[20, 0, 30, 10], [0, 0, 10, 10]]):
        prediction = Prediction(boxes, [0] * len(boxes), [.5] * len(boxes), [], torch.zeros(0, 1))
        assert math.isclose(average_precision([prediction], [truth], 1)['AP50'], 1)


# Frequency prior

def test_frequency_prior_learns_what_it_counts():
    predictions, truths, _ = golden_cases('predcls')
    prior = FrequencyPrior(150, 50).fit(truths)
    assert prior.counts.sum() == sum(len(t.relations.unique(dim=0)) for t in truths)
    assert prior.pairs.sum() == sum(len(t) * (len(t) - 1) for t in truths)
    guesses = [prior.predict(t) for t in truths]
    for guess, truth in zip(guesses, truths):
        assert len(guess.pairs) == len(truth) * (len(truth) - 1)
        assert (guess.pairs[:, 0] != guess.pairs[:, 1]).all()
        assert (guess.predicates.amax(1).diff() <= 0).all()
        assert 0 <= guess.predicates.min() and guess.predicates.max() <= 1
    untrained = [FrequencyPrior(150, 50).predict(t) for t in truths]
    assert evaluate(guesses, truths, 'predcls')['R@50'] > .5
    assert evaluate(untrained, truths, 'predcls')['R@50'] < .5


def test_frequency_prior_of_images_without_pairs():
    prior = FrequencyPrior(3, 2).fit([SceneGraph([], [], []), SceneGraph([[0, 0, 1, 1]], [2], [])])
    assert prior.pairs.sum() == 0
    guess = prior.predict(SceneGraph([[0, 0, 1, 1]], [2], []))
    assert guess.predicates.shape == (0, 2)


# Table

@pytest.mark.parametrize('name', ['<script>alert(1)</script>', ']]>', '"quoted" & \'single\'',
                                  'a|b', 'line\nbreak', 'x' * 10_000, '\x00\x07'])
def test_table_escapes_names(name):
    figures = {f'{kind}@{k}': .5 for kind in ('R', 'ng-R', 'mR', 'ng-mR') for k in (20, 50, 100)}
    table = results_table({name: dict(predcls=figures, sgdet=figures, AP50=.3),
                           'other': dict(sgdet={**figures, 'R@20': .7})})
    html, markdown = table._repr_html_(), str(table)
    assert '<script' not in html + markdown and len(html + markdown) < 6000
    blocks = markdown.strip().split('\n\n')
    assert [len(block.splitlines()) for block in blocks] == [3, 4]
    for block in blocks:
        assert len({line.replace(r'\|', '').count('|') for line in block.splitlines()}) == 1
    assert blocks[1].splitlines()[3].endswith('| – |')
    assert '**70.0**' in blocks[1] and '30.0' in blocks[1]


def test_rows_of_numbers_below_a_million_have_keys_of_their_own():
    most = 2**20 - 1
    rows = np.array([[0, 2**19 + 5], [1, 5], [1, 2**19 + 5], [most, most], [most - 1, most]])
    assert row_key(rows).tolist() == [2**19 + 5, 2**20 + 5, 2**20 + 2**19 + 5,
                                               2**40 - 1, 2**40 - 1 - 2**20]
