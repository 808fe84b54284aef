"""A picture gives the same pixels whichever way it comes; depth says what range it has and is asked of
nobody who reads none; one odd picture does not end the work of all."""
import io
import json
import os
import re
import struct
import zipfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stdg import evaluation, train, training
from stdg.augmentation import FILL
from stdg.data import SceneGraphs
from stdg.datasets import images
from stdg.datasets.images import make_images
from stdg.datasets.listing import check_pictures, read_listing
from stdg.datasets.visual_genome import Database
from stdg.depth import sensors
from stdg.depth.depth_file import DepthFile
from stdg.depth.estimators import import_pfm
from stdg.depth.maps import write_pfm
from stdg.depth.sensors import depth_report, depth_said, read_depth, write_depth
from stdg.explore.scene import read_scene, upload_scene
from stdg.inference.predictor import predict, read_image, read_member
from stdg.io.archives import open_sources
from stdg.model import STDG
from stdg.testing import loud, toy_database, toy_scene
from stdg.training.settings import Settings

# Reading

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY, ALPHA = COLOUR[..., 0], RNG.integers(0, 256, (5, 7), np.uint8)
ALPHA[0] = 0, 255, 0, 255, 128, 1, 254


def saved(picture, kind='PNG', **options):
    picture.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def deep_png(values):
    "The bytes of a PNG with 16 bits a channel, (H, W) or (H, W, 2, 3 or 4), written by hand."
    h, w, *channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels[0] if channels else 1]
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, colour, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def on_white(colours, alpha):
    "Colours over white, as real numbers; both uint8."
    a = alpha[..., None] / 255
    return colours * a + 255 * (1 - a)


def three(grey): return np.repeat(np.asarray(grey)[..., None], 3, 2)


def exif(turn):
    block = Image.Exif()
    block[0x0112] = turn
    return block


def palette(**options):
    picture = Image.new('P', (7, 5))
    picture.putdata((GREY % 4).ravel().tolist())
    picture.putpalette([9, 8, 7, 200, 10, 20, 30, 220, 40, 1, 2, 250])
    return saved(picture, **options)


PALETTE = np.array([[9, 8, 7], [200, 10, 20], [30, 220, 40], [1, 2, 250]], np.uint8)
# by EXIF orientation, what is seen, written out: the stored rows and columns go ...
TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1),
         7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1)}


