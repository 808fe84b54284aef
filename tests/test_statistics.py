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
from stdg.datasets.visual_genome import SPLITS, Database
from stdg.graph import SceneGraph, Vocabulary
from stdg.io.files import read_json
from stdg.metrics import Evaluator, FrequencyPrior
from stdg.testing import toy_database

names = Vocabulary([f'object {i}' for i in range(6)], [f'predicate {i}' for i in range(4)])


def database(folder, graphs, split, vocabulary=names):
    return toy_database(folder, [(graph, None) for graph in graphs], split, vocabulary, 64)


def random_graph(rng):
    "Few classes, many repeated rows; sometimes no relation, sometimes no object."
    n = rng.randrange(6)
    corners = [(rng.randrange(40), rng.randrange(30)) for _ in range(n)]
    boxes = [[x, y, x + rng.randrange(1, 20), y + rng.randrange(1, 20)] for x, y in corners]
    rows = []
    if n > 1: rows = [[*rng.sample(range(n), 2), rng.randrange(4)] for _ in range(rng.randrange(9))]
    labels = [rng.randrange(6) for _ in range(n)]
    return SceneGraph(boxes, labels, rows, (rng.randrange(50, 65), 64))


@pytest.fixture(params=range(4), scope='module')
def some(request, tmp_path_factory):
    rng = random.Random(request.param)
    graphs = [random_graph(rng) for _ in range(40)]
    splits = [rng.choice([0, 0, 0, 1, 2]) for _ in graphs]
    return database(tmp_path_factory.mktemp('db'), graphs, splits)


def triplets_of(graph):
    labels = graph.labels.tolist()
    return [(labels[s], labels[o], p) for s, o, p in graph.relations.tolist()]


def boxes_of(graphs): return [box for graph in graphs for box in graph.boxes.int().tolist()]


def plain(some, split, n_val=0, overlap=False, unique=False):
    """Graphs of a split after the filters of training, and [(subject class, object class,
    predicate), ...] of all of them."""
    rows = some.indices(split, n_val)
    graphs = [data.filter_relations(some.graph(i), overlap, unique) for i in rows]
    return graphs, [triplet for graph in graphs for triplet in triplets_of(graph)]


@pytest.mark.parametrize('overlap', [False, True])
@pytest.mark.parametrize('unique', [False, True])
@pytest.mark.parametrize('split, n_val', [('train', 0), ('train', 5), ('val', 5), ('test', 0)])
def test_counts(some, split, n_val, overlap, unique):
    graphs, named = plain(some, split, n_val, overlap, unique)
    flat = select_relations(annotations(some, split, n_val), overlap, unique)
    rows = np.column_stack([flat.labels[flat.relations[:, :2]], flat.relations[:, 2]])
    assert [tuple(row) for row in rows.tolist()] == named, 'order is kept as well'
    objects, relations = flat.per_image()
    assert objects.tolist() == [len(g) for g in graphs]
    assert relations.tolist() == [len(g.relations) for g in graphs]
    assert flat.boxes.tolist() == boxes_of(graphs)
    assert flat.sizes.tolist() == [list(g.size) for g in graphs]
    rows, counts = triplet_counts(flat)
    assert dict(zip(map(tuple, rows.tolist()), counts.tolist())) == Counter(named)
    assert (np.diff(counts) <= 0).all()
    predicates = Counter(p for *_, p in named)
    classes = Counter(c for g in graphs for c in g.labels.tolist())
    assert predicate_counts(flat).tolist() == [predicates[p] for p in range(4)]
    assert object_counts(flat).tolist() == [classes[c] for c in range(6)]


def test_prior_tables(some):
    for overlap in (False, True):
        graphs = plain(some, 'train', 3, overlap, True)[0]
        prior = FrequencyPrior(6, 4).fit(g for g in graphs if len(g.relations))
        table, pairs = prior_tables(select_relations(annotations(some, 'train', 3), overlap))
        assert np.array_equal(table, prior.counts) and np.array_equal(pairs, prior.pairs)
        assert table.sum() > 0


def test_released_boxes_are_those_of_the_graphs(some):
    released = Database(some.folder, released=True)
    boxes = annotations(released).boxes.tolist()
    assert boxes == boxes_of(map(released.graph, range(len(some)))) != annotations(some).boxes.tolist()


