"""What people give: files from Windows, from a Mac, from pandas; ids as text or 1.0; splits, boxes
and cameras in other conventions; several files. It is read, or the error names the reason."""
import csv
import gzip
import json
import math
import os
import stat
import unicodedata
import zipfile

import numpy as np
import pytest
from sample_pictures import saved, small, zipped

from stdg.datasets.annotations import image_number
from stdg.datasets.coco import read_own
from stdg.datasets.listing import check_pictures, read_listing
from stdg.datasets.public import read_gqa, read_open_images, read_psg
from stdg.datasets.visual_genome import Database
from stdg.io.archives import open_sources
from stdg.io.files import write_json
from stdg.prepare import main, prepare

W, H, N = 40, 30, 4
STEPS = 'check', 'database', 'images', 'statistics'


def picture(i): return saved(small(i, (W, H)))

def put(folder, *names):
    "Pictures under `names` in `folder`."
    for i, name in enumerate(names):
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))

def own(n=N, **images):
    "A file of `n` pictures 1.jpg, 2.jpg ..., each with a cup on a table; `images` has further fields of them."
    def image(i): return dict(id=i, file_name=f'{i}.jpg', width=W, height=H, split='train')
    return dict(images=[image(i) | {name: field(i) for name, field in images.items()} for i in range(1, n + 1)],
                annotations=[dict(id=10 * i + k, image_id=i, category_id=k, bbox=[5 * k, 8, 10, 12])
                             for i in range(1, n + 1) for k in (1, 2)],
                categories=[dict(id=1, name='cup'), dict(id=2, name='table')], predicates=[dict(id=1, name='on')],
                relations=[dict(subject_id=10 * i + 1, object_id=10 * i + 2, predicate_id=1)
                           for i in range(1, n + 1)])

def written(folder, record, name='a.json'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(json.dumps(record))
    return folder/name

@pytest.fixture
def raw(tmp_path):
    "A folder with four pictures."
    put(tmp_path/'raw', *(f'{i}.jpg' for i in range(1, N + 1)))
    return tmp_path/'raw'

def run(capsys, raw, *options, steps=('check', 'database'), kind='own', annotations=('a.json',)):
    "Exit status and all that is said; what a mistake of a person brings is one line."
    command = [*steps, '--raw', raw, '--folder', raw.parent/'out', '--size', 64, '--depth', 'none', '--kind', kind]
    if annotations: command += ['--annotations', *annotations]
    try: main([str(part) for part in (*command, *options)])
    except SystemExit as stopped:
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line and '%|' not in line]
        assert len(lines) == 1 and 'Traceback' not in said.err, said.err
        return stopped.code, said.out + lines[0]
    said = capsys.readouterr()
    return 0, said.out

def amounts(raw):
    database = Database(raw.parent/'out', 64)
    return len(database), int(database.relation_counts().sum()), database.vocabulary.objects


# Text

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_text_of_any_tool(raw, encoding, capsys):
    record = own()
    record['categories'][0]['name'] = 'caf\u00e9 \u5b57'
    text = json.dumps(record, ensure_ascii=False, indent=1).replace('\n', '\r\n')
    (raw/'a.json').write_bytes(text.encode(encoding))
    status, said = run(capsys, raw, steps=('check', 'database', 'images'))
    assert status == 0 and '4 images, 8 objects, 4 relations' in said and '4 of 4 pictures are sound' in said
    assert amounts(raw) == (4, 4, ('caf\u00e9 \u5b57', 'table'))


@pytest.mark.parametrize('data, why', [
    (b'', 'it is empty'), (b'  \n', 'it is empty'), (gzip.compress(b'{}', mtime=0), 'it is packed: unpack it first'),
    (b'PK\3\4', 'unpack it first'), (b'{"images": ["caf\xe9"]}', "can't decode byte 0xe9.*save it as UTF-8"),
    (b'{"images": []}\n{"images": []}\n', 'are these JSON lines'), ('{"a": 1}'.encode('utf-16')[:-1], 'truncated'),
    (b'{"images": [', 'is not whole JSON')])
def test_what_is_no_json_is_named(raw, data, why, capsys):
    (raw/'a.json').write_bytes(data)
    status, said = run(capsys, raw)
    assert status and 'a.json is not whole JSON' in said
    with pytest.raises(ValueError, match=why): read_own(raw/'a.json')


# Ids

