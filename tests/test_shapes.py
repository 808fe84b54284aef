"Shapes: every category, many seeds."
import numpy as np
import pytest

from stdg.graph import Vocabulary
from stdg.rooms.catalogue import CATEGORIES, make
from stdg.rooms.solids import Material

SEEDS = range(12)


def shapes(name): return [make(name, np.random.default_rng(seed)) for seed in SEEDS]


def test_names():
    assert len(CATEGORIES) >= 28 and set(CATEGORIES) <= set(Vocabulary.visual_genome().objects)
    with pytest.raises(ValueError, match='unicorn'): make('unicorn', np.random.default_rng(0))
    with pytest.raises(ValueError, match='velvet'): Material('velvet', [[1, 0, 0]])
    with pytest.raises(ValueError, match='colors'): Material('plain', [1, 0])


@pytest.mark.parametrize('name', CATEGORIES)
def test_mesh_is_sound(name):
    for shape in shapes(name):
        assert shape.category == name and 10 <= shape.n_faces <= 1500
        for part in shape.parts:
            assert np.isfinite(part.vertices).all()
            assert part.faces.min() >= 0 and part.faces.max() < len(part.vertices)
            assert 0 <= part.material.colors.min() and part.material.colors.max() < 1.6
        mesh = shape.mesh()
        assert len(mesh.faces) == shape.n_faces and np.allclose(mesh.bounds, shape.bounds)


@pytest.mark.parametrize('name', CATEGORIES)
def test_size_and_place(name):
    for shape in shapes(name):
        low, high = shape.bounds
        assert .08 < (high - low).max() < 2.2 and (high - low).min() > .01
        assert abs(low[0] + high[0]) < 1e-9
        if 'wall' in shape.mount: assert abs(high[1]) < 1e-9 and abs(low[2]) < 1e-9
        elif 'hang' in shape.mount: assert abs(high[2]) < 1e-9 and abs(low[1] + high[1]) < 1e-9
        else: assert abs(low[2]) < 1e-9 and abs(low[1] + high[1]) < 1e-9


@pytest.mark.parametrize('name', CATEGORIES)
def test_supports_and_containers_are_inside(name):
    for shape in shapes(name):
        (x, y, z), (x_far, y_far, z_far) = shape.bounds
        inside = [shape.container] if shape.container else []
        for height, x0, y0, x1, y1 in [*shape.support, *inside]:
            assert z - 1e-6 <= height <= z_far + 1e-6
            assert x <= x0 < x1 <= x_far and y <= y0 < y1 <= y_far


@pytest.mark.parametrize('name', CATEGORIES)
def test_support_carries(name):
    """What stands on a support rests on a face: the middle of the rectangle has the mesh just below
    it."""
    for shape in shapes(name):
        mesh = shape.mesh()
        for height, x0, y0, x1, y1 in shape.support:
            spot = np.array([(x0 + x1) / 2, (y0 + y1) / 2, height + .05])
            hits = mesh.ray.intersects_location([spot], [[0, 0, -1]])[0]
            assert len(hits) and abs(hits[:, 2].max() - height) < .04


@pytest.mark.parametrize('name', CATEGORIES)
def test_seeds(name):
    once, again = shapes(name), shapes(name)
    for a, b in zip(once, again):
        for p, q in zip(a.parts, b.parts):
            assert np.array_equal(p.vertices, q.vertices)
            assert np.array_equal(p.material.colors, q.material.colors)
    assert len({shape.bounds.tobytes() for shape in once}) > 6
    assert len({shape.parts[0].material.colors.tobytes() + shape.parts[-1].material.colors.tobytes()
                for shape in once}) > 1
    assert len({shape.mount for shape in once}) == 1  # one specimen tells how all are mounted
