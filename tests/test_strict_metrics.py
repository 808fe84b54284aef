"""The strict protocol against a plain evaluator in loops, hand-made cases, and the properties that
it guarantees; intervals and groups of `stdg.evaluation.intervals`."""
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stdg.datasets.statistics import predicate_groups
from stdg.evaluation.intervals import difference, group_recall, intervals, predicate_table, resample
from stdg.graph import TASKS, Prediction, SceneGraph
from stdg.matching import PROTOCOLS, _one_to_one, found_relations
from stdg.metrics import Evaluator, evaluate

K = (20, 50, 100)


def strict(predictions, truths, task='sgdet', zero_shot=None):
    return evaluate(predictions, truths, task, zero_shot, protocol='strict')


# The definition, in loops

def iou(a, b):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.


def deduplicate(boxes, labels, scores, pairs):
    "{object that takes part in a claim: the kept object that it is or repeats}, best first."
    kept = {}
    for i in sorted({i for pair in pairs for i in pair}, key=lambda i: (-scores[i], i)):
        same = [k for k in kept if kept[k] == k and labels[i] == labels[k]
                and iou(boxes[i], boxes[k]) >= .5]
        kept[i] = max(same, key=lambda k: iou(boxes[i], boxes[k]), default=i)
    return kept


def detections_of(truth, boxes, labels, kept):
    "{object of the truth: the one detection that may find it}."
    def fit(t, i):
        return iou(truth.boxes[t].tolist(), boxes[i]) if labels[i] == truth.labels[t] else 0.
    matched = {}
    for i in kept:
        free = [t for t in range(len(truth)) if t not in matched and fit(t, i) >= .5]
        if free: matched[max(free, key=lambda t: fit(t, i))] = i
    shared = {}
    for t in set(range(len(truth))) - matched.keys():
        fitting = [i for i in kept if fit(t, i) >= .5]
        if fitting: shared[t] = fitting[0]
    return matched | shared


def plain_triplets(prediction, truth, task):
    "Ranked triplets with constraint and without, and {object of the truth: detection}."
    boxes, labels = prediction.boxes.tolist(), prediction.labels.tolist()
    scores = prediction.scores.tolist()
    if task == 'predcls': labels, scores = truth.labels.tolist(), [1.] * len(truth)
    claims = {}
    for (s, o), row in zip(prediction.pairs.tolist(), prediction.predicates.tolist()):
        if scores[s] * scores[o] * max(row) > 0:
            claims[s, o] = [max(two) for two in zip(row, claims.get((s, o), row))]
    if task == 'sgdet':
        kept = deduplicate(boxes, labels, scores, claims)
        place = {i: rank for rank, i in enumerate(kept)}
        of = detections_of(truth, boxes, labels, [i for i in kept if kept[i] == i])
        def rank(pair):
            product = scores[pair[0]] * scores[pair[1]] * max(claims[pair])
            return *sorted(-place[i] for i in pair), product
        kept_claims = {}
        for pair in sorted(claims, key=rank, reverse=True):
            kept_claims.setdefault(tuple(kept[i] for i in pair), claims[pair])
        claims = kept_claims
    else: of = {t: t for t in range(len(truth)) if labels[t] == truth.labels[t]}
    every = [(float(np.float32(scores[s]) * np.float32(scores[o]) * np.float32(r)), s, o, p)
             for (s, o), row in claims.items() for p, r in enumerate(row)]
    every = sorted((t for t in every if t[0] > 0), reverse=True)
    assume(len({t[0] for t in every}) == len(every))  # of equal products the order is not promised
    best = [next(t for t in every if t[1:3] == pair) for pair in claims]
    return [t[1:] for t in sorted(best, reverse=True)], [t[1:] for t in every], of


