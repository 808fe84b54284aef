"""Picture, HHA and boxes stay together; the same batches from any number of processes; the released
variants; broken input."""
import io
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.v2.functional import adjust_hue

from stdg import augmentation, data, fields, training
from stdg.augmentation import FILL, geometry, jitter, photometry
from stdg.data import SceneGraphs, loader
from stdg.datasets.visual_genome import Database, write_annotations
from stdg.depth.hha_file import hha_path
from stdg.graph import SceneGraph, Vocabulary
from stdg.io.packed import write_packed
from stdg.testing import toy_database

CANVAS, SIZES = 256, [(256, 176), (170, 256), (256, 256), (131, 256), (256, 131), (255, 200)]
COLOURS = np.array([(r, g, b) for r in (40, 230) for g in (40, 230) for b in (40, 230)][1:],
                   np.uint8)
BACKGROUND = np.array([40, 40, 40], np.uint8)  # the darkest colour of all
names = Vocabulary([f'marker {i}' for i in range(7)], ['left of', 'above'])


def scene(size):
    "A picture with seven markers, each of a colour of its own, at whole pixels, and its graph."
    image, boxes = np.tile(BACKGROUND, (*size, 1)), []
    for i, colour in enumerate(COLOURS):
        row, column = divmod(i, 3)
        y = (size[0] * (2 * row + 1)) // 6 - 12 + 3 * column
        x = (size[1] * (2 * column + 1)) // 6 - 9 + 2 * row
        image[y:y + 22, x:x + 17 + row] = colour
        boxes.append([x, y, x + 17 + row, y + 22])
    return image, SceneGraph(boxes, list(range(7)), [[0, 2, 0], [1, 6, 1], [4, 5, 0]], size)


def saved(picture, kind, **options):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **options)
    return out.getvalue()


def write_hha(database, pictures, image_ids=None):
    if image_ids is None: image_ids = database.image_ids
    write_packed(hha_path(database), 'png', [saved(p, 'PNG') for p in pictures],
                 image_ids=image_ids)