def test_ids_are_one_whatever_they_are_written_as(raw, capsys):
    record, forms = own(), [lambda i: i, float, str, lambda i: f'{i}.0']
    for k, rows in enumerate((record['annotations'], record['relations'])):
        for i, row in enumerate(rows):
            for j, key in enumerate([key for key in row if key.endswith('id')]):
                row[key] = forms[(i + j + k) % 4](row[key])
    written(raw, record)
    status, said = run(capsys, raw, steps=('check', 'database', 'images'))
    assert status == 0 and 'nothing was wrong' in said and amounts(raw)[:2] == (4, 4)
    same = {form: read_own(written(raw, own(id=form), 'b.json')) for form in forms[:3]}
    assert {tuple(read.images) for read in same.values()} == {(1, 2, 3, 4)}


@pytest.mark.parametrize('wrong', [1.5, None, True, [1], '', math.nan])
def test_the_error_carries_what_was_dropped_before(raw, wrong, capsys):
    "All annotations are dropped, and then all pictures: the reason is in the line that ends the run."
    record = own()
    for row in record['annotations']: row['id'] = wrong
    written(raw, record)
    status, said = run(capsys, raw)
    assert status == 1 and 'none of the 4 pictures has an annotated object' in said
    assert '8 x annotations: an id is neither a whole number nor text: annotations[0]' in said
    written(raw, own(id=lambda i: wrong))
    status, said = run(capsys, raw)
    assert status == 1 and 'it has no picture that can be taken' in said and 'images[0]' in said
    assert '4 x images: an id is neither a whole number nor text' in said and 'a.json' in said


def test_every_reader_says_what_it_dropped(tmp_path):
    "An error that follows dropped records names counts and the first record of each kind, in every format."
    bad = own()
    for row in bad['predicates']: row['name'] = ' '
    with pytest.raises(ValueError, match=r'at least one of predicates.*1 x predicates: a name is not printable text: '
                                         r'predicates\[0\].*4 x relations: an id that is not among'):
        read_own(written(tmp_path, bad))
    shapes = dict(psg_record(), data=[dict(image_id=1, file_name='1.jpg', height='x', width=W)] * 3)
    with pytest.raises(ValueError, match=r'no picture that can be taken.*3 x data: width and height.*data\[0\]'):
        read_psg(written(tmp_path, shapes))
    with pytest.raises(ValueError, match='no picture that can be taken'): read_gqa(dict(train=written(tmp_path, [1])))
    with pytest.raises(ValueError, match=r"no picture that can be taken.*2 x train: no 'height'.*train\[0\]"):
        read_gqa(dict(train=written(tmp_path, {'1': {}, '2': {}})))
    rows = [['1', '/m/01', '/m/09', *'.1 .2 .1 .2 .5 .9 .5 .9'.split(), 'on']] * 2
    vrd, classes = open_images(tmp_path, rows)
    with pytest.raises(ValueError, match=r'no picture that can be taken.*2 x .*a label without a name: .*\[0\]'):
        read_open_images(dict(train=vrd), classes)


def test_one_odd_record_does_not_end_the_rest(tmp_path):
    odd = [None, 5, [], 'text', {}, dict(id=10 ** 17), dict(id='\ud800', file_name='\ud800.jpg', width=W, height=H),
           dict(id=7, file_name='7.jpg', width=W, height=H, split=[1]), dict(id=8, file_name={}, width=W, height=H)]
    record = own()
    for name in record: record[name] = [*odd, *record[name], *odd]
    read = read_own(written(tmp_path, record))
    graphs = [graph for i, _, graph in read if 1 <= i <= N]
    assert [len(graph) for graph in graphs] == [2] * N and [len(graph.relations) for graph in graphs] == [1] * N
    scene = dict(width=W, height=H, objects={'a': thing('cup', ('on', 'b')), 'b': thing('table'), 'c': 5, 'd': None,
                                             'e': dict(thing('cup'), relations=7), 'f': {}})
    read = read_gqa(dict(train=written(tmp_path, {'1': scene, **{f'x{i}': row for i, row in enumerate(odd)}})))
    assert len(read.images[1][1]) == 3 and read.images[1][1].relations.tolist() == [[0, 1, 0]]
    assert read.report.count('objects: relations are no list') == 1
    psg = psg_record()
    psg['data'] += odd
    psg['thing_classes'] += [' ', 7]
    assert len(read_psg(written(tmp_path, psg))) == N


# Objects