def plain_strict(predictions, truths, task, zero_shot, n_predicates):
    lists, sums = {}, {}
    for prediction, truth in zip(predictions, truths):
        relations = list(dict.fromkeys(map(tuple, truth.relations.tolist())))
        constrained, free, of = plain_triplets(prediction, truth, task)
        annotated = [t for t in constrained if t[:2] in {r[:2] for r in relations}]
        for kind, triplets in (('', constrained), ('ng-', free), ('A', annotated)):
            for k in K if relations else ():
                found = {r: (of.get(r[0], -1), of.get(r[1], -1), r[2]) in triplets[:k]
                         for r in relations}
                def share(rows): return sum(found[r] for r in rows) / len(rows)
                sums.setdefault(f'{kind}@{k}', []).extend(found.values())
                lists.setdefault(f'{kind}R@{k}', []).append(share(relations))
                classes = truth.labels.tolist()
                unseen = [r for r in relations if (classes[r[0]], classes[r[1]], r[2]) in zero_shot]
                if unseen: lists.setdefault(f'{kind}zR@{k}', []).append(share(unseen))
                for p in {r[2] for r in relations}:
                    of_p = share([r for r in relations if r[2] == p])
                    lists.setdefault((f'{kind}per_predicate_recall@{k}', p), []).append(of_p)
    figures = {name: np.mean(values) for name, values in lists.items() if isinstance(name, str)}
    for kind in ('', 'ng-'):
        for k in K:
            figures[f'{kind}microR@{k}'] = np.mean(sums[f'{kind}@{k}'])
            each = figures[f'{kind}per_predicate_recall@{k}'] = [
                np.mean(lists.get((f'{kind}per_predicate_recall@{k}', p), 0))
                for p in range(n_predicates)]
            r, m = figures[f'{kind}R@{k}'], np.mean(each)
            figures[f'{kind}mR@{k}'] = m
            figures[f'{kind}F@{k}'] = 2 * r * m / (r + m) if r + m else 0.
            figures[f'A@{k}'] = np.mean(sums[f'A@{k}'])
    return figures