def write_jpeg(folder, pictures, image_ids):
    jpegs = [saved(p, 'JPEG', quality=98, subsampling=0) for p in pictures]
    sizes = dict(image_heights=[p.shape[0] for p in pictures],
                 image_widths=[p.shape[1] for p in pictures])
    write_packed(folder/f'imdb_{CANVAS}.h5', 'jpeg', jpegs, image_ids=image_ids, **sizes)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The same scenes in both layouts; their HHA shows the same pattern as the picture.

    Eight are for training."""
    images, graphs = zip(*[scene(SIZES[i % len(SIZES)]) for i in range(9)])
    split = [0] * 8 + [2]
    records = [dict(image=image, image_id=50 + i) for i, image in enumerate(images)]
    made = {layout: tmp_path_factory.mktemp(layout) for layout in ('canvas', 'jpeg')}
    toy_database(made['canvas'], list(zip(graphs, records)), split, names, CANVAS)
    write_annotations(made['jpeg'], graphs, split, names, CANVAS)
    write_jpeg(made['jpeg'], images, np.arange(9) + 50)
    for folder in made.values(): write_hha(Database(folder), images)
    return made


@pytest.fixture
def copy(folders, tmp_path): return shutil.copytree(folders['jpeg'], tmp_path/'db')


def both(folder, released=False, **options):
    return SceneGraphs(Database(folder, released=released), 'train', ('rgb', 'hha'), train=True,
                       **options)


def seeded(*key): return data._generator(*key)


def found(picture, colour):
    """Box and area of the pixels of a marker's `colour` in `picture` (3, H, W), to a fraction of a
    pixel; None if there are none."""
    direction = torch.from_numpy(colour - BACKGROUND).float()
    apart = picture.float() - 40
    share = torch.einsum('c,chw->hw', direction, apart) / direction.square().sum()
    alike = (apart - share * direction[:, None, None]).abs().amax(0) < 40
    share = torch.where(alike, share, 0).clamp(0, 1)
    inside = share > .5
    if not inside.any(): return None
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    middle = share[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = middle[:, middle.shape[1] // 2].sum(), middle[middle.shape[0] // 2].sum()
    box = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    return box, float(height * width)


KINDS = dict(usual={}, cropped=dict(scale=(1.4, 2.2)), padded=dict(scale=(.45, .7)),
             mirrored=dict(flip=1, scale=(1., 1.), stretch=(1., 1.)),
             plain=dict(flip=0, scale=(1., 1.), stretch=(1., 1.)),
             stretched=dict(flip=1, stretch=(1.5, 2.)))


@pytest.mark.parametrize('layout', ['canvas', 'jpeg'])
@pytest.mark.parametrize('kind', KINDS)
def test_picture_hha_and_boxes_are_in_the_same_place(folders, layout, kind):
    dataset = both(folders[layout], colour=False, **KINDS[kind])
    shown = lost = 0
    for seed in range(1 if kind in ('plain', 'mirrored') else 3):
        for i, row in enumerate(dataset.rows):
            graph = dataset._graph(row)
            pictures, moved, _ = geometry(dataset._pictures(row, graph.size).values(), graph,
                                          CANVAS, **KINDS[kind], generator=seeded(seed, i))
            sample = dataset.sample(i, seeded(seed, i))
            assert torch.equal(pictures[0], sample['rgb'])
            assert torch.equal(pictures[1], sample['hha'])
            for picture in pictures:
                for box, ignored, colour in zip(moved.boxes, moved.ignore.tolist(), COLOURS):
                    seen = found(picture, colour)
                    if ignored:
                        lost += 1
                        continue
                    shown += 1
                    case = seed, i, colour, box, seen
                    assert seen is not None and (seen[0] - box).abs().max() <= 1, case
    assert shown >= 112
    if kind == 'cropped': assert lost > 60
    if kind in ('padded', 'plain', 'mirrored'): assert lost == 0


def test_what_is_ignored_lost_a_quarter(folders):
    """Of each object the picture still shows at most three quarters if it is ignored, and more if
    it is not."""
    dataset, seen = both(folders['canvas'], colour=False), {True: 0, False: 0}
    for seed in range(8):
        for i, row in enumerate(dataset.rows):
            graph = dataset._graph(row)
            steps = augmentation._draw(graph, CANVAS, (1.3, 2.), (.75, 1.33), .5, seeded(seed, i))
            moved, _ = augmentation._move(graph, steps)
            picture = augmentation._place(dataset._pictures(row, graph.size)['rgb'], steps)
            sides = graph.boxes[:, 2:] - graph.boxes[:, :2]
            whole = sides.prod(1) * steps.factors[0] * steps.factors[1]
            for area, ignored, colour in zip(whole.tolist(), moved.ignore.tolist(), COLOURS):
                left = found(picture, colour)
                share = left[1] / area if left else 0
                if abs(share - .75) > .06:
                    seen[ignored] += 1
                    assert (share < .75) == ignored, (seed, i, share)
    assert min(seen.values()) > 100


def test_a_quarter_to_the_pixel():
    """Cropped at x = 15 of 20: exactly 0.75 is left, which is too little; at 16 it is enough.

    What lies outside has no area and is ignored as well."""
    graph = SceneGraph([[0, 0, 20, 10], [30, 0, 40, 10], [5, 5, 5, 9]], [0, 1, 2],
                       [[0, 1, 0], [0, 2, 1]], (10, 40))
    for edge, ignored in ((15, True), (16, False)):
        steps = augmentation.Placement(False, (1., 1.), graph.boxes, (0., 0., 40., 10.),
                                       (0, 0, edge, 10), 40, False)
        moved, valid = augmentation._move(graph, steps)
        left = (40 - edge) // 2
        assert moved.ignore.tolist() == [ignored, True, True]
        assert moved.boxes[0].tolist() == [left, 15, left + edge, 25]
        assert valid == (left, 15, edge - 1, 9)
        targets = fields.encode(moved, 7, 2, (40, 40), 4, valid)
        assert targets['mask'].sum() == 1 - ignored
        assert not targets['relation'].any(), 'nothing is painted of what has no area'


def test_outside_is_filled_and_inside_is_valid(folders):
    dataset = both(folders['canvas'], colour=False)
    padded = 0
    for seed in range(20):
        row = dataset.rows[seed % 8]
        graph = dataset._graph(row)
        pictures, _, (x, y, w, h) = geometry(dataset._pictures(row, graph.size).values(), graph,
                                             CANVAS, generator=seeded(seed))
        inside = torch.zeros(CANVAS, CANVAS, dtype=bool)
        inside[int(y):int(y + h) + 1, int(x):int(x + w) + 1] = True
        filled = [(picture == torch.tensor(FILL, dtype=torch.uint8)[:, None, None]).all(0)
                  for picture in pictures]
        assert all(torch.equal(f, ~inside) for f in filled)
        padded += not inside.all()
    assert padded > 5


def plain_window(lo, hi, length, canvas, margin, draw):
    "Spec 1.5 step 5, on one axis, as it reads."
    start, end = max(lo - margin, 0), min(hi + margin, length)
    start, end = min(start, length - canvas), max(end, canvas)
    first, last = int(start), int(end) - canvas
    if last <= first: return first
    return min(max(draw(first - canvas // 2, last + canvas // 2), first), last)


def test_window_as_the_spec_reads():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length = int(rng.integers(513, 1100))
        lo, hi = np.sort(rng.uniform(0, length, 2))
        ours = {augmentation._window(lo, hi, 0, length, 512, seeded(k)) for k in range(12)}
        first, last = (plain_window(lo, hi, length, 512, 50, draw)
                       for draw in (lambda a, b: a, lambda a, b: b - 1))
        assert first <= min(ours) and max(ours) <= last
        assert 0 <= min(ours) and max(ours) + 512 <= length
        if last - first > 50: assert len(ours) > 1
    many = np.array([augmentation._window(100, 900, 0, 1000, 512, seeded(k)) for k in range(600)])
    for end in (50, 438):
        share = (many == end).mean()
        assert abs(share - 256 / 900) < .06, 'drawn from a wider range, then clamped'


def test_draws(folders):
    """Half are mirrored; scale and stretch keep to their ranges, the scale evenly on a logarithmic
    axis; sizes are cut to whole pixels."""
    graph = SceneGraph([[3, 3, 90, 90]], [0], [], (300, 401))
    steps = [augmentation._draw(graph, 512, (.7, 1.5), (.75, 1.33), .5, seeded(k))
             for k in range(600)]
    x, y = np.array([s.factors for s in steps]).T
    assert .44 < np.mean([s.flip for s in steps]) < .56
    assert .7 - 1/300 < y.min() < .72 and 1.46 < y.max() <= 1.5
    assert abs((y < np.sqrt(.7 * 1.5)).mean() - .5) < .06
    assert .74 < (x / y).min() < .78 and 1.3 < (x / y).max() < 1.34
    assert np.allclose(y * 300, (y * 300).round()) and np.allclose(x * 401, (x * 401).round())


def test_colours_change_in_rgb_only(folders):
    changed, plain = both(folders['jpeg']), both(folders['jpeg'], colour=False)
    for i in range(8):
        a, b = changed.sample(i, seeded(i)), plain.sample(i, seeded(i))
        assert torch.equal(a['hha'], b['hha']) and not torch.equal(a['rgb'], b['rgb'])
        assert all(torch.equal(a['targets'][k], b['targets'][k]) for k in a['targets'])
        alone = SceneGraphs(changed.database, 'train', ('rgb',), train=True).sample(i, seeded(i))
        assert torch.equal(a['rgb'], alone['rgb']), 'RGB does not depend on whether HHA is read'


def noise(low, high, side):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(low, high, (3, side, side), dtype=np.uint8))


def test_photometry_steps():
    picture = noise(0, 256, 64)
    jpegged, = photometry([picture], jpeg=1, grey=0, generator=seeded(1))
    clean, = photometry([picture], jpeg=0, grey=0, generator=seeded(1))
    assert 5 < (jpegged.int() - clean.int()).abs().float().mean()
    assert torch.equal(clean, jitter(picture, seeded(1)))
    for turn in (-.1, .06):
        turned = augmentation._turn_hue(picture.flatten(1).float(), turn).view(3, 64, 64) / 255
        torch.testing.assert_close(turned, adjust_hue(picture / 255, turn), atol=2e-5, rtol=0)
    grey, = photometry([picture], jpeg=0, grey=1, generator=seeded(1))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert grey.float().std() > 5


# The released variants, each as described in spec 1.5

def test_released_geometry_of_boxes():
    """x <- -(x + w) - 1 + W; the valid area loses its last column, mirrored its first; boxes are
    clipped to it."""
    graph = SceneGraph([[10, 20, 40, 60], [0, 0, 100, 80]], [0, 1], [], (80, 100))
    for flip, x1, x2, valid in ((0, 10, 40, (0, 0, 99, 79)), (1, 59, 89, (1, 0, 99, 79))):
        steps = augmentation._draw(graph, 100, (1., 1.), (1., 1.), flip, seeded(0), released=True)
        moved, area = augmentation._move(graph, steps)
        assert moved.boxes[0].tolist() == [x1, 30, x2, 70]
        assert area == (valid[0], valid[1] + 10, *valid[2:])
        assert moved.boxes[1].tolist() == [flip * 1, 10, 99, 89] and not moved.ignore.any()
        steps = augmentation._draw(graph, 100, (1., 1.), (1., 1.), flip, seeded(0))
        ours, whole = augmentation._move(graph, steps)
        assert ours.boxes[0].tolist() == [x1 + flip, 30, x2 + flip, 70]
        assert ours.boxes[1].tolist() == [0, 10, 100, 90] and whole == (0, 10, 99, 79)


def test_released_zoom_is_corner_aligned():
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 256, (20, 25, 3), dtype=np.uint8), 4, 0), 4, 1)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    graph = SceneGraph([[10, 10, 60, 60]], [0], [], (80, 100))
    for seed in range(5):
        steps = augmentation._draw(graph, 400, (.7, 1.5), (.75, 1.33), 0, seeded(seed),
                                   released=True)
        fx, fy = steps.factors
        _, _, w, h = steps.window
        top, left = (400 - h) // 2, (400 - w) // 2

        def placed(steps):
            out = augmentation._place(tensor, steps)[:, top:top + h, left:left + w]
            return out.permute(1, 2, 0).numpy()

        theirs = ndimage.zoom(picture, (fy, fx, 1), order=1, mode='nearest')
        ours, smooth = placed(steps), placed(steps._replace(released=False))
        assert theirs.shape == ours.shape and abs(theirs.astype(int) - ours).max() <= 1
        assert abs(theirs.astype(int) - smooth).max() > 10


def test_released_mirror_moves_the_hha_of_portraits(folders):
    """By canvas - width pixels; ours stays with the picture, and so does the HHA of a picture as
    wide as the canvas."""
    options = dict(colour=False, flip=1, scale=(1., 1.), stretch=(1., 1.))
    ours = both(folders['canvas'], **options)
    old = both(folders['canvas'], released=True, **options)
    for i in range(6):
        h, w = SIZES[i]
        top, left = (CANVAS - h) // 2, (CANVAS - w) // 2
        a, b = old.sample(i, seeded(0)), ours.sample(i, seeded(0))
        inside = slice(top, top + h), slice(left, left + w)
        assert torch.equal(b['rgb'], b['hha'])
        shift = CANVAS - w
        assert torch.equal(a['hha'][:, inside[0], left + shift:left + w],
                           b['hha'][:, inside[0], left:left + w - shift])
        empty = a['hha'][:, inside[0], left:left + min(shift, w)]
        assert (empty == 0).all(), 'black where the canvas was empty'


def test_released_padding_is_blue_first(folders):
    padded = both(folders['canvas'], released=True, colour=False, scale=(.5, .5))
    sample = padded.sample(0, seeded(0))
    assert sample['rgb'][:, 0, 0].tolist() == [*FILL[::-1]]
    assert sample['hha'][:, 0, 0].tolist() == [*FILL]
    sample = SceneGraphs(Database(folders['canvas'], released=True), 'test')[0]
    assert sample['rgb'].shape == (3, CANVAS, CANVAS)


@pytest.mark.parametrize('inputs', [('rgb', 'hha'), ('hha',)])
def test_released_jpeg_puts_the_picture_in_place_of_hha(folders, inputs):
    old = SceneGraphs(Database(folders['canvas'], released=True), 'train', inputs, train=True)
    pair = both(folders['canvas'], released=True)
    fired = 0
    for seed in range(40):
        sample, whole = old.sample(0, seeded(seed)), pair.sample(0, seeded(seed))
        assert set(sample) == {*inputs, 'index', 'targets'}
        assert torch.equal(sample['hha'], whole['hha'])
        fired += torch.equal(whole['hha'], whole['rgb'].flip(0))
    assert 1 <= fired <= 10  # 4 are expected


def test_released_colours_of_hha_have_draws_of_their_own():
    picture = noise(60, 180, 32)
    rgb, hha = photometry([picture, picture], jpeg=0, grey=0, generator=seeded(3))
    assert not torch.equal(rgb, picture) and not torch.equal(hha, picture)
    assert not torch.equal(rgb, hha)
    grey = set()
    for k in range(60):
        changed = photometry([picture, picture], jpeg=0, grey=.5, generator=seeded(k))
        grey.add(tuple(bool((p[0] == p[1]).all()) for p in changed))
    assert grey == {(False, False), (False, True), (True, False), (True, True)}
    rgb, hha = photometry([picture, picture], jpeg=1, grey=0, generator=seeded(3))
    assert torch.equal(rgb, hha)


def test_released_is_the_flag_of_the_database(folders):
    ours = both(folders['canvas'], augment=False)
    old = both(folders['canvas'], released=True, augment=False)
    odd = (ours.database.graph(0).boxes[:, 2] - ours.database.graph(0).boxes[:, 0]) % 2 == 1
    assert odd.any() and not odd.all() and not ours.released and old.released
    difference = ours.truth(0).boxes - old.truth(0).boxes
    assert torch.equal(difference[:, 0], odd.float())
    inside = slice(40, 216)
    assert torch.equal(ours[0]['rgb'][:, :, inside],
                       old[0]['rgb'][:, :, inside]), 'the picture is red first in both'
    assert torch.equal(ours[0]['hha'], old[0]['hha'])


# Batches

def equal(a, b):
    if not isinstance(a, dict): return torch.equal(a, b)
    return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)


def two_epochs(dataset, workers, context=None, **options):
    batches = loader(dataset, 3, 7, workers, **options)
    if context: batches.multiprocessing_context = context
    return [batch for _ in range(2) for batch in batches]


def test_any_number_of_workers_gives_the_same_batches(folders):
    dataset = both(folders['jpeg'])
    dataset.database.image(0), dataset[0]  # files are open here before workers are made
    before = torch.get_rng_state()
    here = two_epochs(dataset, 0)
    after = torch.get_rng_state()
    assert torch.equal(before, after), 'the loader draws nothing from the global numbers'
    assert len(here) == 4
    for a, b in (here[:2], here[2:]): assert len({*a['index'].tolist(), *b['index'].tolist()}) == 6
    for workers, context in ((1, 'fork'), (2, 'fork'), (1, 'spawn')):
        dataset[1]
        there = two_epochs(dataset, workers, context)
        assert all(equal(a, b) for a, b in zip(here, there, strict=True)), (workers, context)
    once = loader(dataset, 8, 7)
    first, second = next(iter(once)), next(iter(once))
    assert not torch.equal(first['index'], second['index'])
    sorted_first = first['rgb'][first['index'].argsort()]
    assert not torch.equal(sorted_first, second['rgb'][second['index'].argsort()])


def test_batches_are_whole(folders):
    dataset = both(folders['canvas'])
    for batch in two_epochs(dataset, 0)[:2]:
        alone = default_collate([dataset.sample(i, seeded(7, 1, i))
                                 for i in batch['index'].tolist()])
        assert equal(batch, alone) and batch['targets']['relation'].any()
        assert batch['targets']['heatmap'].dtype == torch.float32


def test_a_plain_loader_works_too(folders):
    dataset = SceneGraphs(Database(folders['jpeg']), 'train')
    dataset.database.image(0)
    batches = list(DataLoader(dataset, 3, num_workers=2))
    assert [b['index'].tolist() for b in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(torch.equal(b['rgb'][k], dataset[i]['rgb']) for b in batches
               for k, i in enumerate(b['index'].tolist()))
    read = [b['index'].tolist() for b in loader(dataset, 3)]
    assert read == [[0, 1, 2], [3, 4, 5], [6, 7]], 'nothing is dropped in evaluation'


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs /proc')
@pytest.mark.parametrize('layout', ['canvas', 'jpeg'])
def test_no_open_file_crosses_a_fork(folders, layout):
    def open_here():
        descriptors = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]
        names = [os.readlink(fd) for fd in descriptors if os.path.exists(fd)]
        return [name for name in names if name.startswith(str(folders[layout]))]
    dataset = both(folders[layout])
    dataset[0]
    assert len(open_here()) >= 2
    child = os.fork()
    if not child: os._exit(len(open_here()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not open_here()
    assert torch.equal(dataset.sample(0, seeded(1))['hha'],
                       both(folders[layout]).sample(0, seeded(1))['hha'])


def test_training_does_not_depend_on_workers(folders, tmp_path):
    tiny = dict(backbone='small', mode='combine', n_objects=7, n_predicates=2, pretrained=False,
                fpn=16, channels=16)
    weights = []
    for workers in (0, 2):
        torch.rand(workers)
        model = training.build_network(0, **tiny)
        dataset = both(folders['jpeg'], stride=model.stride)
        training.fit(model, dataset, tmp_path/str(workers), 'student', epochs=2, steps=3,
                     batch_size=4, workers=workers, progress=False)
        weights.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_memory_stays_flat(folders):
    statm = Path('/proc/self/statm')
    if not statm.exists(): pytest.skip('needs /proc')
    def resident(): return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20
    batches = loader(both(folders['jpeg']), 4)
    for _ in range(5): list(batches)
    before = resident()
    for _ in range(15): list(batches)
    assert resident() < before + 30


# Broken input

def test_corrupt_jpeg_in_a_worker_is_named(copy):
    with h5py.File(copy/f'imdb_{CANVAS}.h5', 'r+') as file:
        ends = file['jpeg_end'][:]
        file['jpeg'][ends[2] + 200:ends[3]] = 0
    for workers in (0, 1):
        with pytest.raises(ValueError, match=f'imdb_{CANVAS}.h5: the JPEG of image 53 is damaged'):
            list(loader(both(copy), 4, workers=workers))


def test_damaged_hha_in_a_worker_is_named(copy):
    path = hha_path(Database(copy))
    with h5py.File(path, 'r+') as file: file['png'][file['png_end'][1]:file['png_end'][1] + 30] = 0
    with pytest.raises(ValueError, match=f'{path.name}.*image 52 is damaged'):
        list(loader(both(copy), 4, workers=1))


def test_killed_worker_is_reported(folders):
    """In a process of its own: PyTorch also reports a dead worker by a signal handler, which may
    interrupt anything."""
    script = f"""if True:
        import os, signal
        from stdg.data import SceneGraphs, loader
        from stdg.datasets.visual_genome import Database
        dataset = SceneGraphs(Database({str(folders['jpeg'])!r}), 'train', train=True)
        batches = loader(dataset, 1, workers=1)
        try:
            for _ in range(50):
                for _ in batches: os.kill(batches._iterator._workers[0].pid, signal.SIGKILL)
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(3)
        """
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 3, run.stderr
    assert re.search(r'a process that makes batches died .exit code -9.*use fewer '
                     r'workers|DataLoader worker \(pid.* is killed by signal: Killed',
                     run.stdout), run.stdout


def test_hha_of_other_images_or_another_size(copy):
    database = Database(copy)
    pictures = [np.zeros((*database.graph(i).size, 3), np.uint8) for i in range(9)]
    write_hha(database, pictures, database.image_ids[::-1])
    with pytest.raises(ValueError, match='was made for other images'): both(copy)
    write_hha(database, [p[:-2] if i == 4 else p for i, p in enumerate(pictures)])
    with pytest.raises(ValueError, match=r'hha_256_metric.h5: the HHA of image 54 has 131 x 254 '
                       r'pixels, its picture 131 x 256. Remove the file'):
        both(copy)[4]


def test_overlap_filter_counts_at_once(tmp_path):
    rng = np.random.default_rng(0)
    graphs = []
    for i in range(30):
        corner = rng.integers(0, 40, (6, 2))
        relations = np.c_[rng.integers(0, 6, (i % 5, 2)), rng.integers(0, 2, i % 5)]
        graphs.append(SceneGraph(np.c_[corner, corner + rng.integers(1, 12, (6, 2))],
                                 rng.integers(0, 7, 6), relations, (60, 60)))
    database = toy_database(tmp_path, [(graph, None) for graph in graphs], [0] * 30, names, 60)
    counts = [int(data.overlapping(database.graph(i)).sum()) for i in range(30)]
    assert data.overlapping_counts(database).tolist() == counts
    assert 0 < sum(counts) < sum(len(g.relations) for g in graphs)
    filtered = SceneGraphs(database, 'train', train=True, overlap=True)
    assert filtered.rows == np.flatnonzero(counts).tolist()


@pytest.mark.parametrize('side', range(49, 65))
def test_relations_reach_to_the_last_column_of_a_picture(tmp_path, side):
    """Two things above one another at the right edge of a picture that is narrower than its canvas,
    and beside one another at the lower edge of one that is lower: the line between them is as wide
    in the targets as the valid area allows, to the cell."""
    upright = [[side - 3, 4, side - 1, 14], [side - 3, 44, side - 1, 54]]
    scenes = []
    for flat in (False, True):
        boxes = [[y1, x1, y2, x2] for x1, y1, x2, y2 in upright] if flat else upright
        scenes.append((SceneGraph(boxes, [0, 1], [[0, 1, 0]], (side, 64) if flat else (64, side)),
                       None))
    database = toy_database(tmp_path, scenes, [0, 0])
    targets = SceneGraphs(database, 'train', train=True, stride=4, augment=False)
    corner = (64 - side) // 2
    line = (corner + side - 2) / 4  # its cell; its neighbours on both sides are written too
    last = min(round(line - 1) + 2, math.ceil((corner + side - 1) / 4), 15)
    columns, rows = (targets[i]['targets']['relation'][0, 0].amax(axis) for i, axis in ((0, 0), (1, 1)))
    for written in (columns, rows):
        assert written.nonzero()[:, 0].tolist() == list(range(round(line - 1), last + 1))
