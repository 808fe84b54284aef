"""Sources: archives, folders and pictures made to harm; the quick check finds what the whole
decoding finds."""
import io
import os
import random
import stat
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps
from sample_pictures import CAT, FORK, forks, saved, small, zipped

from stdg.io import archives as sources
from stdg.io.archives import FolderSource, ZipSource, picture_size, read_picture


def patched(path, what, value, entry=0):
    """Change a 2- or 4-byte number of an entry of the archive's directory (and of the header before
    its data, where it has one)."""
    data = bytearray(path.read_bytes())
    at = [i for i in range(len(data)) if data[i:i + 4] == b'PK\1\2'][entry]
    head = struct.unpack_from('<I', data, at + 42)[0]
    form, central, local = dict(flags=('<H', 8, 6), packed=('<I', 20, 18), size=('<I', 24, 22),
                                method=('<H', 10, 8))[what]
    struct.pack_into(form, data, at + central, value)
    struct.pack_into(form, data, head + local, value)
    path.write_bytes(data)
    return path


# Archives and folders

def test_members_made_to_harm_are_refused_and_named(tmp_path):
    jpeg, link, pipe = saved(small(1)), zipfile.ZipInfo('link.jpg'), zipfile.ZipInfo('pipe.jpg')
    link.external_attr, pipe.external_attr = (stat.S_IFLNK | 0o777) << 16, stat.S_IFIFO << 16
    bad = {'../a.jpg': 'leads out', 'x/../../a.jpg': 'leads out', '/etc/a.jpg': 'leads out',
           'C:/a.jpg': 'leads out', 'C:a.jpg': 'leads out', r'a\..\b.jpg': 'leads out',
           'link.jpg': 'a link', 'pipe.jpg': 'a device', 'long' * 300: '1200 bytes',
           'twice.jpg': 'two members'}
    special = {'link.jpg': link, 'pipe.jpg': pipe}
    members = [('VG_100K/', b''), *((special.get(name, name), jpeg) for name in bad),
               ('twice.jpg', b'x'), ('VG_100K/1.jpg', jpeg), ('a..b.jpg', jpeg)]
    source = ZipSource(zipped(tmp_path/'a.zip', members))
    assert list(source.names()) == ['VG_100K/1.jpg', 'a..b.jpg'] and set(source.refused) == set(bad)
    assert source.read('VG_100K/1.jpg') == jpeg
    for name, why in bad.items():
        assert why in source.refused[name]
        with pytest.raises(ValueError, match='a.zip.*is refused'): source.read(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.zip']


@pytest.mark.parametrize('what, value, why', [
    ('flags', 1, 'encrypted'),
    ('size', 2**28 + 1, 'unpacks to 268,435,457 bytes'),
    ('size', 2**24, 'times its size'),
    ('method', 99, 'method 99')])
def test_what_the_directory_declares_is_bounded(tmp_path, what, value, why):
    path = zipped(tmp_path/'a.zip', [('1.jpg', saved(CAT)), ('2.jpg', b'good')])
    source = ZipSource(patched(path, what, value))
    assert list(source.names()) == ['2.jpg']
    with pytest.raises(ValueError, match=f"'1.jpg' is refused: .*{why}"): source.read('1.jpg')


def test_bombs(tmp_path):
    """An honest bomb is refused; one that lies about its size gives no more than it declared, and
    is found damaged."""
    bomb = bytes(50_000_000)
    path = zipped(tmp_path/'a.zip', [('1.jpg', bomb), ('2.jpg', b'good')], zipfile.ZIP_DEFLATED)
    assert 'times its size' in ZipSource(path).refused['1.jpg']
    source = ZipSource(patched(path, 'size', 60_000))
    assert not source.refused
    tracemalloc.start()
    with pytest.raises(ValueError, match="'1.jpg' is damaged .*CRC"): source.read('1.jpg')
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
    assert source.read('2.jpg') == b'good'


def test_methods_without_a_bound_are_refused(tmp_path):
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = zipped(tmp_path/'a.zip', [('1.jpg', bytes(10**6))], method)
        assert list(ZipSource(path).refused) == ['1.jpg']


def test_broken_archives_give_one_clear_error(tmp_path):
    members = [(f'{i}.jpg', saved(small(i))) for i in range(5)]
    whole = zipped(tmp_path/'whole.zip', members).read_bytes()
    path = tmp_path/'cut.zip'
    cuts = [whole[:n] for n in range(0, len(whole) - 1, 97)]
    for data in [b'', b'<html>404</html>', saved(CAT), *cuts]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match='cut.zip is not a whole zip archive.*Fetch it again'):
            ZipSource(path)
    with pytest.raises(FileNotFoundError, match='none.zip is missing'):
        ZipSource(tmp_path/'none.zip')


