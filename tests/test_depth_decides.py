"""Rooms in which depth decides: staged as they say they are, told by geometry, and told from the rooms
that were there before; and the gate, which says how much boxes and classes give away."""
import hashlib
import json

import numpy as np
import pytest
import torch

from stdg import begin_run
from stdg.datasets.visual_genome import Database
from stdg.graph import SceneGraph
from stdg.rooms import staging
from stdg.rooms.build import VOCABULARY, make_rooms, room, room_graph
from stdg.rooms.gate import BoxPairs, auc, gate
from stdg.rooms.layout import arrange
from stdg.rooms.relations import PREDICATES, Bodies, Spans, clashes, relations
from stdg.rooms.room_style import PLAIN, RoomStyle
from stdg.training.settings import Settings

SMALL = dict(size=64, samples=1)
BEHIND = PREDICATES.index('behind')


@pytest.fixture(scope='module')
def staged():
    "Layouts, cameras and the factors by which their things were resized, all in all."
    real = staging.resized
    def resized(shape, factor):
        found = real(shape, factor)
        found.factor = getattr(shape, 'factor', 1) * factor
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, 'resized', resized)
        made = [staging.stage(*np.random.default_rng(seed).spawn(2)) for seed in range(24)]
    layouts, cameras = zip(*made)
    return layouts, cameras, np.array([s.factor for layout in layouts for s in layout.shapes])


def test_the_rooms_that_were_there_stay_as_they_were():
    "What stands where in three rooms, and what is true there, as in databases of version 5."
    digest = hashlib.sha256()
    for seed in range(3):
        layout = arrange(np.random.default_rng([seed, 0]).spawn(5)[0])
        digest.update(repr((layout.names, np.round(layout.poses, 6).tolist())).encode())
        digest.update(room_graph(seed, 96).relations.numpy().astype(np.int64).tobytes())
        assert not layout.scenery and not layout.blocked and not any(layout.ground)
    assert digest.hexdigest()[:16] == '9c069d501f19c41b'


def test_nothing_staged_is_in_another_thing(staged):
    "No piece is deeper than 5 mm in a piece of another thing or of a stand, but in a container."
    for layout in staged[0]:
        bodies = layout.bodies()
        held = {tuple(r[:2]) for r in true(bodies) if PREDICATES[r[2]] == 'in'}
        stands = Spans.joined(layout.blocked)
        for i, spans in enumerate(layout.spans):
            assert not clashes(spans, stands, .005).any(), layout.names[i]
            free = [j for j in range(i) if not {(i, j), (j, i)} & held]
            for j in free: assert not clashes(spans, layout.spans[j], .005).any(), (i, j)


def true(bodies):
    n = len(bodies)
    return relations(bodies, np.zeros((n, 4)), np.zeros(n))[0].tolist()


def test_nothing_floats(staged):
    """A thing rests on a thing or in one, or on a plate right under its middle, or hangs where a stand
    touches its box."""
    counts = dict(carried=0, stood=0, hung=0)
    for layout in staged[0]:
        bodies, stands = layout.bodies(), Spans.joined(layout.blocked)
        carried = {r[0] for r in true(bodies) if PREDICATES[r[2]] in ('on', 'in')}
        for i, spans in enumerate(layout.spans):
            low, high = spans.low.min(0), spans.high.max(0)
            if layout.fixed[i]:
                near = (stands.low < high + .006).all(1) & (stands.high > low - .006).all(1)
                kind = 'hung'
            elif i in carried: near, kind = np.array([True]), 'carried'
            else:
                middle, kind = (low + high)[:2] / 2, 'stood'
                near = ((stands.low[:, :2] < middle) & (stands.high[:, :2] > middle)).all(1)
                near &= np.abs(stands.high[:, 2] - low[2]) < .001
            assert near.any(), (layout.names[i], kind)
            counts[kind] += 1
    assert min(counts.values()) > 12


def test_cameras_sizes_and_heights_are_as_wide_as_they_say(staged):
    layouts, cameras, factors = staged
    tilt = np.degrees([np.arcsin(-camera.rotation[2, 2]) for camera in cameras])
    assert 5 <= tilt.min() < 14 and 50 < tilt.max() <= 60
    assert factors.min() > .499 and factors.max() < 1.501
    assert factors.min() < .6 and factors.max() > 1.3
    ground = np.concatenate([layout.ground for layout in layouts])
    ground = ground[ground > 0]
    assert ground.min() < .3 and ground.max() > 1 and ground.std() > .25


def test_a_stand_carries_a_thing_like_the_floor():
    "What a stand carries does not hang from its neighbour; without the stand it would."
    boxes, depth = np.zeros((2, 4)), np.zeros(2)
    pair = dict(position=[[0, 0, 1], [.31, 0, .8]], yaw=[0, 0],
                bounds=[[[-.15, -.15, 0], [.15, .15, .3]], [[-.15, -.15, 0], [.15, .15, .5]]])
    names = lambda bodies: [PREDICATES[p] for a, b, p in relations(bodies, boxes, depth)[0] if a == 1]
    assert 'hanging from' in names(Bodies(**pair))
    assert names(Bodies(**pair, ground=[1, .8])) == ['against']
    with pytest.raises(ValueError, match='grounds'): Bodies(**pair, ground=[1])


def test_what_is_behind_is_further_in_the_depth_map_too():
    right = []
    for seed in range(14):
        r = room((3, seed), style='staged', **SMALL)
        far = [np.median(r.depth[r.instance == i + 1]) for i in range(len(r.graph))]
        right += [far[a] > far[b] for a, b, p in r.dense.tolist() if p == BEHIND]
        assert len(r.bodies.ground) == len(r.graph)
    assert len(right) > 6 and np.mean(right) > .85


