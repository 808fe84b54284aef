"""Broken input of every kind: one clear error that names the file and the remedy, and nothing
already written is lost."""
import os
import shutil
import warnings

import h5py
import numpy as np
import pytest
import torch

from stdg import checkpoint, decode, fields, hha, losses, matching, metrics
from stdg.data import SceneGraphs
from stdg.datasets.visual_genome import Database, write_annotations
from stdg.depth.precompute import prepare_hha
from stdg.evaluation import core as evaluation
from stdg.graph import TASKS, SceneGraph, Vocabulary
from stdg.io.files import atomic_path
from stdg.model import STDG
from stdg.testing import toy_database

names = Vocabulary(['cup', 'table'], ['near', 'on'])


@pytest.fixture
def folder(tmp_path):
    "A whole database of four pictures; the last has no objects, the third no relations."
    boxes = [[4, 4, 20, 20], [0, 18, 60, 50]]
    related = SceneGraph(boxes, [0, 1], [[0, 1, 1]], (64, 64))
    unrelated = SceneGraph(boxes, [0, 1], [], (64, 64))
    graphs = [related, related, unrelated, SceneGraph([], [], [], (64, 64))]
    rng = np.random.default_rng(0)
    records = [dict(image=rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), image_id=i + 1,
                    depth=rng.uniform(1, 3, (64, 64)),
                    camera=[[60, 0, 32.5], [0, 60, 32.5], [0, 0, 1]]) for i in range(4)]
    toy_database(tmp_path/'db', list(zip(graphs, records)), [0] * 4, names, 64)
    return tmp_path/'db'


def edit(path, name, row, value):
    with h5py.File(path, 'r+') as file: file[name][row] = value


@pytest.mark.parametrize('name', ['VG-SGG.h5', 'VG-SGG-dicts.json', 'imdb_64.h5'])
def test_missing_file(folder, name):
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError,
                       match=r'(imdb_<size>|VG-SGG.*)\.\w+ is missing.*python -m stdg.prepare'):
        Database(folder)