@st.composite
def scenes(draw, n_predicates=5, classes=2):
    """Crowded boxes of few classes, so that duplicates abound; repeated pairs and truths; empty
    predictions.

    Equal products alone are left out."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, r, m = (draw(st.integers(1, high)) for high in (5, 8, 9))
    q = draw(st.sampled_from([0, 1, 6, 40]))
    corner = rng.integers(0, 9, (n, 2))
    truth = SceneGraph(np.column_stack([corner, corner + rng.integers(5, 12, (n, 2))]),
                       rng.integers(0, classes, n),
                       np.column_stack([rng.integers(0, n, (r, 2)),
                                        rng.integers(0, n_predicates, r)]))
    source = rng.integers(0, n, m)
    moved = truth.boxes.numpy()[source] + rng.integers(-2, 3, (m, 4))
    boxes = np.sort(moved.reshape(m, 2, 2), axis=1).reshape(m, 4)
    labels = np.where(rng.uniform(size=m) < .8, truth.labels.numpy()[source],
                      rng.integers(0, classes, m))
    predicates = rng.uniform(size=(q, n_predicates)) * (rng.uniform(size=(q, n_predicates)) < .7)
    return Prediction(boxes, labels, rng.integers(0, 5, m) / 4, rng.integers(0, m, (q, 2)),
                      predicates), truth


def on_truth(prediction, truth):
    "The same scores for the objects of the truth, which may be fewer or more."
    at = np.arange(len(truth)) % len(prediction)
    return Prediction(truth.boxes, prediction.labels[at], prediction.scores[at],
                      prediction.pairs % len(truth), prediction.predicates, truth.size)


@settings(max_examples=120, deadline=None)
@given(cases=st.lists(scenes(), min_size=1, max_size=4), task=st.sampled_from(TASKS))
def test_agrees_with_the_definition(cases, task):
    predictions, truths = zip(*cases)
    if task != 'sgdet': predictions = [on_truth(*case) for case in cases]
    zero_shot = [(0, 0, p) for p in range(3)] + [(1, 0, 2), (0, 1, 4)]
    evaluator = Evaluator(task, 5, zero_shot, 'strict')
    for prediction, truth in zip(predictions, truths): evaluator.update(prediction, truth)
    figures, expected = evaluator.compute(), plain_strict(predictions, truths, task, zero_shot, 5)
    counts = [t.relations.unique(dim=0)[:, 2].bincount(minlength=5).numpy() for t in truths]
    assert figures.pop('truths_per_predicate') == np.sum(counts, 0).tolist()
    for name, value in figures.items():
        np.testing.assert_allclose(value, expected.get(name, math.nan), rtol=0, atol=1e-9,
                                   err_msg=name)
    assert len(figures) == 3 * (13 if task != 'sgdet' else 12)


def test_one_to_one_is_greedy_by_score():
    """The rounds of proposals against detections that choose one after another; overlaps are seldom
    equal."""
    rng, shared, rejected = np.random.default_rng(0), 0, 0
    for _ in range(400):
        overlap = rng.uniform(0, 1, rng.integers(1, 6, 2))
        matched = {}
        for i in range(overlap.shape[1]):
            free = [t for t in range(len(overlap)) if t not in matched and overlap[t, i] >= .5]
            if not free: continue
            best = max(free, key=lambda t: overlap[t, i])
            matched[best] = i
            rejected += best != overlap[:, i].argmax()
        left = {t: int((row >= .5).argmax()) for t, row in enumerate(overlap)
                if t not in matched and (row >= .5).any()}
        shared += bool(left) and bool(((overlap >= .5).sum(1) > 1).any())
        assert {t: i for t, i in np.argwhere(_one_to_one(overlap)).tolist()} == matched | left
    assert shared > 20 and rejected > 20


# What it guarantees

@settings(max_examples=200, deadline=None)
@given(case=scenes(), seed=st.integers(0, 2**32 - 1))
def test_a_copy_buys_no_second_guess_whatever_it_says(case, seed):
    """Copies of kept objects, of no better score, repeat pairs of the originals with a right guess
    and score 1.

    No figure changes, so R@K with graph constraint never rises."""
    prediction, truth = case
    rng, n = np.random.default_rng(seed), len(prediction)
    originals, labels = prediction.boxes.tolist(), prediction.labels.tolist()
    claims = [pair for pair, row in zip(prediction.pairs.tolist(), prediction.predicates.tolist())
              if prediction.scores[pair].prod() * max(row) > 0]
    kept = deduplicate(originals, labels, prediction.scores.tolist(), claims)
    taken = [pair for pair in claims if all(kept[i] == i for i in pair)]
    if not taken: return
    pairs = np.array(taken)[rng.integers(0, len(taken), 12)]
    # a copy of either end of each pair, moved if it stays a copy of that object first of all
    sources, boxes = pairs.ravel(), []
    for i in sources:
        moved = (np.array(originals[i]) + rng.integers(-1, 2, 4)).tolist()
        fits = {i: 0}
        if moved[0] < moved[2] and moved[1] < moved[3]:
            fits = {k: iou(moved, originals[k]) for k in kept
                    if kept[k] == k and labels[k] == labels[i]}
        boxes.append(moved if fits[i] >= .5 and max(fits, key=fits.get) == i else originals[i])
    ends = n + np.arange(24).reshape(12, 2)
    both = rng.uniform(size=(12, 1)) < .4
    one = rng.permuted(np.tile([True, False], (12, 1)), axis=1)
    copies = np.where(both | one, ends, pairs)
    right = truth.relations[rng.integers(0, len(truth.relations), 12), 2]
    scores = prediction.scores[sources] * torch.tensor(rng.choice([.5, 1.], 24))
    copied = Prediction(torch.cat([prediction.boxes, torch.tensor(boxes)]),
                        torch.cat([prediction.labels, prediction.labels[sources]]),
                        torch.cat([prediction.scores, scores]),
                        torch.cat([prediction.pairs, torch.tensor(copies)]),
                        torch.cat([prediction.predicates, torch.eye(5)[right]]))
    before, after = strict([prediction], [truth]), strict([copied], [truth])
    assert all(after[f'R@{k}'] <= before[f'R@{k}'] for k in K)
    assert before == after


@settings(max_examples=150, deadline=None)
@given(case=scenes(), task=st.sampled_from(TASKS))
def test_one_guess_for_a_pair_of_objects(case, task):
    """With graph constraint no two predicates are found for one pair of true objects, however often
    they are detected."""
    prediction, truth = case if task == 'sgdet' else (on_truth(*case), case[1])
    relations, found = found_relations(prediction, truth, task, 5, 'strict')
    hit = [tuple(r[:2]) for r in relations[found[0, -1] > 0].tolist()]
    assert len(hit) == len(set(hit))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), task=st.sampled_from(TASKS))
def test_without_traps_it_is_the_reference(seed, task):
    """Objects apart and found once, pairs in the order of products, no truth twice: all figures are
    those of the reference."""
    rng = np.random.default_rng(seed)
    n, p = 8, 4
    boxes = np.array([[200 * i, 0, 200 * i + 100, 80] for i in range(n)])
    ends = rng.permutation(np.argwhere(~np.eye(n, dtype=bool)))
    truth = SceneGraph(boxes, rng.integers(0, 3, n),
                       np.column_stack([ends[:9], rng.integers(0, p, 9)]))
    labels = np.where(rng.uniform(size=n) < .7, truth.labels, rng.integers(0, 3, n))
    scores = rng.uniform(.1, 1, n).astype(np.float32)
    pairs = ends[rng.permutation(56)[:40]]
    predicates = rng.uniform(.01, 1, (40, p)).astype(np.float32)
    value = predicates.max(1) * (1 if task == 'predcls' else scores[pairs].prod(1))
    order = np.argsort(-value)
    prediction = Prediction(boxes + rng.integers(-10, 11, (n, 4)), labels, scores, pairs[order],
                            predicates[order])
    reference, figures = evaluate([prediction], [truth], task), strict([prediction], [truth], task)
    assert {name: figures[name] for name in reference} == reference
    some = rng.permutation(40)[:10]
    again = Prediction(prediction.boxes, labels, scores,
                       torch.cat([prediction.pairs, prediction.pairs[some]]),
                       torch.cat([prediction.predicates, prediction.predicates[some] * .5]))
    assert strict([again], [truth], task) == figures


def test_the_truth_scores_one():
    boxes = [[0, 0, 40, 40], [30, 0, 70, 40], [100, 0, 140, 40]]
    truth = SceneGraph(boxes, [0, 0, 1], [[0, 2, 0], [1, 2, 1], [2, 0, 1]])
    perfect = Prediction(boxes, [0, 0, 1], [1, 1, 1], truth.relations[:, :2],
                         torch.eye(2)[truth.relations[:, 2]])
    for task in TASKS:
        figures = strict([perfect], [truth], task)
        for kind in ('R', 'mR', 'ng-R', 'microR', 'F', 'ng-F'): assert figures[f'{kind}@20'] == 1


# Cases by hand

CUP, TABLE, ON, NEAR = 0, 1, 0, 1
scene = SceneGraph([[40, 10, 60, 40], [0, 40, 100, 90]], [CUP, TABLE], [[0, 1, ON]])


def said(cups, scores, guesses, table=1.):
    "A table and cups on boxes `cups`, each with its guess about the table."
    n = len(cups)
    return Prediction([*cups, [0, 40, 100, 90]], [CUP] * n + [TABLE], [*scores, table],
                      [[i, n] for i in range(n)], guesses)


def recalls(prediction, truth=scene, task='sgdet', name='R@20'):
    return [evaluate([prediction], [truth], task, protocol=p)[name] for p in PROTOCOLS]


@pytest.mark.parametrize('second', [[40, 10, 60, 40], [41, 12, 62, 41], [46, 10, 66, 40]])
def test_a_copy_buys_no_second_guess(second):
    # the last two boxes lie on either side of the cup, apart from one another
    cups = [[34, 10, 54, 40] if second[0] == 46 else [40, 10, 60, 40], second]
    assert recalls(said(cups, [.9, .8], [[.1, .8], [1., 0.]])) == [1, 0]
    # of equal scores the earlier is kept
    assert recalls(said(cups, [.9, .9], [[.1, .8], [1., 0.]])) == [1, 0]
    # the guess of the better box, and no other
    assert recalls(said(cups, [.8, .9], [[.1, .8], [1., 0.]])) == [1, 1]
    assert recalls(said(cups, [.9, .8], [[.8, .1], [0., 1.]])) == [1, 1]


def test_a_copy_may_make_a_first_guess():
    """The better box makes no claim about the second table.

    The copy's claim becomes one of the better box, with its box and score."""
    truth = SceneGraph([*scene.boxes.tolist(), [200, 40, 300, 90]], [CUP, TABLE, TABLE],
                       [[0, 1, ON], [0, 2, NEAR]])
    boxes, labels = [*truth.boxes.tolist(), [44, 10, 64, 40]], [CUP, TABLE, TABLE, CUP]
    for scores, name in (([.9, 1, 1, .3], 'the copy is weaker'),
                         ([.3, 1, 1, .9], 'the copy is kept')):
        prediction = Prediction(boxes, labels, scores, [[0, 1], [3, 2]], [[1., 0], [0, 1.]])
        assert recalls(prediction, truth) == [1, 1], name
    far = Prediction([[44, 10, 64, 40], *boxes[1:3], [50, 10, 70, 40]], labels, [.9, 1, 1, .3],
                     [[0, 1], [3, 2]], [[1., 0], [0, 1.]])
    # the copy shares 10/30 with the true cup, but 14/26 with the box that it repeats
    assert recalls(far, truth) == [1/2, 1]