def test_crowds_are_left_out_and_counted(tmp_path):
    record, yes = own(), [1, 1., True, '1', 'true']
    crowds = [dict(id=100 + i, image_id=1, category_id=2, bbox=[0, 0, 30, 20], iscrowd=said,
                   segmentation=dict(counts=[5, 9], size=[H, W])) for i, said in enumerate(yes)]
    record['annotations'] += [*crowds, dict(crowds[0], id=200, iscrowd=0, ignore=1), dict(crowds[0], id=201, iscrowd=2)]
    record['annotations'] += [dict(crowds[0], id=210 + i, iscrowd=no) for i, no in enumerate((0, False, None, '0'))]
    record['relations'] += [dict(subject_id=11, object_id=100, predicate_id=1)]
    read = read_own(written(tmp_path, record))
    assert len(read.images[1][1]) == 2 + 4 and read.images[1][1].relations.tolist() == [[0, 1, 0]]
    assert read.report.count('crowds and regions to ignore: left out') == len(yes) + 1
    assert read.report.count('annotations: iscrowd or ignore is neither 0 nor 1') == 1
    assert read.report.count('relations of an object that was left out') == 1
    psg = psg_record()
    for r in psg['data']: r['segments_info'] = [dict(iscrowd=0), dict(iscrowd=1)]
    assert [len(graph) for _, _, graph in read_psg(written(tmp_path, psg))] == [1] * N


def test_boxes_in_other_units_are_noticed(tmp_path, raw, capsys):
    shares = own()
    for row in shares['annotations']: row['bbox'] = [v / s for v, s in zip(row['bbox'], (W, H, W, H))]
    written(raw, shares)
    status, said = run(capsys, raw)
    assert status == 1 and 'most boxes lie within 0 and 1' in said and '8 x objects whose box' in said
    few = own()
    few['annotations'][0]['bbox'] = [.2, .3, .4, .5]
    read = read_own(written(tmp_path, few))
    assert read.report.count('objects whose box lies within 0 and 1: is it in pixels?') == 1
    corners = own()
    for row in corners['annotations']: row['bbox'] = [15, 10, 15 + 12 * (row['id'] % 2 + 1), 28]
    read = read_own(written(tmp_path, corners))
    kind = 'objects whose box looks like x1, y1, x2, y2: x, y, width, height is needed'
    assert read.report.count(kind) == 8 and not read_own(written(tmp_path, own())).report.count(kind)
    outside = own()
    for row in outside['annotations']: row['bbox'] = [5000, 5000, 10, 10]
    written(raw, outside)
    status, said = run(capsys, raw)
    assert status == 1 and '8 x boxes outside of their picture: object 11 of 1.jpg' in said


K = [[100, 0, 20], [0, 90, 15], [0, 0, 1]]

@pytest.mark.parametrize('camera', [
    [100, 90, 20, 15], K, [[*row, 0] for row in K], sum(K, []), np.transpose(K).tolist(), dict(K=K),
    dict(fx=100, fy=90, cx=20, cy=15), dict(width=W, height=H, intrinsic_matrix=np.transpose(K).ravel().tolist()),
    ['100', '90', 20., 15]])
def test_cameras_of_other_tools(tmp_path, camera):
    read = read_own(written(tmp_path, own(camera=lambda i: camera)), strict=True)
    assert read.cameras == {i: [100, 90, 20, 15] for i in range(1, N + 1)}


def test_a_camera_that_is_none_is_named(raw, capsys):
    for camera, why in [([[1, 2], [3, 4]], '4 x images: the camera .* is not 4 numbers'),
                        ([math.nan] * 4, 'finite numbers'),
                        ([[1, 9, 0], [0, 1, 0], [0, 0, 1]], r'is not \[\[fx, 0, cx\]')]:
        written(raw, own(camera=lambda i, camera=camera: camera))
        status, said = run(capsys, raw)
        assert status == 1 and 'no picture that can be taken' in said
        with pytest.raises(ValueError, match=why): read_own(raw/'a.json')


# Splits

