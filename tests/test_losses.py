"Losses: the released numbers, gradients, and what must not happen at the extremes."
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from stdg.losses import detection_loss, focal_loss, relation_loss, teaching_loss

GOLDEN = np.load(Path(__file__).parent / 'golden/fields.npz')
NAMES = dict(heatmap='detection_heatmap', offset='detection_offset', size='detection_size',
             mask='detection_mask', index='detection_index', relation='relation_fields')


@pytest.fixture(scope='module')
def targets():
    return {name: torch.stack([torch.from_numpy(GOLDEN[f'case{i}_{key}']) for i in range(6)])
            for name, key in NAMES.items()}


@pytest.fixture
def small():
    "Two images, three classes, two predicates, 4 x 5 cells, in float64."
    torch.manual_seed(0)
    heatmap = torch.rand(2, 3, 4, 5) * .9
    heatmap[0, 1, 2, 2] = heatmap[1, 0, 1, 4] = 1
    relation = torch.zeros(2, 2, 9, 4, 5)
    relation[0, 1, :, 1, 1:4] = torch.tensor([1, 2, 3, -1, 4, .1, .1, .3, .4])[:, None]
    relation[0, 1, 4, 1, 2] = 0  # the row of the object's centre
    targets = dict(heatmap=heatmap, offset=torch.rand(2, 128, 2), size=torch.rand(2, 128, 2) * 4,
                   mask=(torch.arange(128) < 2).repeat(2, 1).byte(),
                   index=torch.randint(0, 20, (2, 128)), relation=relation)
    return {name: t.double() if t.is_floating_point() else t for name, t in targets.items()}


def close(terms, golden):
    return np.allclose([float(term) for term in terms.values()], golden, rtol=1e-5, atol=0)


def test_golden_detection(targets):
    terms = detection_loss(torch.from_numpy(GOLDEN['loss_detection_output']), targets)
    assert list(terms) == ['heatmap', 'size', 'offset'] and close(terms, GOLDEN['loss_detection'])


# no cell of the golden cases lies exactly on an object's row or column
@pytest.mark.parametrize('released', [True, False])
def test_golden_relation(targets, released):
    terms = relation_loss(torch.from_numpy(GOLDEN['loss_relation_output']), targets,
                          released=released)
    assert list(terms) == ['confidence', 'object', 'subject', 'subject_scale', 'object_scale']
    assert close(terms, GOLDEN['loss_relation'])


def test_golden_teaching():
    offsets = lambda who: [torch.from_numpy(GOLDEN[f'teaching_{who}{head}']) for head in (0, 1)]
    assert np.isclose(float(teaching_loss(offsets('student'), offsets('teacher'))),
                      GOLDEN['teaching_loss'], rtol=1e-5)


def test_gradients(small):
    probability = torch.rand(2, 3, 4, 5).double() * .98 + .01
    detection = torch.cat([probability, torch.randn(2, 4, 4, 5).double()], 1).requires_grad_()
    relation = torch.randn(2, 2, 7, 4, 5).double().requires_grad_()
    assert gradcheck(lambda x: tuple(detection_loss(x, small).values()), detection)
    for released in (False, True):
        assert gradcheck(lambda x: tuple(relation_loss(x, small, released).values()), relation)
    teacher = [torch.randn(1, 4, 3, 3).double() * 8 for _ in range(3)]
    student = [torch.randn(1, 4, 3, 3).double().requires_grad_() for _ in range(3)]
    assert gradcheck(lambda *x: teaching_loss(x, teacher), student)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_the_extremes(small, dtype):
    targets = {name: t.float() if t.is_floating_point() else t for name, t in small.items()}
    for value in (0., 1.):
        output = torch.full((2, 7, 4, 5), value, dtype=dtype, requires_grad=True)
        terms = detection_loss(output, targets)
        sum(terms.values()).backward()
        assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
        assert output.grad.isfinite().all()
    for logit in (-1000., 0., 1000.):
        output = torch.full((2, 2, 7, 4, 5), logit, dtype=dtype, requires_grad=True)
        terms = relation_loss(output, targets)
        sum(terms.values()).backward()
        assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
        assert output.grad.isfinite().all()


