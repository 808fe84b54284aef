"""Visual Genome's raw lists to a database: against a plain reference on random images, with junk in
every place, cut off in the middle, and at the size of half the real thing."""
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdg.datasets import vg_rules
from stdg.datasets.listing import Listing, write_listing
from stdg.datasets.vg_files import to_corners
from stdg.datasets.vg_raw import RAW, make_database
from stdg.datasets.vg_rules import merge_boxes
from stdg.datasets.visual_genome import Database, write_images

OBJECTS, PREDICATES = ['cup', 'man', 'person', 'table'], ['near', 'on']
FILES = {'object_alias.txt': 'cup,mug\nman,guy\n', 'predicate_alias.txt': 'on,on top of\n',
         'object_list.txt': '\n'.join(reversed(OBJECTS)),
         'predicate_list.txt': '\n'.join(PREDICATES)}
SIZES = (16, 40)


def write_raw(folder, lists):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in lists.items(): (folder/f'{name}.json').write_text(json.dumps(records))
    for name, text in FILES.items(): (folder/name).write_text(text)


def listing(folder, rows):
    "rows: (image id, position, height, width)"
    folder.mkdir(parents=True, exist_ok=True)
    write_listing(folder, Listing(*zip(*rows), np.array([b'%d.jpg' % row[0] for row in rows]),
                                  np.zeros(len(rows))))


def made(home, lists, rows, **settings):
    write_raw(home/'raw', lists)
    listing(home/'db', rows)
    return make_database(home/'db', home/'raw', SIZES, progress=False, **settings)


def check_whole(folder, rows, summary):
    """The database opens, no box leaves the square, every relation stays in its image, and the
    books balance."""
    pictures = [dict(image=np.zeros((16, 16, 3), np.uint8), image_id=row[0]) for row in rows]
    write_images(folder, pictures, len(pictures), 16)
    database, counts = Database(folder, 16), summary['counts']
    with h5py.File(folder/'VG-SGG.h5') as file:
        for size in SIZES:
            corners = to_corners(file[f'boxes_{size}'][:])
            assert (corners >= 0).all() and (corners <= size).all()
            assert (corners[:, 2:] > corners[:, :2]).all()
    assert len(database) == len(rows)
    assert database.relation_counts().sum() == counts['relations kept']
    for i in range(len(rows)):
        subject, object, _ = database.graph(i).relations.T
        assert (subject != object).all()
    def total(start): return sum(n for kind, n in counts.items() if kind.startswith(start))
    gone = total('objects merged') + counts['objects too small'] + counts['objects without a class']
    objects = counts['objects listed'] + counts['objects added by relations']
    assert objects == counts['objects kept'] + gone
    assert counts['relations listed'] == counts['relations kept'] + total('dropped')
    return database


# The rules once more, in plain Python, without arrays.

def pair_type(a, b, same):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    r = Fraction(width * height, both) if width > 0 and height > 0 else Fraction(0)
    inside = any(p[0] >= q[0] and p[1] >= q[1] and p[2] <= q[2] and p[3] <= q[3]
                 for p, q in ((a, b), (b, a)))
    if a == b or r > Fraction(9, 10): return 1
    if not same: return 0
    return 2 if inside else 3 if r > Fraction(6, 10) else 0


def merged_plainly(boxes, first):
    "Groups as (survivor, [(absorbed, type)], box)."
    absorbed, groups = set(), []
    for i in range(len(boxes)):
        if i in absorbed: continue
        group = []
        for j in range(i + 1, len(boxes)):
            if j in absorbed: continue
            kind = pair_type(boxes[i], boxes[j], first[i] == first[j])
            if kind:
                absorbed.add(j)
                group.append((j, kind))
        members = [boxes[i]] + [boxes[j] for j, _ in group]
        if any(kind > 1 for _, kind in group):
            box = [min(m[0] for m in members), min(m[1] for m in members),
                   max(m[2] for m in members), max(m[3] for m in members)]
        else:
            box = [int(Fraction(sum(m[side] for m in members), len(members))) for side in range(4)]
        groups.append((i, group, box))
    return groups


