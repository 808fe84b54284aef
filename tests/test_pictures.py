"""Pictures: checks and scalings that are killed, every problem named, and pixels equal to Pillow's
own."""
import io
import itertools
import os
import signal
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from sample_pictures import CAT, FORK, forks, saved, small, zipped

from stdg.datasets import images, listing
from stdg.datasets.images import make_images, scaled_size
from stdg.datasets.listing import check_pictures, read_listing
from stdg.datasets.vg_files import annotation_file
from stdg.datasets.visual_genome import Database
from stdg.graph import Vocabulary
from stdg.io.archives import open_sources, picture_size, read_picture

# Checking

def plain(n, start=0): return [(start + i, f'{start + i}.jpg', 40, 30) for i in range(n)]

def archive(tmp_path, n=12):
    members = [(f'VG_100K/{i}.jpg', saved(small(i), quality=95)) for i in range(n)]
    return open_sources([zipped(tmp_path/'images.zip', members)])

def check(folder, entries, sources, **options):
    return check_pictures(folder, entries, sources, progress=False, **options)


def test_every_problem_is_counted_and_named(tmp_path):
    sources = archive(tmp_path)
    good = plain(2) + [(2, '2.jpg', None, None), (3, '3.jpg', 40, None)]
    bad = dict(bad_entry=[('7', '7.jpg', 40, 30), (None, '7.jpg', 40, 30), (7.5, '7.jpg', 40, 30),
                          (2**31, '7.jpg', 40, 30), (7, None, 40, 30), (7, '', 40, 30),
                          (7, '\ud800.jpg', 40, 30),
                          (7, '7.jpg', 0, 30), (7, '7.jpg', 40, -30), (7, '7.jpg', '40', 30),
                          (7, '7.jpg', float('nan'), 30), (7, '7.jpg'), {'id': 7}, 7],
               duplicate_id=[(2, '5.jpg', 40, 30)],
               missing=[(50, '50.jpg', 40, 30), (51, '../../../etc/passwd', None, None)],
               wrong_size=[(8, '8.jpg', 41, 30), (9, '9.jpg', 30, 40)])
    entries = good + list(itertools.chain.from_iterable(bad.values()))
    report = check(tmp_path/'db', entries, sources)
    assert report['counts'] == {kind: len(bad.get(kind, [])) for kind in listing.PROBLEMS}
    assert report['pictures'] == 4 and report['entries'] == len(entries)
    text = ' '.join(itertools.chain.from_iterable(report['problems'].values()))
    for part in ("entry 4, ('7', '7.jpg'", 'image 2 (entry 18, 5.jpg) occurs before', 'image 50: 50.jpg',
                 'image 8: VG_100K/8.jpg has 40 x 30 pixels, 41 x 30 are announced',
                 '30 x 40 are announced (is it to be turned'):
        assert part in text
    assert read_listing(tmp_path/'db').image_ids.tolist() == [0, 1, 2, 3]


def test_visual_genome_counts_and_the_four_known_files(tmp_path):
    ids = (1591, 1592, 1722, 4616, 4617, 4618)
    members = [(f'VG_100K/{i}.jpg', saved(small(i))) for i in ids]
    sources = open_sources([zipped(tmp_path/'images.zip', members)])
    entries = [(i, f'{i}.jpg', 40, 30) for i in ids]
    report = check(tmp_path/'db', entries, sources, skip=listing.VG_CORRUPTED, expected=listing.VG_EXPECTED)
    assert report['skipped'] == [1592, 1722, 4616, 4617] and not any(report['counts'].values())
    assert report['warnings'][:2] == ['6 entries, 108,077 are expected',
                                      '2 sound pictures, 108,073 are expected']
    found = read_listing(tmp_path/'db')
    assert found.image_ids.tolist() == [1591, 4618] and found.valid_idx.tolist() == [0, 5]
    again = check(tmp_path/'db', entries, sources, skip=listing.VG_CORRUPTED, expected=(6, 2))
    assert again['warnings'] == []


