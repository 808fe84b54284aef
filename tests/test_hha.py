"""HHA pictures against golden ones, planes whose answer is known, and bad input."""
from pathlib import Path

import numpy as np
import pytest
import torch

from stdg.depth.maps import camera_matrix, pseudo_depth
from stdg.hha import encode, gravity, normals

GOLDEN = np.load(Path(__file__).parent/'golden'/'hha.npz')
CAMERA = camera_matrix(120, 40, 30)


def close(picture, golden):
    "The share of values within 1, per channel."
    return (np.abs(picture.astype(int) - golden) <= 1).mean((0, 1))


def plane(normal, distance, height=60, width=80, camera=CAMERA):
    "Depth of the plane normal . P = distance (metres); pixels count from 1."
    v, u = np.mgrid[1:height+1, 1:width+1]
    x, y = (u - camera[0, 2])/camera[0, 0], (v - camera[1, 2])/camera[1, 1]
    return distance / (normal[0]*x + normal[1]*y + normal[2])


@pytest.mark.parametrize('case', ['metric0', 'metric1', 'metric2'])
def test_golden_metric(case):
    picture, golden = encode(GOLDEN[f'{case}_depth'], GOLDEN[f'{case}_K']), GOLDEN[f'{case}_hha']
    assert picture.dtype == np.uint8 and picture.shape == golden.shape
    share = close(picture, golden)
    assert (share >= .997).all(), share
    # the rest are windows whose pixels lie on one line: no normal here, noise in the golden picture
    assert (share[1:] == 1).all()
    spanned = picture[..., 0] != 218
    assert np.abs(picture[spanned].astype(int) - golden[spanned]).max() <= 1


@pytest.mark.parametrize('case', ['relative0', 'relative1'])
def test_golden_relative(case):
    picture = encode(*pseudo_depth(GOLDEN[f'{case}_inverse_depth'], released=True))
    share = close(picture, GOLDEN[f'{case}_hha'])
    assert (share >= .997).all(), share


@pytest.mark.parametrize('case', ['relative0', 'relative1'])
def test_golden_from_stored_half_precision(case):
    depth = GOLDEN[f'{case}_pseudo_depth']
    assert depth.dtype == np.float16
    picture = encode(depth, GOLDEN[f'{case}_K'])
    share = close(picture, GOLDEN[f'{case}_hha'])
    assert (share >= .996).all(), share
    assert np.array_equal(picture, encode(torch.from_numpy(depth), GOLDEN[f'{case}_K']).numpy())


def test_batch_is_single():
    depths = np.random.default_rng(0).uniform(1, 4, (3, 40, 50)).astype(np.float32)
    depths[1, 10:20, 10:20] = 0
    cameras = np.stack([camera_matrix(f, 25, 20) for f in (60, 100, 200)])
    together = encode(depths, cameras)
    assert together.shape == (3, 40, 50, 3)
    for picture, depth, camera in zip(together, depths, cameras):
        assert np.array_equal(picture, encode(depth, camera))
    shared = encode(torch.from_numpy(depths), cameras[0])
    assert isinstance(shared, torch.Tensor)
    assert np.array_equal(shared[2].numpy(), encode(depths[2], cameras[0]))


@pytest.mark.parametrize('radius', [3, 10])
@pytest.mark.parametrize('normal', [(0, 0, 1), (0, .8, .6), (.6, -.48, .64)])
def test_normal_of_a_plane(radius, normal):
    for focal in (120, 500, 3000):  # the longer the lens, the worse the conditioning
        camera = camera_matrix(focal, 40, 30)
        found = normals(plane(normal, 2, camera=camera), camera, radius)
        expected = torch.tensor(normal, dtype=torch.float32)[:, None, None].expand_as(found)
        assert torch.allclose(found, expected, atol=2e-3)


def test_normal_of_a_plane_with_holes():
    depth = plane((.6, -.48, .64), 2)
    depth[np.random.default_rng(0).random(depth.shape) < .3] = 0
    found = normals(depth, CAMERA, 3)
    expected = torch.tensor([.6, -.48, .64])[:, None, None].expand_as(found)
    assert torch.allclose(found, expected, atol=2e-3)


def test_normals_batch_and_nan():
    depth = np.zeros((2, 30, 30), np.float32)
    depth[0] = 2
    depth[1, 15] = 2  # one line of pixels spans no plane
    found = normals(depth, CAMERA)
    assert found.shape == (2, 3, 30, 30)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()
    assert torch.allclose(normals(depth[0], CAMERA), found[0], equal_nan=True)


