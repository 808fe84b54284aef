"Deformable convolution: precision, compilation, export, and what it keeps for the backward pass."
import itertools

import pytest
import torch
from torchvision.ops import deform_conv2d

from stdg.deform import DeformConv, PreHead
from stdg.model import STDG


def case(c, b=2, h=9, w=7):
    torch.manual_seed(0)
    x = torch.randn(b, c, h, w, requires_grad=True)
    return x, (4 * torch.randn(b, 18, h, w)).requires_grad_()


@pytest.mark.parametrize('c,n', [(8, 8), (8, 16), (32, 8)])
def test_layer_equals_torchvision(c, n):
    layer, (x, offsets) = DeformConv(c, n), case(c)
    learnt = (x, offsets, layer.weight, layer.bias)
    ours, theirs = layer(x, offsets), deform_conv2d(x, offsets, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), learnt),
                    torch.autograd.grad(theirs.square().sum(), learnt)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_an_offset_that_is_no_number():
    "No index into the field comes of it, but NaN at its cell alone, which the loss then shows."
    layer, (x, offsets) = DeformConv(8, 16), case(8)
    whole = layer(x, offsets).detach()
    broken = offsets.detach().clone()
    broken[1, 4, 2, 3] = float('nan')
    out = layer(x, broken)
    assert out[1, :, 2, 3].isnan().all() and int(out.isnan().sum()) == 16
    assert torch.equal(out.nan_to_num(7), whole.where(~out.isnan(), 7))
    broken[1, 4, 2, 3] = float('inf')
    assert int(layer(x, broken).isnan().sum()) == 16


@pytest.mark.parametrize('c', [8, 32])
def test_training_under_autocast(c):
    "The sampling stays exact: only the input and the offsets are rounded."
    layer, (x, offsets) = DeformConv(c, 8), case(c)
    with torch.autocast('cpu', dtype=torch.bfloat16): out = layer(x.bfloat16(), offsets.bfloat16())
    out.sum().backward()
    torch.testing.assert_close(out, layer(x.bfloat16().float(), offsets.bfloat16().float()))
    assert out.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in (x, offsets, layer.weight))


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
    free_batch = {0: torch.export.Dim('batch')}
    program = torch.export.export(model, (image,), dynamic_shapes=(free_batch,)).module()
    with torch.no_grad():
        for ours, theirs in zip(program(torch.cat([image, image[:1]])), model(image)):
            torch.testing.assert_close(ours[:2], theirs, rtol=1e-4, atol=1e-4)


def peak(function):
    "Most bytes that `function` holds at once, by the allocator's own records."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events()
                    if e.name() == '[memory]')
    return max(itertools.accumulate(size for _, size in events))


@pytest.mark.parametrize('c,n', [(256, 256), (768, 256)])
def test_needs_no_more_memory_than_torchvision(c, n):
    "Two pre-heads on one field, as in the published networks, forward and backward."
    heads, x = [PreHead(c, n) for _ in range(2)], torch.randn(4, c, 24, 24, requires_grad=True)

    def run(): sum(head(x)[0].sum() for head in heads).backward()

    run()  # gradients exist from here on
    ours = peak(run)
    for head in heads:
        for block in head.blocks:
            block.deform.way = lambda *inputs: deform_conv2d(*inputs, padding=1)
    assert ours <= peak(run)