def test_nothing_there_is_an_error_and_leaves_the_listing_alone(tmp_path):
    sources = archive(tmp_path)
    check(tmp_path/'db', plain(3), sources)
    before = (tmp_path/'db'/'pictures.h5').read_bytes()
    for entries, why in [([], 'there are no entries'), (plain(3, 90), "'missing': 3.*image 90: 90.jpg"),
                         ([(1, '1.jpg', 9, 9)], "'wrong_size': 1")]:
        with pytest.raises(ValueError, match=f'none is there and whole.*images.zip.*{why}'):
            check(tmp_path/'db', entries, sources)
    assert (tmp_path/'db'/'pictures.h5').read_bytes() == before


def test_too_little_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(listing.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=10_000))
    report = check(tmp_path/'db', plain(3), archive(tmp_path))
    assert 'are needed at the peak, 0.0 GB are free' in report['warnings'][0]
    assert report['disk']['needed']['peak'] > report['disk']['free'] == 10_000


def test_the_same_check_is_not_done_twice_another_one_is(tmp_path, monkeypatch):
    folder, decoded = tmp_path/'own', []
    folder.mkdir()
    for i in range(4): (folder/f'{i}.jpg').write_bytes(saved(small(i)))
    (folder/'2.jpg').write_bytes(saved(small(2))[:-200])
    noted = lambda data, bound: decoded.append(1) or picture_size(data, bound)
    monkeypatch.setattr(listing, 'picture_size', noted)
    def again(entries): return check(tmp_path/'db', entries, open_sources([folder]))
    first = again(plain(4))
    assert first['counts']['unreadable'] == 1 and len(decoded) == 4
    assert again(iter(plain(4)))['problems'] == first['problems'] and len(decoded) == 4
    (folder/'2.jpg').write_bytes(saved(small(2)))
    assert again(plain(4))['pictures'] == 4 and len(decoded) == 8
    assert again(plain(4)[::-1])['pictures'] == 4 and len(decoded) == 12
    assert read_listing(tmp_path/'db').image_ids.tolist() == [3, 2, 1, 0]
    (tmp_path/'db'/'check.json').write_text('{"inputs"')
    with pytest.raises(ValueError, match='check.json is not whole JSON.*Remove it and check again'):
        check(tmp_path/'db', plain(4), open_sources([folder]))


def _until_killed(function, number, folder):
    "In a child: small parts, and the end of the process when picture `number` is asked for."
    left = itertools.count(1)
    def counted(read):
        def call(*args):
            if next(left) > number: os.kill(os.getpid(), signal.SIGKILL)
            return read(*args)
        return call
    listing._CHECKED, images._PART = 4, dict(jpeg=4, canvas=4)
    listing.picture_size, listing.read_picture = counted(picture_size), counted(read_picture)
    function(folder)


def killed(function, number, folder):
    child = FORK.Process(target=_until_killed, args=(function, number, folder))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@forks
def test_a_killed_check_goes_on(tmp_path, monkeypatch):
    sources, decoded = archive(tmp_path, 22), []
    killed(lambda folder: check(folder, plain(22), sources, workers=1), 11, tmp_path/'db')
    assert not (tmp_path/'db'/'pictures.h5').exists() and not (tmp_path/'db'/'check.json').exists()
    monkeypatch.setattr(listing, '_CHECKED', 4)
    noted = lambda data, bound: decoded.append(1) or picture_size(data, bound)
    monkeypatch.setattr(listing, 'picture_size', noted)
    report = check(tmp_path/'db', plain(22), sources)
    # one worker runs a few pictures ahead of the part that it fills
    assert len(decoded) in (14, 18) and report['pictures'] == 22
    assert sorted(path.name for path in (tmp_path/'db').iterdir()) == ['check.json', 'pictures.h5']
    check(tmp_path/'whole', plain(22), sources)
    for a, b in zip(vars(read_listing(tmp_path/'db')).values(),
                    vars(read_listing(tmp_path/'whole')).values()):
        assert np.array_equal(a, b)


