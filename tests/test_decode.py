"""Decoding: the released numbers, a plain loop over candidates, round trips from graph to fields
and back, and bad fields."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from stdg.decode import (
    candidates,
    decode,
    decode_batch,
    decode_tasks,
    detect,
    ideal_output,
)
from stdg.fields import encode
from stdg.graph import TASKS, SceneGraph
from stdg.naming import hungarian_match, peak_at
from stdg.reading import PUBLISHED, Reading

GOLDEN = np.load(Path(__file__).parent / 'golden/decode.npz')


def golden(case):
    part = lambda name: torch.from_numpy(GOLDEN[f'case{case}_{name}'])
    truth = SceneGraph(part('gt_boxes'), part('gt_labels') - 1, [])
    return part('detection'), part('relation'), truth, part


def by_pair(pairs): return (pairs[:, 0] * 1000 + pairs[:, 1]).argsort()


def random_fields(seed, classes=6, predicates=4, h=9, w=12, density=.3):
    g = torch.Generator().manual_seed(seed)
    detection = torch.rand(classes + 4, h, w, generator=g)
    relation = torch.rand(predicates, 7, h, w, generator=g)
    detection[-2:] *= 4
    relation[:, 1] *= w
    relation[:, 2] *= h
    relation[:, 3] *= w
    relation[:, 4] *= h
    relation[:, 0] *= torch.rand(predicates, h, w, generator=g) < density
    return detection, relation


def random_graph(seed, n=8, r=12, classes=6, predicates=4, side=192, size=None):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, side - 60, (n, 2))
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(r)])
    return SceneGraph(np.c_[corner, corner + rng.uniform(15, 60, (n, 2))],
                      rng.integers(0, classes, n),
                      np.c_[pairs, rng.integers(0, predicates, r)], size or (side, side))


@pytest.mark.parametrize('case', range(6))
@pytest.mark.parametrize('task', TASKS)
def test_golden(case, task):
    detection, relation, truth, part = golden(case)
    ours = decode(detection, relation, task, truth, released=True)
    pairs, predicates = part(f'{task}_pairs'), part(f'{task}_predicates')
    assert torch.allclose(ours.boxes.double(), part(f'{task}_boxes'), atol=1e-3, rtol=0)
    assert torch.equal(ours.labels, part(f'{task}_labels') - 1)
    assert torch.allclose(ours.scores.double(), part(f'{task}_scores'), atol=1e-5, rtol=0)
    assert torch.equal(ours.pairs[by_pair(ours.pairs)], pairs[by_pair(pairs)])
    assert torch.allclose(ours.predicates[by_pair(ours.pairs)].double(), predicates[by_pair(pairs)],
                          atol=1e-5, rtol=0)
    best = predicates.amax(1)
    alone = torch.tensor([(best == value).sum() == 1 for value in best])
    assert torch.equal(ours.pairs[alone], pairs[alone])  # the order, where scores differ


@pytest.mark.parametrize('case', range(6))
def test_default_differs_in_rank_only(case):
    detection, relation, truth, _ = golden(case)
    for task in ('sgdet', 'predcls'):
        ours = decode(detection, relation, task, truth)
        theirs = decode(detection, relation, task, truth, released=True)
        a, b = by_pair(ours.pairs), by_pair(theirs.pairs)
        assert torch.equal(ours.pairs[a], theirs.pairs[b])
        assert torch.equal(ours.predicates[a], theirs.predicates[b])
        rank = ours.scores[ours.pairs].prod(1) * ours.predicates.amax(1)
        assert (rank.diff() <= 1e-7).all()
        assert task == 'sgdet' or torch.equal(ours.pairs, theirs.pairs)


def plain_relations(relation, boxes, scores, filtered, stride):
    "Sections 8.2 and 8.3 of the method spec word for word."
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).double().numpy()
    q, pairs = scores.double().numpy(), {}
    for p, y, x in (relation[:, 0] > .1).nonzero().tolist():
        c, *points = relation[p, :5, y, x].tolist()
        def nearest(point):
            distance = np.linalg.norm(centres - np.array(point) * stride, axis=1)
            return int((distance / (q * c + 1e-5)).argmin())
        s, o = nearest(points[:2]), nearest(points[2:])
        if s == o or filtered and c <= min(q[s], q[o]) / 2: continue
        row = pairs.setdefault((s, o), np.zeros(len(relation)))
        row[p] = max(row[p], c)
    return pairs


@pytest.mark.parametrize('seed', range(4))
def test_plain_loop(seed):
    detection, relation = random_fields(seed)
    truth = random_graph(seed, side=72, size=(72, 96))
    for task in TASKS:
        ours = decode(detection, relation, task, truth, stride=8)
        plain = plain_relations(relation, ours.boxes, ours.scores, task != 'predcls', 8)
        assert {tuple(pair) for pair in ours.pairs.tolist()} == set(plain)
        for pair, row in zip(ours.pairs.tolist(), ours.predicates):
            assert np.allclose(row, plain[tuple(pair)], atol=1e-6)


def test_many_candidates_need_no_more_than_blocks():
    detection, relation = random_fields(0, predicates=20, density=1.)
    ours = decode(detection, relation, stride=8)
    plain = plain_relations(relation, ours.boxes, ours.scores, True, 8)
    assert {tuple(pair) for pair in ours.pairs.tolist()} == set(plain)
    assert (relation[:, 0] > .1).sum() > 3 * 512


@pytest.mark.parametrize('stride', [8, 16])
def test_round_trip(stride):
    kept = total = right = 0
    for seed in range(30):
        graph = random_graph(seed)
        fields = ideal_output(encode(graph, 6, 4, graph.size, stride))
        prediction = decode(*fields, 'predcls', graph, stride)
        assert torch.equal(prediction.boxes, graph.boxes) and prediction.size == graph.size
        found = {(s, o, p) for (s, o), row in zip(prediction.pairs.tolist(), prediction.predicates)
                 for p in row.nonzero()[:, 0].tolist()}
        true = {tuple(row) for row in graph.relations.tolist()}
        kept += len(found & true)
        right += len(found)
        total += len(true)
    assert kept / total > .95 and kept / right > .99


def test_round_trip_detection():
    graph = SceneGraph([[8, 8, 60, 50], [70, 20, 150, 120], [20, 100, 66, 180]], [0, 1, 0],
                       [(0, 1, 2), (2, 1, 0)], (192, 192))
    fields = ideal_output(encode(graph, 6, 4, graph.size, 8))
    prediction = decode(*fields, stride=8)
    order = [(prediction.boxes[:3] - box).abs().sum(1).argmin().item() for box in graph.boxes]
    assert torch.allclose(prediction.boxes[order], graph.boxes, atol=1e-3)
    assert torch.equal(prediction.labels[order], graph.labels)
    pairs = {tuple(pair) for pair in prediction.pairs.tolist()}
    assert pairs == {(order[0], order[1]), (order[2], order[1])}
    assert torch.equal(decode(*fields, 'sgcls', graph, 8).labels, graph.labels)


def test_unmatched_boxes_do_not_leak_their_class():
    detection = torch.zeros(10, 12, 12)
    detection[3, 4, 5] = .4  # a weak peak of class 3 beside the centre of the first box, of size 0
    truth = SceneGraph([[32, 24, 56, 56], [60, 60, 90, 90]], [5, 2], [], (96, 96))
    relation = torch.zeros(4, 7, 12, 12)
    ours, theirs = (decode(detection, relation, 'sgcls', truth, 8, released)
                    for released in (False, True))
    assert theirs.labels.tolist() == [5, 2] and theirs.scores.tolist() == [1, 1]
    assert ours.labels[0] == 3 and ours.scores[1] == 0
    assert torch.isclose(ours.scores[0], torch.tensor(.4))


def test_match_is_one_to_one_and_best_in_total():
    boxes = torch.tensor([[0., 0, 100, 100], [10, 0, 110, 100]])
    others = torch.tensor([[4., 0, 104, 100], [200, 200, 300, 300], [0, 0, 70, 100]])
    ours, theirs = hungarian_match(boxes, others)
    assert list(zip(ours.tolist(), theirs.tolist())) == [(0, 2), (1, 0)]


def test_a_match_overlaps_by_more_than_half():
    """Widths count the last pixel: of boxes 100 pixels wide, those that share 66 have an overlap
    of 66/134, just below a half; in the last case it is a half, which is not more."""
    box = torch.tensor([[0., 0, 99, 49]])
    for shift, matched in ((33, True), (34, False), (35, False), (38, False), (60, False)):
        ours, _ = hungarian_match(box, box + torch.tensor([shift, 0, shift, 0]))
        assert len(ours) == matched, shift
        downwards = torch.tensor([0, shift, 0, shift])
        ours, _ = hungarian_match(box[:, [1, 0, 3, 2]], box[:, [1, 0, 3, 2]] + downwards)
        assert len(ours) == matched, f'{shift} downwards'
    half = torch.tensor([[0., 0, 49, 49]])
    assert len(hungarian_match(box, half)[0]) == 0
    assert len(hungarian_match(box, half + torch.tensor([0, 0, 1, 0]))[0]) == 1


def test_boxes_that_do_not_touch_cost_as_much_as_one_more():
    """Three boxes in a row of 100 pixels, with others beside them: two good matches and a pair that
    does not touch are better than three that hardly touch."""
    at = lambda *lefts: torch.tensor([[left, 0., left + 99, 99] for left in lefts])
    ours, theirs = hungarian_match(at(0, 96, 192), at(5, 101, -95))
    assert list(zip(ours.tolist(), theirs.tolist())) == [(0, 0), (1, 1)]


def test_the_peak_beside_a_box_is_sought_within_the_field():
    "Of the cells within one of the centre, also in the corners of the field and beyond its edge."
    heatmap = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for row in range(-1, 6):
        for column in range(-1, 8):
            y, x = min(max(row, 0), 4), min(max(column, 0), 6)
            around = heatmap[:, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].amax((1, 2))
            label, score = peak_at(heatmap, torch.tensor([[column + .5, row + .5]]))
            assert (label.tolist(), score.tolist()) == ([around.argmax()], [around.max()])


def test_sgcls_takes_the_class_of_a_detection_on_more_than_half():
    """Detections of class 3 on boxes of class 5, shifted by so much that they share a little more
    or less than a half; the released code keeps the true class below it."""
    detection, relation = torch.zeros(10, 12, 24), torch.zeros(4, 7, 12, 24)
    boxes = torch.tensor([[8., 24, 47, 63], [104, 24, 143, 63]])
    for box, shift in zip(boxes, (12, 14)):  # 28/52 and 26/54 of 40 pixels
        x, y = (box[:2] + box[2:]) / 2 / 8 + torch.tensor([shift / 8, 0])
        detection[3, int(y), int(x)] = .6
        detection[-4:, int(y), int(x)] = torch.tensor([x % 1, y % 1, 39 / 8, 39 / 8])
    truth = SceneGraph(boxes, [5, 5], [], (96, 192))
    found = decode(detection, relation, 'sgcls', truth, 8, released=True)
    assert found.labels.tolist() == [3, 5]
    assert found.scores.tolist() == pytest.approx([.6, 1])


def test_the_likeliest_names_a_given_box():
    "Against a plain loop; the released code knows nothing of it."
    reading = Reading('lines', naming='likeliest')
    changed = 0
    for seed in range(4):
        detection, relation = random_fields(seed, density=.2)
        truth = random_graph(seed, n=12, side=72, size=(72, 96))
        boxes, labels, scores = (part[0] for part in detect(detection[None], 8))
        named = decode(detection, relation, 'sgcls', truth, 8, reading=reading)
        matched = decode(detection, relation, 'sgcls', truth, 8)
        for i, (box, label, score) in enumerate(zip(truth.boxes, named.labels, named.scores)):
            overlap = box_iou(box[None], boxes)[0]
            worth = [(s * o ** 2).item() if o > .3 else 0. for s, o in zip(scores, overlap)]
            best = max(range(len(worth)), key=worth.__getitem__)
            if worth[best]: assert (label, score) == (labels[best], scores[best])
            else:
                centre = (box[:2] + box[2:])[None] / 2 / 8
                assert (label, score) == tuple(part[0] for part in peak_at(detection[:-4], centre))
            changed += label != matched.labels[i]
        for one, other in zip(*(decode(detection, relation, 'sgcls', truth, 8, True, how).labels
                                for how in (reading, PUBLISHED))): assert one == other
    assert changed > 4


def test_defaults_of_every_way_of_decoding():
    "A stride of 16, and nothing as in the released code."
    detection, relation = random_fields(0)
    graph = random_graph(0, side=144, size=(144, 192))
    batch = detection[None], relation[None]
    names = ('boxes', 'labels', 'scores', 'pairs', 'predicates')
    for task in TASKS:
        expected = decode(detection, relation, task, graph, 16, False)
        released = decode(detection, relation, task, graph, 16, True)
        assert task == 'predcls' or not all(
            torch.equal(getattr(released, name), getattr(expected, name)) for name in names)
        for found in (decode(detection, relation, task, graph),
                      decode_batch(*batch, task, [graph])[0],
                      decode_tasks(*batch, (task,), [graph])[task][0]):
            assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)
        assert expected.size == (144, 192)
    assert list(decode_tasks(*batch)) == ['sgdet']
    assert torch.equal(detect(batch[0])[0], detect(batch[0], 16)[0])
    assert torch.equal(candidates(relation[None])[3], candidates(relation[None], 16, .1)[3])


def test_an_unmatched_box_takes_the_peak_at_its_centre():
    detection, relation = random_fields(3, density=0)
    detection[-2:] = 0  # detections of no size match nothing
    truth = random_graph(5, n=12, side=72, size=(72, 96))
    found = decode(detection, relation, 'sgcls', truth, 8)
    for box, label, score in zip(truth.boxes, found.labels, found.scores):
        column, row = (((box[:2] + box[2:]) / 2 / 8).long()).tolist()
        around = detection[:-4, max(row - 1, 0):row + 2, max(column - 1, 0):column + 2]
        assert (label, score) == (around.amax((1, 2)).argmax(), around.max())


def test_batch_is_the_images_one_by_one():
    fields = [random_fields(seed) for seed in range(3)]
    truths = [random_graph(seed, n=4 + seed, side=72, size=(72, 96)) for seed in range(3)]
    fields[1][1].zero_()
    detections, relations = (torch.stack(part) for part in zip(*fields))
    for task in TASKS:
        batch = decode_batch(detections, relations, task, truths, 8)
        for one, (detection, relation), truth in zip(batch, fields, truths):
            alone = decode(detection, relation, task, truth, 8)
            for name in ('boxes', 'labels', 'scores', 'pairs', 'predicates'):
                assert torch.equal(getattr(one, name), getattr(alone, name))


def test_always_100_detections_or_every_cell():
    assert len(decode(*random_fields(0, classes=1, h=3, w=5)).boxes) == 15
    assert len(decode(torch.zeros(10, 20, 20), torch.zeros(4, 7, 20, 20)).boxes) == 100
    labels = detect(random_fields(0, classes=3, h=2, w=2)[0][None])[1]
    assert labels.shape == (1, 12) and labels.max() == 2


def test_negative_sizes_of_an_untrained_network():
    detection, relation = random_fields(0)
    detection[-2:] -= 10
    prediction = decode(detection, relation)
    assert torch.equal(prediction.boxes[:, 2:], prediction.boxes[:, :2])


@pytest.mark.parametrize('task', TASKS)
def test_nothing_to_find(task):
    detection, relation = random_fields(0)
    none = SceneGraph([], [], [])
    unrelated = decode(detection, torch.zeros_like(relation), task,
                       random_graph(0, size=(144, 192)))
    assert unrelated.predicates.shape == (0, 4)
    if task != 'sgdet':
        prediction = decode(detection, relation, task, none)
        assert len(prediction) == 0
        assert prediction.pairs.shape == (0, 2) and prediction.predicates.shape == (0, 4)
    lone = decode(detection, relation, task, SceneGraph([[0, 0, 9, 9]], [0], []))
    assert task == 'sgdet' or len(lone.pairs) == 0


def test_half_precision_and_gradients_are_accepted():
    detection, relation = random_fields(0)
    exact = decode(detection.bfloat16().float(), relation.bfloat16().float())
    half = decode(detection.bfloat16().requires_grad_(), relation.bfloat16())
    assert torch.equal(exact.pairs, half.pairs) and not half.boxes.requires_grad


def test_bad_input():
    detection, relation = random_fields(0)
    truth = random_graph(0)
    with pytest.raises(ValueError, match="task 'all' is unknown"):
        decode(detection, relation, 'all')
    for task in ('sgcls', 'predcls'):
        with pytest.raises(ValueError, match='needs the true boxes'):
            decode(detection, relation, task)
        with pytest.raises(ValueError, match='truth has label 7'):
            decode(detection, relation, task, SceneGraph([[0, 0, 9, 9]], [7], []))
    with pytest.raises(ValueError, match='needs the true boxes'):
        decode_batch(detection[None], relation[None], 'predcls', [truth, truth])
    with pytest.raises(ValueError, match='needs the true boxes'):
        decode_batch(detection[None].repeat(2, 1, 1, 1), relation[None].repeat(2, 1, 1, 1, 1),
                     'predcls', [random_graph(0, side=144, size=(144, 192)), None])
    with pytest.raises(ValueError, match='at least one class'): decode(detection[:4], relation)
    with pytest.raises(ValueError, match=r'\(P, 7, h, w\)'): decode(detection, relation[:, :5])
    with pytest.raises(ValueError, match='fields disagree'): decode(detection, relation[..., :-1])
    with pytest.raises(ValueError, match='fields disagree'):
        decode_batch(detection[None], relation[None].repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match=r'truth is of an image of \(192, 192\) pixels, '
                       r'at stride 8 \(24, 24\) cells; the fields have \(9, 12\)'):
        decode(detection, relation, 'predcls', truth, 8)
    for broken in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='detection fields hold NaN'):
            decode(detection.index_fill(0, torch.tensor([2]), broken), relation)
        with pytest.raises(ValueError, match='relation fields hold NaN'):
            decode(detection, relation.index_fill(1, torch.tensor([0]), broken))