def test_splits_as_people_write_them(raw, capsys):
    names = dict(zip(range(1, 5), ('TRAIN', 'Train2017', 'validation', 'Test-dev')))
    written(raw, own(split=names.get))
    status, said = run(capsys, raw)
    assert status == 0 and "4 x split names of another spelling: 'TRAIN' is train" in said
    assert list(read_own(raw/'a.json').splits.values()) == ['train', 'train', 'val', 'test']
    written(raw, own(split=lambda i: ('', None, 'null', 'train')[i - 1]))
    assert set(read_own(raw/'a.json').splits.values()) == {'train'}
    for wrong in ('trian', 3, ['train'], 'trainval'):
        written(raw, own(split=lambda i, wrong=wrong: wrong))
        status, said = run(capsys, raw)
        assert status == 1 and '4 x images: a split other than train, val, test: images[0]' in said


def psg_record(first=1, **changes):
    def image(i):
        return dict(image_id=str(i), file_name=f'val2017/{i}.jpg', height=H, width=W, relations=[[0, 1, 0]],
                    annotations=[dict(bbox=[5 * k, 8, 5 * k + 10, 20], bbox_mode=0, category_id=k) for k in (0, 1)])
    return dict(dict(thing_classes=['cup'], stuff_classes=['table'], predicate_classes=['on'],
                     test_image_ids=[str(first)], data=[image(i) for i in range(first, first + N)]), **changes)

def thing(name, *relations, **changes):
    return dict(dict(name=name, x=2, y=3, w=20, h=18, relations=[dict(name=n, object=o) for n, o in relations]),
                **changes)

def gqa_record(*ids):
    return {str(i): dict(width=W, height=H, objects={'5': thing('cup', ('on', 6)), '6': thing('table')}) for i in ids}

HEADER = ['ImageID', 'LabelName1', 'LabelName2', 'XMin1', 'XMax1', 'YMin1', 'YMax1', 'XMin2', 'XMax2', 'YMin2',
          'YMax2', 'RelationshipLabel']
ROW = ['/m/01', '/m/02', '.1', '.5', '.1', '.5', '.3', '.9', '.4', '.9', 'on']

def open_images(folder, rows, encoding='utf-8', mark=',', name='vrd.csv', classes='class-descriptions-boxable.csv'):
    for path, lines in ((folder/name, [HEADER, *rows]), (folder/classes, [['/m/01', 'Cup'], ['/m/02', 'Table']])):
        with open(path, 'w', newline='', encoding=encoding) as file:
            csv.writer(file, delimiter=mark).writerows(lines)
    return folder/name, folder/classes


MISTAKES = [
    ((), 'annotations, its files, are needed'), (('test=a.json',), 'test without train'),
    (('val=a.json', 'test=b.json'), 'val, test without train'), (('trian=a.json',), "'trian=a.json' names no split"),
    (('train=a.json', 'Training=b.json'), 'train is named twice, for a.json and b.json'),
    (('train=a.json', 'val=a.json'), 'a.json is named twice'), (('a.json', './a.json'), 'a.json is named twice'),
    (('a.json', 'val=b.json'), 'a.json without a split beside val=b.json'), (('none.json',), 'none.json is missing'),
    (('train=a.json', 'val=none.json'), 'none.json is missing'), (('train=',), 'names no split'),
    (('.',), 'is a folder')]

@pytest.mark.parametrize('kind', ['own', 'psg', 'gqa', 'open_images'])
def test_files_are_refused_before_reading(raw, kind, capsys):
    "No file of these is ever opened: they hold nothing, and reading them would be another error."
    for name in 'ab': (raw/f'{name}.json').touch()
    several = (('a.json', 'b.json'), 'a.json, b.json without a split; files of kind')
    for names, why in MISTAKES + [several] * (kind in ('gqa', 'open_images')):
        status, said = run(capsys, raw, kind=kind, annotations=names)
        assert status == 2 and why in said and 'JSON' not in said, names
    assert not (raw.parent/'out').exists()
    status, said = run(capsys, raw, kind='visual_genome')
    assert status == 2 and 'annotations are for another kind' in said


