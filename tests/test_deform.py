"Deformable convolution: precision, compilation, export, and what it keeps for the backward pass."
import pytest
import torch
from torchvision.ops import deform_conv2d

from stdg.deform import DeformConv, PreHead
from stdg.model import STDG


def case(c, b=2, h=9, w=7):
    torch.manual_seed(0)
    return torch.randn(b, c, h, w, requires_grad=True), (4 * torch.randn(b, 18, h, w)).requires_grad_()


@pytest.mark.parametrize('c,n', [(8, 8), (8, 16), (32, 8)])
def test_layer_equals_torchvision(c, n):
    layer, (x, offsets) = DeformConv(c, n), case(c)
    learnt = (x, offsets, layer.weight, layer.bias)
    ours, theirs = layer(x, offsets), deform_conv2d(x, offsets, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), learnt), torch.autograd.grad(theirs.square().sum(), learnt)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize('c', [8, 32])
def test_training_under_autocast(c):
    "The sampling stays exact: only the input and the offsets are rounded."
    layer, (x, offsets) = DeformConv(c, 8), case(c)
    with torch.autocast('cpu', dtype=torch.bfloat16): out = layer(x.bfloat16(), offsets.bfloat16())
    out.sum().backward()
    torch.testing.assert_close(out, layer(x.bfloat16().float(), offsets.bfloat16().float()))
    assert out.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in (x, offsets, layer.weight))


@pytest.mark.parametrize('c', [8, 32])
def test_compiles_without_a_break(c):
    head, (x, _) = PreHead(c, 16), case(c)
    compiled = torch.compile(head, backend='aot_eager', fullgraph=True)
    (plain,), (fast,) = (torch.autograd.grad(f(x)[0].square().sum(), x) for f in (head, compiled))
    torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize('backbone', ['small', 'resnet50'])
def test_whole_network_exports_with_free_batch(backbone):
    model = STDG(backbone, n_objects=5, n_predicates=3, pretrained=False).eval()
    image = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    with torch.no_grad():
        for ours, theirs in zip(program(torch.cat([image, image[:1]])), model(image)): torch.testing.assert_close(ours[:2], theirs, rtol=1e-4, atol=1e-4)


def kept(function, *inputs):
    "Bytes of the tensors that are kept for the backward pass."
    sizes = {}
    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): out = function(*inputs)
    return sum(sizes.values()), out


@pytest.mark.parametrize('c,n', [(16, 16), (64, 16)])
def test_keeps_no_more_than_torchvision(c, n):
    layer, (x, offsets) = DeformConv(c, n), case(c, h=16, w=16)
    ours, _ = kept(layer, x, offsets)
    theirs, _ = kept(lambda *a: deform_conv2d(*a, layer.weight, layer.bias, padding=1), x, offsets)
    with torch.no_grad(): assert kept(layer, x, offsets)[0] == 0
    assert ours <= theirs
