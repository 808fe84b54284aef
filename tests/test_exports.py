"""VRD's JSON and Label Studio's export, from the files of a tool to a database, by the command line;
numbers worked out by hand."""
import json
import math
import re

import pytest
from PIL import Image

from stdg.datasets.exports import read_label_studio, read_vrd
from stdg.datasets.visual_genome import Database
from stdg.io.archives import open_sources
from stdg.prepare import main

W, H = 200, 100  # of every picture


def put(path, size=(W, H), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 120, 150)).save(path, **options)


def written(path, record):
    path.write_text(json.dumps(record))
    return path


def run(capsys, raw, kind, *annotations, steps=('check', 'database', 'images')):
    "Exit status and all that is said; a mistake of a person brings one line."
    command = [*steps, '--raw', raw, '--folder', raw.parent/'out', '--size', 100, '--depth', 'none',
               '--kind', kind, '--annotations', *annotations]
    try: main([str(part) for part in command])
    except SystemExit as stopped:
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line and '%|' not in line]
        assert len(lines) == 1 and 'Traceback' not in said.err, said.err
        return stopped.code, said.out + lines[0]
    return 0, capsys.readouterr().out


def told(database, i):
    "Relations of picture `i` in words, and boxes by class, at the scale of 1 to 2."
    graph, names = database.graph(i), database.vocabulary
    things = [names.objects[label] for label in graph.labels]
    return ({(things[s], names.predicates[p], things[o]) for s, o, p in graph.relations.tolist()},
            {thing: box for thing, box in zip(things, graph.boxes.tolist())})


# VRD

def end(category, x1, y1, x2, y2): return dict(category=category, bbox=[y1, y2, x1, x2])


def vrd(raw):
    "Two files of VRD, three pictures; a person on a horse, the horse beside a tree."
    horse = end(1, 40, 20, 160, 90)
    rows = [dict(predicate=0, subject=end(0, 60, 0, 100, 50), object=horse),
            dict(predicate=1, subject=horse, object=end(2, 150, 0, 200, 100))]
    written(raw/'objects.json', ['person', 'horse', 'tree'])
    written(raw/'predicates.json', ['on', 'next to', 'wear'])
    written(raw/'annotations_train.json', {'1.jpg': rows, '2 b.jpg': []})
    written(raw/'annotations_test.json', {'3.jpg': rows[:1]})


@pytest.fixture
def raw(tmp_path):
    (tmp_path/'raw').mkdir()
    return tmp_path/'raw'


def test_vrd_becomes_a_database(raw, capsys):
    vrd(raw)
    for file in ('train/1.jpg', 'train/2 b.jpg', 'test/3.jpg'): put(raw/file)
    status, said = run(capsys, raw, 'vrd', 'train=annotations_train.json', 'test=annotations_test.json')
    assert status == 0 and '3 of 3 pictures are sound' in said and '3 images, 5 objects, 3 relations' in said
    database = Database(raw.parent/'out', 100)
    assert database.vocabulary.objects == ('person', 'horse', 'tree')
    assert database.vocabulary.predicates == ('on', 'next to', 'wear')
    assert database.indices('train').tolist() == [0, 1] and database.indices('test').tolist() == [2]
    relations, boxes = told(database, 0)
    assert relations == {('person', 'on', 'horse'), ('horse', 'next to', 'tree')}
    assert boxes == dict(person=[30, 0, 50, 25], horse=[20, 10, 80, 45], tree=[75, 0, 100, 50])


def test_vrd_alone_draws_its_splits_and_several_need_theirs(raw, capsys):
    vrd(raw)
    put(raw/'1.jpg')
    read = read_vrd(raw/'annotations_train.json', open_sources(raw))
    assert set(read.splits.values()) <= {'train', 'val', 'test'}
    assert read.report.count('splits drawn by a seed, since no image has one') == 2
    status, said = run(capsys, raw, 'vrd', 'annotations_train.json', 'annotations_test.json')
    assert status == 2 and 'files of kind vrd do not tell it. Write train=file' in said


