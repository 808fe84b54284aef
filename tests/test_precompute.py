"""HHA of a database: kills and shards, every source, both layouts, the released pictures, and one
clear error for each thing that can be wrong.

As a script (`python test_precompute.py FOLDER`) it is the worker that the first test kills."""
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from stdg import depth, hha
from stdg.datasets.visual_genome import Database
from stdg.depth import precompute
from stdg.depth.hha_file import HHAFile, hha_path
from stdg.depth.precompute import hha_of, hha_of_estimate, merge_hha, prepare_hha
from stdg.graph import SceneGraph
from stdg.io.packed import write_packed
from stdg.testing import toy_database

GOLDEN = np.load(Path(__file__).parent/'golden'/'hha.npz')


def floor(h, w, seed):
    "A tilted floor with a box on it, in metres, and holes."
    rows, cols = np.mgrid[:h, :w]
    distance = (100 / (rows + 40)).astype(np.float32)
    y, x = np.random.default_rng(seed).integers(4, min(h, w) - 16, 2)
    distance[y:y + 12, x:x + 12] = 1
    distance[0, :5] = 0
    return distance


def make_database(folder, n=6, size=64, shapes=((48, 64), (64, 48)), with_depth=True):
    rng, scenes = np.random.default_rng(0), []
    for i in range(n):
        h, w = shapes[i % len(shapes)]
        record = dict(image=rng.integers(0, 256, (h, w, 3), dtype=np.uint8), image_id=100 + i)
        if with_depth:
            record.update(depth=floor(h, w, i), camera=depth.camera_matrix(60, w / 2, h / 2))
        scenes.append((SceneGraph([], [], [], (h, w)), record))
    return toy_database(folder, scenes, size=size)


@pytest.fixture
def database(tmp_path): return make_database(tmp_path/'db')


def read(path, database):
    "All pictures of an HHA file, (h, w, 3)."
    file = HHAFile(path, database.image_ids)
    return [file[i].transpose(1, 2, 0) for i in range(len(database))]


def prepared(database, source='metric', **options):
    "Make the HHA of a source, and read it."
    return read(prepare_hha(database, source, progress=False, **options), database)


def equal(pictures, others):
    return all(np.array_equal(a, b) for a, b in zip(pictures, others, strict=True))


def write_maps(database, tag, maps, metric=0, **columns):
    path = database.folder/f'depth_{tag}.h5'
    write_packed(path, 'depth', [np.asarray(m, np.float16).ravel() for m in maps], np.float16, True,
                 image_ids=database.image_ids, shape=[m.shape for m in maps], **columns)
    with h5py.File(path, 'r+') as file: file['metric'] = [metric]
    return path


def child(folder, shard, slow=0.):
    "A real process that does its share, slowly. Returns its id."
    pid = os.fork()
    if pid: return pid
    code, png = 1, precompute._png
    try:
        def late(picture):
            time.sleep(slow)
            return png(picture)
        precompute._png = late
        prepare_hha(Database(folder), 'relative', shard=(shard, 2), progress=False)
        code = 0
    finally: os._exit(code)


def worker(folder):
    "Kill shard 0 in the middle, then let two processes finish."
    parts = Path(folder)/'hha_64_relative-parts'
    pid, end = child(folder, 0, slow=.03), time.monotonic() + 60
    while not (parts/'part-000000.h5').exists() and time.monotonic() < end: time.sleep(.01)
    time.sleep(.1)
    os.kill(pid, signal.SIGKILL)
    print('killed', os.waitpid(pid, 0)[1], len(list(parts.glob('part-*'))))
    for shard in range(2): print('exit', os.waitpid(child(folder, shard), 0)[1])


