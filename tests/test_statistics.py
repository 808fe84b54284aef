"""Counts over flat arrays against plain loops over graphs, the tables of the prior, zero-shot
triplets and their file, the report."""
import json
import pickle
import random
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from stdg import data
from stdg.datasets.statistics import (
    annotations,
    box_geometry,
    object_counts,
    plot_images,
    plot_objects,
    plot_predicates,
    plot_triplets,
    predicate_counts,
    predicate_groups,
    prior_tables,
    read_zero_shot,
    relation_distance,
    report,
    select_relations,
    triplet_counts,
    write_statistics,
    zero_shot_triplets,
)
from stdg.datasets.visual_genome import SPLITS, Database, write_annotations, write_images
from stdg.graph import SceneGraph, Vocabulary
from stdg.io.files import read_json
from stdg.metrics import Evaluator, FrequencyPrior

names = Vocabulary([f'object {i}' for i in range(6)], [f'predicate {i}' for i in range(4)])


def database(folder, graphs, split, vocabulary=names):
    write_annotations(folder, graphs, split, vocabulary, 64)
    write_images(folder,
                 [dict(image=np.zeros((*g.size, 3), np.uint8), image_id=i)
                  for i, g in enumerate(graphs)], len(graphs), 64)
    return Database(folder)


def random_graph(rng):
    "Few classes, many repeated rows; sometimes no relation, sometimes no object."
    n = rng.randrange(6)
    corners = [(rng.randrange(40), rng.randrange(30)) for _ in range(n)]
    boxes = [[x, y, x + rng.randrange(1, 20), y + rng.randrange(1, 20)] for x, y in corners]
    rows = [[*rng.sample(range(n), 2), rng.randrange(4)]
            for _ in range(rng.randrange(9))] if n > 1 else []
    return SceneGraph(boxes, [rng.randrange(6) for _ in range(n)], rows,
                      (rng.randrange(50, 65), 64))


@pytest.fixture(params=range(4), scope='module')
def some(request, tmp_path_factory):
    rng = random.Random(request.param)
    graphs = [random_graph(rng) for _ in range(40)]
    return database(tmp_path_factory.mktemp('db'), graphs,
                    [rng.choice([0, 0, 0, 1, 2]) for _ in graphs])


def plain(some, split, n_val=0, overlap=False, unique=False):
    """Graphs of a split after the filters of training, and [(subject class, object class,
    predicate), ...] of all of them."""
    graphs = [data.filter_relations(some.graph(i), overlap, unique) for i in some.indices(split,
        n_val)]
    return graphs, [(int(g.labels[s]), int(g.labels[o]), p) for g in graphs
                    for s, o, p in g.relations.tolist()]


@pytest.mark.parametrize('overlap', [False, True])
@pytest.mark.parametrize('unique', [False, True])
@pytest.mark.parametrize('split, n_val', [('train', 0), ('train', 5), ('val', 5), ('test', 0)])
def test_counts(some, split, n_val, overlap, unique):
    graphs, named = plain(some, split, n_val, overlap, unique)
    flat = select_relations(annotations(some, split, n_val), overlap, unique)
    assert [tuple(row)
            for row in np.column_stack([flat.labels[flat.relations[:, :2]],
                                        flat.relations[:,
                                                       2]]).tolist()] == named, 'order is kept as well'
    assert [counts.tolist() for counts in flat.per_image()] == [[len(g) for g in graphs],
        [len(g.relations) for g in graphs]]
    assert flat.boxes.tolist() == [box for g in graphs
                                   for box in g.boxes.int().tolist()] and flat.sizes.tolist() == [
        list(g.size) for g in graphs]
    rows, counts = triplet_counts(flat)
    assert dict(zip(map(tuple, rows.tolist()),
                    counts.tolist())) == Counter(named) and (np.diff(counts) <= 0).all()
    assert predicate_counts(flat).tolist() == [Counter(p for *_, p in named)[p] for p in range(4)]
    assert object_counts(flat).tolist() == [sum(g.labels.tolist().count(c) for g in graphs)
                                            for c in range(6)]


def test_prior_tables(some):
    for overlap in (False, True):
        graphs = plain(some, 'train', 3, overlap, True)[0]
        prior = FrequencyPrior(6, 4).fit(g for g in graphs if len(g.relations))
        table, pairs = prior_tables(select_relations(annotations(some, 'train', 3), overlap))
        assert np.array_equal(table, prior.counts) and np.array_equal(pairs,
            prior.pairs) and table.sum() > 0


