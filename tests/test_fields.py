"Target fields: the released numbers, a plain loop over cells, and the corners of the definition."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from stdg.fields import blank_padding, encode, field_size, relation_cells
from stdg.graph import SceneGraph

GOLDEN = np.load(Path(__file__).parent / 'golden/fields.npz')
MEANT = [0, 1, 2, 3, 4, 7, 8]  # components that a loss reads
REVERSED = [0, 3, 4, 1, 2, 8, 7]


def golden_graph(case):
    part = lambda name: GOLDEN[f'case{case}_{name}']
    relations = part('relations') - [0, 0, 1]
    return SceneGraph(part('boxes'), part('labels') - 1, relations, (512, 512),
                      part('ignore') > 0), part


def random_graph(seed, n=12, r=15, classes=5, predicates=4, height=160, width=208):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, (width - 20, height - 20), (n, 2))
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(r)])
    pairs = np.sort(pairs, 1)  # no relation beside its reverse, whose distances tie
    return SceneGraph(np.c_[corner, corner + rng.uniform(2, 90, (n, 2))],
                      rng.integers(0, classes, n),
                      np.c_[pairs, rng.integers(0, predicates, r)], (height, width),
                      rng.random(n) < .15)


@pytest.mark.parametrize('case', range(6))
def test_golden(case):
    graph, part = golden_graph(case)
    fields = encode(graph, 12, 8, valid_area=part('valid_area'))
    for name in ('heatmap', 'offset', 'size', 'mask', 'index'):
        assert np.allclose(fields[name], part(f'detection_{name}'), rtol=0, atol=1e-5), name
    ours, theirs = fields['relation'].numpy(), part('relation_fields')
    assert (ours[:, 0] == theirs[:, 0]).all()
    same = np.isclose(ours[:, MEANT], theirs[:, MEANT], rtol=0, atol=1e-5).all(1)
    swapped = np.isclose(ours[:, REVERSED], theirs[:, MEANT], rtol=0, atol=1e-5).all(1)
    assert (same | swapped).all()
    assert case > 3 or same.all()  # a relation and its reverse occur in the last two only
    inside = ours[:, 0] == 1
    assert (ours[:, 5:7].swapaxes(1, 3).swapaxes(1, 2)[inside] == 1 / 16).all()


def plain_fields(graph, n_objects, n_predicates, size, stride):
    "Section 5 of the method spec word for word, cell by cell."
    h, w = field_size(size, stride)
    heatmap, relation = np.zeros((n_objects, h, w)), np.zeros((n_predicates, 9, h, w))
    distance = np.full((n_predicates, h, w), np.inf)
    boxes = graph.boxes.numpy() / np.float32(stride)
    slots = []
    for box, label, ignored in zip(boxes, graph.labels.tolist(), graph.ignore.tolist()):
        x1, y1, x2, y2 = box.clip(0, np.array([w - 1, h - 1] * 2, np.float32))
        if ignored or x2 <= x1 or y2 <= y1: continue
        bw, bh, m = math.ceil(x2 - x1), math.ceil(y2 - y1), .7
        b1, c1 = bh + bw, bw * bh * (1 - m) / (1 + m)
        b2, c2 = 2 * (bh + bw), (1 - m) * bw * bh
        b3, c3 = -2 * m * (bh + bw), (m - 1) * bw * bh
        r = max(0, int(min((b1 + math.sqrt(b1**2 - 4 * c1)) / 2,
                           (b2 + math.sqrt(b2**2 - 16 * c2)) / 2,
                           (b3 + math.sqrt(b3**2 - 16 * m * c3)) / 2)))
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        for y in range(max(0, int(cy) - r), min(h, int(cy) + r + 1)):
            for x in range(max(0, int(cx) - r), min(w, int(cx) + r + 1)):
                square = (x - int(cx))**2 + (y - int(cy))**2
                value = math.exp(-square / (2 * ((2 * r + 1) / 6)**2))
                heatmap[label, y, x] = max(heatmap[label, y, x], value)
        slots.append([cx - int(cx), cy - int(cy), x2 - x1, y2 - y1, int(cy) * w + int(cx)])
    for s, o, p in graph.relations.tolist():
        if graph.ignore[s] or graph.ignore[o]: continue
        a, b = ((boxes[i, :2] + boxes[i, 2:]) / 2 for i in (s, o))
        d, scales = b - a, [.1 * (boxes[i, 2:] - boxes[i, :2]).min() for i in (s, o)]
        length = math.hypot(*d)
        g = min(max(2 / length, .25), .4)
        for t in np.linspace(g, 1 - g, max(2, math.ceil(length))):
            left, top = (round(v) for v in (a + t * d - 1).tolist())
            for y in range(max(0, top), min(h, top + 3)):
                for x in range(max(0, left), min(w, left + 3)):
                    va, vb = a - (x, y), b - (x, y)
                    line = abs(d[1] * va[0] - d[0] * va[1]) / (length + .01)
                    if line < distance[p, y, x] - 1e-6:
                        distance[p, y, x] = line
                        relation[p, :, y, x] = [1, *va, *vb, 1 / stride, 1 / stride, *scales]
    return heatmap, np.array(slots), relation


@pytest.mark.parametrize('seed,stride', [(0, 8), (1, 8), (2, 16), (3, 4), (4, 32), (5, 13)])
def test_plain_loop(seed, stride):
    graph = random_graph(seed)
    fields = encode(graph, 5, 4, graph.size, stride)
    heatmap, slots, relation = plain_fields(graph, 5, 4, graph.size, stride)
    assert np.allclose(fields['heatmap'], heatmap, atol=1e-5)
    n = int(fields['mask'].sum())
    assert n == len(slots) and (fields['mask'][:n] == 1).all()
    assert np.allclose(np.c_[fields['offset'][:n], fields['size'][:n], fields['index'][:n]], slots,
                       atol=1e-5)
    assert np.allclose(fields['relation'], relation, atol=1e-4)