def kinds():
    "Name to (bytes of the file, what is to be seen (H, W, 3), the same as an array or None)."
    found = {}
    for n, turn in TURNS.items():
        found[f'turned {n}'] = saved(Image.fromarray(COLOUR), exif=exif(n)), turn(COLOUR), None
    lossless = saved(Image.fromarray(COLOUR), 'WEBP', lossless=True, exif=exif(6))
    found['turned webp'] = lossless, TURNS[6](COLOUR), None
    grey_turned = saved(Image.fromarray(GREY), exif=exif(8))
    found['turned grey'] = grey_turned, three(TURNS[8](GREY)), None
    deep_turned = saved(Image.fromarray(GREY.astype(np.uint16) * 16), exif=exif(5))
    found['turned 12 bits'] = deep_turned, three(TURNS[5](GREY)), None
    clear_turned = saved(Image.fromarray(np.dstack([COLOUR, ALPHA])), exif=exif(7))
    found['turned alpha'] = clear_turned, TURNS[7](on_white(COLOUR, ALPHA)), None
    found['rgb'] = saved(Image.fromarray(COLOUR)), COLOUR, COLOUR
    found['bmp'] = saved(Image.fromarray(COLOUR), 'BMP'), COLOUR, COLOUR
    found['grey'] = saved(Image.fromarray(GREY)), three(GREY), GREY
    bits = GREY > 127
    found['one bit'] = saved(Image.fromarray(bits)), three(np.where(bits, 255, 0)), bits
    for n in (9, 10, 12, 14, 16):
        deep = GREY.astype(np.uint16) << n - 8
        deep[0, 0] = 2**n - 1
        # upper eight of the bits in use, which are 8, 10, 12, 14 or 16
        seen = deep >> {9: 2}.get(n, n - 8)
        found[f'grey of {n} bits'] = saved(Image.fromarray(deep)), three(seen), deep
        found[f'grey of {n} bits, last axis'] = deep_png(deep), three(seen), deep[..., None]
    for n in (12, 16):
        deep = COLOUR.astype(np.uint16) << n - 8
        deep[0, 0] = 2**n - 1
        found[f'rgb of {n} bits'] = deep_png(deep), deep >> n - 8, deep
        opaque = np.dstack([deep, np.full((5, 7), 2**n - 1, np.uint16)])
        found[f'rgba of {n} bits'] = deep_png(opaque), deep >> n - 8, opaque
    found['12 bits, opaque in 16'] = (deep_png(np.dstack([COLOUR.astype(np.uint16) * 16,
                                                          np.full((5, 7), 65535)])), COLOUR, None)
    clear = np.dstack([COLOUR, ALPHA])
    found['rgba'] = saved(Image.fromarray(clear)), on_white(COLOUR, ALPHA), clear
    found['rgba webp'] = (saved(Image.fromarray(clear), 'WEBP', lossless=True, exact=True),
                          on_white(COLOUR, ALPHA), clear)
    both = np.dstack([GREY, ALPHA])
    found['grey and alpha'] = saved(Image.fromarray(both)), on_white(three(GREY), ALPHA), both
    found['palette'] = palette(), PALETTE[GREY % 4], None
    hole = PALETTE.copy()
    hole[1] = 255
    found['palette, one clear'] = palette(transparency=1), hole[GREY % 4], None
    half = on_white(PALETTE, np.array([255, 0, 128, 255]))
    found['palette of alphas'] = palette(transparency=bytes([255, 0, 128])), half[GREY % 4], None
    keyed = np.where(GREY == GREY[2, 2], 255, GREY)
    key = int(GREY[2, 2])
    found['grey, one clear'] = saved(Image.fromarray(GREY), transparency=key), three(keyed), None
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    moving = dict(save_all=True, append_images=[second], lossless=True)
    found['animated webp'] = saved(first, 'WEBP', **moving), COLOUR, None
    found['animated png'] = (saved(first, save_all=True, append_images=[second]), COLOUR, None)
    profile = saved(first, icc_profile=b'not a profile at all')
    found['with a colour profile'] = profile, COLOUR, None
    flat = Image.new('RGB', (16, 16), (200, 30, 60))
    ink = flat.convert('CMYK')
    found['cmyk jpeg'] = saved(ink, 'JPEG', quality=100), np.full((16, 16, 3), (200, 30, 60)), None
    two = saved(flat, 'MPO', save_all=True, append_images=[flat], quality=100)
    found['two jpegs in one'] = two, np.full((16, 16, 3), (200, 30, 60)), None
    return found


KINDS = kinds()


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "All kinds as files of a folder, in a zip archive of the same, and as pictures of a database."
    place = tmp_path_factory.mktemp('shelf')
    (place/'own').mkdir()
    with zipfile.ZipFile(place/'own.zip', 'w') as archive:
        for name, (data, *_) in KINDS.items():
            (place/'own'/f'{name}.png').write_bytes(data)
            archive.writestr(f'{name}.png', data)
    entries = [(i, f'{name}.png', None, None) for i, name in enumerate(KINDS)]
    sources = open_sources([place/'own'])
    check_pictures(place/'db', entries, sources, progress=False)
    listing = read_listing(place/'db')
    assert len(listing) == len(KINDS)
    listed = {name: listing.picture(sources, i) for i, name in enumerate(KINDS)}
    return SimpleNamespace(place=place, listed=listed)


