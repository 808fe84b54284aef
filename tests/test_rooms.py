"""Rooms: nothing interpenetrates, what is annotated is visible, and a database survives
interruptions."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stdg.datasets.visual_genome import Database
from stdg.rooms import build as rooms
from stdg.rooms.build import VOCABULARY, make_rooms, room
from stdg.rooms.layout import arrange
from stdg.rooms.relations import PREDICATES, separation

SMALL = dict(size=64, samples=1)


@pytest.fixture(scope='module')
def some(): return [room((5, i), **SMALL) for i in range(40)]


def test_nothing_interpenetrates():
    "No piece is deeper than 5 mm in a piece of another thing, but for what lies in a container."
    for seed in range(40):
        layout = arrange(np.random.default_rng(seed))
        pieces = layout.solids()
        owner = np.repeat(range(len(layout)), [len(p) for p in layout.pieces])
        bodies = layout.bodies()
        depth = -separation(pieces, pieces)
        held = rooms.relations(bodies, np.zeros((len(bodies), 4)), np.zeros(len(bodies)))[0]
        held = {tuple(r[:2]) for r in held.tolist() if PREDICATES[r[2]] == 'in'}
        for a, b in np.argwhere((depth > .005) & (owner[:, None] != owner)):
            assert (owner[a], owner[b]) in held or (owner[b], owner[a]) in held, (seed,
                layout.names[owner[a]], layout.names[owner[b]])


def test_everything_is_inside_the_room():
    for seed in range(20):
        layout = arrange(np.random.default_rng(seed))
        corners = rooms.footprints(layout.solids())
        assert np.abs(corners[..., 0]).max() <= layout.width / 2 and corners[..., 1].max() < .001
        assert rooms.heights(layout.bodies())[:, 0].min() > -.002


def test_a_room_is_sound(some):
    for r in some:
        h, w = r.depth.shape
        assert r.image.shape == (h, w, 3) and r.image.dtype == np.uint8
        assert r.depth.dtype == np.float32 and r.camera.shape == (3, 3)
        assert np.isfinite(r.depth).all() and (r.depth >= 0).all() and np.median(r.depth) > .5
        assert 6 <= len(r.graph) <= 20 and len(r.bodies) == len(r.graph)
        assert tuple(r.graph.size) == (h, w)
        assert r.dense.max(0)[2] < len(PREDICATES) and r.dense[:, :2].max() < len(r.graph)


def test_walls_do_not_shine():
    "A wall may wear the colours of a lamp, not its light."
    lit = 0
    for seed in range(60):
        layout = arrange(np.random.default_rng(seed))
        lit += any(part.material.emission > 0 for shape in layout.shapes for part in shape.parts)
        assert all(part.material.emission == part.material.gloss == 0
                   for part in rooms.shell(layout, np.random.default_rng(seed), 1.))
    assert lit > 20


def test_boxes_are_tight_bounds_of_visible_pixels(some):
    for r in some[:10]:
        for i, box in enumerate(r.graph.boxes.tolist()):
            y, x = np.nonzero(r.instance == i + 1)
            assert len(x) >= 40
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_annotation_is_sparse_and_long_tailed(some):
    sparse, dense = ([np.asarray(rows) for rows in column]
                     for column in zip(*[(r.graph.relations, r.dense) for r in some]))
    assert min(map(len, sparse)) >= 1 and 3.5 < np.mean([len(s) for s in sparse]) < 8
    assert all({tuple(row) for row in s.tolist()} <= {tuple(row) for row in d.tolist()}
               for s, d in zip(sparse, dense))
    assert sum(map(len, sparse)) < .6 * sum(map(len, dense))
    counts = np.sort(np.bincount(np.concatenate(sparse)[:, 2], minlength=10))[::-1]
    # a head, and a tail that is there
    assert counts[:3].sum() > .5 * counts.sum() and (counts > 0).sum() >= 8


def test_deterministic():
    one, two, other = room((1, 2), **SMALL), room((1, 2), **SMALL), room((1, 3), **SMALL)
    for name in ('image', 'depth', 'dense'):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert np.array_equal(one.graph.relations, two.graph.relations)
    assert not np.array_equal(one.image, other.image)


def test_clutter_changes_the_picture_only():
    calm, wild = room(4, size=128, clutter=0), room(4, size=128, clutter=1)
    assert np.array_equal(calm.graph.boxes, wild.graph.boxes)
    assert np.array_equal(calm.dense, wild.dense)
    assert np.quantile(np.abs(calm.depth - wild.depth), .95) < .01
    changed = (np.abs(calm.image.astype(int) - wild.image).sum(2) > 30)[calm.instance == 0]
    assert changed.mean() > .3


def test_a_print_out_of_sight_is_left_out_and_not_missed(monkeypatch):
    left, real = [], rooms._may_show
    monkeypatch.setattr(rooms, '_may_show', lambda *a: left.append(real(*a)) or left[-1])
    without = room(4, size=96, clutter=1)
    assert 0 < sum(left) < len(left)
    monkeypatch.setattr(rooms, '_may_show', lambda *a: True)
    everything = room(4, size=96, clutter=1)
    assert (np.abs(without.image.astype(int) - everything.image).max(-1) > 2).mean() < .001
    assert np.allclose(without.depth, everything.depth, atol=1e-5)
    assert np.array_equal(without.graph.boxes, everything.graph.boxes)


def test_larger_pictures():
    r = room(3, size=512, samples=1)
    assert r.image.shape == (512, 512, 3) and r.camera[0, 2] == 256.5


@pytest.mark.parametrize('wrong', [dict(clutter=1.5), dict(clutter=-.1), dict(size=8)])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match='clutter|size'): room(0, **wrong)


# ---- the database ----

@pytest.fixture
def few(monkeypatch):
    "Shards of three rooms, ten rooms, in this process."
    monkeypatch.setattr(rooms, 'SHARD', 3)
    return dict(n_train=6, n_val=1, n_test=3, workers=1, **SMALL)


def _content(folder):
    base = Database(folder)
    return [(base.image(i).tobytes(), np.asarray(base.depth(i)).tobytes(),
             base.graph(i).boxes.tolist(), base.graph(i).relations.tolist(),
             np.asarray(base.dense(i)).tolist()) for i in range(len(base))]


def test_database(tmp_path, few, monkeypatch):
    folder = make_rooms(tmp_path / 'rooms', **few)
    base = Database(folder)
    assert base.vocabulary.objects == VOCABULARY.objects
    assert base.vocabulary.predicates == PREDICATES
    assert [len(base.indices(s)) for s in ('train', 'val', 'test')] == [6, 1, 3]
    for i in (0, 7):
        r = room((0, i), **SMALL)
        assert np.array_equal(base.image(i), r.image)
        assert np.allclose(base.depth(i), r.depth, rtol=1e-3)
        assert np.allclose(base.camera(i), r.camera)
        assert np.array_equal(base.graph(i).boxes, r.graph.boxes)
        assert np.array_equal(base.graph(i).labels, r.graph.labels)
        assert np.array_equal(base.graph(i).relations, r.graph.relations)
        assert np.array_equal(base.dense(i), r.dense)
    assert not (folder / 'shards').exists()
    for step in ('_read_shard', '_render_all', '_assemble'):  # nothing is left to do
        monkeypatch.setattr(rooms, step, None)
    make_rooms(folder, **few)


def test_goes_on_after_an_interruption(tmp_path, few, monkeypatch):
    whole = make_rooms(tmp_path / 'whole', **few)
    real, seen = rooms._render_shard, []
    def stops(folder, settings, k, *rest):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(k)
        return real(folder, settings, k, *rest)
    monkeypatch.setattr(rooms, '_render_shard', stops)
    with pytest.raises(KeyboardInterrupt): make_rooms(tmp_path / 'cut', **few)
    assert seen == [0, 1]
    torn = rooms._shard_path(tmp_path / 'cut', 0)
    torn.write_bytes(torn.read_bytes()[:5000])
    seen.clear()
    monkeypatch.setattr(rooms, '_render_shard', lambda *a: (seen.append(a[2]), real(*a)))
    make_rooms(tmp_path / 'cut', **few)
    assert seen == [0, 2, 3]  # the torn one and the missing ones, not the good one
    assert _content(whole) == _content(tmp_path / 'cut')


def test_a_shard_of_other_settings_is_rendered_again(tmp_path, few, monkeypatch):
    settings = dict(images=[6, 1, 3], size=64, clutter=.3, seed=0, mean_relations=6., samples=1,
                    shard=3, version=rooms.VERSION)
    rooms.writable_folder(tmp_path / 'shards')
    rooms._render_shard(tmp_path, {**settings, 'seed': 9}, 0)
    assert rooms._read_shard(tmp_path, settings, 0) is None
    rooms._render_shard(tmp_path, settings, 1)
    rooms._shard_path(tmp_path, 1).rename(rooms._shard_path(tmp_path, 2))
    assert rooms._read_shard(tmp_path, settings, 2) is None  # the right settings, another number
    np.savez(rooms._shard_path(tmp_path, 0), a=np.array([{}], object))
    assert rooms._read_shard(tmp_path, settings, 0) is None  # a pickle is not opened


def test_processes_give_the_same_rooms(tmp_path, few):
    one = make_rooms(tmp_path / 'one', **few)
    two = make_rooms(tmp_path / 'two', **{**few, 'workers': 2})
    assert _content(one) == _content(two)


def test_killed_in_the_middle(tmp_path):
    """The whole process group is killed after the first shard; a new call finishes the database and
    keeps what was there."""
    call = ('from stdg.rooms import make_rooms; '
            f'make_rooms({str(tmp_path)!r}, 50, 0, 1, size=64, samples=1, workers=2)')
    process = subprocess.Popen([sys.executable, '-c', call], start_new_session=True,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / 'shards').glob('[0-9]*.npz')):
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / 'shards').glob('[0-9]*.npz')) and not (tmp_path / 'VG-SGG.h5').exists()
    make_rooms(tmp_path, 50, 0, 1, size=64, samples=1, workers=2)
    assert len(Database(tmp_path)) == 51


def test_a_failing_worker_is_reported(tmp_path):
    settings = dict(images=[6, 0, 0], size=64, clutter=7., seed=0, mean_relations=6., samples=1,
                    shard=3, version=1)
    with pytest.raises(RuntimeError,
                       match='(?s)a new call goes on.*clutter must be between 0 and 1'):
        rooms._render_all(tmp_path, settings, [0], 2, lambda: None)


def test_other_settings_are_refused(tmp_path, few):
    make_rooms(tmp_path, **few)
    before = _content(tmp_path)
    with pytest.raises(ValueError, match=r'other settings: clutter 0.3 \(asked: 0.9\)'):
        make_rooms(tmp_path, **few, clutter=.9)
    assert _content(tmp_path) == before


def test_rooms_of_an_earlier_version_are_refused_and_still_read(tmp_path, few):
    make_rooms(tmp_path, **few)
    before, path = _content(tmp_path), tmp_path / 'rooms.json'
    path.write_text(path.read_text().replace(f'"version": {rooms.VERSION}', '"version": 4'))
    with pytest.raises(ValueError, match=rf'version 4 \(asked: {rooms.VERSION}\)'):
        make_rooms(tmp_path, **few)
    assert _content(tmp_path) == before


def test_torn_settings_are_named(tmp_path, few):
    (tmp_path / 'rooms.json').write_text('{"size": 6')
    with pytest.raises(ValueError, match='rooms.json'): make_rooms(tmp_path, **few)


def test_unwritable_folder(tmp_path, few):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(OSError, match='nothing can be written in .*file'):
        make_rooms(tmp_path / 'file' / 'rooms', **few)


def test_no_rooms_asked(tmp_path):
    with pytest.raises(ValueError, match='at least one room'): make_rooms(tmp_path, 0, 0, 0)