def test_killed_and_sharded_equals_one_undisturbed_run(tmp_path):
    database = make_database(tmp_path/'db', n=150)
    run = subprocess.run([sys.executable, __file__, database.folder], capture_output=True,
                         text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == 'killed 9 1 exit 0 exit 0'.split(), run.stdout + run.stderr
    assert not hha_path(database, 'relative').exists(), 'a shard does not merge'
    merged = read(merge_hha(database, 'relative'), database)
    assert not list(database.folder.glob('*parts*')) and len(merged) == 150
    for i in (0, 1, 31, 32, 64, 149):
        expected = hha_of(database.depth(i), database.camera(i), 'relative', database.image_ids[i])
        assert np.array_equal(merged[i], expected)
    path = hha_path(database, 'relative')
    first = path.read_bytes()
    assert merge_hha(database, 'relative') == prepare_hha(database, 'relative', progress=False)
    assert path.read_bytes() == first
    path.unlink()
    assert equal(merged, prepared(database, 'relative'))


def test_shards_that_lack_a_part_or_differ(database):
    why = 'Nothing has been started for .*hha_64_relative.h5'
    with pytest.raises(FileNotFoundError, match=why): merge_hha(database, 'relative')
    assert prepare_hha(database, 'relative', shard=(1, 2), progress=False) is None
    with pytest.raises(ValueError, match='hha_64_relative.h5: 1 of 1 parts are missing'):
        merge_hha(database, 'relative')
    with pytest.raises(ValueError, match=r'parts of something else: noise None \(asked: 0.5\)'):
        prepare_hha(database, 'relative', shard=(0, 2), noise=.5, progress=False)
    with pytest.raises(ValueError, match='shard 2/2'):
        prepare_hha(database, 'relative', shard=(2, 2), progress=False)
    assert prepare_hha(database, 'relative', shard=(0, 2), progress=False) is None
    assert merge_hha(database, 'relative').exists()


def test_noise_changes_the_pictures_and_threads_stay_as_they_were(database):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    quiet = prepared(database, 'relative', noise=0., blur=0.)
    hha_path(database, 'relative').unlink()
    assert not np.array_equal(quiet[0], prepared(database, 'relative', noise=.2)[0])
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_the_simulated_estimator_errs_differently_on_each_picture(tmp_path):
    """Three times the same depth: the noise follows from the number of the picture, so that no two
    are alike and each is the same in any database."""
    def of_ids(folder, *image_ids):
        scenes = [(SceneGraph([], [], [], (48, 64)),
                   dict(image=np.zeros((48, 64, 3), np.uint8), image_id=image_id,
                        depth=floor(48, 64, 0), camera=depth.camera_matrix(60, 32, 24)))
                  for image_id in image_ids]
        return prepared(toy_database(tmp_path/folder, scenes, size=64), 'relative')
    first, second, third = of_ids('three', 7, 8, 9)
    for one, other in ((first, second), (first, third), (second, third)):
        assert np.abs(one.astype(int) - other).mean() > 1
    assert equal(of_ids('other', 9, 7), [third, first])
    stored = floor(48, 64, 0).astype(np.float16)
    assert np.array_equal(first, hha_of(stored, None, 'relative', image_id=7))


@pytest.mark.parametrize('case', ['relative0', 'relative1'])
@pytest.mark.parametrize('kind', ['pfm', 'file'])
def test_released_pictures_are_golden(case, kind, tmp_path):
    inverse = GOLDEN[f'{case}_inverse_depth']
    h, w = (int(512 / max(inverse.shape) * side) for side in inverse.shape)
    database = make_database(tmp_path/'db', 1, 512, [(h, w)], with_depth=False)
    database._images().close()
    with h5py.File(database.folder/'imdb_512.h5', 'r+') as file:
        file['original_heights'][0], file['original_widths'][0] = inverse.shape
    database = Database(database.folder)
    if kind == 'pfm':
        (tmp_path/'midas').mkdir()
        depth.write_pfm(tmp_path/'midas'/'100-dpt.pfm', inverse)
    else: write_maps(database, 'midas', [inverse])
    source = tmp_path/'midas' if kind == 'pfm' else 'midas'
    path = prepare_hha(database, source, released=True, progress=False)
    assert path.name == 'hha_512_midas-released.h5'
    assert path == hha_path(database, source, released=True) == hha_path(database, 'midas-released')
    picture, golden = read(path, database)[0], GOLDEN[f'{case}_hha'][:h, :w]
    same = (abs(picture.astype(int) - golden) <= 1).mean((0, 1))
    assert (same >= (.997 if kind == 'pfm' else .98)).all(), same  # a file holds half precision
    plain = prepared(database, source)[0]
    assert (abs(plain.astype(int) - golden) <= 1).mean() < .9, 'another camera, another picture'


def test_an_estimators_zeros_are_far_and_the_released_ones_missing(database):
    maps = [1 / floor(*database.graph(i).size, 9).clip(.5) for i in range(6)]
    for m in maps:
        m -= m.min()
        m[:8] = 0  # as a ReLU leaves the sky
    write_maps(database, 'relu', maps)
    far, missing = (prepared(database, 'relu', released=released) for released in (False, True))
    for a, b in zip(far, missing, strict=True):
        assert (a[:7, :, 2] == 31).all() and (b[:7, :, 2] == 255).all()


def test_metres_with_cameras(database):
    truth = [database.depth(i) for i in range(6)]
    cameras = np.stack([database.camera(i) for i in range(6)])
    exact = [hha_of(*one) for one in zip(truth, cameras)]
    write_maps(database, 'own', truth, 1, camera=cameras)
    assert equal(prepared(database, 'own'), exact)
    write_maps(database, 'bare', truth, 1)
    made_up = [depth.camera_matrix(500 / 8, d.shape[1] / 2, d.shape[0] / 2) for d in truth]
    assert equal(prepared(database, 'bare'), map(hha.encode, truth, made_up))
    hha_path(database, 'bare').unlink()
    assert equal(prepared(database, 'bare', camera=cameras), exact)
    write_maps(database, 'twice', [np.kron(d, np.ones((2, 2))) for d in truth], 1,
               camera=cameras * [[2], [2], [1]])
    assert equal(prepared(database, 'twice'), exact)


def test_maps_a_pixel_off_fill_the_picture(database):
    maps = [depth.inverse_depth_from(database.depth(i), rng=i) for i in range(6)]
    short = [m[:-1] if m.shape[0] < m.shape[1] else m[:, :-1] for m in maps]
    short = [s.astype(np.float16).astype(np.float32) for s in short]
    write_maps(database, 'off', short)
    filled = [np.pad(s, [(0, m.shape[0] - s.shape[0]), (0, m.shape[1] - s.shape[1])], 'edge')
              for s, m in zip(short, maps)]
    assert equal(prepared(database, 'off'), [hha_of_estimate(one, one.shape) for one in filled])


def test_pictures_of_the_released_code(database, tmp_path):
    exact = [hha_of(database.depth(i), database.camera(i)) for i in range(6)]
    old = tmp_path/'hha'
    old.mkdir()
    for i, picture in enumerate(exact):
        canvas = np.zeros((64, 64, 3), np.uint8)
        canvas[:picture.shape[0], :picture.shape[1]] = picture
        Image.fromarray(canvas[..., ::-1]).save(old/f'{100 + i}.png')
    assert equal(prepared(database, old), exact)
    hha_path(database, old).unlink()
    for change, error, message in [
        (lambda p: Image.new('RGB', (63, 64)).save(p), ValueError,
         '103.png has 63 x 64 pixels, the canvas of the database 64 x 64'),
        (lambda p: Image.new('L', (64, 64)).save(p), ValueError,
         '103.png is damaged .64 x 64 L, RGB'),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), ValueError, '103.png is damaged'),
        (lambda p: p.unlink(), FileNotFoundError, '103.png is missing')]:
        change(old/'103.png')
        with pytest.raises(error, match=message): prepare_hha(database, old, progress=False)