def test_released_boxes_are_those_of_the_graphs(some):
    released = Database(some.folder, released=True)
    assert annotations(released).boxes.tolist() == [box for i in range(len(some))
                                                    for box in released.graph(
        i).boxes.int().tolist()] != annotations(some).boxes.tolist()


def test_zero_shot(some):
    for split, n_val in (('test', 0), ('test', 8), ('val', 8)):
        seen, asked = plain(some, 'train', n_val)[1], plain(some, split, n_val)[1]
        assert [tuple(row) for row in zero_shot_triplets(some, split,
                                                         n_val).tolist()] == sorted(
            set(asked) - set(seen))
    unseen = {tuple(row) for row in zero_shot_triplets(some).tolist()}
    assert unseen
    evaluator = Evaluator('predcls', 4, zero_shot_triplets(some))
    for i in some.indices('test'):
        evaluator.update(FrequencyPrior(6, 4).predict(some.graph(i)), some.graph(i))
    with_unseen = [g for g in plain(some, 'test')[0]
                   if unseen & set((int(g.labels[s]), int(g.labels[o]), p)
                                   for s, o, p in g.relations.tolist())]
    assert evaluator.unseen_images == len(with_unseen) > 0


def test_geometry_of_a_wide_picture(tmp_path):
    wide = annotations(database(tmp_path,
                                [SceneGraph([[8, 4, 24, 12], [48, 20, 64, 32]], [0, 1], [[0, 1, 0]],
                                            (32, 64))], [0]))
    size, centre = box_geometry(wide)
    assert size.tolist() == [.25, pytest.approx((.25 * .375) ** .5)] and centre.tolist() == [[.25,
        .25], [.875, .8125]]
    assert relation_distance(wide).tolist() == [pytest.approx((40 ** 2 + 18 ** 2) ** .5
        / (32 ** 2 + 64 ** 2) ** .5)]


def test_nothing_at_all(tmp_path):
    empty = database(tmp_path, [SceneGraph([], [], [], (9, 9))] * 2, [0, 0])
    flat = annotations(empty)
    assert len(flat.labels) == len(select_relations(flat,
                                                    overlap=True).relations) == 0 and [c.tolist()
        for c in flat.per_image()] == [[0, 0]] * 2
    assert len(triplet_counts(flat)[0]) == 0 and prior_tables(flat)[
        1].sum() == 0 and zero_shot_triplets(empty).shape == (0, 3)
    assert len(box_geometry(flat)[0]) == len(relation_distance(flat)) == 0
    with pytest.raises(ValueError, match=f'{tmp_path.name}: no relation is annotated in the '
                       'training split'):
        write_statistics(tmp_path)
    assert not (tmp_path/'statistics.json').exists()


# The file of zero-shot triplets

def test_read_zero_shot(tmp_path):
    rows = np.array([[1, 6, 4], [6, 1, 1], [3, 3, 2]])
    for legacy in (False, True):
        torch.save(torch.from_numpy(rows), tmp_path/'list.pytorch',
                   _use_new_zipfile_serialization=not legacy)
        assert zipfile.is_zipfile(tmp_path/'list.pytorch') != legacy
        found = read_zero_shot(str(tmp_path/'list.pytorch'), names)
        assert found.tolist() == (rows - 1).tolist() and found.dtype == np.int64


class Code:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


def _stored(value, kind):
    def write(path):
        if kind == 'pickle': path.write_bytes(pickle.dumps(value))
        elif kind == 'bytes': path.write_bytes(value)
        else: torch.save(value, path, _use_new_zipfile_serialization=kind == 'zip')
    return write


def _bomb(path):
    """A whole torch file of a modest tensor, deflated, whose directory tells of a gigabyte beside
    it."""
    torch.save(torch.ones(2, 3, dtype=torch.int64), path)
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive, archive.open('archive/data/9',
        'w') as entry:
        for _ in range(200): entry.write(bytes(2 ** 20))


def _cut(path):
    torch.save(torch.ones(2, 3, dtype=torch.int64), path)
    path.write_bytes(path.read_bytes()[:-200])