def test_vrd_takes_sizes_from_turned_and_from_doubtful_pictures(raw):
    "A picture that its EXIF tag turns is as wide as it is shown; of two sizes, none is taken."
    vrd(raw)
    exif = Image.Exif()
    exif[0x112] = 6
    put(raw/'1.jpg', (H, W), exif=exif)
    put(raw/'a'/'3.jpg')
    put(raw/'b'/'3.jpg', (W, H + 1))
    read = read_vrd(dict(train=raw/'annotations_train.json', test=raw/'annotations_test.json'), open_sources(raw))
    assert [graph.size for _, _, graph in read] == [(H, W), None, None]
    assert [len(graph) for _, _, graph in read] == [3, 0, 0]
    what = 'pictures that are not there, so that their size is not known: objects left out'
    assert read.report.found[what] == dict(count=2, first=['2 b.jpg', '3.jpg'])


@pytest.mark.parametrize('file, record, why', [
    ('objects.json', None, 'objects.json is missing. VRD'), ('predicates.json', {}, 'predicates.json is not a list of'),
    ('annotations_train.json', [], 'annotations_train.json is not a dictionary. VRD'),
    ('annotations_train.json', {'1.jpg': {}}, r'no list of relations: annotations_train.json\[0\] ..1.jpg'),
    ('objects.json', [], 'a vocabulary needs at least one of objects.*no such category'),
    ('objects.json', ['person', 3, 'tree'], 'objects.json: a name is not printable.*relations: no such category')])
def test_vrd_says_what_is_wrong(raw, capsys, file, record, why):
    vrd(raw)
    put(raw/'1.jpg')
    if record is None: (raw/file).unlink()
    else: written(raw/file, record)
    status, said = run(capsys, raw, 'vrd', 'annotations_train.json', steps=('check', 'database'))
    assert status == 1 and re.search(why, said, re.DOTALL), said


# Label Studio

def box(key, label, x1, y1, x2, y2, rotation=0, **more):
    "A rectangle of pixels, as the tool writes it: in percent of the picture."
    value = dict(x=100 * x1 / W, y=100 * y1 / H, width=100 * (x2 - x1) / W, height=100 * (y2 - y1) / H)
    return dict(id=key, type='rectanglelabels', from_name='label', to_name='image', original_width=W,
                original_height=H, image_rotation=0, origin='manual',
                value=value | dict(rotation=rotation, rectanglelabels=[label])) | more


def arrow(subject, object, *labels, **more):
    return dict(type='relation', from_id=subject, to_id=object, labels=[*labels]) | more


def task(key, image, *annotations, **data):
    return dict(id=key, data=dict(image=image) | data, predictions=[], drafts=[], annotations=[
        dict(id=100 * key + i, was_cancelled=False, ground_truth=False, result=result)
        if isinstance(result, list) else result for i, result in enumerate(annotations)])


CUP, TABLE = box('a', 'cup', 20, 10, 60, 50), box('b', 'table', 0, 40, 200, 100)


