"""PFM files, pseudo depth and simulated estimators."""
from pathlib import Path

import numpy as np
import pytest
import torch

from stdg.depth.maps import camera_matrix, inverse_depth_from, pseudo_depth, read_pfm, stereo_motorcycle, write_pfm

GOLDEN = np.load(Path(__file__).parent/'golden'/'hha.npz')


@pytest.mark.parametrize('case', ['relative0', 'relative1'])
def test_released_pseudo_depth_is_golden(case):
    depth, camera = pseudo_depth(GOLDEN[f'{case}_inverse_depth'], released=True)
    assert depth.shape == (512, 512) and depth.dtype == np.float32
    assert np.array_equal(camera, GOLDEN[f'{case}_K'])
    # stored in half precision: 2^-11 of 10 m
    golden = GOLDEN[f'{case}_pseudo_depth'].astype(np.float32)
    np.testing.assert_allclose(depth, golden, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize('case', ['relative0', 'relative1'])
def test_only_the_camera_differs_by_default(case):
    inverse = GOLDEN[f'{case}_inverse_depth']
    depth, camera = pseudo_depth(inverse)
    scale = 512/max(inverse.shape)
    assert np.array_equal(depth, pseudo_depth(inverse, released=True)[0])
    height, width = inverse.shape
    middle = [[500, 0, scale*width/2], [0, 500, scale*height/2], [0, 0, 1]]
    np.testing.assert_allclose(camera, middle)


def test_pseudo_depth_of_tensors_and_other_sizes():
    inverse = np.random.default_rng(0).random((30, 40), np.float32) + 1
    depth, camera = pseudo_depth(torch.from_numpy(inverse), size=128)
    assert isinstance(depth, torch.Tensor) and isinstance(camera, torch.Tensor)
    assert depth.shape == (128, 128)
    again, camera_again = pseudo_depth(inverse, size=128)
    assert np.array_equal(depth.numpy(), again) and np.array_equal(camera.numpy(), camera_again)
    assert 1 <= again[:96].min() and again.max() <= 10 and not again[96:].any()
    assert camera[0, 0] == 125 and camera[0, 2] == 64 and camera[1, 2] == 48


def test_pseudo_depth_ignores_scale_and_shift():
    inverse = np.random.default_rng(0).random((30, 40))
    np.testing.assert_allclose(pseudo_depth(inverse)[0], pseudo_depth(1000*inverse + 300)[0],
                               rtol=1e-3)


def test_a_very_flat_picture_keeps_a_row():
    depth, _ = pseudo_depth(np.linspace(1, 2, 2000).reshape(1, 2000), size=64)
    assert depth[0].all() and not depth[1:].any()


@pytest.mark.parametrize('wrong, message', [
    (np.full((4, 5), 7.), 'constant'),
    (np.array([[1, np.nan], [2, 3]]), 'NaN'),
    (np.array([[1, np.inf], [2, 3]]), 'NaN or infinite'),
    (np.ones((2, 4, 5)), 'shape'),
    (np.ones((0, 5)), 'shape')])
def test_pseudo_depth_refuses(wrong, message):
    with pytest.raises(ValueError, match=message): pseudo_depth(wrong)


def test_pseudo_depth_refuses_a_canvas_without_pixels():
    with pytest.raises(ValueError, match='size'): pseudo_depth(np.eye(4), size=0)


@pytest.mark.parametrize('shape', [(1, 1), (3, 7), (40, 25)])
def test_pfm_round_trip(tmp_path, shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    write_pfm(tmp_path/'map.pfm', array)
    back = read_pfm(tmp_path/'map.pfm')
    assert back.dtype == np.float32 and np.array_equal(back, array) and back.flags.c_contiguous
    assert [p.name for p in tmp_path.iterdir()] == ['map.pfm']


def test_pfm_layout(tmp_path):
    array = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    rows = [4, 5, 6, 1, 2, 3]
    write_pfm(tmp_path/'map.pfm', array)
    little = b'Pf\n3 2\n-1.0\n' + np.array(rows, '<f4').tobytes()
    assert (tmp_path/'map.pfm').read_bytes() == little
    (tmp_path/'big.pfm').write_bytes(b'Pf\n3 2\n1.0\n' + np.array(rows, '>f4').tobytes())
    assert np.array_equal(read_pfm(tmp_path/'big.pfm'), array)


@pytest.mark.parametrize('content, message', [
    (b'', 'not a PFM'),
    (b'\x89PNG\r\n\x1a\n', 'not a PFM'),
    (b'PF\n1 1\n-1.0\n' + bytes(12), 'colour'),
    (b'Pf\n3 2\n-1.0\n' + bytes(23), 'truncated'),
    (b'Pf\n3 2\n-1.0\n' + bytes(25), 'too long'),
    (b'Pf\n3\n-1.0\n' + bytes(24), 'header'),
    (b'Pf\n3 x\n-1.0\n' + bytes(24), 'header'),
    (b'Pf\n3 -2\n-1.0\n', 'header'),
    (b'Pf\n3 2\n', 'header'),
    (b'Pf\n3 2\n0\n' + bytes(24), 'header'),
    (b'Pf\n3 2\nnan\n' + bytes(24), 'header')])
def test_pfm_faults_name_the_file(tmp_path, content, message):
    path = tmp_path/'broken.pfm'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'broken.pfm.*{message}'): read_pfm(path)


def test_pfm_missing_or_of_another_shape(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pfm'): read_pfm(tmp_path/'absent.pfm')
    with pytest.raises(ValueError, match='map.pfm'):
        write_pfm(tmp_path/'map.pfm', np.ones((2, 3, 3)))
    assert not list(tmp_path.iterdir())


def test_estimate_is_a_line_of_inverse_depth_without_noise():
    depth = np.random.default_rng(0).uniform(1, 6, (20, 30))
    estimates = [inverse_depth_from(depth, noise=0, blur=0, rng=seed) for seed in (0, 1)]
    for estimate in estimates: assert np.corrcoef(estimate.ravel(), 1/depth.ravel())[0, 1] > .999999
    assert not np.allclose(*estimates)  # scale and shift are unknown


def test_estimate_fills_holes_is_positive_and_repeatable():
    depth = np.random.default_rng(0).uniform(1, 6, (20, 30))
    depth[5:12, 5:20] = 0
    before = depth.copy()
    estimate = inverse_depth_from(depth, rng=3)
    assert np.array_equal(depth, before)
    assert estimate.dtype == np.float32 and np.isfinite(estimate).all() and estimate.min() > 0
    assert np.array_equal(estimate, inverse_depth_from(depth, rng=3))
    assert np.array_equal(estimate, inverse_depth_from(depth, rng=np.random.default_rng(3)))
    assert pseudo_depth(estimate)[0][:341].min() >= 1


def test_more_noise_is_a_worse_estimate():
    _, depth, _ = stereo_motorcycle()
    seen = depth > 0
    fit = [np.corrcoef(inverse_depth_from(depth, noise=noise, rng=0)[seen], 1/depth[seen])[0, 1]
           for noise in (.01, .1, .5)]
    assert fit[0] > fit[1] > fit[2]


@pytest.mark.parametrize('wrong, message', [
    (np.zeros((4, 5)), 'every pixel is missing'),
    (np.full((4, 5), -1.), 'negative'),
    (np.full((4, 5), np.nan), 'NaN'),
    (np.ones(4), 'shape')])
def test_estimate_refuses(wrong, message):
    with pytest.raises(ValueError, match=message): inverse_depth_from(wrong)


def test_estimate_refuses_negative_noise():
    with pytest.raises(ValueError, match='noise'): inverse_depth_from(np.ones((4, 5)), noise=-1)


def test_motorcycle():
    image, depth, camera = stereo_motorcycle()
    assert image.shape == (500, 741, 3) and image.dtype == np.uint8
    assert depth.shape == (500, 741) and depth.dtype == np.float32 and np.isfinite(depth).all()
    assert .9 < (depth > 0).mean() < .95 and 2 < depth[depth > 0].min() and depth.max() < 5.2
    assert np.array_equal(camera, camera_matrix(994.978, 311.193, 254.877))
