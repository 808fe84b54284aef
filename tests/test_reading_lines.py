"""Reading along lines: the same cells as are painted, a plain loop, ideal fields, odd boxes; priors in
the decoder; one thing, one name."""
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from stdg import reading as reading_module
from stdg.decode import decode_batch, decode_given, decode_tasks, detect, ideal_output
from stdg.fields import MAX_OBJECTS, encode, relation_cells
from stdg.graph import TASKS, SceneGraph, triplets
from stdg.reading import PUBLISHED, PairPrior, Reading, line_cells, line_scores, suppress

LINES = Reading('lines')
NAMES = 'boxes', 'labels', 'scores', 'pairs', 'predicates'


def random_graph(rng, n=8, r=12, classes=6, predicates=4, size=(72, 96)):
    h, w = size
    corner = rng.uniform(0, [w - 20, h - 20], (n, 2))
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(r)]).reshape(-1, 2)
    return SceneGraph(np.c_[corner, corner + rng.uniform(5, 20, (n, 2))],
                      rng.integers(0, classes, n), np.c_[pairs, rng.integers(0, predicates, r)], size)


def random_fields(rng, classes=6, predicates=4, h=9, w=12, share=1.):
    detection, relation = rng.random((classes + 4, h, w)), rng.random((predicates, 7, h, w))
    detection[-2:] *= 4
    relation[:, 1:5] *= np.array([w, h, w, h])[:, None, None]
    relation[:, 0] *= rng.random((predicates, h, w)) < share
    return torch.tensor(detection, dtype=torch.float32), torch.tensor(relation, dtype=torch.float32)


def some_prior(rng, classes=6, predicates=4):
    pairs = rng.integers(0, 30, (classes, classes))
    return PairPrior(rng.binomial(pairs[..., None], .2, (classes, classes, predicates)), pairs)


def plain_scores(relation, boxes, stride, tau):
    "Pair by pair and cell by cell, {(subject, object): scores}; patches as section 5.2 has them."
    p, _, h, w = relation.shape
    boxes = boxes.numpy() / np.float32(stride)
    centres, found = (boxes[:, :2] + boxes[:, 2:]) / 2, {}
    for s, a in enumerate(centres):
        for o, b in enumerate(centres):
            if s == o: continue
            total, painted = np.zeros(p), 0
            for x, y in relation_cells(a[None], (b - a)[None])[1].tolist():
                if not (0 <= x < w and 0 <= y < h): continue
                painted += 1
                c, *points = relation[:, :5, y, x].double().numpy().T
                off = np.hypot(points[0] - a[0], points[1] - a[1])
                off += np.hypot(points[2] - b[0], points[3] - b[1])
                total += c * np.exp(-off / tau)
            found[s, o] = total / max(painted, 1)
    return found


def table(prediction):
    return {tuple(p): row for p, row in zip(prediction.pairs.tolist(), prediction.predicates.numpy())}


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def close(one, other):
    "The same up to the last digits: a processor rounds the end of an array otherwise than its middle."
    ours, theirs = table(one), table(other)
    return (all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES[:3])
            and ours.keys() == theirs.keys()
            and all(np.allclose(row, theirs[pair], rtol=1e-5, atol=1e-6) for pair, row in ours.items())
            and np.allclose(one.predicates.amax(1), other.predicates.amax(1), rtol=1e-5, atol=1e-6))