def test_a_claim_of_a_copy_ranks_by_the_score_of_the_object():
    """Twenty pairs at 0.5; the copy's claim has a product of 0.1 * 0.9, but as a claim of the object
    it has 1 * 0.9."""
    boxes = [[100 * i, 0, 100 * i + 50, 50] for i in range(22)]
    truth = SceneGraph(boxes, range(22), [[0, 21, 0]])
    pairs = [[i, i + 1] for i in range(1, 21)] + [[0, 1], [22, 21]]
    prediction = Prediction([*boxes, [2, 0, 52, 50]], [*range(22), 0], [1.] * 22 + [.1], pairs,
                            [[.5]] * 20 + [[.1], [.9]])
    assert recalls(prediction, truth) == [0, 1]
    assert recalls(prediction, truth, name='ng-R@20') == [0, 1]


def test_the_pair_of_the_better_boxes_is_kept():
    """Of copies that guess at the same pair the one whose weaker box is better, even where the
    product of the scores says otherwise."""
    cup, copy, table, slab = [40, 10, 60, 40], [41, 10, 61, 40], [0, 40, 100, 90], [1, 40, 101, 90]
    prediction = Prediction([cup, copy, table, slab], [CUP, CUP, TABLE, TABLE], [.9, .5, .6, .4],
                            [[0, 3], [1, 2]], [[1., 0], [0, .9]])
    assert recalls(prediction) == [1, 0]  # weaker boxes score 0.4 and 0.5; products 0.36 and 0.27


