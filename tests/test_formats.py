"""Annotations of other people: whatever is in them, what comes out is a sound database, and what
was lost is told."""
import csv
import json
import math
import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stdg.datasets.annotations import image_number
from stdg.datasets.coco import read_own, scaled_boxes, to_coco, write_database
from stdg.datasets.public import read_gqa, read_open_images, read_psg
from stdg.datasets.visual_genome import Database, write_images
from stdg.graph import SceneGraph, Vocabulary
from stdg.io.files import write_json
from stdg.testing import toy_database

SIZES = (64, 96)


def listing_of(rows):
    image_ids, heights, widths = np.array(rows).T
    return SimpleNamespace(image_ids=image_ids, heights=heights, widths=widths)


def database_of(folder, rows, annotations):
    "The database of `annotations` on pictures of `rows` (id, height, width), at both sizes."
    summary = write_database(folder, listing_of(rows), annotations, annotations.vocabulary,
                             annotations.splits, SIZES)
    for size in SIZES:
        records = []
        for i, *shape in rows:
            scaled = [max(int(side * size / max(shape)), 1) for side in shape]
            records.append(dict(image=np.zeros((*scaled, 3), np.uint8), image_id=i % 2**31))
        write_images(folder, records, len(rows), size)
    return summary, [Database(folder, size) for size in SIZES]


def same(a, b):
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y))
               for x, y in zip(vars(a).values(), vars(b).values()))


def messy(seed):
    """A file of two to four pictures with thirty objects and thirty relations, a tenth of all
    values being nonsense."""
    rng = random.Random(seed)
    nonsense = [math.nan, math.inf, 1e308, 'x', None, -1, 2.5, True, [], {}, 10**400]
    def spoilt(value): return rng.choice(nonsense) if rng.random() < .03 else value
    shapes = [(rng.randint(1, 700), rng.randint(1, 700)) for _ in range(rng.randint(2, 4))]
    def box(h, w):
        "Inside, across the border or far outside; now and then of half a pixel or without area."
        x, y = rng.uniform(-.2, 1.1) * w, rng.uniform(-.2, 1.1) * h
        width, height = rng.choice([0, .5, w / 3, w]), rng.choice([-2, .5, h / 3, h])
        return [spoilt(v) for v in (x, y, width, height)]
    def thing(i):
        image = rng.randrange(len(shapes))
        return spoilt(dict(id=spoilt(i), image_id=spoilt(image),
                           category_id=spoilt(rng.randrange(3)), bbox=spoilt(box(*shapes[image]))))
    def edge(_):
        return spoilt(dict(subject_id=spoilt(rng.randrange(32)), object_id=spoilt(rng.randrange(32)),
                           predicate_id=spoilt(rng.randrange(3))))
    good = dict(id='good', image_id=0, category_id=0, bbox=[0, 0, .25, .5])
    return shapes, dict(images=[dict(id=i, file_name=f'{i}.jpg', width=w, height=h)
                                for i, (h, w) in enumerate(shapes)],
                        annotations=[good, *map(thing, range(30))],
                        categories=[dict(id=i, name=f'thing {i}') for i in range(3)],
                        predicates=[dict(id=i, name=f'does {i}') for i in range(3)],
                        relations=[*map(edge, range(30))])


@pytest.mark.parametrize('seed', range(25))
def test_any_file_becomes_a_sound_database(tmp_path, seed):
    """No box leaves its picture, every relation joins objects of its picture, and nothing
    disappears uncounted."""
    shapes, record = messy(seed)
    (tmp_path/'own.json').write_text(json.dumps(record))
    own = read_own(tmp_path/'own.json')
    kept = sum(len(g) for _, _, g in own), sum(len(g.relations) for _, _, g in own)
    def lost(*starts):
        return sum(e['count'] for kind, e in own.report.found.items() if kind.startswith(starts) and 'cut' not in kind)
    assert kept[0] + lost('annotations', 'boxes') == 31 and kept[0] > 5
    assert kept[1] + lost('relations') == 30
    for _, _, g in own:
        assert (g.boxes >= 0).all() and (g.boxes[:, 2:] <= torch.tensor(g.size[::-1])).all()
        assert (g.boxes[:, 2:] >= g.boxes[:, :2]).all()
        assert (g.relations[:, 0] != g.relations[:, 1]).all()
    rows = [(i, h, w) for i, (h, w) in enumerate(shapes)]
    summary, databases = database_of(tmp_path/'db', rows, own)
    assert (summary['objects'], summary['relations']) == kept
    for database in databases:  # opening it has checked that relations stay within their pictures
        for row, (_, _, g) in enumerate(own):
            read = database.graph(row)
            assert read.labels.tolist() == g.labels.tolist()
            assert read.relations.tolist() == g.relations.tolist()
            assert (read.boxes >= 0).all()
            assert (read.boxes[:, 2:] <= torch.tensor(read.size[::-1])).all()
            assert (read.boxes[:, 2:] > read.boxes[:, :2]).all()