# Scaling

@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([32, 512, 1024]))
def test_scaled_sizes_are_the_truncated_ones(w, h, size):
    f = size / max(w, h)
    (rows,), (cols,) = scaled_size(np.array([h], np.int32), np.array([w], np.int32), size)
    assert (rows, cols) == (max(int(h * f), 1), max(int(w * f), 1))
    assert size - 1 <= max(rows, cols) <= size


def stored(path):
    with h5py.File(path) as file: return {name: file[name][:] for name in file}

def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype
                                        for k in a)


@forks
@pytest.mark.parametrize('layout', ['jpeg', 'canvas'])
def test_killed_twice_and_in_three_shards_it_is_the_same_file(tmp_path, layout, monkeypatch):
    sources = archive(tmp_path, 22)
    for name in ('db', 'whole', 'shards'): check(tmp_path/name, plain(22), sources)
    whole = stored(make_images(tmp_path/'whole', sources, 32, layout, progress=False))
    for number in (7, 9):
        killed(lambda folder: make_images(folder, sources, 32, layout, workers=1, progress=False),
               number, tmp_path/'db')
    assert not (tmp_path/'db'/'imdb_32.h5').exists()
    monkeypatch.setattr(images, '_PART', dict(jpeg=4, canvas=4))
    read = []
    noted = lambda data, bound: read.append(1) or read_picture(data, bound)
    monkeypatch.setattr(listing, 'read_picture', noted)
    path = make_images(tmp_path/'db', sources, 32, layout, progress=False)
    assert same(stored(path), whole) and 6 <= len(read) <= 18
    made = [make_images(tmp_path/'shards', sources, 32, layout, shard=(i, 3), progress=False)
            for i in (2, 0, 1)]
    assert made[:2] == [None, None] and same(stored(made[2]), whole)
    read.clear()
    (tmp_path/'shards'/'imdb_32-parts').mkdir()  # left by a kill after the joining
    again = make_images(tmp_path/'shards', sources, 32, layout, shard=(0, 3), progress=False)
    assert again == made[2] and not read
    there = sorted(path.name for path in (tmp_path/'shards').iterdir())
    assert there == ['check.json', 'imdb_32.h5', 'pictures.h5']


def test_two_shards_may_end_at_the_same_moment(tmp_path, monkeypatch):
    sources, merge = archive(tmp_path), images.Parts.merge
    check(tmp_path/'db', plain(12), sources)
    def late(self, **columns):
        merge(self, **columns)  # the other shard's
        return merge(self, **columns)
    monkeypatch.setattr(images.Parts, 'merge', late)
    assert make_images(tmp_path/'db', sources, 32, progress=False).exists()


def test_a_broken_part_is_named(tmp_path, monkeypatch):
    sources = archive(tmp_path)
    monkeypatch.setattr(images, '_PART', dict(jpeg=4, canvas=4))
    for layout in listing.LAYOUTS:
        check(tmp_path/layout, plain(12), sources)
        make_images(tmp_path/layout, sources, 32, layout, shard=(0, 2), progress=False)
        part = tmp_path/layout/'imdb_32-parts'/'part-000002.h5'
        data = part.read_bytes()
        part.write_bytes((part.parent/'part-000000.h5').read_bytes())
        with pytest.raises(ValueError, match='part-000002.h5 holds other (pictures|pieces)'):
            make_images(tmp_path/layout, sources, 32, layout, shard=(1, 2), progress=False)
        part.write_bytes(data[:500])
        message = 'part-000002.h5 is not a whole HDF5 file.*Remove it and run the step again'
        with pytest.raises(ValueError, match=message):
            make_images(tmp_path/layout, sources, 32, layout, progress=False)
        part.unlink()
        assert make_images(tmp_path/layout, sources, 32, layout, progress=False).exists()


