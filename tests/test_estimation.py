"""Monocular depth over a database: real loading, real kills, shards, and one clear error for each
thing that can be wrong.

As a script (`python test_estimation.py FOLDER MODEL`) it is the worker that the first test
kills."""
import os

os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stdg.datasets.visual_genome import Database
from stdg.depth.depth_file import DepthFile, depth_path
from stdg.depth.estimators import Estimator, estimate_depth, merge_depth
from stdg.graph import SceneGraph
from stdg.testing import toy_database

transformers = pytest.importorskip('transformers')
SHAPES = [(48, 64), (64, 48), (64, 64), (40, 64), (3, 64)]


def make_database(folder, n=20, shapes=SHAPES):
    "Pictures of five shapes, one of them three pixels high: rows could be taken for colours there."
    rng, scenes = np.random.default_rng(0), []
    for i, (h, w) in enumerate((shapes * n)[:n]):
        tiles = rng.integers(0, 256, (-(-h // 8), -(-w // 8), 3))
        image = np.kron(tiles, np.ones((8, 8, 1))).astype(np.uint8)[:h, :w]
        scenes.append((SceneGraph([], [], [], (h, w)), dict(image=image, image_id=100 + 7 * i)))
    return toy_database(folder, scenes, size=64)


def save(network, processor, folder, spread=6.):
    "Random weights, spread so that the maps are not flat."
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1: weights.mul_(spread)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_dpt(folder, seed=0):
    from transformers import BeitConfig, DPTConfig, DPTForDepthEstimation, DPTImageProcessor
    torch.manual_seed(seed)
    backbone = BeitConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                          intermediate_size=48, image_size=64, patch_size=16,
                          out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
                          use_relative_position_bias=True)
    config = DPTConfig(backbone_config=backbone, hidden_size=32, fusion_hidden_size=16,
                       neck_hidden_sizes=[16, 16, 32, 32])
    network = DPTForDepthEstimation(config)
    network.head.head[4].bias.data.fill_(1.)
    processor = DPTImageProcessor(size=dict(height=64, width=64), keep_aspect_ratio=False,
                                  ensure_multiple_of=32)
    return save(network, processor, folder)


def tiny_depth_anything(folder, kind='metric'):
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )
    torch.manual_seed(0)
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2,
                            image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
                            reshape_hidden_states=False, apply_layernorm=True)
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32,
                                 neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
                                 head_hidden_size=8, depth_estimation_type=kind,
                                 max_depth=20 if kind == 'metric' else None)
    processor = DPTImageProcessor(size=dict(height=56, width=56), keep_aspect_ratio=True,
                                  ensure_multiple_of=14)
    return save(DepthAnythingForDepthEstimation(config), processor, folder)


def tiny_zoedepth(folder):
    from transformers import (
        BeitConfig,
        ZoeDepthConfig,
        ZoeDepthForDepthEstimation,
        ZoeDepthImageProcessor,
    )
    torch.manual_seed(0)
    backbone = BeitConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                          intermediate_size=48, image_size=64, patch_size=16,
                          out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = ZoeDepthConfig(backbone_config=backbone, backbone_hidden_size=32,
                            neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
                            bottleneck_features=16, num_relative_features=8, bin_embedding_dim=8,
                            num_attractors=[4, 2, 2, 1])
    processor = ZoeDepthImageProcessor(size=dict(height=64, width=64), ensure_multiple_of=32)
    return save(ZoeDepthForDepthEstimation(config), processor, folder)


def tiny_glpn(folder):
    from transformers import GLPNConfig, GLPNForDepthEstimation, GLPNImageProcessor
    torch.manual_seed(0)
    config = GLPNConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, max_depth=10)
    return save(GLPNForDepthEstimation(config), GLPNImageProcessor(), folder, 3.)


@pytest.fixture(scope='module')
def model(tmp_path_factory): return tiny_dpt(tmp_path_factory.mktemp('models')/'tiny')


@pytest.fixture
def database(tmp_path): return make_database(tmp_path/'db')


@pytest.fixture
def copy(model, tmp_path): return shutil.copytree(model, tmp_path/'copy')