def ways(shelf, name):
    "Yield (how, (3, H, W)) of every way in which the picture `name` can be given."
    data, _, array = KINDS[name]
    path = shelf.place/'own'/f'{name}.png'
    yield 'file', read_image(path)
    yield 'file by text', read_image(str(path))
    for where in ('own', 'own.zip'):
        source, = open_sources([shelf.place/where])
        yield where, read_member(source, f'{name}.png')
    with Image.open(path) as opened: yield 'opened', read_image(opened)
    if name not in ('rgb of 12 bits', 'rgba of 12 bits', '12 bits, opaque in 16'):
        # once decoded, Pillow has the upper bytes alone
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        yield 'decoded', read_image(loaded)
    yield 'read again', read_image(Image.fromarray(read_image(path).permute(1, 2, 0).numpy()))
    yield 'prepared for training', read_image(shelf.listed[name])
    yield 'uploaded', torch.from_numpy(upload_scene(data, name).picture.copy()).permute(2, 0, 1)
    if array is None: return
    yield 'array', read_image(array)
    yield 'tensor', read_image(torch.from_numpy(array))
    yield 'in reverse in memory', read_image(np.ascontiguousarray(array[::-1])[::-1])
    if array.dtype == np.uint16: yield 'big-endian', read_image(array.astype('>u2'))
    if array.ndim == 3 and array.shape[2] != 2:
        yield 'channels first', read_image(array.transpose(2, 0, 1))


@pytest.mark.parametrize('name', KINDS)
def test_the_same_pixels_from_every_way(shelf, name):
    expected = torch.from_numpy(np.array(KINDS[name][1], float)).permute(2, 0, 1)
    slack = 3 if 'jpeg' in name else 1 if 'alpha' in name or 'rgba' in name else 0
    first = None
    for way, seen in ways(shelf, name):
        assert seen.dtype == torch.uint8 and seen.shape == expected.shape, way
        assert (seen - expected).abs().max() <= slack, (way, seen[:, 0, :3], expected[:, 0, :3])
        if first is None: first = seen
        assert torch.equal(seen, first), way


def test_other_pil_pictures(tmp_path):
    "What no file of ours holds, but another program's picture may."
    gif = saved(Image.fromarray(GREY), 'GIF', save_all=True, append_images=[Image.fromarray(255 - GREY)])
    assert torch.equal(read_image(Image.open(io.BytesIO(gif))), read_image(GREY))
    assert torch.equal(read_image(Image.fromarray(GREY.astype(np.int32) * 257)), read_image(GREY))
    for order in '<>':
        deep = (GREY.astype(np.uint16) * 257).astype(f'{order}u2').tobytes()
        mode = {'<': 'I;16', '>': 'I;16B'}[order]
        assert torch.equal(read_image(Image.frombytes(mode, (7, 5), deep)), read_image(GREY)), order
    for mode in ('YCbCr', 'HSV', 'RGBX', 'CMYK', 'La', 'RGBa', 'PA'):
        flat = Image.new({'La': 'LA', 'RGBa': 'RGBA', 'PA': 'P'}.get(mode, 'RGB'), (4, 3), 0)
        assert read_image(flat.convert(mode)).shape == (3, 3, 4), mode
    source = Image.fromarray(COLOUR)
    before = source.tobytes(), dict(source.info)
    read_image(source)[:] = 0
    assert (source.tobytes(), dict(source.info)) == before, "another's picture is left as it is"


@pytest.mark.parametrize('wrong, why', [
    (COLOUR / 255, 'float64'), (torch.rand(3, 5, 7), 'float32'), (COLOUR.astype(np.int64), 'int64'),
    (torch.rand(3, 5, 7).bfloat16(), 'bfloat16'), (COLOUR[None], r'\(1, 5, 7, 3\)'),
    (COLOUR[:0], r'\(0, 7, 3\)'), (np.zeros((5, 6, 5), np.uint8), r'\(5, 6, 5\)'), (None, 'object')])
def test_arrays_that_are_no_picture(wrong, why):
    with pytest.raises(ValueError, match=f'this is .*{why}.*White is 255'): read_image(wrong)


@pytest.mark.parametrize('wrong, why', [
    (Image.new('F', (3, 2)), 'its pixels are floating-point numbers .mode F.*White is 255'),
    (Image.fromarray(np.full((2, 3), 70_000, np.int32)), 'its pixels go from 70000 to 70000'),
    (Image.fromarray(np.full((2, 3), -1, np.int32)), 'its pixels go from -1'),
    (Image.new('1', (9000, 8000)), '9000 x 8000 pixels are more than 64 megapixels.*Scale it down')])
