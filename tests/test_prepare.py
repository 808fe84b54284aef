"The whole way from downloaded files to a database, by the command line."
import io
import json
import os
import shutil
import zipfile

import h5py
import numpy as np
import pytest
from forked import forked
from PIL import Image

from stdg import depth
from stdg.data import SceneGraphs
from stdg.datasets.visual_genome import Database
from stdg.depth.hha_file import HHAFile, hha_path
from stdg.io.files import write_json
from stdg.prepare import prepare

N = 9


def picture(i, size=(64, 48)):
    rng = np.random.default_rng(i)
    image = Image.fromarray(np.kron(rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3)),
                                    np.ones((8, 8, 1))).astype(np.uint8))
    image.save(out := io.BytesIO(), 'JPEG', quality=95)
    return out.getvalue()


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "Nine pictures in an archive and a folder, three lists, and the depth of each as PFM."
    folder, records = tmp_path_factory.mktemp('raw'), []
    (folder/'VG_100K_2').mkdir()
    with zipfile.ZipFile(folder/'images.zip', 'w') as archive:
        for i in range(1, N + 1):
            if i < 5: archive.writestr(f'VG_100K/{i}.jpg', picture(i))
            elif i != 7: (folder/'VG_100K_2'/f'{i}.jpg').write_bytes(picture(i))
            depth.write_pfm(folder/'maps'/f'{i}-other.pfm',
                            np.linspace(1, 50, 48 * 64).reshape(48, 64) + i)
            a, b = [dict(object_id=10 * i + k, x=1 + 20 * k, y=5, w=18, h=30, names=[n])
                    for k, n in enumerate(('man', 'shirt'))]
            records.append((dict(image_id=i, width=64, height=48), dict(image_id=i, objects=[a, b]),
                            dict(image_id=i,
                                 relationships=[dict(predicate='wearing', subject=a, object=b)])))
    for name, rows in zip(('image_data', 'objects', 'relationships'), zip(*records)):
        write_json(folder/f'{name}.json', list(rows))
    return folder


def command(*arguments):
    return forked(['-m', 'stdg.prepare', *map(str, arguments)], os.getcwd())