def child(folder, model, shard, slow=0., stuck=False):
    """A real process that does its share; slowly, or stuck for ever while it writes its second
    part. Returns its id."""
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        maps, replace, parts = Estimator.maps, os.replace, []
        def late(*args):
            time.sleep(slow)
            return maps(*args)
        def hang(partial, path):
            parts.extend([path] * Path(path).name.startswith('part-'))
            if len(parts) == 2: time.sleep(600)
            replace(partial, path)
        Estimator.maps = late
        if stuck: os.replace = hang
        estimate_depth(Database(folder), model, size=64, shard=(shard, 3), batch=2, progress=False)
        code = 0
    finally: os._exit(code)


def worker(folder, model):
    """Start shard 0 and kill it between two parts; start shard 1 and kill it within one; then let
    three processes finish."""
    parts = Path(folder)/'depth_tiny-parts'
    def whole(shard):
        numbers = (int(path.stem[5:]) for path in parts.glob('part-*.h5'))
        return sorted(k for k in numbers if k % 3 == shard)
    def partial(name='*'): return list(parts.glob(f'.*partial{name}'))
    def kill(shard, ready, **how):
        pid, end = child(folder, model, shard, **how), time.monotonic() + 60
        while not ready() and time.monotonic() < end: time.sleep(.02)
        os.kill(pid, signal.SIGKILL)
        # flushed, or a forked child that flushes says it again
        print('killed', shard, os.waitpid(pid, 0)[1], len(whole(shard)), len(partial()), flush=True)

    kill(0, lambda: whole(0), slow=.4)
    kill(1, lambda: whole(1) and partial('.part-*'), stuck=True)
    for shard in range(3):
        print('exit', os.waitpid(child(folder, model, shard), 0)[1], len(whole(shard)), flush=True)


@pytest.fixture
def one_thread():
    "As the processes that are killed have: other numbers of threads round otherwise."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_twice_in_three_shards_equals_one_undisturbed_run(model, database, tmp_path,
                                                                 one_thread):
    run = subprocess.run([sys.executable, __file__, database.folder, model], capture_output=True,
                         text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr
    killed = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith('killed')]
    assert [k[1] for k in killed] == ['9', '9'], run.stdout
    assert all(0 < int(k[2]) < 4 for k in killed), run.stdout
    assert killed[1][3] == '1', 'the second was killed while it wrote'
    assert run.stdout.count('exit 0') == 3 and 'exit 0 4' in run.stdout, run.stdout
    assert not depth_path(database.folder, model).exists(), 'a shard does not merge'
    merged = DepthFile(merge_depth(database, model), database.image_ids)
    assert not list(database.folder.glob('*parts*'))
    other = Database(database.folder)
    other.folder = tmp_path/'undisturbed'
    once = DepthFile(estimate_depth(other, model, size=64, batch=2, progress=False),
                     database.image_ids)
    assert len(merged) == 20 and [tuple(s) for s in merged.shapes] == SHAPES * 4
    assert all(np.array_equal(a, b) and np.ptp(a) > 0 for a, b in zip(merged, once))
    with h5py.File(merged.path) as a, h5py.File(once.path) as b:
        assert set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_part_size_does_not_matter_and_a_file_reads_in_other_processes(model, database):
    small = DepthFile(estimate_depth(database, model, size=64, batch=3, progress=False))
    maps = list(pickle.loads(pickle.dumps(small)))
    small.path.unlink()
    large = DepthFile(estimate_depth(database, model, size=64, batch=16, progress=False))
    for a, b in zip(maps, large): np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize('make, most', [
    (tiny_depth_anything, 20), (tiny_zoedepth, 10), (tiny_glpn, 10)])
def test_metric_models_give_metres(make, most, tmp_path):
    database, model = make_database(tmp_path/'db', 8, SHAPES[:4]), make(tmp_path/'metres')
    maps = DepthFile(estimate_depth(database, model, size=64, batch=8, progress=False))
    assert maps.metric and [m.shape for m in maps] == SHAPES[:4] * 2
    assert all(.0009 < m.min() < m.max() <= most * 1.2 for m in maps)
    estimator = Estimator(tmp_path/'metres')
    for row in range(4):
        np.testing.assert_allclose(maps[row], estimator([database.image(row)])[0], rtol=5e-3)