def test_pil_pictures_that_are_refused(wrong, why):
    with pytest.raises(ValueError, match=f'the picture is not read: {why}'): read_image(wrong)


def broken():
    sound = saved(Image.fromarray(RNG.integers(0, 256, (60, 80, 3), np.uint8)))
    large = saved(Image.new('1', (9000, 8000)))
    return dict(empty=b'', cut=sound[:3000], cut_early=sound[:40], text=b'not a picture at all',
                large=large, gif=saved(Image.fromarray(GREY), 'GIF'))


@pytest.mark.parametrize('name', broken())
def test_what_is_broken_is_told_in_the_same_line(tmp_path, name):
    data, path = broken()[name], tmp_path/'own'/'a.png'
    path.parent.mkdir()
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path/'own.zip', 'w', zipfile.ZIP_STORED) as archive:
        archive.writestr('a.png', data)
    said = []
    for where in ('own', 'own.zip'):
        source, = open_sources([tmp_path/where])
        said.append((read_member, (source, 'a.png'), 'a.png'))
    said.append((read_image, (path,), str(path)))
    lines = set()
    for function, given, begins in said:
        with pytest.raises(ValueError) as caught: function(*given)
        line = str(caught.value)
        assert line.startswith(f'{begins}: the picture is not read: ') and '\n' not in line
        lines.add(line.removeprefix(begins))
    try: opened = Image.open(path, formats=['PNG'])
    except Image.UnidentifiedImageError: opened = None  # Pillow has refused it
    if opened is not None:
        with pytest.raises(ValueError) as caught: read_image(opened)
        lines.add(str(caught.value).removeprefix(str(path)))
    assert len(lines) == 1, lines
    remedy = 'Scale it down' if name == 'large' else 'Is it whole, and one of JPEG'
    assert remedy in lines.pop()


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='is missing, or is no file'): read_image(tmp_path)
    os.mkfifo(tmp_path/'pipe.jpg')
    with pytest.raises(FileNotFoundError, match='pipe.jpg'): read_image(tmp_path/'pipe.jpg')
    with open(tmp_path/'vast.jpg', 'wb') as file: file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match='vast.jpg has more than 268,435,456 bytes'):
        read_image(tmp_path/'vast.jpg')


# The order of channels around a picture

def tiny(order='RGB', mode='rgb'):
    torch.manual_seed(0)
    return loud(STDG('small', mode, n_objects=2, n_predicates=2, pretrained=False, fpn=16,
                     channels=16, colour_order=order)).eval()


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    "Six toy scenes, wider than high, without depth."
    scenes = []
    for i in range(6):
        graph, record = toy_scene(i, (48, 64))
        scenes.append((graph, {name: record[name] for name in ('image', 'image_id')}))
    return toy_database(tmp_path_factory.mktemp('wide'), scenes).folder


def what_is_read(model, work):
    "The pictures, as bytes in the order of the network's channels, that reach `model` in `work()`."
    found = []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    def note(module, given):
        found.append(((given[0] * std + mean) * 255).round().byte())
    hook = model.network.register_forward_pre_hook(note)
    try: work()
    finally: hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize('released', [False, True])
