"""Visual Genome's files as other programs write them: what can only mean one thing is read as it is
meant, with a sentence; what cannot is refused by the dataset's name, and no message of the package
advises to make rooms."""
import ast
import json
import re
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from stdg.data import SceneGraphs
from stdg.datasets import vg_forms
from stdg.datasets.visual_genome import Database
from stdg.graph import SceneGraph, Vocabulary
from stdg.prepare import main
from stdg.testing import toy_database

SIZE = 64
NAMES = Vocabulary(['cup', 'table', 'lamp'], ['near', 'on'])
BOXES = [[4, 6, 21, 20], [0, 18, 60, 51], [30, 2, 47, 31]]
root = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    "The folder of a database of three pictures as the form has it; the last one has no relations."
    graphs = [SceneGraph(BOXES, [0, 1, 2], [[0, 1, 1], [2, 0, 0]], (SIZE, SIZE)),
              SceneGraph(BOXES[:2], [2, 1], [[0, 1, 1]], (48, SIZE)), SceneGraph(BOXES[:1], [0], [], (SIZE, SIZE))]
    folder = tmp_path_factory.mktemp('ours')
    toy_database(folder, [(graph, None) for graph in graphs], [0, 0, 2], NAMES, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # its own form needs no sentence
        assert Database(folder).notes == ()
    return folder


def changed(ours, folder, **datasets):
    """A copy in which each dataset is replaced: what the function of the numbers gives; None takes it
    away. `image_ids` is in the picture file, all others in VG-SGG.h5."""
    shutil.copytree(ours, folder)
    for name, change in datasets.items():
        with h5py.File(folder/(f'imdb_{SIZE}.h5' if name.startswith('image_') else 'VG-SGG.h5'), 'r+') as file:
            if name not in file: file[name] = change(None)
            else:
                values = file[name][:]
                del file[name]
                if change: file[name] = change(values)
    return folder


def read(folder, **options):
    "The database, opened with one warning, that tells its notes."
    with pytest.warns(UserWarning, match='in the form of another program') as said:
        database = Database(folder, **options)
    assert len(said) == 1 and all(note in str(said[0].message) for note in database.notes)
    return database


def same(database, other):
    "Graphs, pictures and ids are equal, to the bit."
    for i in range(len(database)):
        for a, b in zip(vars(database.graph(i)).values(), vars(other.graph(i)).values()):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        assert (database.image(i) == other.image(i)).all()
    assert database.vocabulary == other.vocabulary
    assert database.image_ids.tolist() == other.image_ids.tolist() and database.image_ids.dtype.kind == 'i'
    assert [database.indices(split).tolist() for split in ('train', 'val', 'test')] == [
        other.indices(split).tolist() for split in ('train', 'val', 'test')]


def text(values): return [str(v) for v in values.tolist()]
def flat(values): return values.ravel()
def stood(values): return values[:, None]


@pytest.mark.parametrize('change, note', [
    (dict(predicates=flat), 'predicates has shape (3,), read as (3, 1)'),
    (dict(labels=flat), 'labels has shape (6,), read as (6, 1)'),
    (dict(split=stood), 'split has shape (3, 1), read as (3,)'),
    (dict(img_to_first_box=stood, img_to_last_box=stood), 'img_to_last_box has shape (3, 1), read as (3,)'),
    (dict(image_ids=text), 'image_ids holds text, read as numbers'),
    (dict(image_ids=lambda v: np.array(text(v), 'S')), 'image_ids holds text, read as numbers'),
    (dict(labels=lambda v: np.array(text(flat(v)), 'S')), 'labels holds text, read as numbers'),
    (dict(boxes_64=lambda v: v.astype('f4')), 'boxes_64 holds float32, read as whole numbers'),
    (dict(boxes_64=lambda v: v.astype('f8')), 'boxes_64 holds float64, read as whole numbers'),
    (dict(attributes=lambda _: np.zeros((0, 10), np.int64)), 'attributes is empty, and not needed'),
    (dict(attributes=lambda _: h5py.Empty('i8')), 'attributes is empty, and not needed')],
    ids=lambda value: value.split(',')[0] if isinstance(value, str) else None)
def test_what_can_only_mean_one_thing_is_read(ours, tmp_path, change, note):
    database = read(changed(ours, tmp_path/'theirs', **change))
    assert note in database.notes
    same(database, Database(ours))
    assert len(SceneGraphs(database, 'train').rows) == 2


def test_all_at_once(ours, tmp_path):
    "And no names of the writer, an attribute table, and the other names of files."
    folder = changed(ours, tmp_path/'theirs', predicates=flat, labels=flat, image_ids=text,
                     boxes_64=lambda v: v.astype('f4'), attributes=lambda _: np.zeros((6, 10), np.int64))
    with h5py.File(folder/'VG-SGG.h5', 'r+') as file: del file.attrs['names']
    for name in ('VG-SGG.h5', 'VG-SGG-dicts.json'):
        (folder/name).rename(folder/re.sub(r'(\.\w+)$', r'-with-attri\1', name))
    database = read(folder)
    assert len(database.notes) == 4, 'an attribute table that is full needs no sentence'
    same(database, Database(ours))


def test_boxes_with_fractions_are_rounded_at_their_corners(ours, tmp_path):
    """Corners x1, y1, x2, y2 as fractions, written as centre and extent; within half a pixel of what
    is read, where the sides are long enough."""
    corners = np.array(BOXES + BOXES[:2] + BOXES[:1], float) + [.3, .4, .4, -.3]
    centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    database = read(changed(ours, tmp_path/'theirs', boxes_64=lambda _: centres))
    assert database.notes == ('boxes_64 holds float64, corners are rounded',)
    assert database.flat().boxes.tolist() == np.rint(corners).tolist() == Database(ours).flat().boxes.tolist()
    assert database.graph(0).relations.tolist() == [[0, 1, 1], [2, 0, 0]]


def test_boxes_of_another_size_are_scaled(ours, tmp_path):
    "The corners of boxes_128 are twice those of the pictures; asked for by size, or found."
    def doubled(centres):
        corner = centres[:, :2] - centres[:, 2:] // 2
        return np.concatenate([2 * corner + centres[:, 2:], 2 * centres[:, 2:]], 1)
    with h5py.File(ours/'VG-SGG.h5') as file: boxes = doubled(file['boxes_64'][:])
    folder = changed(ours, tmp_path/'theirs', boxes_128=lambda _: boxes, boxes_64=None)
    for options in ({}, dict(size=SIZE)):
        database = read(folder, **options)
        assert database.size == SIZE
        assert database.notes == ('boxes_128 is scaled to 64 pixels, of which there are no boxes',)
        same(database, Database(ours))
    both = changed(ours, tmp_path/'both', boxes_128=lambda _: 0 * boxes + 9)
    same(Database(both), Database(ours))
    with pytest.raises(FileNotFoundError, match='imdb_128.h5 is missing'): Database(folder, 128)
    (folder/'imdb_64.h5').unlink()
    with pytest.raises(FileNotFoundError, match=r'imdb_<size>.h5 is missing; VG-SGG.h5 has boxes for size \[128\]'):
        Database(folder)


def names_of(**change):
    def write(folder):
        record = {**json.loads((folder/'VG-SGG-dicts.json').read_text()), **change}
        (folder/'VG-SGG-dicts.json').write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        return folder
    return write


def test_names_in_other_forms(ours, tmp_path):
    for i, change in enumerate([
            dict(idx_to_label={'0': '__background__', '1': 'cup', '2': 'table', '3': 'lamp'}),
            dict(idx_to_label=None, idx_to_predicate=None, predicate_to_idx=dict(near='1', on='2')),
            dict(attribute_to_idx={}, idx_to_attribute={}, attribute_count={})]):
        same(Database(names_of(**change)(changed(ours, tmp_path/str(i)))), Database(ours))
    for i, (change, why) in enumerate([
            (dict(idx_to_label={'0': 'cup', '1': 'table', '2': 'lamp'}), "gives 'cup' the number 0, which is"),
            (dict(idx_to_label=['cup', 'table', 'lamp']), 'is missing'),
            (dict(idx_to_label={'1': 'cup', '2': 'table', '3': 'table'}), "names are repeated: ..table.."),
            (dict(idx_to_label={'1': 'cup', '2': 'table', 'lamp': '3'}), "'lamp' is no number of a name")]):
        folder = names_of(**change)(changed(ours, tmp_path/f'wrong{i}'))
        with pytest.raises(ValueError, match=f'VG-SGG-dicts.json is not a names file of this format: .*{why}'):
            Database(folder)


def put(row, value):
    def change(values):
        values[row] = value
        return values
    return change


WRONG = [
    (dict(labels=lambda v: v - 1), 'VG-SGG.h5: labels row 0 is 0, outside 1..3'),
    (dict(labels=lambda v: v + .5), 'VG-SGG.h5: labels holds float64 .6, 1.: whole numbers are needed'),
    (dict(labels=lambda v: ['cup'] * len(v)), "VG-SGG.h5: labels holds object .6,.: 'cup' is no whole number"),
    (dict(labels=lambda v: np.concatenate([v, v], 1)), 'VG-SGG.h5: labels holds int64 .6, 2.: shape .N, 1. is needed'),
    (dict(labels=lambda v: v > 0), 'VG-SGG.h5: labels holds bool'),
    (dict(predicates=put(0, 0)), 'VG-SGG.h5: predicates row 0 is 0, outside 1..2'),
    (dict(predicates=None), "VG-SGG.h5 has no dataset 'predicates'"),
    (dict(predicates=lambda _: h5py.Empty('i8')), "VG-SGG.h5: dataset 'predicates' is empty"),
    (dict(predicates=lambda v: v[:2]), 'VG-SGG.h5: predicates has 2 rows, relationships has 3'),
    (dict(relationships=lambda v: v.T), 'VG-SGG.h5: relationships holds int32 .2, 3.: shape .N, 2. is needed'),
    (dict(relationships=flat), 'VG-SGG.h5: relationships holds int32 .6,.: shape .N, 2. is needed'),
    (dict(relationships=lambda v: v + 1), 'VG-SGG.h5: relationships row . .*points to an object that is not'),
    (dict(split=put(1, 3)), 'VG-SGG.h5: split row 1 is 3; 0 is train, 1 val, 2 test'),
    (dict(img_to_last_rel=lambda v: v.astype(float)), 'VG-SGG.h5: img_to_last_rel holds float64'),
    (dict(boxes_64=lambda v: v / SIZE), 'VG-SGG.h5: boxes_64 lie within 0 and 1, as shares do; centre, width'),
    (dict(boxes_64=lambda v: np.array([[9, 9, 50, 60]] * 3 + [[40, 30, 60, 63]] * 3)),
     'VG-SGG.h5: boxes_64 seem to be corners x1, y1, x2, y2; centre, width and height are needed'),
    (dict(boxes_64=put((2, 3), -4)), 'VG-SGG.h5: boxes_64 have a negative width or height in row 2'),
    (dict(boxes_64=lambda v: v * np.nan), 'VG-SGG.h5: boxes_64 holds float64 .6, 4.: whole numbers are needed'),
    (dict(boxes_64=lambda v: v[:, :3]), 'VG-SGG.h5: boxes_64 holds int32 .6, 3.: shape .N, 4. is needed'),
    (dict(boxes_64=None), "VG-SGG.h5 has no dataset 'boxes_64', and none of another size"),
    (dict(image_ids=lambda v: ['1.jpg', '2.jpg', '3.jpg']), "imdb_64.h5: image_ids holds object .3,.: '1.jpg' is"),
    (dict(image_ids=lambda v: v[:2]), 'imdb_64.h5: image_ids has 2 rows for 3 images|imdb_64.h5 has 2 images'),
    (dict(image_heights=lambda v: v + .5), 'imdb_64.h5: heights and widths are whole numbers')]


@pytest.mark.parametrize('change, why', WRONG, ids=[f'{[*change][0]}-{i}' for i, (change, _) in enumerate(WRONG)])
def test_what_could_mean_several_things_names_the_dataset(ours, tmp_path, change, why):
    with pytest.raises(ValueError, match=why) as caught: Database(changed(ours, tmp_path/'theirs', **change))
    said = str(caught.value)
    assert said.endswith(vg_forms.HINT) and '\n' not in said and 'room' not in said


def test_ids_that_share_one_long_text_take_little(ours, tmp_path):
    "A file of a few megabytes in which 100,000 rows point to the same text: it ends at the first rows."
    folder = changed(ours, tmp_path/'theirs', image_ids=None)
    with h5py.File(folder/'imdb_64.h5', 'r+') as file:
        one = file.create_dataset('one', (1,), h5py.string_dtype(), chunks=(1,))
        one[0] = '9' * 50_000
        ids = file.create_dataset('image_ids', (100_000,), h5py.string_dtype(), chunks=(100_000,))
        ids.id.write_direct_chunk((0,), one.id.read_direct_chunk((0,))[1] * 100_000)
    rows, start = [], h5py.Dataset.astype
    class Counted:
        def __init__(self, view): self.view = view
        def __getitem__(self, key):
            rows.append(key)
            return self.view[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5py.Dataset, 'astype', lambda data, kind: Counted(start(data, kind)))
        with pytest.raises(ValueError, match="image_ids holds object .100000,.: '9{19}' is no whole number"):
            Database(folder)
    size = (folder/'imdb_64.h5').stat().st_size
    assert len(rows) == 1 and (rows[0].stop - rows[0].start) * size <= 2**28


def test_the_command_reads_them(ours, tmp_path, capsys):
    "Statistics of a database of others: the sentence is a warning; a mistake is one line."
    folder = changed(ours, tmp_path/'theirs', predicates=flat)
    command = ['statistics', '--raw', str(tmp_path), '--folder', str(folder), '--size', str(SIZE), '--depth', 'none']
    with pytest.warns(UserWarning, match='predicates has shape .3,., read as .3, 1.'): main(command)
    assert 'statistics: statistics.json' in capsys.readouterr().out
    with h5py.File(folder/'VG-SGG.h5', 'r+') as file: file['labels'][0] = 0
    with pytest.raises(SystemExit): main(command)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and 'VG-SGG.h5: labels row 0 is 0, outside 1..3' in lines[0] and 'room' not in lines[0]


def test_prepare_keeps_annotations_of_others(ours, tmp_path, capsys):
    "Those in the folder are kept, the pictures are made for them, and their boxes are scaled."
    raw, folder = tmp_path/'raw', tmp_path/'theirs'
    folder.mkdir()
    raw.mkdir()
    with h5py.File(ours/'VG-SGG.h5') as file, h5py.File(folder/'VG-SGG.h5', 'w') as other:
        for name in file: other[name.replace('boxes_64', 'boxes_1024')] = file[name][:] * (16 if 'boxes' in name else 1)
    shutil.copy(ours/'VG-SGG-dicts.json', folder)
    sides = [(96, 96), (96, 72), (96, 96)]
    for i, side in enumerate(sides, 1): Image.new('RGB', side).save(raw/f'{i}.jpg')
    records = [dict(image_id=i, width=w, height=h) for i, (w, h) in enumerate(sides, 1)]
    (raw/'image_data.json').write_text(json.dumps(records))
    command = ['--raw', str(raw), '--folder', str(folder), '--size', str(SIZE), '--depth', 'none']
    with pytest.warns(UserWarning, match='boxes_1024 is scaled to 64 pixels'): main(['all', *command])
    assert 'database: VG-SGG.h5 by others is kept: 3 images' in capsys.readouterr().out
    with pytest.warns(UserWarning): database = Database(folder)
    moved = np.abs(database.flat().boxes - Database(ours).flat().boxes)
    assert moved.max() <= 1 and database.graph(0).relations.tolist() == [[0, 1, 1], [2, 0, 0]]
    with pytest.raises(SystemExit): main(['database', *command, '--remake'])
    assert 'has no objects.json' in capsys.readouterr().err, 'asked for, it is made from the lists'
    with h5py.File(folder/'VG-SGG.h5', 'r+') as file: file.attrs['names'] = 'ours'
    with pytest.raises(SystemExit): main(['database', *command])
    assert 'has no objects.json' in capsys.readouterr().err, 'what is ours is not by others'


def texts_said(source):
    "The texts of a module that are not docstrings."
    tree, told = ast.parse(source), []
    with_docs = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = {id(node.body[0].value) for node in with_docs if node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            told.append(''.join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            told.append(node.value)
    return told


ADVICE = re.compile(r'make_rooms|\b(make|take|use|render|build|fetch|only)\b[^.]{0,20}\brooms\b', re.IGNORECASE)
def advised(source): return [text for text in texts_said(source) if ADVICE.search(text)]


def test_no_message_advises_to_make_rooms():
    "Rooms are no remedy for a file that is damaged or of another form."
    assert advised("'''Make rooms.'''\nx = f'Make {1} rooms'\ny = 'a room'") == ['Make  rooms']
    paths = [path for path in (root/'stdg').rglob('*.py') if path.parent.name != 'rooms' and path.name != '_modidx.py']
    found = {path.name: texts for path in paths if (texts := advised(path.read_text(encoding='utf-8')))}
    assert len(paths) > 80 and not found