def test_all_files_are_read(raw, tmp_path, capsys):
    "Pictures, objects and classes of each file are counted from 1, and no picture of any file is lost."
    written(raw, own(2, split=lambda i: None))
    second = own(2, file_name=lambda i: f'{i + 2}.jpg', split=lambda i: None)
    second['categories'] = [dict(id=1, name='Table'), dict(id=2, name='lamp')]
    written(raw, second, 'b.json')
    status, said = run(capsys, raw, annotations=('train=a.json', 'VAL=b.json'), steps=('check', 'database', 'images'))
    assert status == 0 and '4 of 4 pictures are sound' in said and '4 images, 8 objects, 4 relations' in said
    assert amounts(raw) == (4, 4, ('cup', 'table', 'lamp'))
    assert Database(raw.parent/'out', 64).indices('val').tolist() == [2, 3]
    written(raw, own(2), 'c.json')  # the same pictures as in a.json
    status, said = run(capsys, raw, annotations=('a.json', 'b.json', 'c.json'))
    assert status == 0 and '2 x pictures that two files have: taken from the first: image 1, 1.jpg' in said
    put(raw, *(f'val2017/{i}.jpg' for i in range(11, 15)))
    for name, first in (('d.json', 1), ('e.json', 11)): written(raw, psg_record(first), name)
    status, said = run(capsys, raw, kind='psg', annotations=('d.json', 'e.json'))
    assert status == 0 and '8 of 8 pictures are sound' in said and '8 images, 16 objects, 8 relations' in said
    assert list(read_psg([raw/'d.json', raw/'e.json']).splits.values()) == ['test', *['train'] * 3] * 2
    read = read_psg(dict(train=raw/'d.json', val=raw/'e.json'))
    assert list(read.splits.values()) == ['test', *['train'] * 3, 'test', *['val'] * 3]
    for name, ids in (('f.json', (1, 2)), ('g.json', (3, 4))): written(raw, gqa_record(*ids), name)
    status, said = run(capsys, raw, kind='gqa', annotations=('train=f.json', 'validation=g.json'))
    assert status == 0 and '4 images, 8 objects, 4 relations' in said
    done = prepare(tmp_path/'again', raw, ('check',), 'gqa', ['train=f.json', 'test=g.json'], progress=False)
    assert '4 of 4 pictures are sound' in done['check']['result']
    status, said = run(capsys, raw, kind='gqa', annotations=('f.json',))
    assert status == 0 and '2 images, 4 objects, 2 relations' in said
    assert prepare(tmp_path/'text', raw, ('check',), 'own', 'a.json', progress=False), 'one file may be a text'


def test_a_split_named_with_a_file_is_that_of_its_pictures(tmp_path):
    first, second = own(2), own(3, file_name=lambda i: f'v{i}.jpg', split=lambda i: ('test', None, '')[i - 1])
    read = read_own(dict(train=written(tmp_path, first), val=written(tmp_path, second, 'b.json')))
    assert list(read.splits.values()) == ['train', 'train', 'test', 'val', 'val']
    assert read.report.count('images in a file for val that name another split, which is taken') == 1
    psg = psg_record()
    del psg['test_image_ids']
    read = read_psg(written(tmp_path, psg))
    assert read.report.count("pictures taken to 'train', since the file has no test_image_ids") == N


def test_streamed_files_of_other_tools(tmp_path):
    "A byte order mark, UTF-16, semicolons, another name of the class file, NaN."
    for encoding in ('utf-8-sig', 'utf-16'):
        (tmp_path/'g.json').write_text(json.dumps(gqa_record(1, 2)), encoding=encoding)
        (tmp_path/'p.json').write_text(json.dumps(psg_record()), encoding=encoding)
        assert len(read_gqa(dict(train=tmp_path/'g.json'))) == 2 and len(read_psg(tmp_path/'p.json')) == N
        for mark in ',;\t':
            read = read_open_images(dict(train=open_images(tmp_path, [['1', *ROW]], encoding, mark)[0]),
                                    tmp_path/'class-descriptions-boxable.csv')
            assert read.vocabulary.objects == ('Cup', 'Table') and len(read) == 1
    (tmp_path/'g.json').write_text('{"1": {"width": NaN}}')
    with pytest.raises(ValueError, match='g.json is not whole JSON .*NaN and Infinity are not JSON: write null'):
        read_gqa(dict(train=tmp_path/'g.json'))
    (tmp_path/'g.json').write_text('{}\n{}\n')
    with pytest.raises(ValueError, match='are these JSON lines'): read_gqa(dict(train=tmp_path/'g.json'))
    vrd, classes = open_images(tmp_path, [['1', *ROW]])
    again, _ = open_images(tmp_path, [['1', *ROW[:-1], 'under'], ['2', *ROW]], name='test.csv')
    read = read_open_images(dict(train=vrd, test=again), classes)
    assert list(read.splits.values()) == ['train', 'test'] and len(read.images[1][1].relations) == 2
    assert read.report.count('rows of a picture that a file of another split has: taken to that one') == 1
    for name in ('g.json', 'p.json', 'vrd.csv'): (tmp_path/name).write_bytes(gzip.compress(b'{}', mtime=0))
    for read in (lambda: read_gqa(dict(train=tmp_path/'g.json')), lambda: read_psg(tmp_path/'p.json'),
                 lambda: read_open_images(dict(train=vrd), classes)):
        with pytest.raises(ValueError, match='is not .*it is packed: unpack it first'): read()
    (tmp_path/'vrd.csv').write_bytes('ImageID;caf\u00e9'.encode('latin-1'))
    with pytest.raises(ValueError, match='vrd.csv is not a CSV file .*save it as UTF-8'):
        read_open_images(dict(train=vrd), classes)
    (tmp_path/'vrd.csv').write_text('')
    with pytest.raises(ValueError, match='vrd.csv has no column ImageID'):
        read_open_images(dict(train=tmp_path/'vrd.csv'), tmp_path/'class-descriptions-boxable.csv')