def test_a_copy_of_another_class_is_another_object():
    prediction = Prediction([[40, 10, 60, 40], [40, 10, 60, 40], [0, 40, 100, 90]],
                            [TABLE, CUP, TABLE], [1, .5, 1], [[0, 2], [1, 2]], [[0, 1.], [1., 0]])
    assert recalls(prediction) == [1, 1]


def test_copies_take_no_ranks():
    "Twenty-five copies that all make a wrong claim do not push the right pair out."
    cups = [[40, 10, 60, 40]] * 25 + [[300, 10, 320, 40]]
    truth = SceneGraph([*scene.boxes.tolist(), cups[-1]], [CUP, TABLE, CUP], [[2, 1, ON]])
    assert recalls(said(cups, [.9] * 25 + [.1], [[0, 1.]] * 25 + [[1., 0]]), truth) == [0, 1]


def test_an_object_without_a_claim_removes_no_other():
    better = Prediction([[40, 10, 60, 40], [41, 10, 61, 40], [0, 40, 100, 90]], [CUP, CUP, TABLE],
                        [.9, .5, 1], [[1, 2], [0, 2]], [[1., 0], [0., 0]])
    assert recalls(better) == [1, 1]


def test_crowds_are_found_one_by_one():
    """Two people who overlap a little more than either box of them: each finds its own, in whatever
    order they score."""
    people = [[0, 0, 40, 100], [24, 0, 64, 100]]
    truth = SceneGraph([*people, [0, 200, 50, 220]], [0, 0, 1], [[0, 2, ON], [1, 2, NEAR]])
    for scores in ([.9, .8, 1], [.8, .9, 1]):
        prediction = Prediction([[0, 0, 44, 100], [20, 0, 64, 100], [0, 200, 50, 220]], [0, 0, 1],
                                scores, [[0, 2], [1, 2]], [[1., 0], [0, 1.]])
        assert recalls(prediction, truth) == [1, 1]