@pytest.mark.parametrize('seed', range(8))
def test_the_cells_are_those_that_are_painted(seed):
    """In both directions, to the last rounding: random and whole numbers, level, upright and
    coinciding centres, ends outside the field and far away."""
    rng = np.random.default_rng(seed)
    ends = rng.uniform(-6, [1, 8, 24, 70][seed % 4], (2, 300, 2)).astype(np.float32)
    if seed % 2: ends = np.round(ends * 4) / 4
    ends[1, :40] = ends[0, :40]
    ends[1, 40:80, seed % 2] = ends[0, 40:80, seed % 2]
    ends[1, 80:100] *= 40
    ends[0, 100:103] = 3e3
    h, w = [(17, 24), (24, 17), (1, 1), (3, 40)][seed // 2]
    line, cell, times = line_cells(*torch.from_numpy(ends), (h, w))
    key = (line * h * w + cell).numpy()
    assert (np.diff(key) > 0).all() and times.shape == (2, len(key)) and times.sum(0).all()
    for way, (a, b) in enumerate((ends, ends[::-1])):
        which, painted = relation_cells(a, b - a)
        inside = ((painted >= 0) & (painted < (w, h))).all(1)
        expected = np.bincount(which[inside] * h * w + painted[inside] @ [1, w], minlength=300 * h * w)
        got = np.zeros(300 * h * w, int)
        got[key] = times[way]
        assert (got == expected).all()


def test_no_cell_is_painted_more_often_than_half_a_byte_holds():
    "Lines of all lengths and directions through one cell, by the published painting."
    angle, length = np.meshgrid(np.linspace(0, np.pi / 2, 40), np.linspace(.1, 60, 150))
    step = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(-1, 2) * length.reshape(-1, 1)
    start = (20.3 - step / 2).astype(np.float32)
    which, cell = relation_cells(start, step.astype(np.float32))
    key = (which * 512 + cell[:, 0] + 128) * 512 + cell[:, 1] + 128
    assert 7 <= np.unique(key, return_counts=True)[1].max() <= 9


@pytest.mark.parametrize('share', [1., .05])
@pytest.mark.parametrize('seed', range(2))
def test_scores_are_those_of_a_plain_loop(seed, share):
    "Where most cells are sure and where few are; confidences below a thousandth may be left out."
    rng = np.random.default_rng(seed)
    fields, graph = random_fields(rng, share=share), random_graph(rng, 5 + seed)
    sgdet, given = Reading('lines', tau=2.5, objects=6), Reading('lines', tau=2.5)
    batch = [field[None] for field in fields]
    for task in TASKS:
        found, = decode_batch(*batch, task, [graph], 8, reading=sgdet if task == 'sgdet' else given)
        n = 6 if task == 'sgdet' else len(graph)
        plain, ours = plain_scores(fields[1], found.boxes[:n], 8, 2.5), table(found)
        assert ours.keys() == plain.keys()
        assert max(abs(ours[pair] - row).max() for pair, row in plain.items()) < 1e-5
        rank = found.predicates.amax(1) * found.scores[found.pairs].prod(1)
        assert (rank.diff() <= 1e-7).all()


def test_leaving_out_what_is_unsure_changes_little(monkeypatch):
    rng = np.random.default_rng(0)
    _, relation = random_fields(rng)
    relation[:, 0] = 10. ** torch.from_numpy(rng.uniform(-8, -1, relation[:, 0].shape))
    centres = torch.tensor(rng.uniform(0, 9, (1, 7, 2)), dtype=torch.float32)
    one, other = torch.ones(7, 7).triu(1).nonzero().T
    question = relation[None], centres, torch.zeros_like(one), one, other
    little = line_scores(*question)
    ways = reading_module._ask_all, reading_module._ask_sure
    for name in ('_ask_all', '_ask_sure'):
        for way in ways:
            monkeypatch.setattr(reading_module, name, way)
            assert torch.allclose(line_scores(*question), little, atol=1e-6)
    monkeypatch.setattr(reading_module, 'LEAST', 0.)
    assert 0 < (line_scores(*question) - little).max() < 1e-3


@pytest.mark.parametrize('stride', [8, 16])
def test_ideal_fields_give_every_relation_back(stride):
    """A relation that no nearer one of its predicate covers has the score of all its cells, 1; and
    its predicate is the surest of its pair."""
    whole = total = right = 0
    for seed in range(25):
        graph = random_graph(np.random.default_rng(seed), r=10, size=(192, 192))
        _, relation = ideal_output(encode(graph, 6, 4, graph.size, stride))
        given = [(graph.boxes, graph.labels, torch.ones(len(graph)))]
        found = table(decode_given(relation[None], given, stride, LINES)[0])
        boxes = graph.boxes.numpy() / np.float32(stride)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        for s, o, p in {tuple(row) for row in graph.relations.tolist()}:
            cells = relation_cells(centres[s][None], (centres[o] - centres[s])[None])[1]
            cells = cells[(cells < relation.shape[-1]).all(1) & (cells >= 0).all(1)]
            c, *points = relation[p][:5, cells[:, 1], cells[:, 0]].numpy()
            mine = (c == 1) & (np.abs(np.array(points).T - [*centres[s], *centres[o]]) < 1e-3).all(1)
            score = found[s, o][p]
            assert score > mine.mean() - 1e-4
            total, whole = total + 1, whole + mine.all()
            right += score > .3
            if mine.all(): assert score == pytest.approx(1, abs=1e-4)
    assert whole > .2 * total and right > .97 * total


def test_a_batch_is_its_images_one_by_one():
    rng = np.random.default_rng(0)
    prior = some_prior(rng)
    readings = [LINES, Reading('lines', suppress='hard', prior=.5, table=prior, power=2.),
                Reading(suppress='soft', prior=.5, table=prior), Reading('lines', objects=3)]
    fields = [random_fields(rng, share=.5) for _ in range(4)]
    truths = [random_graph(rng, n, 0 if n < 2 else 5) for n in (5, 0, 1, 9)]
    detections, relations = (torch.stack(part) for part in zip(*fields))
    for reading in readings:
        batch = decode_tasks(detections, relations, TASKS, truths, 8, reading=reading)
        for i, truth in enumerate(truths):
            alone = decode_tasks(detections[i:i + 1], relations[i:i + 1], TASKS, [truth], 8,
                                 reading=reading)
            assert all(close(batch[task][i], alone[task][0]) for task in TASKS)


def test_blocks_of_pictures_and_pairs_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    for share in (1., .05):
        fields = [random_fields(rng, h=30, w=40, share=share) for _ in range(3)]
        relations = torch.stack([relation for _, relation in fields])
        boxes = torch.tensor(rng.uniform(0, 240, (3, 70, 2)), dtype=torch.float32).repeat(1, 1, 2)
        given = [(b, torch.zeros(len(b)), torch.ones(len(b))) for b in (boxes[0], boxes[1, :3], boxes[2])]
        count = []
        monkeypatch.setattr(reading_module, 'line_cells', lambda *a: count.append(1) or line_cells(*a))
        batch = decode_given(relations, given, 8, LINES)
        assert len(count) > 3, 'more than a block a picture'
        for i in range(3):
            assert close(batch[i], decode_given(relations[i:i + 1], given[i:i + 1], 8, LINES)[0])


def test_pairs_without_a_cell_in_the_field_score_nothing():
    "Outside, however far, or on one side and the other of a corner; coinciding ones are read where they are."
    _, relation = random_fields(np.random.default_rng(0))
    at = torch.tensor([[-300., -300], [-310, -280], [2e3, 20], [2.4e3, 30], [40, 40], [40, 40]])
    given = [(torch.cat([at - 4, at + 4], 1), torch.zeros(6), torch.ones(6))]
    found = table(decode_given(relation[None], given, 8, LINES)[0])
    assert len(found) == 30
    assert not found[0, 1].any() and not found[2, 3].any() and not found[3, 2].any()
    assert found[4, 5].all() and (found[4, 5] == found[5, 4]).all()
    plain = plain_scores(relation, given[0][0], 8, 4)
    assert all(np.allclose(found[pair], row, atol=1e-5) for pair, row in plain.items())
    assert (np.diff([row.max() for row in found.values()]) <= 0).all(), 'those without a cell come last'


@pytest.mark.parametrize('prior', [0., 1.])
@pytest.mark.parametrize('relations', ['votes', 'lines'])
def test_few_and_many_objects(relations, prior):
    rng = np.random.default_rng(0)
    reading = Reading(relations, prior=prior, table=some_prior(rng))
    _, relation = random_fields(rng)
    for n in (0, 1, 2, MAX_OBJECTS, MAX_OBJECTS + 20):
        corner = torch.tensor(rng.uniform(0, 80, (n, 2)), dtype=torch.float32)
        scores = torch.linspace(.1, .9, n)
        given = [(torch.cat([corner, corner + 9], 1), torch.zeros(n), scores)]
        found, = decode_given(relation[None], given, 8, reading)
        m = min(n, MAX_OBJECTS)
        assert len(found) == n and found.predicates.shape[1] == 4
        if relations == 'lines': assert len(found.pairs) == max(m * (m - 1), 0)
        if relations == 'lines' and n > m: assert found.pairs.min() == n - m, 'the surest form pairs'
        if relations == 'votes' and prior: assert len(found.pairs) >= max(m * (m - 1), 0)
        assert not (found.pairs[:, 0] == found.pairs[:, 1]).any()
        assert len(found.pairs) == len(found.pairs.unique(dim=0))


def test_bad_fields_and_objects_are_refused():
    rng = np.random.default_rng(0)
    _, relation = random_fields(rng)
    graph = random_graph(rng)
    given = [(graph.boxes, graph.labels, torch.ones(len(graph)))]
    for reading in (PUBLISHED, LINES):
        for broken in (float('nan'), float('inf')):
            wrong = relation.index_fill(1, torch.tensor([1]), broken)[None]
            with pytest.raises(ValueError, match='relation fields hold NaN'):
                decode_given(wrong, given, 8, reading)
        with pytest.raises(ValueError, match=r'\(P, 7, h, w\) is needed'):
            decode_given(relation, given, 8, reading)
        with pytest.raises(ValueError, match='objects of 2 images for fields of 1'):
            decode_given(relation[None], given * 2, 8, reading)
        with pytest.raises(ValueError, match='row 0 is not finite'):
            decode_given(relation[None], [(graph.boxes * float('nan'), *given[0][1:])], 8, reading)
        with pytest.raises(ValueError, match='scores: 1 rows'):
            decode_given(relation[None], [(*given[0][:2], torch.ones(1))], 8, reading)
    prior = Reading('lines', prior=1., table=some_prior(rng, predicates=3))
    with pytest.raises(ValueError, match='prior is of 3 predicates, the fields have 4'):
        decode_given(relation[None], given, 8, prior)
    prior = Reading('lines', prior=1., table=some_prior(rng, classes=2))
    with pytest.raises(ValueError, match='prior is of 2 classes'):
        decode_given(relation[None], given, 8, prior)
    with pytest.raises(ValueError, match='prior is of 2 classes'):
        decode_batch(random_fields(rng)[0][None], relation[None], stride=8, reading=prior)


def test_half_precision_and_gradients_are_accepted():
    rng = np.random.default_rng(0)
    detection, relation = (field[None] for field in random_fields(rng))
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        half, exact = ([field.to(kind).to(last) for field in (detection, relation)]
                       for last in (kind, torch.float32))
        half[1].requires_grad_()
        assert same(decode_batch(*half, stride=8, reading=LINES)[0],
                    decode_batch(*exact, stride=8, reading=LINES)[0])


def test_given_boxes_are_those_of_predcls():
    rng = np.random.default_rng(1)
    detection, relation = (field[None] for field in random_fields(rng))
    graph, prior = random_graph(rng), some_prior(rng)
    given = [(graph.boxes.numpy(), graph.labels.tolist(), np.ones(len(graph)))]
    for reading in (PUBLISHED, LINES, Reading(prior=.5, table=prior), Reading('lines', prior=2., table=prior)):
        expected, = decode_batch(detection, relation, 'predcls', [graph], 8, reading=reading)
        found, = decode_given(relation, given, 8, reading)
        assert same(found, expected) and found.size == (72, 96)


@pytest.mark.parametrize('relations', ['votes', 'lines'])
def test_a_prior_weighs_scores_and_ranks_anew(relations):
    rng = np.random.default_rng(0)
    batch = [field[None] for field in random_fields(rng, share=.05)]
    graph, prior = random_graph(rng), some_prior(rng)
    weighed = Reading(relations, prior=.5, epsilon=.01, table=prior)
    every = len(graph) * (len(graph) - 1)
    for task in TASKS:
        before, = decode_batch(*batch, task, [graph], 8, reading=weighed.without_prior())
        after, = decode_batch(*batch, task, [graph], 8, reading=weighed)
        old, new = table(before), table(after)
        assert old.keys() <= new.keys()
        assert task == 'sgdet' and len(old) == len(new) or len(new) == every
        assert relations == 'lines' or task == 'sgdet' or len(old) < every
        for (s, o), row in new.items():
            share = prior.frequencies(after.labels[[s]].numpy(), after.labels[[o]].numpy())[0]
            assert np.allclose(row, (old.get((s, o), 0) + .01) / 1.01 * share ** .5, rtol=1e-4)
        rank = after.predicates.amax(1) * after.scores[after.pairs].prod(1)
        assert (rank.diff() <= 1e-6).all()


def test_the_power_of_the_objects_in_the_ranking():
    batch = [field[None] for field in random_fields(np.random.default_rng(0), share=.2)]
    for relations in ('votes', 'lines'):
        plain, = decode_batch(*batch, stride=8, reading=Reading(relations))
        told = {(*pair, predicate): score for (*pair, predicate), score
                in zip(*(part.tolist() for part in triplets(plain, constraint=False)))}
        for power in (1., 2., 3.):
            found, = decode_batch(*batch, stride=8, reading=Reading(relations, power=power))
            rows, scores = (part.tolist() for part in triplets(found))
            rank = found.predicates.amax(1) * found.scores[found.pairs].prod(1)
            assert (rank.diff() <= 1e-6).all() and len(rank) > 20
            for (*pair, predicate), score in zip(rows, scores):
                objects = float(plain.scores[pair].prod()) ** (power - 1)
                assert score == pytest.approx(told[*pair, predicate] * objects, rel=1e-5)


def test_the_published_and_the_released_decoder_know_no_reading():
    rng = np.random.default_rng(0)
    batch, graph = [field[None] for field in random_fields(rng, share=.3)], random_graph(rng)
    other = Reading('lines', suppress='hard', prior=1., table=some_prior(rng))
    for task in TASKS:
        released, = decode_batch(*batch, task, [graph], 8, True)
        assert same(decode_batch(*batch, task, [graph], 8, True, other)[0], released)
        assert same(decode_batch(*batch, task, [graph], 8, reading=Reading())[0],
                    decode_batch(*batch, task, [graph], 8)[0])


def plain_suppression(boxes, scores, how, overlap):
    "Box by box, as the papers have it."
    iou, left, scores = box_iou(boxes, boxes), list(range(len(scores))), scores.clone()
    kept = torch.zeros_like(scores)
    while left:
        best = max(left, key=lambda i: (scores[i].item(), -i))
        kept[best] = scores[best]
        left.remove(best)
        over = [i for i in left if iou[best, i] > overlap]
        if how == 'hard': left = [i for i in left if i not in over]
        else: scores[over] *= 1 - iou[best, over]
    return kept


@pytest.mark.parametrize('how', ['hard', 'soft'])
def test_suppression_is_that_of_a_plain_loop(how):
    rng = np.random.default_rng(0)
    corner = torch.tensor(rng.uniform(0, 60, (5, 40, 2)), dtype=torch.float32)
    boxes = torch.cat([corner, corner + torch.tensor(rng.uniform(10, 50, (5, 40, 2)))], -1).float()
    boxes[0, 3:7] = boxes[0, 2]  # one thing under five names
    boxes[1, 4, 2:] = boxes[1, 4, :2]  # of no area
    scores = torch.tensor(rng.random((5, 40)), dtype=torch.float32)
    for overlap in (.3, .5, .9):
        batch = suppress(boxes, scores, how, overlap)
        for b, q, ours in zip(boxes, scores, batch):
            assert torch.allclose(ours, plain_suppression(b, q, how, overlap), atol=1e-6)
            assert torch.equal(ours, suppress(b, q, how, overlap))
        assert (batch < scores).any()
    assert suppress(boxes[:, :0], scores[:, :0], how).shape == (5, 0)


@pytest.mark.parametrize('relations', ['votes', 'lines'])
def test_nothing_has_two_names(relations):
    rng = np.random.default_rng(0)
    detections, relations_ = (torch.stack(part) for part in zip(*[random_fields(rng) for _ in range(3)]))
    graph = random_graph(rng)
    plain = decode_tasks(detections, relations_, TASKS, [graph] * 3, 8, reading=Reading(relations))
    hard = decode_tasks(detections, relations_, TASKS, [graph] * 3, 8,
                        reading=Reading(relations, suppress='hard', overlap=.4))
    soft = decode_tasks(detections, relations_, TASKS, [graph] * 3, 8,
                        reading=Reading(relations, suppress='soft', overlap=.4))
    lengths = set()
    for before, after, softer in zip(plain['sgdet'], hard['sgdet'], soft['sgdet']):
        overlap = box_iou(after.boxes, after.boxes).fill_diagonal_(0)
        assert overlap.max() <= .4 and 10 < len(after) < len(before) == 100
        assert (after.scores.diff() <= 0).all() and (softer.scores.diff() <= 0).all()
        assert set(map(tuple, after.boxes.tolist())) <= set(map(tuple, before.boxes.tolist()))
        assert softer.scores.sum() < before.scores.sum() and softer.scores[0] == before.scores[0]
        lengths.add(len(after))
    assert len(lengths) > 1, 'lists of several lengths'
    for task in ('sgcls', 'predcls'):  # given boxes stay
        assert all(same(a, b) for a, b in zip(plain[task], hard[task]))
    assert len(detect(detections, 8)[0][0]) == 100