def test_zero_shot(some):
    for split, n_val in (('test', 0), ('test', 8), ('val', 8)):
        seen, asked = plain(some, 'train', n_val)[1], plain(some, split, n_val)[1]
        found = [tuple(row) for row in zero_shot_triplets(some, split, n_val).tolist()]
        assert found == sorted(set(asked) - set(seen))
    unseen = {tuple(row) for row in zero_shot_triplets(some).tolist()}
    assert unseen
    evaluator = Evaluator('predcls', 4, zero_shot_triplets(some))
    for i in some.indices('test'):
        evaluator.update(FrequencyPrior(6, 4).predict(some.graph(i)), some.graph(i))
    with_unseen = [g for g in plain(some, 'test')[0] if unseen & set(triplets_of(g))]
    assert evaluator.unseen_images == len(with_unseen) > 0


def test_geometry_of_a_wide_picture(tmp_path):
    graph = SceneGraph([[8, 4, 24, 12], [48, 20, 64, 32]], [0, 1], [[0, 1, 0]], (32, 64))
    wide = annotations(database(tmp_path, [graph], [0]))
    size, centre = box_geometry(wide)
    assert size.tolist() == [.25, pytest.approx((.25 * .375) ** .5)]
    assert centre.tolist() == [[.25, .25], [.875, .8125]]
    assert relation_distance(wide).tolist() == [pytest.approx(np.hypot(40, 18) / np.hypot(32, 64))]


def test_nothing_at_all(tmp_path):
    empty = database(tmp_path, [SceneGraph([], [], [], (9, 9))] * 2, [0, 0])
    flat = annotations(empty)
    assert len(flat.labels) == len(select_relations(flat, overlap=True).relations) == 0
    assert [counts.tolist() for counts in flat.per_image()] == [[0, 0]] * 2
    assert len(triplet_counts(flat)[0]) == 0 and prior_tables(flat)[1].sum() == 0
    assert zero_shot_triplets(empty).shape == (0, 3)
    assert len(box_geometry(flat)[0]) == len(relation_distance(flat)) == 0
    message = f'{tmp_path.name}: no relation is annotated in the training split'
    with pytest.raises(ValueError, match=message): write_statistics(tmp_path)
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
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('archive/data/9', 'w') as entry:
            for _ in range(200): entry.write(bytes(2 ** 20))


def _cut(path):
    torch.save(torch.ones(2, 3, dtype=torch.int64), path)
    path.write_bytes(path.read_bytes()[:-200])