def test_from_download_to_samples(raw, tmp_path):
    done = command('all', '--raw', raw, '--folder', tmp_path, '--size', 64, 128, '--depth', 'maps',
                   '--originals', '--pfm', tmp_path/'again')
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path/'again').iterdir())
    assert written == [f'{i}-other.pfm' for i in range(1, 10) if i != 7]
    for said in ('8 of 9 pictures are sound', '1 missing: image 7: 7.jpg',
                 '8 images, 16 objects, 8 relations'):
        assert said in done.stdout
    for size in (64, 128):
        database = Database(tmp_path, size)
        assert database.image_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
        assert len(database.indices('train')) == 5
        k = size / 64
        assert database.graph(6).boxes.tolist() == [[0, 4 * k, 18 * k, 34 * k],
                                                    [20 * k, 4 * k, 38 * k, 34 * k]]
        wanted = np.asarray(Image.open(io.BytesIO(picture(8))).resize((size, size * 3 // 4),
            Image.Resampling.BILINEAR))
        assert abs(database.image(6).astype(int) - wanted).mean() < 6
        sample = SceneGraphs(database, 'train', ('rgb', 'hha'), train=True, source='other',
                             overlap=False)[0]
        assert sample['hha'].shape == sample['rgb'].shape == (3, size, size)
    assert json.loads((tmp_path/'statistics.json').read_text())['splits']['test']['images'] == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.h5')}
    again = command('check', 'database', 'images', 'depth', 'hha', '--raw', raw, '--folder',
                    tmp_path, '--size', 64, 128, '--depth', 'maps')
    assert again.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.h5')}


def test_three_shards_then_merge(raw, tmp_path):
    settings = dict(raw=raw, sizes=(64,), depth='maps', progress=False)
    prepare(tmp_path/'one', steps=('check', 'database', 'images', 'depth', 'hha'), **settings)
    prepare(tmp_path/'many', steps=('check', 'database', 'images'), **settings)
    for step in ('depth', 'hha'):
        for i in (2, 0):
            assert prepare(tmp_path/'many', steps=(step, 'statistics'), shard=(i, 3),
                           **settings) == {step: pytest.approx(dict(seconds=0, result=None),
                abs=60)}
        if step == 'depth':
            assert command('hha', '--raw', raw, '--folder', tmp_path/'many', '--size', 64,
                           '--depth', 'maps', '--shard',
                           '0/3').returncode == 1, 'depth is not whole yet'
        prepare(tmp_path/'many', steps=(step,), shard=(1, 3), **settings)
        prepare(tmp_path/'many', steps=('merge',), **settings)
    files = [HHAFile(hha_path(database, 'other'), database.image_ids)
             for database in (Database(tmp_path/'one'), Database(tmp_path/'many'))]
    assert all(np.array_equal(files[0][i], files[1][i]) for i in range(8))
    assert not list((tmp_path/'many').glob('*-parts'))


def test_annotations_by_others_are_kept(raw, tmp_path):
    prepare(tmp_path/'ours', raw, ('check', 'database'), sizes=(64,), progress=False)
    prepare(tmp_path/'theirs', raw, ('check',), sizes=(64,), progress=False)
    for name in ('VG-SGG.h5', 'VG-SGG-dicts.json'):
        shutil.copy(tmp_path/'ours'/name, tmp_path/'theirs'/name.replace('VG-SGG-dicts',
            'VG-SGG-dicts-with-attri').replace('VG-SGG.', 'VG-SGG-with-attri.'))
    done = prepare(tmp_path/'theirs', raw, ('database', 'images'), sizes=(64,), progress=False)
    assert done['database']['result'] == 'VG-SGG-with-attri.h5 by others is kept: 8 images'
    assert len(Database(tmp_path/'theirs')) == 8
    with h5py.File(tmp_path/'theirs'/'VG-SGG-with-attri.h5', 'r+') as file:
        del file['split']
        file['split'] = np.zeros(9, np.int32)
    with pytest.raises(ValueError, match='VG-SGG-with-attri.h5 has 9 images, pictures.h5 has '
                       '8.*check.json tells'):
        prepare(tmp_path/'theirs', raw, ('database',), sizes=(64,), progress=False)


def test_own_annotations(raw, tmp_path):
    own = dict(images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=48,
                            split='train' if i < 4 else 'test') for i in range(1, 7)],
               categories=[dict(id=1, name='<b>cup</b>')],
               annotations=[dict(id=i, image_id=i, category_id=1, bbox=[4, 4, 20, 20])
                            for i in range(1, 7)], predicates=[dict(id=1, name='near')],
               relations=[])
    write_json(raw/'mine.json', own)
    done = command('check', 'database', 'images', '--raw', raw, '--folder', tmp_path, '--size', 64,
                   '--kind', 'own', '--annotations', 'mine.json', '--depth', 'none')
    assert done.returncode == 0 and '6 of 6 pictures are sound' in done.stdout
    assert '6 images, 6 objects, 0 relations' in done.stdout
    database = Database(tmp_path)
    assert database.vocabulary.objects == ('<b>cup</b>',)
    assert database.graph(0).boxes.tolist() == [[4, 4, 24, 24]]


@pytest.mark.parametrize('arguments, message', [
    (('--raw', 'nowhere'), 'check: nowhere is not a folder. Put the downloaded files there'),
    (('--kind', 'own'), 'check: kind own: annotations, its files, are needed'),
    (('--kind', 'psg', '--annotations', 'psg.json'), 'psg.json is missing'),
    (('--shard', '3'), 'worker and number of workers are written 2/8'),
    (('--layout', 'tiff'), 'invalid choice')])
def test_what_is_said(raw, tmp_path, arguments, message):
    settings = {'--raw': raw, '--folder': tmp_path}
    for name in settings.keys() - set(arguments): arguments += (name, settings[name])
    done = command('check', *arguments)
    assert done.returncode and message in done.stderr and 'Traceback' not in done.stderr
    with pytest.raises(ValueError, match="step 'fly' is unknown; there are check, database"):
        prepare(tmp_path, raw, ('fly',))