def test_label_studio_becomes_a_database(raw, capsys):
    """Uploaded, quoted, from a local folder, from an address; the pictures lie as they are in the
    tool, or as they were before. The direction of every arrow, and an object turned by 90 degrees."""
    on = arrow('a', 'b', 'on', direction='right')
    lamp = box('c', 'lamp', 100, 20, 160, 40, rotation=90)  # from (100, 20): 20 to the left, 60 down
    written(raw/'export.json', [
        task(1, '/data/upload/3/0a1b2c3d-my%20room.jpg', [CUP, TABLE, on], split='train'),
        task(2, '/data/upload/3/ffffffff-two.jpg', [CUP, TABLE, on | dict(direction='left')], split='train'),
        task(3, '/data/local-files/?d=day%201/k%C3%BCche.jpg', [CUP, TABLE, on | dict(direction='bi')], split='test'),
        task(4, 'https://host/bucket/four.jpg?sig=1%2F2', [CUP, lamp, arrow('c', 'a', 'near', 'on')], split='val'),
        task(5, 'five.jpg', [])])
    for file in ('media/upload/3/0a1b2c3d-my room.jpg', 'two.jpg', 'day 1/k\u00fcche.jpg', 'four.jpg', 'five.jpg'):
        put(raw/file)
    status, said = run(capsys, raw, 'label_studio', 'export.json')
    assert status == 0 and '5 of 5 pictures are sound' in said and '5 images, 8 objects, 6 relations' in said
    assert "other spelling: image 2: 3/ffffffff-two.jpg is taken to be two.jpg" in said
    assert "1 x images without a split, while others have one: taken to 'train': image 5" in said
    database = Database(raw.parent/'out', 100)
    assert database.vocabulary.objects == ('cup', 'lamp', 'table')
    cup, table, lamp = [10, 5, 30, 25], [0, 20, 100, 50], [40, 10, 50, 40]
    assert told(database, 0) == ({('cup', 'on', 'table')}, dict(cup=cup, table=table))
    assert told(database, 1)[0] == {('table', 'on', 'cup')}
    assert told(database, 2)[0] == {('cup', 'on', 'table'), ('table', 'on', 'cup')}
    assert told(database, 3) == ({('lamp', 'near', 'cup'), ('lamp', 'on', 'cup')}, dict(cup=cup, lamp=lamp))
    assert [database.indices(split).tolist() for split in ('train', 'val', 'test')] == [[0, 1, 4], [3], [2]]


def test_label_studio_takes_one_annotation_of_several(tmp_path):
    "Ground truth before the latest, the latest before others, never one that was skipped."
    def made(label, **more): return dict(result=[box('a', label, 0, 0, 9, 9), box('b', 'x', 0, 0, 9, 9),
                                                 arrow('a', 'b', 'on')], **more)
    early, late = dict(updated_at='2024-05-01T00:00:00Z'), dict(updated_at='2024-11-01T00:00:00Z')
    record = [task(1, '1.jpg', made('late', **late), made('early', **early)),
              task(2, '2.jpg', made('truth', ground_truth=True, **early), made('late', **late)),
              task(3, '3.jpg', made('skipped', was_cancelled=True, **late), made('early', **early)),
              task(4, '4.jpg', made('first'), made('second')),
              task(5, '5.jpg', made('skipped', was_cancelled=True)), task(6, '6.jpg')]
    read = read_label_studio(written(tmp_path/'e.json', record))
    names = read.vocabulary.objects
    assert [{names[label] for label in graph.labels} - {'x'} for _, _, graph in read] == [
        {'late'}, {'truth'}, {'early'}, {'second'}]
    assert read.report.count('tasks with several annotations: the ground truth, else the last one is taken') == 3
    assert read.report.count('tasks without an annotation, or skipped: left out') == 2


def test_label_studio_without_sizes_gives_shares(raw, capsys):
    "Results that were imported may not tell the size; percent are shares of whatever the picture has."
    bare = [{k: v for k, v in r.items() if not k.startswith('original')} for r in (CUP, TABLE)]
    turned = box('c', 'lamp', 1, 1, 9, 9, rotation=5)
    turned.pop('original_width')
    written(raw/'export.json', [task(1, '1.jpg', [*bare, turned, arrow('a', 'b', 'on')], split='train')])
    put(raw/'1.jpg')
    read = read_label_studio(raw/'export.json')
    assert read.images[1][1].size is None
    assert read.images[1][1].boxes.flatten().tolist() == pytest.approx([.1, .1, .3, .5, 0, .4, 1, 1])
    assert read.report.count('rectangles: turned, in a picture whose original_width is not told') == 1
    assert run(capsys, raw, 'label_studio', 'export.json')[0] == 0
    assert told(Database(raw.parent/'out', 100), 0)[1] == dict(cup=[10, 5, 30, 25], table=[0, 20, 100, 50])