def test_an_object_that_was_drawn_twice_is_found_once_for_both():
    truth = SceneGraph([[40, 10, 60, 40], [41, 10, 61, 40], [0, 40, 100, 90]], [CUP, CUP, TABLE],
                       [[0, 2, ON], [1, 2, ON], [2, 1, NEAR]])
    assert recalls(said([[40, 10, 60, 40]], [1], [[1., 0]]), truth) == [2/3, 2/3]
    again = Prediction(truth.boxes, truth.labels, [1, 1, 1], [[0, 2]], [[1., 0]])
    # given boxes are the objects that they are
    assert recalls(again, truth, 'predcls') == [2/3, 1/3]


def test_plain_overlap():
    # of 20: IoU exactly 1/2 counts, and no pixel is given away
    for width, hit in ((10, 1), (9.9, 0)):
        assert recalls(said([[40, 10, 40 + width, 40]], [1], [[1., 0]]))[1] == hit
    point = SceneGraph([[5, 5, 5, 5], [0, 40, 100, 90]], [CUP, TABLE], [[0, 1, ON]])
    # nothing is half of nothing
    assert recalls(said([[5, 5, 5, 5]], [1], [[1., 0]]), point) == [1, 0]


def test_truths_are_counted_once():
    truth = SceneGraph(scene.boxes, scene.labels,
                       [[0, 1, ON], [0, 1, ON], [1, 0, NEAR], [0, 1, ON]])
    assert recalls(said([[40, 10, 60, 40]], [1], [[1., 0]]), truth) == [3/4, 1/2]
    assert recalls(said([[40, 10, 60, 40]], [1], [[1., 0]]), truth, 'predcls', 'A@20') == [3/4, 1/2]


def test_ranking_is_by_product():
    boxes = [[100 * i, 0, 100 * i + 50, 50] for i in range(22)]
    truth = SceneGraph(boxes, range(22), [[0, 21, 0]])
    pairs = [[i, 0] for i in range(1, 21)] + [[0, 21]]
    late = Prediction(boxes, range(22), [1.] + [.1] * 20 + [1.], pairs, [[.9]] * 20 + [[.3]])
    assert recalls(late, truth) == [0, 1] and recalls(late, truth, name='ng-R@20') == [1, 1]
    # all objects score 1 there, so the order is that of the predicates
    assert recalls(late, truth, 'predcls') == [0, 0]


def test_nothing_said_is_nothing_found():
    itself = SceneGraph([[0, 0, 9, 9]], [CUP], [[0, 0, ON]])
    silent = Prediction(itself.boxes, [CUP], [1], [], torch.zeros(0, 2))
    assert recalls(silent, itself) == [1, 0]  # the reference lets its last object be on itself
    for scores, guess in (([0.], [1., 0]), ([1.], [0., 0])):
        assert recalls(said([[40, 10, 60, 40]], scores, [guess])) == [1, 0]
    nothing = Prediction([], [], [], [], torch.zeros(0, 2))
    full = said([[40, 10, 60, 40]], [1], [[1., 0]])
    figures = strict([full, nothing, nothing, nothing], [scene] * 3 + [SceneGraph([], [], [])])
    for name, value in {'R@20': 1/3, 'microR@20': 1/3, 'mR@20': 1/6, 'F@20': 2 / (3 + 6)}.items():
        assert math.isclose(figures[name], value), name
    assert figures['truths_per_predicate'] == [3, 0]
    assert strict([nothing], [scene])['F@100'] == 0 and math.isnan(strict([], [])['microR@20'])


