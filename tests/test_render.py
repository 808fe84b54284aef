"""Rendering: depth is exact, the camera is the method's, shadows fall, and nothing depends on
chance."""
import numpy as np
import pytest

from stdg.rooms.catalogue import make
from stdg.rooms.rays import Camera, RayScene, amodal_pixels
from stdg.rooms.render import Light, first_sight, render
from stdg.rooms.solids import Material, Part, ball, block, plain

GREY, EYE = plain([.5, .5, .5]), np.eye(4)
GROUND = Part(np.array([(-9, -9, 0), (9, -9, 0), (9, 9, 0), (-9, 9, 0)], float),
              np.array([[0, 1, 2], [0, 2, 3]]), GREY)
SIZE = 96, 128


def move(x, y, z): return np.array([[1, 0, 0, x], [0, 1, 0, y], [0, 0, 1, z], [0, 0, 0, 1.]])


def cloud(depth, camera):
    "World points of a depth map, by the formulas of method spec 2.3a (pixels counted from 1)."
    k = camera.matrix(depth.shape)
    v, u = np.mgrid[1:depth.shape[0] + 1, 1:depth.shape[1] + 1]
    points = np.stack([(u - k[0, 2]) * depth / k[0, 0], (v - k[1, 2]) * depth / k[1, 1], depth], -1)
    return points @ camera.rotation + np.asarray(camera.position)


@pytest.mark.parametrize('fov', [30, 70])
def test_depth_of_planes(fov):
    "A tilted camera sees the floor and a wall where they are."
    camera = Camera([.3, -3, 1.4], [0, 0, .6], fov)
    wall = block((9, .1, 9), (0, 1.05, 0), GREY)
    scene = RayScene().add([GROUND], EYE, 0).add([wall], EYE, 1).build()
    result = render(scene, camera, SIZE)
    points, floor = cloud(result['depth'], camera), result['instance'] == 0
    assert floor.any() and (~floor).any()
    assert np.abs(points[floor][:, 2]).max() < 1e-3
    assert np.abs(points[~floor][:, 1] - 1).max() < 1e-3


def test_depth_of_a_sphere():
    camera = Camera([0, -3, 0], [0, 0, 0], 40)
    result = render(RayScene().add([ball(.5, (0, 0, 0), GREY, 3)], EYE, 0).build(), camera,
                    (101, 101))
    assert abs(result['depth'][50, 50] - 2.5) < 1e-3
    points = cloud(result['depth'], camera)[result['instance'] == 0]
    # flat triangles stand up to 4 mm inside
    assert np.abs(np.linalg.norm(points, axis=1) - .5).max() < 5e-3


def test_intrinsics():
    "A point projects to the pixel that sees it, and straight ahead is the middle."
    camera = Camera([1, -4, 2], [0, 0, .5], 50)
    k = camera.matrix(SIZE)
    assert k[0, 2] == SIZE[1] / 2 + .5 and k[1, 2] == SIZE[0] / 2 + .5 and k[0, 0] == k[1, 1]
    assert np.isclose(2 * np.degrees(np.arctan(SIZE[1] / 2 / k[0, 0])), 50)
    small = .02
    result = render(RayScene().add([ball(small, (.4, .3, .7), GREY, 1)], EYE, 0).build(), camera,
                    (480, 640))
    k = camera.matrix((480, 640))
    p = camera.rotation @ (np.array([.4, .3, .7]) - camera.position)
    v, u = (a.mean() + 1 for a in np.nonzero(result['instance'] == 0))
    assert abs(u - (p[0] / p[2] * k[0, 0] + k[0, 2])) < .5
    assert abs(v - (p[1] / p[2] * k[1, 1] + k[1, 2])) < .5
    # rows go down, depth goes ahead
    assert camera.rotation[1] @ [0, 0, 1] < 0 < camera.rotation[2] @ [0, 1, 0]


def test_instances_and_nothing():
    left, right = (block((1, 1, 1), (x, 0, 0), GREY) for x in (-1, 1))
    scene = RayScene().add([left], EYE, 3).add([right], EYE, 5).build()
    result = render(scene, Camera([0, -5, .5], [0, 0, .5], 60), SIZE)
    assert set(np.unique(result['instance'])) == {-1, 3, 5}
    assert (result['depth'] == 0)[result['instance'] == -1].all()
    assert (result['depth'] > 0)[result['instance'] >= 0].all()
    assert result['instance'][48, 40] == 3 and result['instance'][48, 88] == 5
    assert result['image'].dtype == np.uint8 and result['depth'].dtype == np.float32
    assert result['instance'].dtype == np.int32
    assert result['image'].shape == (*SIZE, 3) == result['normal'].shape


def test_normals():
    scene = RayScene().add([GROUND], EYE, 0).add([ball(.5, (0, 0, .5), GREY)], EYE, 1).build()
    camera = Camera([0, -3, 1], [0, 0, .5], 50)
    result = render(scene, camera, SIZE)
    floor, found = result['instance'] == 0, result['instance'] >= 0
    assert np.allclose(result['normal'][floor], [0, 0, 1], atol=1e-5)
    assert np.allclose(np.linalg.norm(result['normal'][found], axis=1), 1, atol=1e-4)
    towards = np.asarray(camera.position) - cloud(result['depth'], camera)
    cosine = (result['normal'] * towards).sum(-1)[found] / np.linalg.norm(towards[found], axis=1)
    assert (cosine > -.2).all()