def test_open_images_with_a_mark_by_command(raw, capsys):
    for split, name in dict(train='1', validation='2', test='3').items():
        open_images(raw, [[name, *ROW]], 'utf-8-sig', name=f'oidv6-{split}-annotations-vrd.csv',
                    classes='oidv7-class-descriptions.csv')
    files = [f'{split}=oidv6-{split}-annotations-vrd.csv' for split in ('train', 'validation', 'test')]
    status, said = run(capsys, raw, kind='open_images', annotations=files)
    assert status == 0 and '3 of 3 pictures are sound' in said and '3 images, 6 objects, 3 relations' in said


# Names of pictures

SPELLINGS = [r'images\{}', r'images\\{}', r'C:\Users\me\images\{}', '/home/me/images/{}', './{}', './images/{}',
             'file:///home/me/{}', 'http://localhost:8080/data/upload/4/{}?token=1', '/data/local-files/?d=images%2F{}']

@pytest.mark.parametrize('form', [*SPELLINGS, 'case', 'escaped', 'decomposed', 'blank'])
@pytest.mark.parametrize('zipped_up', [False, True])
def test_pictures_are_found_by_other_spellings(tmp_path, form, zipped_up):
    there = [f'm\u00fc photo {i}.jpg' for i in range(3)]
    other = dict(case=str.upper, escaped=lambda name: name.replace(' ', '%20').replace('\u00fc', '%C3%BC'),
                 decomposed=lambda name: unicodedata.normalize('NFD', name), blank='{} '.format)
    asked = [other.get(form, form.format)(name) for name in there]
    assert asked != there
    if zipped_up: zipped(tmp_path/'raw.zip', [(f'top/{name}', picture(i)) for i, name in enumerate(there)])
    else: put(tmp_path/'raw', *there)
    sources = open_sources([tmp_path/('raw.zip' if zipped_up else 'raw')])
    report = check_pictures(tmp_path/'db', [(i, name, W, H) for i, name in enumerate(asked)], sources, progress=False)
    assert report['pictures'] == 3 and not report['counts']['missing']
    listing = read_listing(tmp_path/'db')
    assert [listing.file(i).removeprefix('top/') for i in range(3)] == there
    plain = [name.rsplit('/', 1)[-1] == found for name, found in zip(asked, there)]
    assert report['counts']['other_spelling'] == 3 - sum(plain)


def check(folder, files, size=(W, H)):
    report = check_pictures(folder.parent/'db', [(i, file, *size) for i, file in enumerate(files)],
                            open_sources([folder]), progress=False)
    return read_listing(folder.parent/'db').image_ids.tolist(), {k: v for k, v in report['counts'].items() if v}, report