def own_record(n=2, **changes):
    images = [dict(id=i, file_name=f'{i}.jpg', width=200, height=100) for i in range(n)]
    boxes = [dict(id=10 * i + k, image_id=i, category_id=k, bbox=[20 * k, 10, 30, 40])
             for i in range(n) for k in (0, 1)]
    relations = [dict(subject_id=10 * i, object_id=10 * i + 1, predicate_id=0) for i in range(n)]
    return dict(dict(images=images, annotations=boxes,
                     categories=[dict(id=0, name='cup'), dict(id=1, name='table')],
                     predicates=[dict(id=0, name='on')], relations=relations), **changes)


def test_file_cut_anywhere_is_refused(tmp_path):
    text = json.dumps(own_record())
    for end in range(0, len(text) - 1, 7):
        (tmp_path/'cut.json').write_text(text[:end])
        with pytest.raises(ValueError, match='cut.json is not whole JSON'):
            read_own(tmp_path/'cut.json')


@pytest.mark.parametrize('record', [[], 5, None, {}, own_record(images={}), own_record(relations=None)])
def test_other_json_is_refused(tmp_path, record):
    write_json(tmp_path/'other.json', record)
    with pytest.raises(ValueError, match="other.json has no list '"):
        read_own(tmp_path/'other.json')


def test_names_of_one_class_are_joined_and_told(tmp_path):
    record = own_record(categories=[dict(id=0, name='Caf\u00e9'), dict(id=1, name='cafe\u0301 '),
                                    dict(id=2, name='<b>\u8336\u7897</b>')],
                        predicates=[dict(id=0, name='On'), dict(id=1, name='on')])
    write_json(tmp_path/'own.json', record)
    own = read_own(tmp_path/'own.json')
    assert own.vocabulary == Vocabulary(['Caf\u00e9', '<b>\u8336\u7897</b>'], ['On'])
    assert own.images[0][1].labels.tolist() == [0, 0]
    assert {kind: e['count'] for kind, e in own.report.found.items()} == {
        'class names that differ only in case are one': 1, 'predicate names that differ only in case are one': 1,
        'splits drawn by a seed, since no image has one': 2}
    assert database_of(tmp_path/'db', [(0, 100, 200)], own)[1][0].vocabulary == own.vocabulary


def test_report_names_the_first_records_only(tmp_path):
    relations = [dict(subject_id=0, object_id=99, predicate_id=0)] * 500
    write_json(tmp_path/'own.json', own_record(relations=relations))
    report = read_own(tmp_path/'own.json').report
    entry = report.found['relations: no such object, or it was left out']
    assert entry['count'] == 500 and len(entry['first']) == 5
    assert 'relations[0]' in entry['first'][0] and '99' in entry['first'][0]


def test_text_ids_and_a_split_that_is_lacking(tmp_path):
    record = own_record()
    for r, split in zip(record['images'], ('test', None)):
        r.update(id=f'img-{r["id"]}', split=split)
    for r in record['annotations']: r['image_id'] = f'img-{r["image_id"]}'
    write_json(tmp_path/'own.json', record)
    own = read_own(tmp_path/'own.json')
    assert own.splits == {image_number('img-0'): 'test', image_number('img-1'): 'train'}
    assert own.report.count("images without a split, while others have one: taken to 'train'") == 1
    assert [len(g.relations) for _, _, g in own] == [1, 1]