@pytest.mark.parametrize('order', ['RGB', 'BGR'])
def test_prediction_sees_what_training_and_evaluation_see(wide, tmp_path, order, released):
    model = tiny(order)
    database = Database(wide, released=released)
    test = SceneGraphs(database, 'test')
    n, stored = len(test), [database.image(row) for row in test.rows]
    expected = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, 64, 64)
    channels = slice(None, None, 1 if order == 'RGB' else -1)
    for i, picture in enumerate(stored):
        own = torch.from_numpy(picture[..., channels].copy()).permute(2, 0, 1)
        expected[i, :, 8:56] = own
    evaluated = what_is_read(model, lambda: list(evaluation.predictions(
        model, test, device='cpu', batch_size=n, progress=False)))
    assert torch.equal(evaluated, expected), 'evaluation'
    predicted = what_is_read(model, lambda: predict(list(stored), model, 64, device='cpu'))
    assert torch.equal(predicted, expected), 'prediction'
    scene = upload_scene(saved(Image.fromarray(stored[0])), 'one')
    looked = what_is_read(model, lambda: read_scene(scene, model, database.vocabulary, 64))
    assert torch.equal(looked, expected[:1]), 'explorer'
    plain = SceneGraphs(database, 'test', train=True, augment=False, stride=model.stride)
    trained = what_is_read(model, lambda: training.fit(
        model, plain, tmp_path, 'control', device='cpu', batch_size=n, epochs=1, lr=0., ema=1.,
        progress=False))
    # in training the order of the samples is drawn
    key = lambda pictures: sorted(picture.numpy().tobytes() for picture in pictures)
    assert key(trained) == key(expected), 'training'


def test_a_sample_of_the_usual_order_is_unchanged(wide):
    usual, old = (SceneGraphs(Database(wide, released=released), 'test') for released in (False, True))
    assert usual.seen_by(tiny()) is usual and old.seen_by(tiny('BGR')) is old
    assert usual.seen_by(tiny('BGR')).fingerprint() != usual.fingerprint()
    assert usual[0]['rgb'][:, 0, 0].tolist() == [*FILL]
    assert old[0]['rgb'][:, 0, 0].tolist() == [*FILL[::-1]]


# Depth is asked of those alone that read it

@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "A project's folder, in which the commands work."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data').mkdir()
    return tmp_path


def flat_settings(folder, **options):
    return Settings(**dict(name='flat', data=str(folder), size=64, epochs=1, batch_size=2, device='cpu',
                           pretrained=False, decay=[]) | options)


def test_a_run_that_reads_no_depth_needs_none(wide, at_home, capsys):
    "The control, a student of colours, what is chosen and validated for them, a dry run."
    settings = flat_settings(wide, stages=['teacher', 'control', 'student'], validate_every=1,
                             overfit=2, best='sgdet/R@20')
    train.write_settings(at_home/'run.yaml', settings)
    train.main(['--config', 'run.yaml', '--stages', 'control'])
    kept = at_home/'runs'/'flat'/'control.safetensors'
    facts = json.loads(kept.with_suffix('.json').read_text())
    assert 'thresholds' in facts and not list(wide.glob('hha*'))
    taught = replace(settings, name='taught', stages=['student'], teacher=str(kept))
    prepared = train.prepare_run(taught)
    assert train.train_stage(taught, 'student', prepared).teacher_reads == 'rgb'
    train.write_settings(at_home/'alone.yaml', replace(settings, name='alone', stages=['control']))
    assert list(train.main(['--config', 'alone.yaml', '--dry-run'])) == ['control']
    assert list(train.main(['--config', 'run.yaml', '--dry-run', '--stages', 'control'])) == ['control']
    assert not list(wide.glob('hha*'))


@pytest.mark.parametrize('options', [dict(stages=['teacher']), dict(stages=['control', 'student']),
                                     dict(stages=['student'], teacher='random', steps=1)])
def test_depth_that_is_read_and_not_there_is_named(wide, at_home, options):
    settings = flat_settings(wide, **dict(teacher='random') | options)
    if 'control' in options['stages']: train.prepare_run(settings, ['control'])
    stage = options['stages'][-1]
    why = f"has no depth of its own .depth_source 'metric'.*the stage '{stage}' reads it.*control"
    with pytest.raises(ValueError, match=why): train.prepare_run(settings)


# The range of depth

SLOPE = np.linspace(4, 1, 40)[:, None].repeat(60, 1).astype(np.float32)  # metres, nearer below


def map_file(folder, depth, name='a.png', unit=.001):
    "A depth map in metres as a file of that kind."
    if name.endswith('.npy'): np.save(folder/name, depth)
    elif name.endswith('.pfm'): write_pfm(folder/name, depth)
    else: Image.fromarray(np.rint(depth / unit).astype(np.uint16)).save(folder/name)
    return folder/name


