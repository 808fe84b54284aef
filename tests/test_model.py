"The network against outputs of the released code; the frozen teacher; saving and loading."
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stdg.checkpoint import from_released, load
from stdg.losses import teaching_loss
from stdg.model import STDG

golden = Path(__file__).parent/'golden'
layouts = json.loads((golden/'state_dicts.json').read_text())
outputs = np.load(golden/'model.npz')


def weights(layout):
    "The state dict of a layout: every tensor is drawn by its name alone."
    state = {}
    for key, (shape, dtype) in layout.items():
        if 'int' in dtype:
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith('running_var'): x = .5 + abs(x)
        elif key.endswith('running_mean'): x = .1 * x
        elif key.endswith('bias'): x = .05 * x
        elif len(shape) <= 1: x = 1 + .1 * x
        else: x = x / np.sqrt(np.prod(shape[1:]))
        state[key] = torch.tensor(x, dtype=torch.float32)
    return state


def close(ours, name):
    theirs = torch.tensor(outputs[name]).float()
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5, name


@pytest.mark.parametrize('config', ['resnet50_rgb', 'resnet50_combine', 'swin_s_rgb'])
def test_outputs_equal_released(config):
    model, image = from_released(weights(layouts[config])), torch.tensor(outputs['image'])
    with torch.no_grad():
        (detection, relation), offsets = model(image), model.offsets(image)
        close(detection[None] if detection.ndim == 3 else detection, f'{config}_detection')
        close(relation, f'{config}_relation')
        for ours, head in zip(offsets, ('detection', 'relation')):
            close(ours, f'{config}_offsets_{head}')
        if model.teacher is not None:
            taught = model.teacher.offsets(image.flip(1))
            for ours, head in zip(taught, ('detection', 'relation')):
                close(ours, f'{config}_teacher_offsets_{head}')
            expected = float(outputs[f'{config}_teaching_loss'])
            assert float(teaching_loss(offsets, taught)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('config', sorted(layouts))
def test_every_layout_is_recognised(config):
    state = {key: torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix('torch.')))
             for key, (shape, dtype) in layouts[config].items()}
    model = from_released(state)
    assert model.mode in config and config.startswith(model.config['backbone'])
    assert model.config['head_norm'] == config.endswith('_bn')


@pytest.mark.parametrize('backbone,stride', [('resnet18', 8), ('mobilenetv3_small_100', 16),
                                             ('convnext_atto', 4), ('resnet18', 32)])
def test_any_timm_backbone(backbone, stride):
    model = STDG(backbone, n_objects=5, n_predicates=3, pretrained=False, stride=stride).eval()
    with torch.no_grad(): detection, relation = model(torch.zeros(1, 3, 64, 96))
    h, w = 64 // stride, 96 // stride
    assert detection.shape == (1, 9, h, w) and relation.shape == (1, 3, 7, h, w)


def test_pretrained_weights_come_from_the_package():
    def first_weights(**options):
        model = STDG('small', n_objects=3, n_predicates=2, **options)
        return model.network.backbone.body.conv_stem.weight

    weights = first_weights()
    assert not torch.equal(weights, first_weights(pretrained=False))
    assert torch.equal(weights, first_weights())


SIZES = dict(n_objects=3, n_predicates=2)


@pytest.fixture(scope='module')
def donor():
    "A network of timm whose weights a file may hold."
    torch.manual_seed(0)
    return timm.create_model('resnet10t.c3_in1k', pretrained=False)


@pytest.mark.parametrize('ending', ['safetensors', 'pth', 'model', 'state_dict'])
def test_pretrained_from_a_local_file(donor, tmp_path, ending):
    """Every weight of the backbone comes from the file, as safetensors or as torch saves them, also
    in the dictionaries that training scripts write."""
    weights, path = donor.state_dict(), tmp_path/f'weights.{ending}'
    if ending == 'safetensors': save_file(weights, path)
    else: torch.save(weights if ending == 'pth' else {ending: weights, 'epoch': 7}, path)
    model = STDG('resnet10t.c3_in1k', pretrained=str(path), **SIZES)
    arrived = model.network.backbone.body.state_dict()
    assert len(arrived) > 50 and {'conv1.0.weight', 'layer3.0.conv1.weight'} <= set(arrived)
    assert all(torch.equal(value, weights[name]) for name, value in arrived.items())
    other = STDG('resnet10t.c3_in1k', pretrained=False, **SIZES).network.backbone.body.state_dict()
    assert not torch.equal(other['conv1.0.weight'], weights['conv1.0.weight'])


def test_a_wrong_file_of_weights_is_refused(donor, tmp_path):
    "It says which file, and what is wrong; no network begins from half of its weights."
    weights = donor.state_dict()
    save_file(weights, tmp_path/'whole.safetensors')
    whole = (tmp_path/'whole.safetensors').read_bytes()
    (tmp_path/'half.safetensors').write_bytes(whole[:len(whole) // 2])
    save_file({name: value for name, value in weights.items() if 'layer3' not in name},
              tmp_path/'part.safetensors')
    save_file({**weights, 'conv1.0.weight': torch.zeros(5, 3, 3, 3)}, tmp_path/'shape.safetensors')
    torch.save(dict(weights, code=print), tmp_path/'code.pth')
    for name, backbone, said in (
            ('none.safetensors', 'resnet10t.c3_in1k', 'is missing. It should hold ImageNet weights'),
            ('half.safetensors', 'resnet10t.c3_in1k', 'is not a whole file of weights'),
            ('code.pth', 'resnet10t.c3_in1k', 'holds more than weights'),
            ('part.safetensors', 'resnet10t.c3_in1k', 'does not hold weights of resnet10t'),
            ('shape.safetensors', 'resnet10t.c3_in1k', 'does not hold weights of resnet10t'),
            ('whole.safetensors', 'resnet18.tv_in1k', 'does not hold weights of resnet18')):
        error = FileNotFoundError if name == 'none.safetensors' else ValueError
        with pytest.raises(error, match=f'{name}.*{said}'):
            STDG(backbone, pretrained=tmp_path/name, **SIZES)


def test_teacher_never_changes():
    model = STDG('small', 'combine', n_objects=4, n_predicates=3, pretrained=False).train()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.1,
                                  weight_decay=.1)
    for _ in range(3):
        detection, relation, offsets, taught = model.taught(*torch.randn(2, 2, 3, 64, 64))
        assert not any(t.requires_grad for t in taught)
        optimiser.zero_grad()
        (detection.mean() + relation.mean() + teaching_loss(offsets, taught)).backward()
        optimiser.step()
        model.train()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert not any(m.training for m in model.teacher.modules())
    assert all(torch.equal(before[k], v) for k, v in model.teacher.state_dict().items())


def test_save_and_load_every_mode(tmp_path):
    for mode in ('rgb', 'depth', 'combine'):
        model = STDG('small', mode, n_objects=4, n_predicates=3, pretrained=False,
                     head_norm=True).eval()
        model.save(tmp_path/f'{mode}.safetensors')
        image, again = torch.randn(1, 3, 64, 64), load(tmp_path/f'{mode}.safetensors')
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(model(image), again(image)))
        suffixes = sorted(p.suffix for p in tmp_path.glob(f'{mode}.*'))
        assert again.mode == mode and suffixes == ['.json', '.safetensors']