def test_what_is_ambiguous_is_left_out(tmp_path):
    put(tmp_path/'in', 'a/1.jpg', 'b/1.jpg', 'a/2.jpg', 'c/3.jpg', 'P4.jpg', 'p4.JPG')
    assert check(tmp_path/'in', ['1.jpg', '1.jpg', '2.jpg'])[:2] == ([2], dict(ambiguous=2))
    assert check(tmp_path/'in', ['a/1.jpg', 'b/1.jpg', 'A/2.jpg'])[:2] == ([0, 1, 2], {})
    ids, counts, report = check(tmp_path/'in', ['p4.jpg', 'c/3.jpg', 'd/3.jpg'])
    assert (ids, counts) == ([1], dict(ambiguous=2))
    assert 'may be P4.jpg or p4.JPG, which differ: write its folder' in report['problems']['ambiguous'][0]
    assert 'd/3.jpg is not there, and c/3.jpg may be c/3.jpg' in report['problems']['ambiguous'][1]
    assert check(tmp_path/'in', ['x/3.jpg', 'y/3.jpg', 'a/1.jpg'])[:2] == ([2], dict(ambiguous=2))
    (tmp_path/'in'/'b'/'1.jpg').write_bytes((tmp_path/'in'/'a'/'1.jpg').read_bytes())
    assert check(tmp_path/'in', ['1.jpg'])[:2] == ([0], dict(duplicate_file=1)), 'a copy is no riddle'
    (tmp_path/'in'/'b'/'1.jpg').write_bytes(saved(small(9, (20, 20))))
    assert check(tmp_path/'in', ['1.jpg'])[:2] == ([0], dict(duplicate_file=1)), 'only one has the size'
    report = check(tmp_path/'in', ['2.png', 'c/3.jpg'])[2]
    assert report['problems']['missing'] == ['image 0: 2.png (there is a/2.jpg)']
    with pytest.raises(ValueError, match="'ambiguous': 2.*image 0: q/3.jpg is not there, and c/3.jpg may be r/3.jpg"):
        check(tmp_path/'in', ['q/3.jpg', 'r/3.jpg'])


def test_an_archive_beside_what_was_unpacked_from_it(raw, capsys):
    zipped(raw/'PICTURES.ZIP', [(f'top/{i}.jpg', (raw/f'{i}.jpg').read_bytes()) for i in range(1, 5)])
    (raw/'._PICTURES.ZIP').write_bytes(b'of a Mac')
    written(raw, own())
    status, said = run(capsys, raw)
    assert status == 0 and '4 of 4 pictures are sound; 4 duplicate file' in said


def test_what_systems_put_into_archives_is_skipped(tmp_path, capsys):
    members = [('top/', b''), *((f'top/{i}.jpg', picture(i)) for i in range(1, 5))]
    members += [(f'__MACOSX/top/._{i}.jpg', b'\0\5\x16\7') for i in range(1, 5)]
    members += [('top/.DS_Store', b'x'), ('top/Thumbs.db', b'x'), ('__MACOSX/top/._1.jpg', b'twice')]
    zipped((tmp_path/'raw').with_name('raw.zip'), members)
    source, = open_sources([tmp_path/'raw.zip'])
    assert list(source.names()) == [f'top/{i}.jpg' for i in range(1, 5)] and not source.refused
    written(tmp_path/'raw', own())
    (tmp_path/'raw.zip').rename(tmp_path/'raw'/'pictures.zip')
    status, said = run(capsys, tmp_path/'raw')
    assert status == 0 and said.startswith('check: 4 of 4 pictures are sound (')


def test_links_are_named(raw, capsys):
    "A folder or an archive that links to the pictures: the error says so, and not only that all are missing."
    for i in range(1, 5): (raw/f'{i}.jpg').unlink()
    put(raw.parent/'elsewhere', *(f'{i}.jpg' for i in range(1, 5)))
    written(raw, own())
    (raw/'images').symlink_to(raw.parent/'elsewhere')
    status, said = run(capsys, raw)
    assert status == 1 and "'images': it lies outside of the folder. Links are not followed" in said
    (raw/'images').unlink()
    zipped(raw.parent/'far.zip', [(f'{i}.jpg', picture(i)) for i in range(1, 5)])
    (raw/'pictures.zip').symlink_to(raw.parent/'far.zip')
    status, said = run(capsys, raw)
    assert status == 0 and said.startswith('check: 4 of 4 pictures are sound ('), 'a linked archive is opened'
    (raw/'pictures.zip').unlink()
    link = zipfile.ZipInfo('images')
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    zipped(raw/'pictures.zip', [(link, b'/home/me/images')])
    status, said = run(capsys, raw)
    assert status == 1 and "'images': it is a link or a device. Links are not followed" in said
    assert "'missing': 4" in said and 'image 1: 1.jpg' in said


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such names')
def test_names_of_odd_bytes_do_not_end_the_rest(raw, capsys):
    with open(os.fsencode(raw) + b'/\xff.jpg', 'wb') as file: file.write(b'x')
    (raw/'empty.jpg').touch()
    (raw/'dead.jpg').symlink_to('nowhere')
    record = own()
    odd = '\udcff.jpg', 'empty.jpg', 'dead.jpg', 'a\nb.jpg', 'x' * 2000, '%ff%00.jpg', '/', '.'
    for i, name in enumerate(odd, 50):
        record['images'].append(dict(id=i, file_name=name, width=W, height=H, split='train'))
    written(raw, record)
    status, said = run(capsys, raw)
    assert status == 0 and '4 of 12 pictures are sound' in said and '1 unreadable: image 51: empty.jpg' in said