@pytest.mark.parametrize('scale, name, why', [
    (1000, 'a.npy', 'a depth of 4000 m'), (1000, 'a.pfm', 'a depth of 4000 m'),
    (100, 'a.npy', 'half of its pixels are farther than 250 m'),
    (60, 'a.pfm', 'half of its pixels are farther than 150 m'),
    (.001, 'a.npy', 'nearly all of its pixels are nearer than 0.00'),
    (.01, 'a.png', 'nearly all of its pixels are nearer than 0.0'),
    (0, 'a.png', 'every pixel is missing'), (0, 'a.npy', 'every pixel is missing'),
    (np.nan, 'a.npy', 'every pixel is missing'), (np.inf, 'a.pfm', 'every pixel is missing'),
    (-1, 'a.npy', 'a depth is negative')])
def test_a_range_that_no_room_and_no_street_has(tmp_path, scale, name, why):
    with pytest.raises(ValueError, match=f'{name}: .*{why}') as caught:
        read_depth(map_file(tmp_path, SLOPE * scale, name))
    if 'missing' not in why: assert '--unit' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('scale', [.1, 1, 5, 20])
def test_rooms_and_streets_are_read(tmp_path, scale):
    deep = np.where(SLOPE > 3.5, 0, SLOPE * scale)
    for name in ('a.npy', 'a.pfm', 'a.png'):
        unit = .001 if scale <= 10 else .01
        np.testing.assert_allclose(read_depth(map_file(tmp_path, deep, name, unit), unit), deep,
                                   atol=unit)
    with pytest.raises(ValueError, match='unit 0: the metres that a step'):
        read_depth(tmp_path/'a.png', 0)


def test_units_by_name(tmp_path):
    "Tenths of a millimetre are read right with the unit that the note names."
    path = map_file(tmp_path, SLOPE, unit=.0001)
    np.testing.assert_allclose(read_depth(path), 10 * SLOPE, rtol=1e-3)
    np.testing.assert_allclose(read_depth(path, .0001), SLOPE, rtol=1e-3)


@pytest.mark.parametrize('turn', range(1, 9))
def test_a_map_is_turned_by_its_own_tag(tmp_path, turn):
    stored = (SLOPE * 1000).astype(np.uint16)
    stored[0, 0] = 7
    Image.fromarray(stored).save(tmp_path/'a.png', exif=exif(turn))
    upright = stored if turn == 1 else TURNS[turn](stored)
    np.testing.assert_allclose(read_depth(tmp_path/'a.png'), upright * .001, rtol=1e-6)


def listed(n, size=(40, 60)):
    return SimpleNamespace(image_ids=np.arange(n) + 10, heights=np.full(n, size[0]),
                           widths=np.full(n, size[1]))


def write_maps(folder, depths, name='png', unit=.001, **options):
    files = {}
    for i, depth in enumerate(depths):
        file = f'{i}.{name}'
        map_file(folder, depth, file, unit)
        files[i + 10] = file
    return write_depth(folder/'db', listed(len(depths)), folder, files, size=60, progress=False, **options)


@pytest.mark.parametrize('change, note', [
    (lambda d: d, None), (lambda d: d * 10, 'a median of 25.8 m is a street.s, .*--unit 0.0001'),
    (lambda d: d / 10, 'a median of 0.257 m is nearer than in rooms.*--unit 0.01'),
    (lambda d: d[::-1].copy(), 'the lower part is farther away.*disparity'),
    (lambda d: np.where(np.arange(60) % 3 == 0, d, 0), '67% is missing'),
    (lambda d: np.full_like(d, 2), '9 of 9 maps are constant')])