whole = torch.ones(2, 3, dtype=torch.int64)
FILES = dict(
    text=(_stored(b'1 2 3\n', 'bytes'), 'is not a torch file'),
    nothing=(_stored(b'', 'bytes'), 'is not a torch file'),
    cut=(_cut, 'is not a torch file'),
    bomb=(_bomb, 'OverflowError'),
    plain_pickle=(_stored([[1, 1, 1]], 'pickle'), 'torch file|holds list'),
    a_list=(_stored([[1, 1, 1]], 'zip'), 'holds list'),
    two=(_stored(dict(a=whole), 'zip'), 'holds dict'),
    floats=(_stored(whole.double(), 'zip'), 'torch.float64'),
    int32=(_stored(whole.int(), 'legacy'), 'torch.int32'),
    flat=(_stored(whole.flatten(), 'zip'), r'a tensor \(6,\)'),
    wide=(_stored(torch.ones(2, 4, dtype=torch.int64), 'zip'), r'\(2, 4\)'),
    empty=(_stored(whole[:0].clone(), 'zip'), r'\(0, 3\)'),
    sparse=(_stored(whole.to_sparse(), 'zip'), r'a tensor \(2, 3\)'),
    endless=(_stored(whole[0, :1].clone().expand(10 ** 12, 3), 'zip'), 'at most one row a triplet'),
    zero=(_stored(torch.tensor([[1, 1, 1], [1, 0, 1]]), 'zip'), r'row 1 is \[1, 0, 1\]'),
    negative=(_stored(-whole, 'zip'), 'row 0'),
    object_class=(_stored(torch.tensor([[1, 7, 1]]), 'zip'),
                  r'row 0 is \[1, 7, 1\]; .* from 1 to \[6, 6, 4\]'),
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
        graphs, named = plain(some, split)
        trained, left = plain(some, split, overlap=True, unique=True)
        related = [g for g in graphs if len(g.relations)]
        assert numbers['images'] == len(graphs) and numbers['images_with_relations'] == len(related)
        assert numbers['images_with_objects'] == sum(len(g) > 0 for g in graphs)
        assert numbers['relations'] == len(named)
        assert numbers['distinct_triplets'] == len(set(named))
        assert numbers['distinct_relations'] == len(plain(some, split, unique=True)[1])
        assert numbers['overlapping_relations'] == sum(int(data.overlapping(g).sum()) for g in graphs)
        images = sum(len(g.relations) > 0 for g in trained)
        assert numbers['trained'] == dict(images=images, relations=len(left))
        objects = np.mean([len(g) for g in related])
        assert numbers['objects_per_image']['mean'] == pytest.approx(objects, abs=1e-4)
        assert numbers['relations_per_image']['max'] == max(len(g.relations) for g in related)
        distances = []
        for g in graphs:
            centres = (g.boxes[:, :2] + g.boxes[:, 2:]) / 2
            for s, o, _ in g.relations.tolist():
                distances.append(np.hypot(*(centres[s] - centres[o]).tolist()) / np.hypot(*g.size))
        assert numbers['relation_distance']['mean'] == pytest.approx(np.mean(distances), abs=1e-4)
        sizes = [((x2 - x1) * (y2 - y1) / (g.size[0] * g.size[1])) ** .5 for g in graphs
                 for x1, y1, x2, y2 in g.boxes.tolist()]
        assert numbers['box_size']['median'] == pytest.approx(np.median(sizes), abs=1e-4)
    named = {split: plain(some, split)[1] for split in SPLITS}
    counts = {split: Counter(p for *_, p in named[split]) for split in SPLITS}
    groups = predicate_groups([counts['train'][p] for p in range(4)])
    for p in range(4):
        row = dict(group=str(groups[p]), **{split: counts[split][p] for split in SPLITS})
        assert record['predicates'][f'predicate {p}'] == row
    assert len(record['predicates']) == 4
    objects = [row['train'] for row in record['objects'].values()]
    assert objects == sorted(objects, reverse=True)
    unseen = {tuple(row) for row in zero_shot_triplets(some).tolist()}
    tested = sum(row in unseen for row in named['test'])
    assert record['zero_shot'] == dict(triplets=len(unseen), relations=tested)
    triplets = Counter(named['train'])
    assert record['triplets']['seen_once'] == sum(n == 1 for n in triplets.values())
    assert record['triplets']['most_frequent'][0][3] == triplets.most_common(1)[0][1]


def test_write_twice_and_keep_what_was(some, monkeypatch):
    path = write_statistics(some.folder)
    assert read_json(path) == json.loads(json.dumps(report(some)))
    before = {file: file.read_bytes() for file in some.folder.rglob('*')
              if 'statistics' in str(file.relative_to(some.folder)) and file.is_file()}
    assert len(before) == 6 and write_statistics(str(some.folder)) == path
    assert {file: file.read_bytes() for file in before} == before
    def broken(*args, **kw): raise RuntimeError('killed')
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', broken)
    with pytest.raises(RuntimeError): write_statistics(some.folder)
    assert {file: file.read_bytes() for file in before} == before
    assert not list(some.folder.rglob('*.partial*'))


def test_hostile_names_and_one_class(tmp_path):
    hostile = Vocabulary(['$\\frac{$', 'y' * 10_000], ['<b>\n$\\frac{$'])
    graphs = [SceneGraph([[0, 0, 9, 9], [30, 5, 40, 20]], [0, 1], [[0, 1, 0]], (64, 64))] * 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        path = write_statistics(database(tmp_path, graphs, [0, 2], hostile).folder)
    assert read_json(path)['predicates'] == {'<b>\n$\\frac{$': dict(group='head', train=1, test=1)}
    assert (tmp_path/'statistics'/'triplets.png').stat().st_size < 100_000


def test_figures_show_the_counts(some):
    train = annotations(some, 'train')
    bars = lambda ax: [bar.get_height() for bar in ax.patches]
    predicates = sorted(predicate_counts(train), reverse=True)
    assert bars(plot_predicates(train).axes[0])[:4] == predicates
    assert bars(plot_predicates(train, top=2).axes[0])[:2] == predicates[:2]
    assert bars(plot_objects(train, top=3).axes[0]) == sorted(object_counts(train), reverse=True)[:3]
    rows, counts = triplet_counts(train)
    shown, ones = plot_triplets(train, 'predicate 1').axes[0], rows[:, 2] == 1
    total = sum(int(text.get_text()) for text in shown.texts)
    assert total == predicate_counts(train)[1] == counts[ones].sum()
    table = shown.images[0].get_array()
    row, column = np.unravel_index(table.argmax(), table.shape)
    subject, object, _ = rows[ones][0]
    if counts[ones][0] > counts[ones][1]:
        assert shown.get_yticklabels()[row].get_text() == f'object {subject}'
        assert shown.get_xticklabels()[column].get_text() == f'object {object}'
    figure = plot_images({split: annotations(some, split) for split in SPLITS})
    for ax, which in zip(figure.axes, (0, 1)):
        for steps, split in zip(ax.patches, SPLITS):
            numbers = annotations(some, split).per_image()[which]
            assert steps.get_data().values[0] == pytest.approx(100 * (numbers == 0).mean())