def test_both_layouts_in_another_process(database):
    path = prepare_hha(database, progress=False)
    pictures, canvas = read(path, database), np.zeros((6, 3, 64, 64), np.uint8)
    for i, p in enumerate(pictures): canvas[i, :, :p.shape[0], :p.shape[1]] = p.transpose(2, 0, 1)
    with h5py.File(database.folder/'hha_64_array.h5', 'w') as file:
        file['image_ids'] = database.image_ids
        file.create_dataset('hha', data=canvas, chunks=(1, 3, 64, 64), compression='lzf')
    for file in (path, database.folder/'hha_64_array.h5'):
        reader = pickle.loads(pickle.dumps(HHAFile(file, database.image_ids)))
        assert len(reader) == 6
        for i, p in enumerate(pictures):
            assert np.array_equal(reader[i][:, :p.shape[0], :p.shape[1]], p.transpose(2, 0, 1))


def png(picture):
    Image.fromarray(picture).save(out := io.BytesIO(), 'PNG')
    return out.getvalue()


def test_bad_hha_files(database):
    path, ids = database.folder/'hha_64_x.h5', database.image_ids
    why = 'hha_64_x.h5 is missing. Make it with stdg.depth.precompute.prepare_hha'
    with pytest.raises(FileNotFoundError, match=why): HHAFile(path, ids)
    good = png(np.zeros((48, 64, 3), np.uint8))
    write_packed(path, 'png', [good, good[:-30], b'GIF89a', png(np.zeros((8, 5000, 3), np.uint8)),
                               png(np.zeros((8, 8), np.uint8)), b''], image_ids=ids)
    file = HHAFile(path, ids)
    assert file[0].shape == (3, 48, 64)
    for row in range(1, 6):
        why = f'hha_64_x.h5: the picture of image {100 + row} is damaged'
        with pytest.raises(ValueError, match=why): file[row]
    with pytest.raises(ValueError, match='hha_64_x.h5 was made for other images: remove it'):
        HHAFile(path, ids[::-1])
    write_packed(path, 'png', [good] * 5)
    h5py.File(path, 'r+').create_dataset('image_ids', data=ids)
    with pytest.raises(ValueError, match='hha_64_x.h5 has 5 pictures for 6 images'):
        HHAFile(path, ids)
    with h5py.File(path, 'w') as file: file['image_ids'] = ids
    with pytest.raises(ValueError, match="hha_64_x.h5 has no dataset 'hha'"): HHAFile(path, ids)
    with pytest.raises(ValueError, match="hha_64_x.h5 has no dataset 'hha'"):
        prepare_hha(database, 'x', progress=False)