def test_a_repeated_pair_counts_once_and_at_its_best():
    twice = Prediction(scene.boxes, scene.labels, [1, 1], [[0, 1], [0, 1]], [[.2, .6], [.5, .1]])
    for task in TASKS:
        assert recalls(twice, task=task) == [1, 0]
        assert recalls(twice, task=task, name='ng-R@20') == [1, 1]
    twice.predicates[1, 0] = .7
    for task in TASKS: assert recalls(twice, task=task) == [1, 1]


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_scores_must_be_numbers(protocol):
    for prediction in (said([[40, 10, 60, 40]], [math.nan], [[1., 0]]),
                       said([[40, 10, 60, 40]], [1], [[math.inf, 0]])):
        with pytest.raises(ValueError, match='NaN or infinite'):
            evaluate([prediction], [scene], 'sgdet', protocol=protocol)


# Intervals

def world(rng, images, n_predicates=3, keep=True):
    """An evaluator that has seen images of 1 to 4 relations, each found with the image's own
    chance, on average 0.65, 0.55, 0.45 and 0.35: images with more relations are harder.

    So in the long run R is 0.5 and micro recall (0.65 + 2 0.55 + 3 0.45 + 4 0.35) / 10 = 0.45. An
    image of n relations shows a predicate with chance 1 - (2/3)^n, and mR is the mean of the four
    chances with these weights."""
    evaluator = Evaluator('predcls', n_predicates, protocol='strict', keep=keep)
    boxes, labels = [[100 * i, 0, 100 * i + 50, 50] for i in range(5)], range(5)
    for _ in range(images):
        n = rng.integers(1, 5)
        chance = rng.uniform(.2, .8) + (2.5 - n) * .1
        predicate = rng.integers(0, n_predicates, n)
        pairs = np.column_stack([np.zeros(n, int), np.arange(1, n + 1)])
        scores = np.eye(n_predicates)[np.where(rng.uniform(size=n) < chance, predicate,
                                               (predicate + 1) % n_predicates)]
        evaluator.update(Prediction(boxes, labels, np.ones(5), pairs, scores),
                         SceneGraph(boxes, labels, np.column_stack([pairs, predicate])))
    return evaluator


def test_intervals_cover_the_truth():
    rng, shown = np.random.default_rng(0), 1 - (2/3) ** np.arange(1, 5)
    mean = shown @ [.65, .55, .45, .35] / shown.sum()
    truth = {'R@20': .5, 'microR@100': .45, 'mR@50': mean, 'F@20': mean / (.5 + mean)}
    found = [intervals(world(rng, 60), n=200, seed=seed) for seed in range(60)]
    assert set(found[0]) == {f'{g}{kind}@{k}' for g in ('', 'ng-')
                             for kind in ('R', 'mR', 'microR', 'F') for k in K}
    for name, value in truth.items():
        covered = np.mean([low <= value <= high for low, high in (f[name] for f in found)])
        assert .87 <= covered <= 1, (name, covered)
        wide = np.mean([np.diff(f[name]) for f in found])
        assert .1 < wide < .25, (name, wide)


def test_resamples_are_what_an_evaluator_says_of_the_drawn_images():
    evaluator = world(np.random.default_rng(3), 12)
    drawn = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), 30)
    samples = resample(evaluator, 30, seed=7)
    for i, weights in enumerate(drawn):
        again = Evaluator('predcls', 3, protocol='strict')
        for (truths, hits), weight in zip(evaluator.kept, weights):
            for _ in range(weight):
                again.images += 1
                again.recall += hits.sum(2) / truths.sum()
                again.images_with += truths > 0
                again.per_predicate += hits / np.maximum(truths, 1)
                again.truths, again.hits = again.truths + truths, again.hits + hits
        figures = again.compute()
        for name, values in samples.items():
            if (again.images_with > 0).all():
                np.testing.assert_allclose(values[i], figures[name], rtol=0, atol=1e-12,
                                           err_msg=name)


def test_a_predicate_that_was_not_drawn_does_not_count_as_missed():
    evaluator = Evaluator('predcls', 3, protocol='strict', keep=True)
    boxes = [[0, 0, 50, 50], [100, 0, 150, 50]]
    for p in (0, 0, 0, 1):
        evaluator.update(Prediction(boxes, [0, 1], [1, 1], [[0, 1]], np.eye(3)[[p]]),
                         SceneGraph(boxes, [0, 1], [[0, 1, p]]))
    assert evaluator.compute()['mR@20'] == 2/3  # all found, but predicate 2 does not exist
    np.testing.assert_allclose(resample(evaluator, 50)['mR@20'], 2/3)