def test_image_numbers_fit_the_format_and_are_steady():
    keys = [f'{k:016x}' for k in range(0, 2**64, 2**64 // 5000)]
    for k in range(5000): keys += [str(k), f'n{k}', 2**30 + k]
    found = [image_number(key) for key in keys]
    assert min(found) == 0 and max(found) < 2**31 and len(set(found)) > len(keys) - 5
    assert image_number('n161313') == 1277601968


def test_two_text_ids_of_one_hash_stay_apart(tmp_path):
    seen = {}
    pair = next((seen[n], k) for k in (f'photo {i}' for i in range(300_000))
                if seen.setdefault(n := image_number(k), k) != k)
    record = own_record()
    for r in record['images']: r['id'] = pair[r['id']]
    for r in record['annotations']: r['image_id'] = pair[r['image_id']]
    record['annotations'][0]['bbox'] = [1, 1, 2, 2]
    write_json(tmp_path/'own.json', record)
    own = read_own(tmp_path/'own.json', strict=True)
    first = image_number(pair[0])
    assert list(own.images) == [first, first + 1] and set(own.splits) == set(own.images)
    assert [file for _, file, _ in own] == ['0.jpg', '1.jpg']
    assert own.images[first][1].boxes[0].tolist() == [1, 1, 3, 3]
    assert own.images[first + 1][1].boxes[0].tolist() == [0, 10, 30, 50]


def test_rooms_go_out_and_come_back(tmp_path):
    """Non-square pictures, Visual Genome's vocabulary, all three splits, at odd sizes: equal after
    a round trip."""
    rng, vocabulary = np.random.default_rng(0), Vocabulary.visual_genome()
    graphs = []
    for k in range(12):
        size = (64, int(rng.integers(9, 65))) if k % 2 else (int(rng.integers(9, 65)), 64)
        corner = rng.integers(0, np.array(size[::-1]) - 4, (6, 2))
        boxes = np.concatenate([corner, np.minimum(corner + rng.integers(1, 30, (6, 2)), size[::-1])], 1)
        labels = rng.integers(0, 150, 6)
        relations = np.stack([rng.integers(0, 3, 4), rng.integers(3, 6, 4), rng.integers(0, 50, 4)], 1)
        graphs.append(SceneGraph(boxes, labels, relations, size))
    records = [dict(image=np.zeros((*g.size, 3), np.uint8), image_id=7 * k) for k, g in enumerate(graphs)]
    database = toy_database(tmp_path/'a', list(zip(graphs, records)), [0, 1, 2] * 4, vocabulary, 64)
    files = [f'pictures/{k}.png' for k in range(12)]
    write_json(tmp_path/'out.json', to_coco(database, files=files))
    own = read_own(tmp_path/'out.json', strict=True)
    _, (again, _) = database_of(tmp_path/'b', [(7 * k, *g.size) for k, g in enumerate(graphs)], own)
    assert again.vocabulary == vocabulary and own.images[7][0] == 'pictures/1.png'
    assert all(same(again.graph(k), g) for k, g in enumerate(graphs))
    for split in ('train', 'val', 'test'):
        assert again.indices(split).tolist() == database.indices(split).tolist()


def test_boxes_follow_the_pixels():
    "A picture of 640 x 427 on 512: the factor is .8 and the height 341 (spec 1.2)."
    boxes = [[0, 0, 640, 427], [639.5, 426.5, 640, 427], [100, 50, 201, 102]]
    graph = SceneGraph(boxes, [0, 0, 0], [], (427, 640))
    assert scaled_boxes(graph, 512).tolist() == [[0, 0, 512, 341], [511, 340, 512, 341], [80, 40, 161, 82]]


def test_duplicate_annotation_of_listing_and_order(tmp_path):
    write_json(tmp_path/'own.json', own_record(4))
    own = read_own(tmp_path/'own.json')
    rows = [(3, 100, 200), (9, 50, 50), (0, 100, 200), (1, 200, 100)]
    summary, (database, _) = database_of(tmp_path/'db', rows, own)
    assert database.relation_counts().tolist() == [1, 0, 1, 0] and summary['images'] == 4
    problems = {kind[:25]: (e['count'], e['first']) for kind, e in summary['problems'].items()}
    assert problems == {'pictures without annotati': (1, ['image 9']),
                        'pictures of another size ': (1, ['image 1: 100 x 200, annotated as 200 x 100']),
                        'annotated images whose pi': (1, ['image 2'])}


PSG = dict(thing_classes=['cup'], stuff_classes=['table'], predicate_classes=['on'],
           test_image_ids=[])
PICTURE = dict(image_id='1', file_name='a.jpg', height=50, width=60,
               annotations=[dict(bbox=[0, 0, 9, 9], category_id=0),
                            dict(bbox=[5, 5, 20, 20], category_id=1)], relations=[[0, 1, 0]])
TRUTH = SceneGraph([[0, 0, 9, 9], [5, 5, 20, 20]], [0, 1], [[0, 1, 0]], (50, 60))


@pytest.mark.parametrize('change', [dict(image_id=None), dict(file_name=None), dict(height='50'),
                                    dict(height=0), dict(annotations=None), dict(annotations=5),
                                    dict(relations=3), None, [], 'text'])
def test_psg_picture_of_another_kind_is_left_out(tmp_path, change):
    bad = {**PICTURE, 'image_id': '2', **change} if isinstance(change, dict) else change
    write_json(tmp_path/'psg.json', dict(PSG, data=[bad, PICTURE]))
    read = read_psg(tmp_path/'psg.json')
    assert same(read.images[1][1], TRUTH)
    assert sum(e['count'] for e in read.report.found.values()) == 1
    with pytest.raises(ValueError, match=r'psg.json: data: .*data\[0\]'):
        read_psg(tmp_path/'psg.json', strict=True)


@pytest.mark.parametrize('change',
                         [dict(bbox=[0, 0, 9]), dict(bbox=None), dict(bbox=['a', 0, 9, 9]),
                          dict(category_id=2), dict(category_id=-1), dict(category_id='0'),
                          dict(category_id=None), dict(bbox_mode=4)])
def test_psg_object_of_another_kind_is_left_out(tmp_path, change):
    bad = dict(bbox=[1, 1, 2, 2], category_id=0) | change
    picture = dict(PICTURE, annotations=[*PICTURE['annotations'], bad],
                   relations=[[0, 1, 0], [2, 1, 0], [0], [0, 1, 9], None])
    write_json(tmp_path/'psg.json', dict(PSG, data=[picture]))
    read = read_psg(tmp_path/'psg.json')
    assert same(read.images[1][1], TRUTH)
    assert sum(e['count'] for e in read.report.found.values()) == 5


def test_gqa_twice_the_same_picture_and_other_kinds(tmp_path):
    scene = dict(width=60, height=50,
                 objects={'a': dict(name='cup', x=0, y=0, w=9, h=9,
                                    relations=[dict(name='on', object='b'), dict(name='on'), 5,
                                               dict(name=7, object='b')]),
                          'b': dict(name='table', x=0, y=9, w=30, h=30)})
    write_json(tmp_path/'train.json',
               {'1': scene, '2': None, '3': dict(width=5),
                'n4': dict(scene, objects=dict(a=5, b=dict(name='cup', x=0, y=0, w=None, h=4)))})
    write_json(tmp_path/'val.json', {'1': scene, '5': dict(width=5, height=5, objects={})})
    read = read_gqa(dict(train=tmp_path/'train.json', test=tmp_path/'val.json'))
    assert read.splits == {1: 'train', image_number('n4'): 'train', 5: 'test'}
    assert read.report.count('test: an id twice') == 1
    assert read.images[1][1].relations.tolist() == [[0, 1, 0]] and len(read.images[5][1]) == 0


def test_gqa_keeps_the_most_common_names(tmp_path):
    def thing(name, *edges):
        return dict(name=name, x=0, y=0, w=9, h=9,
                    relations=[dict(name=n, object=o) for n, o in edges])
    objects = dict(a=thing('table'), b=thing('shoe', ('by', 'c')), c=thing('cup', ('on', 'a'), ('by', 'a')),
                   d=thing('cup', ('on', 'a')), e=thing('table'))
    write_json(tmp_path/'gqa.json', {'1': dict(width=60, height=50, objects=objects)})
    read = read_gqa(dict(train=tmp_path/'gqa.json'), most=(2, 1))
    _, graph = read.images[1]
    assert read.vocabulary == Vocabulary(['cup', 'table'], ['on'])
    assert graph.labels.tolist() == [1, 0, 0, 1]
    assert graph.relations.tolist() == [[1, 0, 0], [2, 0, 0]]
    assert {kind: e['count'] for kind, e in read.report.found.items()} == {
        'objects of rarer classes': 1, 'relations of an object that was left out': 1,
        'relations of rarer predicates': 1}


def test_streams_hold_graphs_and_not_text(tmp_path):
    """A file of 12 MB, nearly all of it attributes that are not used, is read within a tenth of
    that."""
    thing = dict(name='cup', x=0, y=0, w=9, h=9, attributes=['x' * 40_000],
                 relations=[dict(name='on', object='b')])
    scene = dict(width=60, height=50, objects=dict(a=thing, b=dict(thing, relations=[])))
    write_json(tmp_path/'gqa.json', {str(i): scene for i in range(150)})
    data = [dict(PICTURE, image_id=str(i), segments_info=['x' * 80_000]) for i in range(150)]
    write_json(tmp_path/'psg.json', dict(PSG, data=data))
    del data
    for name, read in (('gqa', lambda path: read_gqa(dict(train=path))), ('psg', read_psg)):
        assert (tmp_path/f'{name}.json').stat().st_size > 12e6
        tracemalloc.start()
        assert len(read(tmp_path/f'{name}.json')) == 150
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2e6, (name, peak)


HEADER = ['ImageID', 'LabelName1', 'LabelName2', 'XMin1', 'XMax1', 'YMin1', 'YMax1', 'XMin2', 'XMax2', 'YMin2',
          'YMax2', 'RelationshipLabel']


def test_open_images_objects_are_told_apart_by_box_and_class(tmp_path):
    boxes = ['.1', '.3', '.2', '.4'], ['.5', '.7', '.6', '.9']
    rows = [['f1', '/m/cup', '/m/table', *boxes[0], *boxes[1], 'on'],
            ['f1', '/m/mug', '/m/table', *boxes[0], *boxes[1], 'on'],
            ['f1', '/m/cup', '/m/table', '0.10', *boxes[0][1:], *boxes[1], 'at'],
            ['f2', '/m/cup', '/m/table', *boxes[0], *boxes[1], 'on'],
            ['f1', '/m/cup', '/m/table', *boxes[0], '.5', '.7', 'nan', '.9', 'on'],
            ['f1', '/m/cup', '/m/table', *boxes[0], '.5', '.5', '.2', '.9', 'on'], ['f3', '/m/cup']]
    with open(tmp_path/'vrd.csv', 'w', newline='') as file:
        csv.writer(file).writerows([HEADER, *rows])
    classes = '/m/cup,Cup\n/m/mug,Mug\n/m/table,"Table, round"\n/m/never,Never\n\n'
    (tmp_path/'classes.csv').write_text(classes)
    read = read_open_images(dict(train=tmp_path/'vrd.csv'), tmp_path/'classes.csv')
    assert read.vocabulary == Vocabulary(['Cup', 'Mug', 'Table, round'], ['at', 'on'])
    assert len(read) == 2
    graph, count = read.images[image_number('f1')][1], read.report.count
    assert graph.labels.tolist() == [0, 2, 1] and graph.size is None
    assert graph.relations.tolist() == [[0, 1, 1], [2, 1, 1], [0, 1, 0]]
    assert count('boxes that are not finite') == count('boxes without area') == 1
    assert count('relations of an object that was left out') == 2
    summary, (database, _) = database_of(tmp_path/'db', [(image_number('f1'), 100, 200)], read)
    assert database.graph(0).boxes.tolist() == [[6, 6, 19, 13], [32, 19, 45, 29], [6, 6, 19, 13]]
    assert summary['relations'] == 3


def test_open_images_binary_file_is_refused(tmp_path):
    (tmp_path/'classes.csv').write_text('/m/cup,Cup\n')
    (tmp_path/'vrd.csv').write_bytes(','.join(HEADER).encode() + b'\n\xff\xfe\x00')
    with pytest.raises(ValueError, match='vrd.csv is not a CSV file'):
        read_open_images(dict(train=tmp_path/'vrd.csv'), tmp_path/'classes.csv')