def test_bad_sources(database, tmp_path):
    bare = make_database(tmp_path/'bare', with_depth=False)
    with pytest.raises(ValueError, match='imdb_64.h5 has no depth'):
        prepare_hha(bare, progress=False)
    why = r"'sonar' is unknown; there are metric, relative, the depth files \[\] of"
    with pytest.raises(ValueError, match=why): prepare_hha(bare, 'sonar', progress=False)
    with pytest.raises(ValueError, match="'relative' can't name a depth file"):
        prepare_hha(bare, tmp_path/'relative', progress=False)
    with pytest.raises(ValueError, match='relative: the database has its own cameras'):
        prepare_hha(database, 'relative', released=True, progress=False)
    with pytest.raises(ValueError, match='metric: the database has its own cameras'):
        prepare_hha(database, camera=np.eye(3), progress=False)
    maps = [depth.inverse_depth_from(database.depth(i), rng=i) for i in range(6)]
    maps[4] = maps[4].T
    write_maps(database, 'turned', maps)
    why = 'HHA of image 104 from turned: the map has 48 x 64 pixels, its picture 64 x 48'
    with pytest.raises(ValueError, match=why): prepare_hha(database, 'turned', progress=False)
    file = write_maps(database, 'nan', maps[:4] + maps[:2])
    with h5py.File(file, 'r+') as data: data['depth'][3072 * 2] = np.nan
    with pytest.raises(ValueError, match='depth_nan.h5: the depth of image 102 has NaN'):
        prepare_hha(database, 'nan', progress=False)
    with pytest.raises(ValueError, match='depth_nan.h5 was made for other images'):
        prepare_hha(make_database(tmp_path/'db', 5), 'nan', progress=False)
    assert not [p.name for folder in (database, bare) for p in folder.folder.iterdir()
                if p.name.startswith('hha')], 'nothing is left'


def test_maps_without_depth_are_counted_and_named(database):
    maps = [depth.inverse_depth_from(database.depth(i), rng=i) for i in range(6)]
    maps[3] = np.zeros_like(maps[3])
    maps[5] = np.ones_like(maps[5])
    write_maps(database, 'dark', maps)
    why = 'hha_64_dark.*h5: 2 of 6 images have no depth, their map is constant: 103, 105'
    for released in (False, True):
        with pytest.warns(UserWarning, match=why):
            pictures = prepared(database, 'dark', released=released)
        assert np.ptp(pictures[2]) > 0
        assert (pictures[3][..., 0] == 218).all() and (pictures[3][..., 2] == 255).all()


def test_a_map_of_the_wrong_kind_of_shape_is_no_estimate():
    with pytest.raises(ValueError, match='Is one of them turned'):
        hha_of_estimate(np.random.default_rng(0).random((30, 64)).astype(np.float32), (48, 64))


if __name__ == '__main__': worker(sys.argv[1])