def test_the_same_seed_draws_the_same():
    evaluator = world(np.random.default_rng(4), 20)
    assert intervals(evaluator, seed=1) == intervals(evaluator, seed=1) != intervals(evaluator,
        seed=2)
    samples = resample(evaluator, 250, seed=5)
    assert len(samples['F@20']) == 250 and samples['F@20'].std() > 0
    wide, narrow = intervals(evaluator, level=.99)['R@20'], intervals(evaluator, level=.5)['R@20']
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_difference_is_surer_than_its_parts():
    one, two = world(np.random.default_rng(5), 60), world(np.random.default_rng(5), 60)
    for i in range(0, 60, 6):
        two.kept[i] = two.kept[i][0], np.minimum(two.kept[i][1] + 1, two.kept[i][0])
    gap, alone = difference(two, one)['R@20'], intervals(one)['R@20']
    assert 0 < gap[0] < gap[1] and gap[1] - gap[0] < alone[1] - alone[0]
    assert difference(one, two)['R@20'] == pytest.approx([-gap[1], -gap[0]])
    with pytest.raises(ValueError, match='other truths'):
        difference(one, world(np.random.default_rng(6), 60))
    with pytest.raises(ValueError, match='keep=True'):
        resample(world(np.random.default_rng(6), 3, keep=False))
    with pytest.raises(ValueError, match='at least one resample'): resample(one, 0)


def test_keeping_is_a_choice():
    def held(evaluator):
        return sum(np.asarray(value).nbytes for value in vars(evaluator).values()
                   if not isinstance(value, list))
    few, many = (world(np.random.default_rng(0), images, keep=False) for images in (5, 50))
    assert few.kept is many.kept is None and held(few) == held(many)
    assert len(world(np.random.default_rng(0), 50).kept) == 50


# Groups and tables

@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=60))
def test_groups_keep_their_rule(counts):
    counts = np.array(counts)
    if not counts.sum(): return
    groups = predicate_groups(counts)
    head, tail = counts[groups == 'head'], counts[groups == 'tail']
    assert len(head) and head.sum() >= counts.sum() / 2 > head.sum() - head.min()
    assert tail.sum() <= counts.sum() / 20
    rest = counts[groups == 'body']
    if len(rest):
        assert head.min() >= rest.max() and (not len(tail) or rest.min() >= tail.max())
        assert tail.sum() + rest.min() > counts.sum() / 20


def test_group_recall_and_mean_recall_agree():
    figures = world(np.random.default_rng(2), 40).compute()
    means = group_recall(figures, np.array(['head', 'body', 'body']))
    mean = (means['head']['ng-R@50'] + 2 * means['body']['ng-R@50']) / 3
    assert math.isclose(mean, figures['ng-mR@50']) and math.isnan(means['tail']['R@20'])
    with pytest.raises(ValueError, match='2 groups for figures of 3'):
        group_recall(figures, ['head', 'tail'])
    with pytest.raises(ValueError, match="protocol='strict'"):
        predicate_table(evaluate([], [], 'sgdet'), [], [])


@pytest.mark.parametrize('name', ['<script>alert(1)</script>', 'a|b', 'line\nbreak', 'x' * 10_000,
                                  '\x00\x07'])
def test_predicate_table_escapes_names(name):
    table = predicate_table(world(np.random.default_rng(2), 10).compute(), [name, 'on', 'in'],
                            [1, 60, 30])
    html, markdown = table._repr_html_(), str(table)
    assert '<script' not in html + markdown and len(html + markdown) < 5000
    lines = markdown.strip().splitlines()
    assert len(lines) == 8 and len({line.replace(r'\|', '').count('|') for line in lines}) == 1
    assert lines[2].startswith('| on | head | 60 |') and '| tail | 1 |' in lines[4]
    assert lines[5].startswith('| mean of head | head | 60 |')