def test_shadow_and_occlusion_darken():
    light = Light(sun=np.array([-1., 0, 1]))
    camera = Camera([0, -4, 4], [0, 0, 0], 50)
    empty = RayScene().add([GROUND], EYE, 0).build()
    box = block((.6, .6, 1), (0, 0, 0), GREY)
    scene = RayScene().add([GROUND], EYE, 0).add([box], EYE, 1).build()
    bare = render(empty, camera, SIZE, light)
    result = render(scene, camera, SIZE, light)
    points = cloud(result['depth'], camera)
    inside = (result['instance'] == 0) & (np.abs(points[..., 1]) < .15)
    shadow = inside & (points[..., 0] > .45) & (points[..., 0] < 1.1)
    sunny = inside & (points[..., 0] < -1.2)
    assert shadow.sum() > 20 and sunny.sum() > 20
    assert result['image'][shadow].mean() < .75 * bare['image'][shadow].mean()
    assert abs(result['image'][sunny].mean() - bare['image'][sunny].mean()) < 4
    night = Light(sun_color=np.zeros(3))
    bare, boxed = (render(s, camera, SIZE, night)['image'] for s in (empty, scene))
    foot = (result['instance'] == 0) & (np.abs(points[..., 0]) < .2)
    foot &= (points[..., 1] < -.32) & (points[..., 1] > -.45)
    assert foot.sum() > 10 and boxed[foot].mean() < bare[foot].mean() - 5


def test_smoothing_touches_the_picture_only():
    bear = make('bear', np.random.default_rng(0))
    scene = RayScene().add([GROUND], EYE, 0).add(bear.parts, EYE, 1).build()
    camera = Camera([0, -1.2, .6], [0, 0, .2], 40)
    one, two = (render(scene, camera, SIZE, samples=s) for s in (1, 2))
    for name in ('depth', 'instance', 'normal'): assert np.array_equal(one[name], two[name])
    assert not np.array_equal(one['image'], two['image'])
    edges = np.diff(one['instance'], axis=1) != 0
    step = lambda r: np.abs(np.diff(r['image'].astype(int), axis=1))[edges].mean()
    assert step(two) < step(one)


def test_what_was_seen_first_is_what_is_rendered():
    "A scene may grow between two looks, and the first look at it may be handed on."
    camera, box = Camera([0, -3, 1], [0, 0, .4], 50), block((.6, .6, .8), (0, 0, 0), GREY)
    scene = RayScene().add([box], EYE, 1).build()
    before = first_sight(scene, camera, SIZE)
    grown = scene.add([GROUND], EYE, 0).build()
    sight = first_sight(grown, camera, SIZE)
    assert set(np.unique(before.instance)) == {-1, 1}
    assert np.array_equal(sight.instance == 1, before.instance == 1)
    assert (sight.instance == 0).any()
    assert np.array_equal(before.depth[before.instance == 1], sight.depth[before.instance == 1])
    at_once = RayScene().add([box], EYE, 1).add([GROUND], EYE, 0).build()
    one, two = render(grown, camera, SIZE, sight=sight), render(at_once, camera, SIZE)
    for name in one: assert np.array_equal(one[name], two[name]), name


def test_textures_stay_on_a_moved_object():
    checks = Material('checks', [[.9, .1, .1], [.1, .1, .9]], .3, 4)
    views = []
    for offset in (0, 7.3):
        scene = RayScene().add([block((1, 1, 1), (0, 0, 0), checks)], move(offset, 0, 0), 0).build()
        views.append(render(scene, Camera([offset + .3, -3, 1], [offset, 0, .5], 35),
                            SIZE)['image'].astype(int))
    assert (np.abs(views[0] - views[1]).max(-1) > 40).mean() < .01 and views[0].std() > 20


def test_deterministic():
    def picture():
        rng = np.random.default_rng(3)
        scene = RayScene().add([GROUND], EYE, 0)
        for i, name in enumerate(('chair', 'plant', 'laptop', 'vase')):
            scene.add(make(name, rng).parts, move(i * .6 - .9, 0, 0), i + 1)
        return render(scene.build(), Camera([0, -3, 1.2], [0, 0, .4], 50), SIZE, Light.random(rng))
    one, two = picture(), picture()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_amodal_counts():
    """As many pixels as rays find when the thing is alone; also if it reaches out of the picture or
    behind the camera."""
    things = {1: block((.5, .5, 1), (0, .5, 0), GREY), 2: block((2, .1, .6), (0, 0, 0), GREY),
              3: block((.4, 4, .4), (1.2, -2.5, .3), GREY)}
    camera = Camera([0, -3, .8], [0, 0, .5], 50)
    scene = RayScene().add([GROUND], EYE, 0)
    for i, part in things.items(): scene.add([part], EYE, i)
    counted = amodal_pixels(scene.build(), camera, SIZE)
    for i, part in {0: GROUND, **things}.items():
        scene_alone = RayScene().add([part], EYE, 0).build()
        alone = (render(scene_alone, camera, SIZE, samples=1)['instance'] == 0).sum()
        assert abs(counted[i] - alone) <= .01 * alone + 2, i
    seen = np.bincount(render(scene, camera, SIZE)['instance'].clip(0).ravel(), minlength=4)
    assert seen[1] < .8 * counted[1]


def test_bad_input():
    with pytest.raises(ValueError, match='empty'): RayScene().build()
    with pytest.raises(ValueError, match='instance'): RayScene().add([GROUND], EYE, -1)