# Visual Genome's own files

def visual_genome(folder, suffix='', packed=False, predicate='lies on'):
    def record(i):
        a, b = [dict(object_id=10 * i + k, x=1 + 15 * k, y=2, w=14, h=20, names=[name])
                for k, name in enumerate(('man', 'shirt'))]
        return (dict(image_id=float(i), width=W, height=float(H)), dict(image_id=i, objects=[a, b]),
                dict(image_id=i, relationships=[dict(predicate=predicate, subject=a, object=b)]))
    for name, rows in zip(('image_data', 'objects', 'relationships'), zip(*map(record, range(1, 5)))):
        text = json.dumps(list(rows))
        if packed: zipped(folder/f'{name}{suffix}.json.zip', [(f'{name}{suffix}.json', text)])
        else: (folder/f'{name}{suffix}.json').write_text(text, encoding='utf-8-sig')


@pytest.mark.parametrize('suffix, packed', [('', False), ('_v1_2', True), ('_v1.4', False)])
def test_visual_genome_by_its_own_names(raw, suffix, packed, capsys):
    visual_genome(raw, suffix, packed)
    (raw/'relationship_alias.txt').write_text('on,lies on\r\n', encoding='utf-8-sig')
    (raw/'object_alias.txt').write_text('man,guy\n', encoding='utf-16')
    status, said = run(capsys, raw, kind='visual_genome', annotations=())
    assert status == 0 and '4 images, 8 objects, 4 relations; aliases were read' in said
    told = json.loads((raw.parent/'out'/'database.json').read_text())['lists']
    assert told['relationship_alias.txt'] == told['object_alias.txt'] == '2 terms'


def test_visual_genome_says_what_was_left_out(raw, capsys):
    visual_genome(raw, predicate='zzz')
    status, said = run(capsys, raw, kind='visual_genome', annotations=(), steps=STEPS)
    assert status == 1 and 'no relation is annotated in the training split' in said
    assert '4 x dropped relations whose predicate is not in the vocabulary' in said
    write_json(raw/'objects.json', [dict(image_id=i, objects=[5]) for i in range(1, 5)])
    write_json(raw/'relationships.json', [dict(image_id=i, relationships=[]) for i in range(1, 5)])
    status, said = run(capsys, raw, '--remake', kind='visual_genome', annotations=())
    assert status == 1 and 'no object is left' in said and '4 x objects that are no objects: image 1: 5' in said


def test_statistics_of_nothing_say_why(raw, capsys):
    record = own()
    for row in record['relations']: row['object_id'] = row['subject_id']
    written(raw, record)
    status, said = run(capsys, raw, steps=STEPS)
    assert status == 1 and '4 x relations: from an object to itself: relations[0]' in said.splitlines()[-1]


def test_ids_of_two_files_that_meet_are_numbered_on(tmp_path):
    first, second = own(2), own(2, file_name=lambda i: f'v{i}.jpg')
    read = read_own([written(tmp_path, first), written(tmp_path, second, 'b.json')], strict=True)
    assert list(read.images)[:2] == [1, 2] and len(set(read.images)) == 4
    assert {graph.relations.tolist()[0][2] for _, _, graph in read} == {0} and image_number('1') == 1


def test_an_archive_of_a_mac_has_accents(tmp_path):
    "macOS writes UTF-8, with accents as characters of their own, and does not set the flag that says so."
    name = unicodedata.normalize('NFD', 'm\u00fc.jpg')
    path = zipped(tmp_path/'mac.zip', [(f'top/{name}', picture(0))])
    data = bytearray(path.read_bytes())
    for mark, flags in ((b'PK\3\4', 6), (b'PK\1\2', 8)): data[data.index(mark) + flags + 1] &= ~8
    path.write_bytes(data)
    assert name not in zipfile.ZipFile(path).namelist()[0]
    report = check_pictures(tmp_path/'db', [(1, 'm\u00fc.jpg', W, H)], open_sources([path]), progress=False)
    assert report['pictures'] == 1 and report['counts']['other_spelling'] == 1