@pytest.mark.parametrize('name', ['VG-SGG.h5', 'imdb_64.h5'])
def test_truncated_h5(folder, name):
    os.truncate(folder/name, (folder/name).stat().st_size // 2)
    with pytest.raises(ValueError, match=f'{name} is not a whole HDF5 file.*cut off'):
        Database(folder)


def test_foreign_h5(folder):
    shutil.copy(folder/'imdb_64.h5', folder/'VG-SGG.h5')
    with pytest.raises(ValueError, match="VG-SGG.h5 has no dataset 'labels'.*another kind of file"):
        Database(folder)
    (folder/'VG-SGG.h5').write_text('<html>404</html>')
    with pytest.raises(ValueError, match='VG-SGG.h5 is not a whole HDF5 file'): Database(folder)


def test_image_without_boxes_or_relations_is_left_out(folder):
    database = Database(folder)
    assert len(database) == 4 and len(database.graph(3)) == 0
    assert SceneGraphs(database, 'train').rows == [0, 1]


def test_relation_to_a_missing_object(folder):
    edit(folder/'VG-SGG.h5', 'relationships', 1, [0, 1])  # boxes of the first image, in the second
    with pytest.raises(ValueError, match=r'VG-SGG.h5: relationships row 1 \[0, 1\] points to '
                       'an object that is not in its image'):
        Database(folder)


@pytest.mark.parametrize('name,value', [('labels', 3), ('labels', 0), ('predicates', 9)])
def test_label_outside_the_vocabulary(folder, name, value):
    edit(folder/'VG-SGG.h5', name, 0, value)
    with pytest.raises(ValueError, match=f'VG-SGG.h5: {name} row 0 is {value}, '
                       'outside 1..2 of VG-SGG-dicts.json'):
        Database(folder)


def test_nan_in_depth(folder):
    edit(folder/'imdb_64.h5', 'depth', 2, np.float16('nan'))
    with pytest.raises(ValueError, match='imdb_64.h5: the depth of image 3 has NaN.*'
                       'write 0 where it is missing'):
        prepare_hha(Database(folder), progress=False)
    assert not [p for p in folder.iterdir() if 'hha' in p.name], 'no half of an HHA file is left'
    with pytest.raises(ValueError, match='NaN'):
        hha.encode(np.full((8, 8), np.nan, np.float32), np.eye(3))


def test_unwritable_folder(folder):
    (folder/'a-file').touch()
    with pytest.raises(OSError, match='nothing can be written in .*a-file.*Choose another folder'):
        write_annotations(folder/'a-file'/'db', [], [], names, 64)


def test_full_disk_keeps_what_was_there(tmp_path):
    if not os.path.exists('/dev/full'): pytest.skip('needs /dev/full')
    (tmp_path/'log').write_text('good')
    with pytest.raises(OSError, match='log could not be written: No space left on device'):
        with atomic_path(tmp_path/'log'), open('/dev/full', 'w') as file:
            file.write('x' * 10_000)
            file.flush()
    assert (tmp_path/'log').read_text() == 'good' and len(list(tmp_path.iterdir())) == 1


TINY = dict(pretrained=False, fpn=16, channels=16)


@pytest.mark.parametrize('shape', [(1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_pictures_have_three_channels(shape):
    model = STDG('small', 'combine', n_objects=2, n_predicates=2, **TINY)
    for call in (model, model.offsets, model.teacher.offsets):
        with pytest.raises(ValueError, match=r'pictures \(B, 3, H, W\) are needed, '
                           r'these are \(.*64, 64\)'):
            call(torch.zeros(shape))


def test_fields_are_the_picture_over_the_stride():
    graph = SceneGraph([[4, 4, 40, 40]], [0], [[0, 0, 0]], (64, 64))
    targets = {k: v[None] for k, v in fields.encode(graph, 2, 2, (64, 64), 8).items()}
    with pytest.raises(ValueError, match='detection fields: the network gives .*4, 4.*'
                       'must be the same in both'):
        losses.detection_loss(torch.rand(1, 6, 4, 4), targets)
    with pytest.raises(ValueError, match=r'truth is of an image of \(64, 64\) pixels, '
                       r'at stride 8 \(8, 8\) cells; the fields have \(4, 4\)'):
        decode.decode(torch.rand(6, 4, 4), torch.rand(2, 7, 4, 4), 'predcls', graph, stride=8)


def test_nothing_annotated_is_a_valid_truth():
    empty = SceneGraph([], [], [], (64, 64))
    targets = {k: v[None] for k, v in fields.encode(empty, 2, 2, (64, 64), 8).items()}
    assert not any(targets[k].any() for k in ('heatmap', 'mask', 'relation'))
    model = STDG('small', n_objects=2, n_predicates=2, **TINY).train()
    detection, relation = model(torch.rand(2, 3, 64, 64))
    two = {k: torch.cat([v, v]) for k, v in targets.items()}
    parts = losses.detection_loss(detection, two) | losses.relation_loss(relation, two)
    loss = sum(parts.values())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in gradients)
    for task in TASKS:
        found = decode.decode(torch.rand(6, 8, 8), torch.rand(2, 7, 8, 8), task, empty, stride=8)
        for protocol in matching.PROTOCOLS:
            evaluator = metrics.Evaluator(task, 2, protocol=protocol)
            evaluator.update(found, empty)
            assert evaluator.images == 0 and np.isnan(evaluator.compute()['R@20'])


def test_more_objects_than_slots_warn_once():
    corner = np.random.default_rng(0).uniform(0, 400, (150, 2))
    crowd = SceneGraph(np.c_[corner, corner + np.arange(20, 170)[:, None] / 2], [0] * 150, [],
                       (512, 512))
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter('default')
        for _ in range(3): targets = fields.encode(crowd, 1, 1)
    assert targets['mask'].sum() == 128
    message = 'an image with more than 128 objects: the largest 128 are kept'
    assert [str(warning.message) for warning in raised] == [message]


def test_checkpoint_of_another_vocabulary(folder, tmp_path):
    database = Database(folder)
    other = Vocabulary(['cup', 'chair'], ['near', 'on'])
    model = STDG('small', n_objects=2, n_predicates=2, **TINY)
    model.save(tmp_path/'a.safetensors', vocabulary=other.to_json())
    with pytest.raises(ValueError, match="a.safetensors was trained on other classes: "
                       "its object 1 is 'chair', here 'table'"):
        checkpoint.load(tmp_path/'a.safetensors', database.vocabulary)
    model = STDG('small', n_objects=5, n_predicates=2, **TINY)
    with pytest.raises(ValueError, match='the model knows 5 object classes and 2 predicates, '
                       '.*db has 2 and 2'):
        evaluation.evaluate(model, SceneGraphs(database, 'train'), progress=False)