def test_styles_change_what_they_name_and_nothing_else():
    plain, grey = (room((3, 0), style=style, **SMALL) for style in ('staged', ['staged', 'monochrome']))
    dense = room((3, 0), style=RoomStyle(staged=True, dense=True), **SMALL)
    assert np.array_equal(plain.depth, grey.depth) and np.array_equal(plain.depth, dense.depth)
    assert np.array_equal(plain.graph.boxes, grey.graph.boxes)
    assert np.array_equal(plain.image, dense.image)
    assert np.ptp(plain.image.astype(int), axis=2).max() > 30
    assert np.ptp(grey.image.astype(int), axis=2).max() <= 1
    assert np.array_equal(np.asarray(dense.graph.relations), dense.dense)
    assert len(plain.graph.relations) < len(plain.dense)
    graph = room_graph((3, 0), 64, 'staged')
    assert np.array_equal(graph.boxes, plain.graph.boxes)
    assert np.array_equal(np.asarray(graph.relations), plain.dense)


@pytest.mark.parametrize('wrong', ['stagd', ['staged', 'colour']])
def test_an_unknown_style_is_named(wrong):
    with pytest.raises(ValueError, match="style '(stagd|colour)' .*staged, monochrome, dense"):
        room(0, style=wrong)


def test_a_database_keeps_its_style(tmp_path):
    few = dict(n_train=2, n_val=0, n_test=0, workers=1, **SMALL)
    make_rooms(tmp_path/'plain', **few)
    make_rooms(tmp_path/'staged', **few, style=['dense', 'staged'])
    assert 'style' not in json.loads((tmp_path/'plain'/'rooms.json').read_text())
    assert json.loads((tmp_path/'staged'/'rooms.json').read_text())['style'] == ['staged', 'dense']
    make_rooms(tmp_path/'staged', **few, style=RoomStyle(staged=True, dense=True))
    base, r = Database(tmp_path/'staged'), room((0, 1), style=['staged', 'dense'], **SMALL)
    assert np.array_equal(base.image(1), r.image) and np.array_equal(base.dense(1), r.dense)
    assert np.array_equal(base.graph(1).relations, r.graph.relations)
    for name, style, said in (('plain', 'staged', r"style None \(asked: \['staged'\]\)"),
                              ('staged', (), r"style \['staged', 'dense'\] \(asked: None\)")):
        with pytest.raises(ValueError, match='other settings: ' + said) as error:
            make_rooms(tmp_path/name, **few, style=style)
        assert '\n' not in str(error.value)


def test_a_run_asks_for_its_style(monkeypatch):
    class Asked(Exception): pass
    def make(folder, *numbers, **settings): raise Asked(settings['style'])
    monkeypatch.setattr(begin_run.rooms, 'make_rooms', make)
    settings = Settings(stages=['control'], style=['staged', 'dense'], pretrained=False, steps=1)
    with pytest.raises(Asked, match="'staged', 'dense'"): begin_run.prepare_run(settings)
    assert Settings().style == [] and RoomStyle.of(Settings().style) == PLAIN
    with pytest.raises(ValueError, match='style'): Settings(style=['stagd'])


# ---- the gate ----

def toy_graphs(n, told, seed=0):
    """Graphs of four boxes whose order in depth follows their lower edges, if it is `told`, or
    nothing."""
    rng, graphs = np.random.default_rng(seed), []
    for _ in range(n):
        low = rng.uniform(0, 60, (4, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 35, (4, 2))], 1)
        far = -boxes[:, 3] if told else rng.random(4)
        rows = [(a, b, PREDICATES.index('behind' if far[a] > far[b] else 'in front of'))
                for a in range(4) for b in range(4) if a != b]
        rows += [(0, 1, PREDICATES.index('on')), (2, 3, PREDICATES.index('near'))]
        graphs.append(SceneGraph(boxes, rng.integers(len(VOCABULARY.objects), size=4), rows,
                                 size=(100, 100)))
    return graphs


def test_the_gate_finds_what_boxes_tell_and_nothing_else():
    state = torch.get_rng_state()
    told = gate(toy_graphs(60, True), toy_graphs(40, True, 1))
    untold = gate(toy_graphs(60, False), toy_graphs(40, False, 1))
    assert told['lower edge'] == 100 and told['both'] > 90 and told['pairs'] == 240
    assert 40 < untold['lower edge'] < 60 and 40 < untold['both'] < 60
    assert 35 < told['on'] < 65 and 35 < told['classes'] < 65
    assert gate(toy_graphs(60, True), toy_graphs(40, True, 1)) == told
    assert torch.equal(torch.get_rng_state(), state)


def test_auc():
    assert auc(np.arange(4.), np.array([False, False, True, True])) == 100
    assert auc(np.array([3., 0, 2, 1]), np.array([True, True, False, False])) == 50
    with pytest.raises(ValueError, match='0 of 2'): auc(np.zeros(2), np.zeros(2, bool))
    with pytest.raises(ValueError, match='no graph has two objects'): BoxPairs.of([])


def test_lower_edges_tell_today_and_do_not_in_staged_rooms():
    right = {}
    for style, n in (((), 30), ('staged', 60)):
        pairs = BoxPairs.of([room_graph((9, i), 96, style) for i in range(n)]).having('behind')
        right[style] = np.mean(pairs.boxes[:, 11].numpy() < 0)
        assert len(pairs) > 40
    assert right[()] > .78 and .3 < right['staged'] < .68