def encoded_plainly(box, longest, size):
    k, (x, y, w, h) = size / longest, box
    x, y = math.floor(k * (x - 1)), math.floor(k * (y - 1))
    w, h = math.ceil(k * w), math.ceil(k * h)
    x, y = min(max(x, 0), size - 2), min(max(y, 0), size - 2)
    if x + w >= size: w = size - x
    if y + h >= size: h = size - y
    return [x + w // 2, y + h // 2, w, h]


def read_plainly(text, aliases):
    name = text.strip().lower().replace('.', '')
    return aliases.get(name, name)


def image_plainly(objects, relationships, height, width):
    "Steps 1 to 5 of an image of unharmed records: [(box, names)], [(subject, predicate, object)]."
    objects = list(objects)
    for relation in relationships:
        for side in ('subject', 'object'):
            if relation[side]['object_id'] not in [o['object_id'] for o in objects]:
                objects.append(dict(relation[side], names=[relation[side]['name']]))
    objects = [o for o in objects if Fraction(o['w'] * o['h']) > Fraction(2, 1000) * height * width]
    names = [[read_plainly(n, dict(mug='cup', guy='man')) for n in o['names']] for o in objects]
    groups = merged_plainly([[o['x'], o['y'], o['x'] + o['w'], o['y'] + o['h']] for o in objects],
                            [n[0] for n in names])
    place, things = {}, []
    for i, group, (x1, y1, x2, y2) in groups:
        members = [i] + [j for j, _ in group]
        for j in members: place[objects[j]['object_id']] = len(things)
        found = dict.fromkeys(name for j in members for name in names[j])
        things.append(([x1, y1, x2 - x1, y2 - y1], list(found)))
    triples = []
    for r in relationships:
        subject, object = (place.get(r[side]['object_id']) for side in ('subject', 'object'))
        triples.append((subject, read_plainly(r['predicate'], {'on top of': 'on'}), object))
    return things, triples


def database_plainly(lists, rows, share):
    """Per image: labels, boxes at each size, relations, split; all numbered as in the file,
    relations within their image.

    And the counts of names."""
    images = [image_plainly(lists['objects'][p]['objects'],
                            lists['relationships'][p]['relationships'], h, w)
              for _, p, h, w in rows]
    counts = Counter(n for things, _ in images for _, names in things for n in names)
    out = []
    for i, ((things, relations), (_, _, h, w)) in enumerate(zip(images, rows)):
        labels = [max([n for n in names if n in OBJECTS], key=lambda n: counts[n], default=None)
                  for _, names in things]
        kept = [t for t, label in enumerate(labels) if label]
        stay = [(kept.index(s), kept.index(o), PREDICATES.index(p) + 1) for s, p, o in relations
                if s in kept and o in kept and s != o and p in PREDICATES]
        out.append(dict(labels=[OBJECTS.index(labels[t]) + 1 for t in kept],
                        boxes={size: [encoded_plainly(things[t][0], max(h, w), size) for t in kept]
                               for size in SIZES},
                        relations=stay, split=2 if i >= math.trunc(share * len(rows)) else 0))
    return out, counts, Counter(p for _, relations in images for _, p, _ in relations)


# Random images: few places and few names, so that boxes meet.

side = st.integers(-3, 40)
extent = st.sampled_from([1, 2, 3, 9, 10, 11, 20, 21, 60, 200])
name = st.sampled_from(['cup', 'Mug.', ' man', 'GUY', 'person', 'table', 'unicorn'])
thing = st.fixed_dictionaries(dict(x=side, y=side, w=extent, h=extent,
                                   names=st.lists(name, min_size=1, max_size=3)))


@st.composite
def raw_lists(draw):
    n = draw(st.integers(1, 5))
    lists, rows = {name: [] for name in RAW}, []
    for i in range(n):
        things = [dict(t, object_id=100 * i + k)
                  for k, t in enumerate(draw(st.lists(thing, max_size=12)))]
        listed = draw(st.integers(0, len(things)))
        end = lambda k: {**{key: v for key, v in things[k].items() if key != 'names'},
                         'name': things[k]['names'][0]}
        which = st.integers(0, len(things) - 1) if things else st.nothing()
        predicate = st.sampled_from(['ON', 'on top of', 'near.', 'under'])
        triples = draw(st.lists(st.tuples(which, predicate, which), max_size=10)) if things else []
        relations = [dict(subject=end(s), predicate=p, object=end(o)) for s, p, o in triples]
        lists['image_data'].append(dict(image_id=i + 7))
        lists['objects'].append(dict(image_id=i + 7, objects=things[:listed]))
        lists['relationships'].append(dict(image_id=i + 7, relationships=relations))
        if draw(st.booleans()) or i == 0:
            rows.append((i + 7, i, draw(st.integers(20, 90)), draw(st.integers(20, 90))))
    return lists, rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(side, side, extent, extent, st.integers(0, 2)), max_size=25))
def test_merging_is_the_sequential_rule(rows):
    boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in rows]
    owner, how, merged = merge_boxes(np.array(boxes, np.int64).reshape(-1, 4),
                                     np.array([row[4] for row in rows], np.int64))
    groups = merged_plainly(boxes, [row[4] for row in rows])
    assert np.flatnonzero(how == 0).tolist() == [i for i, _, _ in groups]
    absorbed = {(int(owner[j]), int(j), int(how[j])) for j in np.flatnonzero(how)}
    assert absorbed == {(i, j, kind) for i, group, _ in groups for j, kind in group}
    assert all(merged[i].tolist() == box for i, _, box in groups)