def test_other_settings_are_refused_by_name(tmp_path):
    sources = archive(tmp_path)
    check(tmp_path/'db', plain(12), sources)
    make_images(tmp_path/'db', sources, 32, progress=False)
    for options, why in [(dict(quality=90), r'quality 95 \(asked: 90\)'),
                         (dict(layout='canvas'), r'layout jpeg \(asked: canvas\)')]:
        with pytest.raises(ValueError, match=f'imdb_32.h5 was made with other settings: .*{why}'):
            make_images(tmp_path/'db', sources, 32, progress=False, **options)
    check(tmp_path/'db', plain(11), sources)
    with pytest.raises(ValueError, match='other image_ids than pictures.h5'):
        make_images(tmp_path/'db', sources, 32, progress=False)
    images.Parts(tmp_path/'db'/'imdb_16.h5', 'jpeg', np.arange(11), layout='jpeg', quality=90)
    message = r'imdb_16-parts holds parts of something else: quality 90 \(asked: 95\)'
    with pytest.raises(ValueError, match=message):
        make_images(tmp_path/'db', sources, 16, progress=False)
    with pytest.raises(ValueError, match='quality 0: JPEG has 1 to 100'):
        make_images(tmp_path/'db', sources, 64, quality=0)
    with pytest.raises(ValueError, match='shard 3/3'):
        make_images(tmp_path/'db', sources, 64, shard=(3, 3), progress=False)


def test_a_picture_that_changed_after_the_check_is_named(tmp_path):
    folder = tmp_path/'own'
    folder.mkdir()
    for i in range(3): (folder/f'{i}.jpg').write_bytes(saved(small(i)))
    sources = open_sources([folder])
    check(tmp_path/'db', plain(3), sources)
    for data, why in [(saved(small(1, (30, 40))), '30 x 40 pixels, 40 x 30 are listed'),
                      (saved(small(1))[:300], 'not read'),
                      (saved(small(1, (80, 60))), '80 x 60 pixels are more')]:
        (folder/'1.jpg').write_bytes(data)
        with pytest.raises(ValueError, match=f'image 1 .1.jpg.: .*{why}.*check again'):
            make_images(tmp_path/'db', sources, 32, progress=False)
    (folder/'1.jpg').unlink()
    with pytest.raises(ValueError, match='image 1 .1.jpg.: .*is refused'):
        make_images(tmp_path/'db', sources, 32, progress=False)
    with pytest.raises(ValueError, match='image 0 is in source 0, 0 are given'):
        make_images(tmp_path/'db', [], 32, progress=False)