def test_what_the_configuration_says_can_be_overruled(model, database, tmp_path):
    assert not Estimator(tiny_depth_anything(tmp_path/'any', 'relative')).metric
    assert Estimator(model, metric=True).metric
    assert DepthFile(estimate_depth(database, model, size=64, metric=True, progress=False)).metric


def test_a_picture_that_the_processor_cannot_read_is_named(database, tmp_path):
    why = r'image 128 \(64 x 3 pixels\) is not read by the processor of .*flat'
    with pytest.raises(ValueError, match=why):
        estimate_depth(database, tiny_depth_anything(tmp_path/'flat'), progress=False)


def test_without_transformers(model, database, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    why = r"needs transformers, which is not installed; it comes with pip install 'stdg\[depth\]'"
    with pytest.raises(ImportError, match=why): estimate_depth(database, model)
    assert not list(database.folder.glob('depth*'))


def weights(copy, change):
    tensors = load_file(copy/'model.safetensors')
    change(tensors)
    save_file(tensors, copy/'model.safetensors', metadata=dict(format='pt'))


def test_nan_in_the_weights_names_the_images(copy, database):
    weights(copy, lambda t: t['head.head.2.weight'].fill_(torch.nan))
    why = 'copy: the depth of images 100, 107, 114 has NaN or infinite values'
    with pytest.raises(ValueError, match=why):
        estimate_depth(database, copy, batch=3, progress=False)
    assert not list(database.folder.glob('depth*')), 'nothing is left'


def test_absent_weights_are_seen_only_where_they_matter(copy, database, model):
    unused = [f'neck.fusion_stage.layers.0.residual_layer1.convolution{k}.{what}' for k in (1, 2)
              for what in ('weight', 'bias')]
    weights(copy, lambda t: [t.pop(name) for name in unused])
    estimator, image = Estimator(copy), database.image(0)
    assert estimator.absent == sorted(unused)
    assert np.array_equal(estimator([image])[0], Estimator(model)([image])[0])
    weights(copy, lambda t: t.pop('head.head.2.bias'))
    why = r'copy \(absent weights: 5, head.head.2.bias, ...\): the depth of images 100, .* has NaN'
    with pytest.raises(ValueError, match=why): estimate_depth(database, copy, progress=False)


def test_three_rows_are_not_taken_for_three_colours(model):
    pixels, shape = Estimator(model).prepare(np.full((3, 64, 3), (255, 0, 0), np.uint8))
    assert shape == (3, 64) and pixels.shape == (3, 64, 64)
    assert pixels[0].min() == 1 and pixels[1:].max() == -1


def test_weights_in_half_precision(copy, model, database):
    Estimator(model).network.half().save_pretrained(copy)
    assert load_file(copy/'model.safetensors')['head.head.2.bias'].dtype == torch.float16
    image = database.image(0)
    np.testing.assert_allclose(Estimator(copy)([image])[0], Estimator(model)([image])[0], rtol=.01,
                               atol=.01)


def test_weights_of_another_shape(copy):
    weights(copy, lambda t: t.update({'head.head.2.bias': torch.zeros(7)}))
    with pytest.raises(ValueError, match="copy can't be loaded as a depth estimator"):
        Estimator(copy)


def test_untrusted_code_does_not_run(copy, tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/'harm',))
    torch.save(dict(a=Bomb()), copy/'pytorch_model.bin')
    config = json.loads((copy/'config.json').read_text())
    (copy/'evil.py').write_text(f"open({str(tmp_path/'harm')!r}, 'w')\nclass Evil: pass\n")
    evil = {'AutoModelForDepthEstimation': 'evil.Evil', 'AutoConfig': 'evil.Evil'}
    (copy/'config.json').write_text(json.dumps({**config, 'auto_map': evil}))
    Estimator(copy)
    evil = {'AutoConfig': 'evil.Evil'}
    (copy/'config.json').write_text(json.dumps({**config, 'model_type': 'evil', 'auto_map': evil}))
    with pytest.raises(ValueError, match="copy can't be loaded"): Estimator(copy)
    (copy/'config.json').write_text(json.dumps(config))
    (copy/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='copy has no weights as .safetensors'):
        Estimator(copy)
    assert not (tmp_path/'harm').exists()