whole = torch.ones(2, 3, dtype=torch.int64)
FILES = dict(
    text=(_stored(b'1 2 3\n', 'bytes'), 'is not a torch file'),
             nothing=(_stored(b'', 'bytes'), 'is not a torch file'), cut=(_cut, 'is not a torch '
    'file'),
    bomb=(_bomb, 'OverflowError'), plain_pickle=(_stored([[1, 1, 1]], 'pickle'),
                                                 'torch file|holds list'),
    a_list=(_stored([[1, 1, 1]], 'zip'), 'holds list'),
             two=(_stored(dict(a=whole), 'zip'), 'holds dict'),
             floats=(_stored(whole.double(), 'zip'), 'torch.float64'),
    int32=(_stored(whole.int(), 'legacy'), 'torch.int32'),
             flat=(_stored(whole.flatten(), 'zip'), r'a tensor \(6,\)'),
             wide=(_stored(torch.ones(2, 4, dtype=torch.int64), 'zip'), r'\(2, 4\)'),
    empty=(_stored(whole[:0].clone(), 'zip'), r'\(0, 3\)'),
             sparse=(_stored(whole.to_sparse(), 'zip'), r'a tensor \(2, 3\)'),
    endless=(_stored(torch.ones(1, dtype=torch.int64).expand(10 ** 12, 3), 'zip'),
             'at most one row a triplet'),
    zero=(_stored(torch.tensor([[1, 1, 1], [1, 0, 1]]), 'zip'), r'row 1 is \[1, 0, 1\]'),
             negative=(_stored(-whole, 'zip'), 'row 0'),
    object_class=(_stored(torch.tensor([[1, 7, 1]]), 'zip'), r'row 0 is \[1, 7, 1\]; .* from 1 to '
                  r'\[6, 6, 4\]'),
    swapped=(_stored(torch.tensor([[1, 2, 3], [1, 2, 5]]), 'zip'), r'row 1 is \[1, 2, 5\]'))


@pytest.mark.parametrize('name', FILES)
def test_read_zero_shot_refuses(tmp_path, name):
    write, message = FILES[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch announces that sparse layouts may change
        write(tmp_path/'list.pytorch')
        with pytest.raises(ValueError, match=f'list.pytorch.*({message})'):
            read_zero_shot(tmp_path/'list.pytorch', names)


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle'])
def test_no_code_runs(tmp_path, kind):
    _stored(Code(tmp_path/'it-ran'), kind)(tmp_path/'list.pytorch')
    with pytest.raises(ValueError, match='list.pytorch is not a torch file'):
        read_zero_shot(tmp_path/'list.pytorch', names)
    assert not (tmp_path/'it-ran').exists()


def test_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError, match='none is missing.*zero_shot_triplets'):
        read_zero_shot(tmp_path/'none', names)


# Report and figures

def test_report_against_loops(some):
    record = json.loads(json.dumps(report(some), allow_nan=False))
    assert list(record['splits']) == list(SPLITS)
    for split, numbers in record['splits'].items():
        (graphs, named), (trained, left) = plain(some, split), plain(some, split, overlap=True,
            unique=True)
        related = [g for g in graphs if len(g.relations)]
        assert (numbers['images'], numbers['images_with_objects'],
                numbers['images_with_relations']) == (len(graphs), sum(len(g) > 0 for g in graphs),
                                                      len(related))
        assert (numbers['relations'], numbers['distinct_relations'],
                numbers['distinct_triplets']) == (len(named),
                                                  len(plain(some, split, unique=True)[1]),
                                                  len(set(named)))
        assert numbers['overlapping_relations'] == sum(int(data.overlapping(g).sum())
                                                       for g in graphs)
        assert numbers['trained'] == dict(images=sum(len(g.relations) > 0 for g in trained),
                                          relations=len(left))
        assert numbers['objects_per_image']['mean'] == pytest.approx(
            np.mean([len(g) for g in related]), abs=1e-4)
        assert numbers['relations_per_image']['max'] == max(len(g.relations) for g in related)
        distances = [
            np.hypot(*((g.boxes[s, :2] + g.boxes[s, 2:] - g.boxes[o, :2] - g.boxes[o,
            2:]) / 2).tolist()) / np.hypot(*g.size) for g in graphs
            for s, o, _ in g.relations.tolist()]
        assert numbers['relation_distance']['mean'] == pytest.approx(np.mean(distances), abs=1e-4)
        sizes = [((x2 - x1) * (y2 - y1) / (g.size[0] * g.size[1])) ** .5 for g in graphs
                 for x1, y1, x2, y2 in g.boxes.tolist()]
        assert numbers['box_size']['median'] == pytest.approx(np.median(sizes), abs=1e-4)
    counts = Counter(p for *_, p in plain(some, 'train')[1])
    groups = predicate_groups([counts[p] for p in range(4)])
    assert record['predicates'] == {f'predicate {p}': dict(group=str(groups[p]),
        **{split: Counter(q for *_, q in plain(some, split)[1])[p] for split in SPLITS})
                                    for p in range(4)}
    assert [row['train'] for row in record['objects'].values()] == sorted((row['train']
        for row in record['objects'].values()), reverse=True)
    tests, unseen = plain(some,
                          'test')[1], {tuple(row) for row in zero_shot_triplets(some).tolist()}
    assert record['zero_shot'] == dict(triplets=len(unseen),
                                       relations=sum(row in unseen for row in tests))
    assert record['triplets']['seen_once'] == sum(n == 1
                                                  for n in Counter(plain(some,
        'train')[1]).values())
    assert record['triplets']['most_frequent'][0][3] == Counter(plain(some,
        'train')[1]).most_common(1)[0][1]