def test_half_precision_agrees(small):
    output = torch.rand(2, 7, 4, 5) * .9 + .05
    for dtype in (torch.bfloat16, torch.float16):
        rounded = output.to(dtype)
        full, half = (detection_loss(x, small) for x in (rounded.float(), rounded))
        assert all(torch.isclose(full[name], half[name], rtol=1e-4) for name in full)


def test_float16_is_kept_from_the_ends(small):
    "Where a half-precision heat-map is 0 or 1, the loss is that of the nearest number that is not."
    targets = {name: t.float() if t.is_floating_point() else t for name, t in small.items()}
    for value, nearest in ((0., 2**-14), (1., 1 - 2**-12)):
        half = detection_loss(torch.full((2, 7, 4, 5), value, dtype=torch.float16), targets)
        expected = focal_loss(torch.full((2, 3, 4, 5), nearest), targets['heatmap']) / 2
        assert float(half['heatmap']) == pytest.approx(float(expected), rel=1e-6)


def test_released_rule_skips_the_object_row(small):
    output = torch.zeros(2, 2, 7, 4, 5).double()
    ours = relation_loss(output, small)['object']
    theirs = relation_loss(output, small, released=True)['object']
    assert torch.isclose(ours, torch.tensor((3 * 1 + 2 * 4) / 6 / 2).double(), atol=1e-4)
    assert torch.isclose(theirs, torch.tensor((2 * 1 + 2 * 4) / 4 / 2).double(), atol=1e-4)


def test_nothing_annotated(small):
    blank = {name: torch.zeros_like(t) for name, t in small.items()}
    detection = torch.rand(2, 7, 4, 5, requires_grad=True)
    relation = torch.randn(2, 2, 7, 4, 5, requires_grad=True)
    terms = detection_loss(detection, blank) | relation_loss(relation, blank)
    assert all(terms[name].item() == 0 for name in terms if name not in ('heatmap', 'confidence'))
    sum(terms.values()).backward()
    assert terms['heatmap'] > 0
    assert detection.grad.isfinite().all() and relation.grad.isfinite().all()


def test_focal_loss_divides_by_the_positives():
    p = torch.full((4,), .3)
    assert torch.isclose(focal_loss(p, torch.tensor([1., 1, 1, 1])),
                         focal_loss(p[:1], torch.ones(1)))
    assert torch.isclose(focal_loss(p, torch.zeros(4)), 4 * focal_loss(p[:1], torch.zeros(1)))


def test_teacher_gets_no_gradient_and_wild_offsets_are_left_out():
    teacher = torch.tensor([1., 9.99, -10, 30], requires_grad=True)
    student = torch.zeros(4, requires_grad=True)
    teaching_loss([student], [teacher]).backward()
    assert teacher.grad is None and (student.grad != 0).tolist() == [True, True, False, False]


def test_bad_input(small):
    with pytest.raises(ValueError, match='detection fields'):
        detection_loss(torch.rand(2, 6, 4, 5), small)
    with pytest.raises(ValueError, match='detection fields'):
        detection_loss(torch.rand(2, 7, 4, 4), small)
    with pytest.raises(ValueError, match='relation fields'):
        relation_loss(torch.rand(2, 14, 4, 5), small)
    with pytest.raises(ValueError, match='relation fields'):
        relation_loss(torch.rand(2, 2, 9, 4, 5), small)
    with pytest.raises(ValueError, match='0 student heads'): teaching_loss([], [])
    said = r'offsets: the network gives \(1, 36, 4, 4\), the targets have \(1, 36, 4, 5\)'
    with pytest.raises(ValueError, match=said):
        teaching_loss([torch.zeros(1, 36, 4, 4)], [torch.zeros(1, 36, 4, 5)])