def test_what_range_was_read_is_said(tmp_path, change, note):
    depths = [change(SLOPE * (1 + i / 100)) for i in range(9)]
    depths[4] = change(SLOPE)
    (tmp_path/'db').mkdir()
    path = write_maps(tmp_path, depths)
    report, said = depth_report(path), depth_said(path)
    there = np.concatenate([d[d > 0] for d in depths])
    assert report['maps'] == report['read'] == 9 and report['metric']
    assert report['nearest'] == pytest.approx(there.min(), rel=.01)
    assert report['farthest'] == pytest.approx(there.max(), rel=.01)
    assert report['median'] == pytest.approx(np.median(there), rel=.05)
    assert report['missing'] == pytest.approx(np.mean([(d == 0).mean() for d in depths]), abs=.01)
    assert said.startswith('depth_own.h5: 9 maps, ') and '\n' not in said
    assert f"median {report['median']:.3g} m" in said
    if note is None: assert not report['notes'] and 'NOTE' not in said
    else: assert len(report['notes']) == 1 and re.search(f'NOTE: .*{note}', said), said


def test_maps_by_others_are_looked_at_too(tmp_path, wide):
    database = Database(wide)
    (tmp_path/'pfm').mkdir()
    for image_id in database.image_ids: write_pfm(tmp_path/'pfm'/f'{image_id}.pfm', SLOPE * 1000)
    with pytest.raises(ValueError, match='median of its maps is 2.5e.03 m.*Are they millimetres'):
        import_pfm(database, tmp_path/'pfm', 'metres', metric=True, progress=False)
    relative = import_pfm(database, tmp_path/'pfm', 'metres', progress=False)
    assert depth_said(relative) == 'depth_metres.h5' and not depth_report(relative)['metric']
    relative.unlink()
    (tmp_path/'pfm'/f'{database.image_ids[2]}.pfm').unlink()
    (tmp_path/'pfm'/f'{database.image_ids[4]}.pfm').unlink()
    with pytest.raises(FileNotFoundError, match=r'no depth map 102.pfm .*\(2 of 6 have none\)'):
        import_pfm(database, tmp_path/'pfm', 'metres', progress=False)


# One odd picture

def test_one_odd_depth_map_does_not_end_the_others(tmp_path):
    (tmp_path/'db').mkdir()
    depths = [SLOPE] * 70
    depths[3], depths[66] = SLOPE / 100, SLOPE.T.copy()  # one too near, one lying on its side
    why = (r'3.png: nearly all of its pixels.*; .*66.png: the depth map has 40 x 60 pixels.*turned\? '
           r'\(2 of 70 cannot be used')
    with pytest.raises(ValueError, match=why): write_maps(tmp_path, depths)
    read, kept = [], sensors.read_depth
    depths[3] = depths[66] = SLOPE
    def noted(path, unit):
        read.append(path.name)
        return kept(path, unit)
    sensors.read_depth = noted
    try: path = write_maps(tmp_path, depths)
    finally: sensors.read_depth = kept
    assert len(DepthFile(path)) == 70 and len(read) == 32 + 6, 'the part between was made before'


@pytest.mark.parametrize('layout', ['jpeg', 'canvas'])
def test_one_odd_picture_does_not_end_the_others(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(images, '_PART', dict(jpeg=4, canvas=4))
    own = tmp_path/'own'
    own.mkdir()
    sound = [saved(Image.fromarray(RNG.integers(0, 256, (30, 40, 3), np.uint8))) for _ in range(12)]
    for i, data in enumerate(sound): (own/f'{i}.png').write_bytes(data)
    sources = open_sources([own])
    check_pictures(tmp_path/'db', [(i, f'{i}.png', 40, 30) for i in range(12)], sources, progress=False)
    make = lambda: make_images(tmp_path/'db', sources, 32, layout, progress=False)
    (own/'5.png').write_bytes(sound[5][:200])
    (own/'6.png').unlink()
    why = r"image 5 \(5.png\): the picture is not read.*; image 6 .*is refused.*\(2 of 12 cannot be used"
    with pytest.raises(ValueError, match=why): make()
    made = {path.name for path in (tmp_path/'db'/'imdb_32-parts').glob('part-*')}
    assert made == {'part-000000.h5', 'part-000002.h5'}
    for i in (5, 6): (own/f'{i}.png').write_bytes(sound[i])
    assert make().name == 'imdb_32.h5'