def test_shapes_are_fixed_and_collate():
    graphs = [random_graph(0), SceneGraph([], [], []), SceneGraph([[0, 0, 50, 50]], [1], [])]
    batch = default_collate([encode(g, 5, 4, (160, 208), 8) for g in graphs])
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in batch.items()}
    assert shapes == dict(heatmap=(5, 20, 26), offset=(128, 2), size=(128, 2), mask=(128,),
                          index=(128,), relation=(4, 9, 20, 26))
    assert batch['relation'].isfinite().all()
    assert batch['heatmap'].amax((1, 2, 3)).tolist() == [1, 0, 1]
    assert batch['mask'].dtype == torch.uint8 and batch['index'].dtype == torch.int64


def test_earlier_relation_stays_on_a_tie():
    boxes = [[0, 0, 40, 40], [300, 200, 360, 260]]
    both = encode(SceneGraph(boxes, [0, 0], [(0, 1, 0), (1, 0, 0)]), 1, 1)['relation']
    assert torch.equal(both, encode(SceneGraph(boxes, [0, 0], [(0, 1, 0)]), 1, 1)['relation'])


@pytest.mark.parametrize('length,points', [(.5, 2), (2, 2), (2.01, 3), (3, 3), (7.2, 8)])
def test_points_of_a_line(length, points):
    "As many as it is long in cells, rounded up, at least two, each with its eight neighbours."
    relation, cells = relation_cells(np.float64([[10.3, 20.4]]), np.float64([[length, 0]]))
    assert len(relation) == len(cells) == 9 * points
    margin = min(max(2 / length, .25), .4)
    middles = 10.3 + length * np.linspace(margin, 1 - margin, points)
    assert cells[4::9].tolist() == [[round(x - 1) + 1, 20] for x in middles]


def test_predicates_do_not_compete_and_self_relations_have_no_line():
    boxes = [[0, 0, 40, 40], [300, 200, 360, 260]]
    fields = encode(SceneGraph(boxes, [0, 0], [(0, 1, 0), (1, 0, 1), (0, 0, 2)]), 1, 3)['relation']
    assert torch.equal(fields[0, 0], fields[1, 0])
    assert torch.equal(fields[0, 1:3], fields[1, 3:5]) and fields[2].sum() == 0


def test_two_objects_in_one_cell_keep_their_slots():
    fields = encode(SceneGraph([[0, 0, 100, 100], [2, 2, 98, 98]], [0, 1], []), 2, 1)
    assert fields['mask'].sum() == 2 and fields['index'][0] == fields['index'][1]
    assert fields['size'][0, 0] > fields['size'][1, 0]


def test_more_than_128_objects_keeps_the_largest():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 400, (150, 2)), np.arange(20, 170)[:, None] / 2
    graph = SceneGraph(np.c_[corner, corner + side], np.zeros(150), [])
    with pytest.warns(UserWarning, match='largest 128'): fields = encode(graph, 1, 1)
    assert fields['mask'].sum() == 128
    assert np.allclose(fields['size'][:, 0], side[22:, 0] / 16, atol=1e-5)  # in their order


def test_box_outside_the_field_takes_no_slot():
    graph = SceneGraph([[600, 10, 700, 90], [10, 10, 90, 90]], [0, 0], [(0, 1, 0)])
    fields = encode(graph, 1, 1)
    assert fields['mask'].tolist()[:2] == [1, 0] and fields['index'][0] == 3 * 32 + 3
    assert fields['relation'][0, 0].sum() > 0  # the line to it still crosses the field


def test_valid_area():
    graph = random_graph(0, height=512, width=512)
    fields = encode(graph, 5, 4, valid_area=(100, 60, 64, 81))['relation']
    whole = encode(graph, 5, 4)['relation']
    # int(60/16), ceil(141/16)+1; int(100/16), ceil(164/16)+1
    rows, columns = slice(3, 10), slice(6, 12)
    assert torch.equal(fields[:, :, rows, columns], whole[:, :, rows, columns])
    fields[:, :, rows, columns] = 0
    assert fields.count_nonzero() == 0


@pytest.mark.parametrize('area', [(2, 1, 5, 4), (2.2, 1.9, 4.3, 4.7), (0, 0, 9, 7), (-1.5, -2, 6, 5),
                                  (3, 2, 0, 0), (8.5, 6.5, 3, 3), (1, 1, 5.999, 4.001)])
def test_blanking_to_the_cell(area):
    "Of a whole field the cells from int(x) to ceil(x + width) stay, both included."
    x, y, width, height = area
    field = np.ones((2, 3, 7, 9), np.float32)
    blank_padding(field, area)
    for row in range(7):
        for column in range(9):
            inside = (int(x) <= column <= math.ceil(x + width)
                      and int(y) <= row <= math.ceil(y + height))
            assert (field[:, :, row, column] == inside).all(), (row, column)


@pytest.mark.parametrize('change,message', [
    (dict(n_objects=3), 'label 4 for 3 classes'),
    (dict(n_predicates=2), 'predicate 3 for 2 classes'),
    (dict(stride=0), 'at least 1 pixel'),
    (dict(size=(0, 512)), 'at least 1 pixel'),
    (dict(size=(512,)), 'at least 1 pixel'),
    (dict(valid_area=(0, 0, 5)), 'four numbers'),
    (dict(valid_area=(0, 0, float('nan'), 5)), 'four numbers')])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        encode(**dict(graph=random_graph(1), n_objects=5, n_predicates=4) | change)