def test_a_damaged_archive_raises_nothing_but_value_errors(tmp_path):
    members = [(f'{i}.jpg', saved(small(i))) for i in range(3)]
    whole = zipped(tmp_path/'a.zip', members, zipfile.ZIP_DEFLATED).read_bytes()
    rng, opened, damaged = random.Random(0), 0, 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)): data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path/'b.zip').write_bytes(data)
        try: source = ZipSource(tmp_path/'b.zip')
        except ValueError: continue
        opened += 1
        for name in list(source.names()):
            try: assert len(source.read(name)) <= sources.MAX_BYTES
            except ValueError: damaged += 1
    assert opened > 100 and damaged > 100


def read_all(source, names, out): out.put([zlib.crc32(source.read(name)) for name in names])

@forks
def test_handles_do_not_cross_a_fork(tmp_path):
    """Two children and the parent read at the same time; with a common handle they would move each
    other's place."""
    data = {f'{i}.jpg': random.Random(i).randbytes(30_000) for i in range(60)}
    source = ZipSource(zipped(tmp_path/'a.zip', data.items()))
    wanted, out = [zlib.crc32(d) for d in data.values()], FORK.Queue()
    children = [FORK.Process(target=read_all, args=(source, list(data), out)) for _ in range(2)]
    for child in children: child.start()
    for _ in range(3): assert [zlib.crc32(source.read(name)) for name in data] == wanted
    assert [out.get(timeout=60) for _ in children] == [wanted, wanted]
    for child in children: child.join()


def test_threads_share_an_archive(tmp_path):
    data = {f'{i}.jpg': random.Random(i).randbytes(5_000) for i in range(40)}
    source = ZipSource(zipped(tmp_path/'a.zip', data.items(), zipfile.ZIP_DEFLATED))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, list(data) * 10)) == list(data.values()) * 10