def test_parts_of_other_weights_or_settings_are_refused(model, copy, database, tmp_path):
    estimate_depth(database, model, size=64, shard=(0, 2), batch=4, progress=False)
    other = tiny_dpt(tmp_path/'other'/'tiny', seed=1)
    with pytest.raises(ValueError, match='depth_tiny-parts holds parts of something else: weights'):
        estimate_depth(database, other, size=64, progress=False)
    with pytest.raises(ValueError, match=r'pixels 64 \(asked: 32\)'):
        estimate_depth(database, model, size=32, progress=False)
    with pytest.raises(ValueError, match='shard 2/2: the first number goes from 0 to 1'):
        estimate_depth(database, model, size=64, shard=(2, 2), progress=False)
    with pytest.raises(ValueError, match='2 of 5 parts are missing'): merge_depth(database, model)
    # another mount point of the same weights
    moved = shutil.copytree(model, tmp_path/'moved'/'tiny')
    path = estimate_depth(database, moved, size=64, progress=False)
    assert DepthFile(path).path == depth_path(database.folder, model)


def test_constant_maps_are_counted_and_named(model, database, monkeypatch):
    maps = Estimator.maps
    def dark(self, prepared, shapes=None):
        found = maps(self, prepared, shapes)
        return [m * (shape != (3, 64)) for m, (_, shape) in zip(found, prepared)]
    monkeypatch.setattr(Estimator, 'maps', dark)
    why = ('depth_tiny.h5: 4 of 20 images have no depth, '
           'their map is constant: 128, 163, 198, 233')
    with pytest.warns(UserWarning, match=why):
        path = estimate_depth(database, model, size=64, progress=False)
    file = DepthFile(path)
    assert [bool(m.any()) for m in file] == [s != (3, 64) for s in SHAPES * 4]
    path.unlink()
    def darker(self, prepared, shapes=None): return [m * 0 for m in maps(self, prepared, shapes)]
    monkeypatch.setattr(Estimator, 'maps', darker)
    why = 'maps of images 100 to 205 are all constant. Are these trained weights'
    with pytest.raises(ValueError, match=why):
        estimate_depth(database, model, size=64, progress=False)


@pytest.mark.parametrize('change, message', [
    (lambda f: f.pop('metric'), "no dataset 'metric'"),
    (lambda f: f.pop('shape'), "no dataset 'shape'"),
    (lambda f: f.update(shape=np.ones((3, 2), np.int32)), '20 maps, 3 shapes and 20 image_ids'),
    (lambda f: f.update(depth=f['depth'].astype(np.float64)),
     'the maps are float64, float16 is needed'),
    (lambda f: f.update(shape=-f['shape']), 'the map of image 100 does not have the .* pixels'),
    (lambda f: f.update(depth=f['depth'][:-5]), 'depth_end tells of'),
    (lambda f: f.update(camera=np.zeros((2, 3, 3))), r'20 maps.*cameras: \[2\]')])
def test_inconsistent_files(model, database, change, message):
    path = estimate_depth(database, model, size=64, progress=False)
    with h5py.File(path) as file: data = {name: file[name][:] for name in file}
    change(data)
    with h5py.File(path, 'w') as file:
        for name, values in data.items(): file[name] = values
    with pytest.raises(ValueError, match=f'depth_tiny.h5.*{message}'): DepthFile(path)


def test_cut_off_and_foreign_files(model, database):
    path = estimate_depth(database, model, size=64, progress=False)
    with pytest.raises(ValueError, match='depth_tiny.h5 was made for other images'):
        estimate_depth(make_database(database.folder, 19), model)
    os.truncate(path, 3000)
    with pytest.raises(ValueError, match='depth_tiny.h5 is not a whole HDF5 file'): DepthFile(path)


if __name__ == '__main__':
    # loaded once, before the forks, and not in each child
    from transformers import (  # noqa: F401
        AutoImageProcessor,
        AutoModelForDepthEstimation,
        BeitBackbone,
        DPTForDepthEstimation,
        DPTImageProcessor,
    )
    worker(*sys.argv[1:])