@settings(max_examples=60, deadline=None)
@given(raw_lists(), st.sampled_from([0., .4, .7, 1.]))
def test_database_is_the_plain_one(drawn, share):
    lists, rows = drawn
    with tempfile.TemporaryDirectory() as home:
        summary = made(Path(home), lists, rows, train_share=share)
        expected, names, predicates = database_plainly(lists, rows, share)
        check_whole(Path(home)/'db', rows, summary)
        dicts = json.loads((Path(home)/'db'/'VG-SGG-dicts.json').read_text())
        with h5py.File(Path(home)/'db'/'VG-SGG.h5') as file:
            data = {key: file[key][:] for key in file}
    assert dicts['object_count'] == {n: names[n] for n in OBJECTS}
    assert dicts['predicate_count'] == {p: predicates[p] for p in PREDICATES}
    assert data['labels'].tolist() == [[v] for image in expected for v in image['labels']]
    assert data['split'].tolist() == [image['split'] for image in expected]
    for size in SIZES:
        assert data[f'boxes_{size}'].tolist() == [b for image in expected for b in image['boxes'][size]]
    start = relation = 0
    for i, image in enumerate(expected):
        n, r = len(image['labels']), len(image['relations'])
        box_rows, relation_rows = ([data[f'img_to_{end}_{what}'][i] for end in ('first', 'last')]
                                   for what in ('box', 'rel'))
        assert box_rows == ([start, start + n - 1] if n else [-1, -1])
        assert relation_rows == ([relation, relation + r - 1] if r else [-1, -1])
        mine = slice(relation, relation + r)
        pairs = [[s + start, o + start] for s, o, _ in image['relations']]
        assert data['relationships'][mine].tolist() == pairs
        assert data['predicates'][mine, 0].tolist() == [p for _, _, p in image['relations']]
        start, relation = start + n, relation + r


junk = st.sampled_from([None, True, -5, 0, 1.5, '7', 'seven', 'nan', 1e300, 10 ** 12, '1e999999999',
                        [], [1], {}, {'object_id': 3}, '', 'É½…', '\ud800', ['cup', None, 7]])