def test_write_twice_and_keep_what_was(some, monkeypatch):
    path = write_statistics(some.folder)
    assert read_json(path) == json.loads(json.dumps(report(some)))
    before = {file: file.read_bytes() for file in some.folder.rglob('*')
              if 'statistics' in str(file.relative_to(some.folder)) and file.is_file()}
    assert len(before) == 6 and write_statistics(str(some.folder)) == path and all(
        file.read_bytes() == content for file, content in before.items())
    def broken(*args, **kw): raise RuntimeError('killed')
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', broken)
    with pytest.raises(RuntimeError): write_statistics(some.folder)
    assert {file: file.read_bytes()
            for file in before} == before and not list(some.folder.rglob('*.partial*'))


def test_hostile_names_and_one_class(tmp_path):
    hostile = Vocabulary(['$\\frac{$', 'y' * 10_000], ['<b>\n$\\frac{$'])
    graphs = [SceneGraph([[0, 0, 9, 9], [30, 5, 40, 20]], [0, 1], [[0, 1, 0]], (64, 64))] * 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        path = write_statistics(database(tmp_path, graphs, [0, 2], hostile).folder)
    assert read_json(path)['predicates'] == {'<b>\n$\\frac{$': dict(group='head', train=1,
        test=1)} and (tmp_path/'statistics'/'triplets.png').stat().st_size < 100_000


def test_figures_show_the_counts(some):
    train = annotations(some, 'train')
    bars = lambda ax: [bar.get_height() for bar in ax.patches]
    assert bars(plot_predicates(train).axes[0])[:4] == sorted(predicate_counts(train), reverse=True)
    assert bars(plot_predicates(train, top=2).axes[0])[:2] == sorted(predicate_counts(train),
        reverse=True)[:2]
    assert bars(plot_objects(train, top=3).axes[0]) == sorted(object_counts(train),
        reverse=True)[:3]
    rows, counts = triplet_counts(train)
    shown = plot_triplets(train, 'predicate 1').axes[0]
    assert sum(int(text.get_text())
               for text in shown.texts) == predicate_counts(train)[1] == counts[rows[:,
        2] == 1].sum()
    row, column = np.unravel_index(shown.images[0].get_array().argmax(),
                                   shown.images[0].get_array().shape)
    most = rows[rows[:, 2] == 1][0]
    largest = triplet_counts(train)[1][rows[:, 2] == 1]
    if largest[0] > largest[1]:
        assert (shown.get_yticklabels()[row].get_text(),
                shown.get_xticklabels()[column].get_text()) == (f'object {most[0]}',
            f'object {most[1]}')
    figure = plot_images({split: annotations(some, split) for split in SPLITS})
    for ax, which in zip(figure.axes, (0, 1)):
        for steps, split in zip(ax.patches, SPLITS):
            numbers = annotations(some, split).per_image()[which]
            assert steps.get_data().values[0] == pytest.approx(100 * (numbers == 0).mean())