@pytest.mark.parametrize('tilt', [-30, -10, 0, 10, 30])
def test_gravity_of_a_floor_and_a_wall(tilt):
    t = np.radians(tilt)
    down, ahead = np.array([0, np.cos(t), np.sin(t)]), np.array([0, -np.sin(t), np.cos(t)])
    n = np.concatenate([np.tile(down, (500, 1)), np.tile(ahead, (700, 1)),
                        np.tile([1., 0, 0], (300, 1))])
    n += np.random.default_rng(0).normal(0, .02, n.shape)
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    n = torch.from_numpy(n).float().T.reshape(3, 30, 50).clone()
    n[:, 0] = torch.nan
    y = gravity(n)
    assert y.shape == (3,) and np.degrees(np.arccos(y.numpy() @ down)) < 1
    assert torch.allclose(gravity(n[None])[0], y)


def test_floor_and_wall_channels():
    camera = camera_matrix(40, 40, 30)
    floor = plane((0, 1, 1e-9), 1.5, camera=camera)
    depth = np.minimum(np.where(floor > 0, floor, np.inf), 4)
    picture = encode(depth, camera).astype(int)
    on_floor = np.zeros(depth.shape, bool)
    on_floor[-8:] = True
    on_wall = np.zeros(depth.shape, bool)
    on_wall[:20] = True
    assert np.abs(picture[on_floor, 0] - 38).max() <= 1
    assert np.abs(picture[on_wall, 0] - 128).max() <= 1
    assert picture[on_floor, 1].max() <= 1
    assert np.abs(picture[on_wall, 2] - 78).max() == 0  # 31000/400, rounded to even: 77.5 -> 78


def test_unseen_ground_is_130_below():
    picture = encode(np.full((60, 80), 2.), CAMERA)
    v = np.arange(1, 61)
    expected = np.round(130 - 200*(v - 30)/120)
    assert np.abs(picture[..., 1] - expected[:, None]).max() <= 1
    assert (picture[..., 0] == 128).all() and (picture[..., 2] == 155).all()


def test_disparity_saturates():
    picture = encode(np.array([[.2, 1, 1.2, 1.3], [3.1, 10, 31, 310]]), CAMERA)
    assert picture[..., 2].ravel().tolist() == [255, 255, 255, 238, 100, 31, 10, 1]


def test_nothing_measured():
    for shape in ((1, 1), (4, 5), (2, 30, 40)):
        picture = encode(np.zeros(shape), CAMERA)
        assert picture.shape == (*shape, 3) and (picture == [218, 130, 255]).all()


def test_missing_pixels_have_their_codes():
    depth = plane((0, .8, .6), 2)
    depth[:20, :20] = 0
    picture = encode(depth, CAMERA)
    assert (picture[:20, :20, 2] == 255).all() and (picture[:16, :16, 0] == 218).all()
    assert (picture[25:, 25:, 0] != 218).all()


def test_input_is_left_alone():
    depth = plane((0, .8, .6), 2).astype(np.float32)
    depth[3] = 0
    tensor = torch.from_numpy(depth.copy()).requires_grad_()
    before = depth.copy()
    first = encode(depth, CAMERA)
    assert np.array_equal(depth, before)
    assert np.array_equal(encode(tensor, CAMERA).numpy(), first)
    assert np.array_equal(tensor.detach().numpy(), before)
    depth.setflags(write=False)
    assert np.array_equal(encode(depth[:, ::-1][:, ::-1], CAMERA), first)


@pytest.mark.parametrize('value, message',
                         [(np.nan, 'NaN'), (np.inf, 'infinite'), (-np.inf, 'infinite'),
                          (-.5, 'negative')])
def test_impossible_depth(value, message):
    depth = np.ones((20, 20))
    depth[3, 4] = value
    with pytest.raises(ValueError, match=f'depth.*{message}'): encode(depth, CAMERA)
    with pytest.raises(ValueError, match=f'depth.*{message}'):
        normals(torch.from_numpy(depth), CAMERA)


@pytest.mark.parametrize('shape', [(5,), (1, 2, 3, 4), (0, 5), (2, 0, 5), ()])
def test_impossible_depth_shape(shape):
    with pytest.raises(ValueError, match='depth: shape'): encode(np.ones(shape), CAMERA)


@pytest.mark.parametrize('camera', [np.eye(4), np.ones((3, 3, 3)), np.zeros((3, 3)),
                                    np.full((3, 3), np.nan), np.diag([-1., 1, 1])])
def test_impossible_camera(camera):
    with pytest.raises(ValueError, match='camera'): encode(np.ones((2, 5, 5)), camera)