def test_label_studio_joins_exports_of_several_projects(tmp_path):
    "Both number their tasks and name their regions alike."
    other = box('b', 'shelf', 0, 40, 200, 100)
    read = read_label_studio(dict(
        train=written(tmp_path/'a.json', [task(1, 'a.jpg', [CUP, TABLE, arrow('a', 'b', 'on')])]),
        test=written(tmp_path/'b.json', [task(1, 'b.jpg', [CUP, other, arrow('a', 'b', 'in')]),
                                         task(2, 'c.jpg', [], split='val')])))
    assert [file for _, file, _ in read] == ['a.jpg', 'b.jpg', 'c.jpg']
    assert list(read.splits.values()) == ['train', 'test', 'val']
    assert read.vocabulary.objects == ('cup', 'table', 'shelf') and read.vocabulary.predicates == ('on', 'in')


NAN = float('nan')


@pytest.mark.parametrize('result, kind', [
    (box('z', '', 0, 0, 9, 9) | dict(value=dict(x=1, y=2, width=3, rectanglelabels=['cup'])),
     "rectangles: no 'height'"),
    (box('z', 'cup', 0, 0, 9, 9, rotation='x'), 'rectangles: rotation is not 1 numbers'),
    (box('z', '', 0, 0, 9, 9), 'rectangles: a name is not printable text'),
    (box('z', 'cup', NAN, 0, 9, 9), 'not finite'),
    (box('z', 'cup', 0, 0, 9, 0), 'boxes without area'), (box('z', 'cup', 300, 0, 400, 9), 'outside of their picture'),
    (dict(type='choices', id='a', value=dict(choices=['good'])), 'results of type choices: left out'),
    (dict(type='rectanglelabels', value={}), "result: no 'id'"), ('x', 'result: a record of another kind'),
    (arrow('a', 'q', 'on'), 'relations: no such object'), (arrow('a', 'a', 'on'), 'from an object to itself'),
    (arrow('a', 'b'), 'relations: without a label'), (arrow('a', 'b', 'on', direction=['left']), 'of another kind'),
    (arrow('a', 'b') | dict(labels='on'), 'relations: labels are no list'),
    (dict(type='relation', from_id='a'), "no 'to_id'"),
    (box('z', 'cup', 0, 0, 9, 9, original_width=W + 1), 'tasks: results of pictures of several sizes'),
    (box('z', 'cup', 0, 0, 9, 9, original_height=None), 'tasks: width and height are not whole numbers')])
def test_label_studio_counts_what_it_cannot_take(tmp_path, result, kind):
    "The rest of the picture, or of the file, stays; strict reading names the record."
    good = [CUP, TABLE, arrow('a', 'b', 'on')]
    path = written(tmp_path/'e.json', [task(1, '1.jpg', good), task(2, '2.jpg', [*good, result])])
    read = read_label_studio(path)
    found = [name for name in read.report.found if kind in name]
    assert len(found) == 1 and read.report.count(found[0]) == 1
    assert len(read.images[1][1].relations) == 1
    if not kind.startswith('tasks'): assert len(read.images[2][1].relations) == 1
    if 'results of type' not in kind:
        with pytest.raises(ValueError, match='e.json: .*Fix it, or read with strict=False'):
            read_label_studio(path, strict=True)


@pytest.mark.parametrize('data, why', [
    (dict(image=['a.jpg', 'b.jpg']), 'several pictures in one task'), (dict(image=3), 'the file name is not text'),
    (dict(image='data:image/png;base64,AAAA'), 'the picture is within the task'), (dict(), "data has no 'image'"),
    (dict(a='a.jpg', b='b.png'), "data has no 'image'"), (None, 'a record of another kind')])
def test_label_studio_needs_one_picture_for_each_task(tmp_path, data, why):
    wrong = task(2, '', [CUP]) | dict(data=data)
    path = written(tmp_path/'e.json', [task(1, '1.jpg', [CUP, TABLE, arrow('a', 'b', 'on')]), wrong])
    read = read_label_studio(path)
    assert len(read) == 1 and [name for name in read.report.found if why in name]