def test_a_folder_gives_nothing_from_outside(tmp_path):
    (tmp_path/'in'/'deep').mkdir(parents=True)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'s.jpg').write_bytes(b'secret')
    (tmp_path/'in'/'deep'/'1.jpg').write_bytes(b'one')
    (tmp_path/'in'/'file.jpg').symlink_to('../out/s.jpg')
    (tmp_path/'in'/'folder').symlink_to('../out')
    (tmp_path/'in'/'dead.jpg').symlink_to('nowhere')
    (tmp_path/'in'/'same.jpg').symlink_to(tmp_path/'in'/'deep'/'1.jpg')
    (tmp_path/'in'/'circle').symlink_to('.')
    os.mkfifo(tmp_path/'in'/'pipe.jpg')
    with open(os.fsencode(tmp_path/'in') + b'/\xff.jpg', 'wb') as file: file.write(b'x')
    (tmp_path/'link').symlink_to('in')
    for root in ('in', 'link'):  # the folder itself may be reached by a link
        source = FolderSource(tmp_path/root)
        assert list(source.names()) == ['same.jpg', 'deep/1.jpg']
        assert source.read('same.jpg') == b'one'
        assert 'not UTF-8' in source.refused['\udcff.jpg']
        assert set(source.refused) == {'file.jpg', 'folder', 'dead.jpg', 'circle', 'pipe.jpg',
                                       '\udcff.jpg'}
        for name in ('file.jpg', 'folder/s.jpg', '../out/s.jpg', str(tmp_path/'out'/'s.jpg'),
                     'pipe.jpg'):
            with pytest.raises(ValueError, match='is refused'): source.read(name)
    # changed after it was looked at
    (tmp_path/'in'/'deep'/'1.jpg').unlink()
    (tmp_path/'in'/'deep'/'1.jpg').symlink_to('../../out/s.jpg')
    with pytest.raises(ValueError, match='outside of the folder'): source.read('deep/1.jpg')


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path/'shut').mkdir()
    (tmp_path/'1.jpg').write_bytes(b'x')
    scandir = os.scandir
    def denied(path):
        if str(path).endswith('shut'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', denied)
    source = FolderSource(tmp_path)
    assert list(source.names()) == ['1.jpg']
    assert source.refused == {'shut': 'it cannot be listed (Permission denied)'}


# One picture

def huge(kind):
    """A file without pixels whose header declares 20000 x 10000 of them (16000 x 12500 in WebP,
    which has a bound)."""
    w, h = 20_000, 10_000
    if kind == 'PNG':
        head = b'IHDR' + struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)
        checksum = struct.pack('>I', zlib.crc32(head))
        return (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + head + checksum
                + struct.pack('>I', 9**6) + b'IDAT' + bytes(40))
    data = bytearray(saved(small(0), kind, **dict(lossless=True) if kind == 'WEBP' else {}))
    if kind == 'JPEG': struct.pack_into('>HH', data, data.index(b'\xff\xc0') + 5, h, w)
    if kind == 'BMP': struct.pack_into('<ii', data, 18, w, h)
    if kind == 'WEBP':
        w, h, at = 16_000, 12_500, data.index(b'VP8L') + 9
        rest = struct.unpack_from('<I', data, at)[0] & ~0xfffffff
        struct.pack_into('<I', data, at, rest | (w - 1) | (h - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize('kind', sources.FORMATS)
@pytest.mark.parametrize('read', [read_picture, picture_size])
def test_200_megapixels_are_refused_before_decoding(kind, read, monkeypatch):
    def never(*_): raise AssertionError('it was decoded')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', never)
    why = r'(its|20000 x 10000) pixels are more than 64 megapixels'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match=why): read(huge(kind))


def test_the_bound_is_exact():
    data = saved(small(0, (40, 30)))
    assert read_picture(data, 1200).size == (40, 30) and picture_size(data, 1200) == (30, 40)
    for read in (read_picture, picture_size):
        with pytest.raises(ValueError, match='40 x 30 pixels'): read(data, 1199)


def test_other_formats_are_not_even_tried():
    for kind in ('GIF', 'TIFF', 'PPM', 'ICO'):
        with pytest.raises(ValueError, match='it is none of JPEG, PNG, WEBP, BMP'):
            read_picture(saved(small(0), kind))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_as_exif_asks(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(CAT, kind, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(read_picture(data), wanted.convert('RGB'))
    assert picture_size(data) == wanted.size[::-1]
    assert (wanted.size == CAT.size) == (orientation < 5)


def test_unreadable_exif_counts_as_none():
    for block in (b'Exif\0\0garbage', b'Exif\0\0II*\0\xff\xff\xff\xff',
                  b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + bytes(9)):
        data = saved(CAT, exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert read_picture(data).size == CAT.size and picture_size(data) == CAT.size[::-1]


def test_every_mode_becomes_rgb():
    read = lambda picture, **options: read_picture(saved(picture, 'PNG', **options))
    grey, ramp = CAT.convert('L'), np.arange(256, dtype=np.uint16)
    assert np.array_equal(read(grey), np.repeat(np.asarray(grey)[..., None], 3, 2))
    deep = np.asarray(read(Image.fromarray(np.tile(ramp * 256 + 17, (4, 1)))))
    assert deep[0, :, 1].tolist() == list(range(256))
    assert read(Image.new('1', (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    for mode, colour, seen in [('RGBA', (200, 0, 0, 0), (255, 255, 255)),
                               ('RGBA', (200, 0, 0, 255), (200, 0, 0)),
                               ('RGBA', (0, 0, 0, 51), (204, 204, 204)),
                               ('LA', (9, 0), (255, 255, 255))]:
        assert read(Image.new(mode, (3, 2), colour)).getpixel((1, 1)) == seen
    palette = Image.new('P', (3, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    clear = read(palette, transparency=1)
    assert clear.getpixel((0, 0)) == (255, 255, 255) and clear.getpixel((1, 1)) == (10, 20, 30)
    cmyk = CAT.convert('CMYK')
    back = np.asarray(read_picture(saved(cmyk, quality=95))).astype(int)
    assert abs(back - np.asarray(cmyk.convert('RGB'))).mean() < 3


def variants():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    for picture in (CAT.resize((120, 80)), noise):
        yield from (saved(picture), saved(picture, progressive=True), saved(picture, keep_rgb=True),
                    saved(picture.convert('L')), saved(picture.convert('CMYK')),
                    saved(picture, restart_marker_rows=1), saved(picture, 'PNG'),
                    saved(picture, 'WEBP'), saved(picture, 'BMP'))


def outcome(function, data):
    try: return function(data)
    except ValueError: return None


def test_the_quick_check_finds_what_the_whole_decoding_finds():
    rng, verdicts = random.Random(0), {True: 0, False: 0}
    for data in variants():
        assert picture_size(data) == read_picture(data).size[::-1]
        cuts = [data[:n] for n in [*range(0, len(data), len(data) // 12),
                                   *range(len(data) - 4, len(data))]]
        flips = []
        for _ in range(12):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            flips.append(bytes(flipped))
        for broken in cuts + flips:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                size, picture = outcome(picture_size, broken), outcome(read_picture, broken)
            assert size == (picture and picture.size[::-1]), len(broken)
            verdicts[picture is None] += 1
        assert all(outcome(picture_size, cut) is None for cut in cuts if len(cut) < .95 * len(data))
    assert min(verdicts.values()) > 50