def test_database_reads_both_layouts(tmp_path):
    """Grey, CMYK, turned, alpha, upscaled, portrait and a sliver: the canvas is Pillow's own
    scaling to the bit, the JPEG near it."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 8
    alpha = CAT.copy()
    alpha.putalpha(128)
    files = {'1.jpg': saved(CAT, quality=95), '2.jpg': saved(CAT.convert('L')),
             '3.jpg': saved(CAT.convert('CMYK')), '4.jpg': saved(CAT, exif=turned),
             '5.png': saved(alpha, 'PNG'), '6.jpg': saved(CAT.resize((40, 31))),
             '7.jpg': saved(CAT.crop((0, 0, 100, 300))),
             '8.png': saved(CAT.crop((0, 0, 300, 2)), 'PNG')}
    sources = open_sources([zipped(tmp_path/'a.zip', files.items())])
    sides = {4: (300, 451)}
    wanted = {}
    for name, data in files.items():
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode == 'RGBA':
            picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
        f = 128 / max(picture.size)
        size = int(picture.width * f), max(int(picture.height * f), 1)
        wanted[int(name[0])] = np.asarray(picture.convert('RGB').resize(size, Image.Resampling.BILINEAR))
    databases = []
    for layout in listing.LAYOUTS:
        entries = [(int(name[0]), name, *sides.get(int(name[0]), (None, None))) for name in files]
        check(tmp_path/layout, entries, sources)
        make_images(tmp_path/layout, sources, 128, layout, progress=False)
        with annotation_file(tmp_path/layout, Vocabulary(['cat'], ['near']), (128,)) as writer:
            for _ in files: writer.add({128: [[20, 20, 10, 10]]}, [0], [], 0)
        databases.append(Database(tmp_path/layout))
    for i, key in enumerate(wanted):
        packed, canvas = (database.image(i) for database in databases)
        assert np.array_equal(canvas, wanted[key]) and packed.shape == canvas.shape, key
        assert abs(packed.astype(int) - canvas).mean() < 3, key
    assert canvas.shape[0] == 1 and databases[1].image(3).shape == (128, 85, 3)
    assert databases[1].image(5).shape == (99, 128, 3)
    raw = stored(tmp_path/'canvas'/'imdb_128.h5')
    assert raw['images'].shape == (8, 3, 128, 128) and raw['images'].dtype == np.uint8
    assert not raw['images'][0, :, 85:].any()
    rgb = raw['images'][0, ::-1, :85].transpose(1, 2, 0)  # it is blue-green-red in the file
    assert np.array_equal(rgb, wanted[1])
    columns = ('image_ids', 'valid_idx', 'original_heights', 'original_widths', 'image_heights',
               'image_widths')
    assert all(raw[name].dtype == np.int32 for name in columns)
    assert [int(raw[name][3]) for name in columns] == [4, 3, 451, 300, 128, 85]
    other = stored(tmp_path/'jpeg'/'imdb_128.h5')
    assert same({name: raw[name] for name in columns}, {name: other[name] for name in columns})
    with h5py.File(tmp_path/'canvas'/'imdb_128.h5') as file:
        assert file['images'].chunks == (1, 3, 128, 128) and file['images'].compression == 'lzf'


def test_a_hostile_listing_is_refused(tmp_path):
    check(tmp_path/'db', plain(3), archive(tmp_path))
    path = tmp_path/'db'/'pictures.h5'
    data = path.read_bytes()
    def objects(file):
        del file['files']
        file.create_dataset('files', (3,), h5py.string_dtype())
    def linked(file):
        del file['source']
        file['source'] = h5py.ExternalLink('other.h5', '/source')
    def short(file):
        del file['widths']
        file['widths'] = np.zeros(2, np.int32)
    for change, why in [(objects, "'files' holds objects"), (linked, "'source' is a link"),
                        (short, 'do not fit together')]:
        path.write_bytes(data)
        with h5py.File(path, 'r+') as file: change(file)
        with pytest.raises(ValueError, match=f'pictures.h5.*{why}.*check_pictures'):
            read_listing(tmp_path/'db')


@pytest.mark.skipif(not os.environ.get('STDG_FULL_SIZE'), reason='two minutes: STDG_FULL_SIZE=1 runs it')
def test_memory_is_flat(tmp_path):
    """Ten times the pictures: the peak grows by at most 2 kB for each, most of it the archive's
    directory."""
    tiny, peak = saved(Image.new('RGB', (8, 8))), {}
    for n in (5_000, 50_000):
        path = zipped(tmp_path/f'{n}.zip', ((f'VG_100K/{i}.jpg', tiny) for i in range(n)))
        tracemalloc.start()
        sources = open_sources([path])
        assert check(tmp_path/str(n), ((i, f'{i}.jpg', 8, 8) for i in range(n)),
                     sources)['pictures'] == n
        make_images(tmp_path/str(n), sources, 16, progress=False)
        peak[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peak[50_000] - peak[5_000]) / 45_000 < 2_000, peak