@settings(max_examples=80, deadline=None)
@given(raw_lists(), st.data())
def test_junk_is_counted_or_refused(drawn, data):
    "Any value of any record replaced: a whole database, or one clear error and nothing written."
    lists, rows = drawn
    def spoil(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys: return
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
            spoil(node[key])
        else: node[key] = deepcopy(data.draw(junk))
    lists = json.loads(json.dumps(lists))
    for _ in range(data.draw(st.integers(1, 4))): spoil(lists[data.draw(st.sampled_from(RAW[1:]))])
    with tempfile.TemporaryDirectory() as home:
        try: summary = made(Path(home), lists, rows)
        except ValueError as error:
            assert any(f'{name}.json' in str(error) for name in RAW), error
            assert [p.name for p in (Path(home)/'db').iterdir()] == ['pictures.h5']
        else: check_whole(Path(home)/'db', rows, summary)


# What a person may be handed, by its kind; two good objects and a relation between them stay.

GOOD = [dict(object_id=1, x=1, y=1, w=20, h=20, names=['man']),
        dict(object_id=2, x=30, y=30, w=20, h=20, names=['table'])]
ends = dict(subject=GOOD[0], object=GOOD[1])
CASES = {
    'objects that are no objects': ([5], []),
    'objects without an id': ([dict(GOOD[0], object_id=None)], []),
    'objects whose box is not of whole numbers': ([dict(GOOD[0], object_id=3, x='nan')], []),
    'objects with a width or height below zero': ([dict(GOOD[0], object_id=3, w=-20, h=-20)], []),
    'objects with a box out of all proportion': ([dict(GOOD[0], object_id=3, w=10 ** 9)], []),
    'objects with a box of no area (too small)': ([dict(GOOD[0], object_id=3, w=0)], []),
    'objects whose id occurs before': ([dict(GOOD[0], x=60)], []),
    'objects without a name': ([dict(GOOD[0], object_id=3, x=60, names=[])], []),
    'boxes that begin outside of the picture (kept)': ([dict(GOOD[0], object_id=3, x=-9, names=['cup'])], []),
    'names rewritten by normalisation or alias': ([dict(GOOD[0], object_id=3, x=60, names=['MUG.'])], []),
    'relations to unknown ids': ([], [dict(ends, predicate='on', subject=dict(object_id=99))]),
    'relations without a predicate': ([], [ends, 'on']),
    'predicates rewritten by normalisation or alias': ([], [dict(ends, predicate='On top of')])}


@pytest.mark.parametrize('kind', CASES)
def test_every_kind_of_oddness_is_named(tmp_path, kind):
    objects, relations = CASES[kind]
    lists = dict(image_data=[dict(image_id=7)], objects=[dict(image_id=7, objects=GOOD + objects)],
                 relationships=[dict(image_id=7,
                                     relationships=[dict(ends, predicate='near')] + relations)])
    summary = made(tmp_path, lists, [(7, 0, 100, 100)])
    graph = check_whole(tmp_path/'db', [(7, 0, 100, 100)], summary).graph(0)
    found = summary['odd'][kind]
    assert found['count'] == max(len(objects), len(relations)) and set(summary['odd']) == {kind}
    assert all(line.startswith('image 7: ') for line in found['first'])
    assert len(graph) == 2 + ('kept' in kind or 'names rewritten' in kind)
    assert len(graph.relations) == 1 + ('predicates' in kind)


@pytest.mark.parametrize('name', RAW)
def test_a_list_cut_off_in_the_middle(tmp_path, name):
    lists = dict(image_data=[dict(image_id=i) for i in range(40)],
                 objects=[dict(image_id=i, objects=GOOD) for i in range(40)],
                 relationships=[dict(image_id=i, relationships=[]) for i in range(40)])
    rows = [(i, i, 100, 100) for i in range(40)]
    made(tmp_path, lists, rows)
    before = {path.name: path.read_bytes() for path in (tmp_path/'db').iterdir()}
    path = tmp_path/'raw'/f'{name}.json'
    os.truncate(path, path.stat().st_size * 3 // 4)
    message = rf'{name}.json is damaged after (29|30) whole records .*Fetch it again'
    with pytest.raises(ValueError, match=message):
        make_database(tmp_path/'db', tmp_path/'raw', SIZES, remake=True, progress=False)
    after = {path.name: path.read_bytes() for path in (tmp_path/'db').iterdir()}
    assert after == before, 'what was there stays, and no temporary file'


def test_stopped_while_the_database_is_written(tmp_path, monkeypatch):
    lists = dict(image_data=[dict(image_id=7)], objects=[dict(image_id=7, objects=GOOD)],
                 relationships=[dict(image_id=7, relationships=[])])
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(vg_rules, 'encode_boxes', stop)
        with pytest.raises(KeyboardInterrupt): made(tmp_path, lists, [(7, 0, 100, 100)])
    assert [p.name for p in (tmp_path/'db').iterdir()] == ['pictures.h5']
    assert made(tmp_path, lists, [(7, 0, 100, 100)])['counts']['objects kept'] == 2


# Half of Visual Genome, of made-up records.

def write_many(folder, n):
    """n records of 35 objects and 21 relations, about the size of the real ones without their
    synsets."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    things = [[dict(object_id=k, x=int(x), y=int(y), w=int(w), h=int(h), names=[names[k % 4]])
               for k, (x, y, w, h) in enumerate(rng.integers([0, 0, 5, 5], [700, 500, 300, 200],
        (35, 4)))]
              for names in [OBJECTS] * 50]
    relations = [[dict(predicate=['ON', 'near', 'under'][k % 3], subject={'object_id': int(a)},
                       object={'object_id': int(b)})
                  for k, (a, b) in enumerate(rng.integers(0, 35, (21, 2)))] for _ in range(50)]
    parts = dict(objects=[json.dumps(t) for t in things],
                 relationships=[json.dumps(r) for r in relations])
    for name in RAW:
        with open(folder/f'{name}.json', 'w') as file:
            for i in range(n):
                part = f', "{name}": {parts[name][i % 50]}' if name in parts else ''
                file.write(('[' if i == 0 else ',') + f'{{"image_id": {i}{part}}}')
            file.write(']')


CHILD = '''
import json, resource, sys
from stdg.datasets.vg_raw import make_database
summary = make_database(sys.argv[1], sys.argv[2], progress=False)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, summary['counts']['objects kept']]))
'''


@pytest.mark.skipif(not os.environ.get('STDG_FULL_SIZE'),
                    reason='a minute and 250 MB of disk: STDG_FULL_SIZE=1 runs it')
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = {}
    for n in (5_000, 50_000):
        write_many(tmp_path/f'raw{n}', n)
        listing(tmp_path/f'db{n}', [(i, i, 600, 800) for i in range(n)])
        done = subprocess.run([sys.executable, '-c', CHILD, tmp_path/f'db{n}', tmp_path/f'raw{n}'],
                              capture_output=True, text=True, check=True)
        peaks[n], kept = json.loads(done.stdout)
        assert kept > 5 * n
        for path in (tmp_path/f'raw{n}').iterdir(): path.unlink()
    print(f'peak memory {peaks} MB')
    # the chunk caches of HDF5 fill up; the lists have 190 MB
    assert peaks[50_000] - peaks[5_000] < 50, f'{peaks} MB: ten times the images may take 50 MB more'