def test_label_studio_says_what_another_export_is(raw, capsys):
    for record in ([dict(id=1, image='a.jpg', label=[])], dict(images=[], annotations=[], categories=[]), []):
        written(raw/'export.json', record)
        status, said = run(capsys, raw, 'label_studio', 'export.json', steps=('check',))
        assert status == 1 and 'export.json is not a list of tasks with data; JSON-MIN, COCO and CSV' in said
    written(raw/'export.json', [task(1, '1.jpg', [CUP, TABLE, arrow('a', 'b')])])
    status, said = run(capsys, raw, 'label_studio', 'export.json', steps=('check',))
    assert status == 1 and 'at least one of predicates. While it was read: 1 x relations: without a label' in said


@pytest.mark.parametrize('angle', [0, 30, 90, 135, 200, 315])
def test_a_turned_rectangle_lies_in_its_upright_box(tmp_path, angle):
    "Points along the sides of the turned rectangle touch all four sides of the box, and none lies outside."
    x, y, w, h = 100, 50, 30, 12
    turn = math.radians(angle)
    points = [(x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn))
              for u, v in ((0, 0), (w / 2, 0), (w, 0), (w, h / 2), (w, h), (0, h), (w / 3, h / 3))]
    record = [task(1, '1.jpg', [CUP, box('b', 'book', x, y, x + w, y + h, rotation=angle), arrow('a', 'b', 'near')])]
    read = read_label_studio(written(tmp_path/'e.json', record))
    bounds = [f(p[k] for p in points) for f in (min, max) for k in (0, 1)]
    assert read.images[1][1].boxes[1].tolist() == pytest.approx(bounds, abs=1e-4)
    assert read.report.count('turned rectangles: the upright box around them is taken') == (angle > 0)


def places(value, path=()):
    "The path of every value within a JSON value."
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner: yield from places(one, (*path, key))


def spoilt(record, path, value):
    "A copy of `record` with `value` at `path`."
    made = json.loads(json.dumps(record))
    if not path: return value
    at = made
    for key in path[:-1]: at = at[key]
    at[path[-1]] = value
    return made


NONSENSE = [None, True, -1, 2.5, NAN, float('inf'), 10**400, '', 'x', [], {}, [1], {'x': 1}, '\ud800', [[]]]


@pytest.mark.parametrize('kind', ['vrd', 'label_studio', 'objects.json'])
def test_nonsense_anywhere_is_counted_or_one_error(raw, kind):
    """Every value of a good file, one after the other, is replaced: the rest is read, and is sound,
    or one line names the file."""
    vrd(raw)
    for file in ('1.jpg', '2 b.jpg'): put(raw/file)
    sources, good = open_sources(raw), json.loads((raw/'annotations_train.json').read_text())
    if kind == 'objects.json': good, path = ['person', 'horse', 'tree'], raw/kind
    elif kind == 'vrd': path = raw/'annotations_train.json'
    else:
        path = raw/'export.json'
        good = [task(1, '1.jpg', [CUP, TABLE, arrow('a', 'b', 'on', direction='bi')]), task(2, '2.jpg', [CUP], [TABLE])]
    def read():
        if kind == 'label_studio': return read_label_studio(path)
        return read_vrd(raw/'annotations_train.json', sources)
    counted = refused = 0
    for i, place in enumerate(places(good)):
        for value in NONSENSE[i % 3::3]:
            path.write_text(json.dumps(spoilt(good, place, value)))
            try: annotations = read()
            except ValueError as error:
                assert str(raw) in str(error) and '\n' not in str(error), (place, value)
                refused += 1
                continue
            counted += bool(annotations.report.found)
            for _, _, graph in annotations:
                bounds = [*graph.size[::-1]] * 2 if graph.size else [1] * 4
                assert all(0 <= side <= bound for box in graph.boxes.tolist() for side, bound in zip(box, bounds))
    assert counted and refused
