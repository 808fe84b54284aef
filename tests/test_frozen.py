"""Heads that learn on the levels of a network that stays as it is, and how."""
import pytest
import torch

from stdg.backbone import Backbone
from stdg.data import network_input
from stdg.evaluation.frozen import HEADS, FrozenPictures, heads_told, level_maps, maps_read
from stdg.graph import SceneGraph
from stdg.model import STDG
from stdg.testing import toy_database


@pytest.mark.parametrize('name, stride, fpn', [
    ('resnet18', 8, 16), ('resnet18', 16, 0), ('resnet50', 16, 0), ('convnext_atto', 8, 16),
    ('mobilenetv3_small_050', 8, 16), ('swin_tiny_patch4_window7_224', 8, 16)])
def test_levels_are_those_of_the_backbone(name, stride, fpn):
    "Whatever timm calls its modules and wherever it puts the channels."
    torch.manual_seed(0)
    backbone = Backbone(name, stride, fpn, pretrained=False).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(): wanted, own = backbone.body(image), backbone(image)
    wanted = [out if out.shape[1] == n else out.permute(0, 3, 1, 2)
              for out, n in zip(wanted, backbone.body.feature_info.channels())]
    strides = backbone.body.feature_info.reduction()
    found = level_maps(backbone, image, [*strides, 4])
    assert torch.equal(found[0], own) and found[-1].shape[2:] == (16, 24)
    for ours, theirs in zip(found[1:-1], wanted, strict=True): assert torch.equal(ours, theirs)


def test_hooks_go_whatever_happens():
    backbone = Backbone('resnet18', 8, 16, pretrained=False)
    for channels, stride, says in ((2, 4, 'pictures'), (3, 3, r'no level of stride 3, only of \[2, 4')):
        with pytest.raises(ValueError, match=says): level_maps(backbone, torch.zeros(1, channels, 64, 64), [stride])
    assert not any(module._forward_hooks for module in backbone.modules())


def test_levels_lie_side_by_side():
    "In the order of their strides after the map, each cell of a coarser one repeated."
    torch.manual_seed(0)
    network = STDG('small', pretrained=False, n_objects=2, n_predicates=2, fpn=16, channels=16).eval()
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    alone = level_maps(network.network.backbone, network_input(network, pictures), [8, 16, 32])
    parts = maps_read(network, pictures, 'each').split([one.shape[1] for one in alone], 1)
    for one, part, times in zip(alone, parts, (1, 1, 2, 4), strict=True):
        assert torch.equal(part, one.repeat_interleave(times, 2).repeat_interleave(times, 3).half())


@pytest.mark.parametrize('reads, cell', [('map', 8), ('each', 8), ('finer', 4)])
def test_boxes_are_in_cells_of_what_is_read(tmp_path, reads, cell):
    "In learning and in being judged: a head looks at the places that it has learnt to look at."
    toys = toy_database(tmp_path/'toys', 9)
    network = STDG('small', pretrained=False, n_objects=2, n_predicates=2, fpn=16, channels=16).eval()
    kept = FrozenPictures(network, toys, reads)
    graphs = [toys.graph(i) for i in range(9)]
    for graph, boxes in zip(graphs, kept.learnt.targets['boxes']):
        assert torch.equal(boxes[:len(graph)] * cell, graph.boxes)
    assert kept.judged.stride == cell and kept.asked.shape[2:] == kept.learnt.maps.shape[2:] == (64 // cell, 64 // cell)


def test_the_network_stays_as_it_is(tmp_path):
    "Its numbers and those of its batch norms; a seed tells everything, in whatever company."
    toys = toy_database(tmp_path/'toys', 9)
    torch.manual_seed(0)
    network = STDG('small', pretrained=False, n_objects=2, n_predicates=2, fpn=16, channels=16).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    few = dict(epochs=2, batch_size=2, channels=16)
    told = heads_told(network, toys, seeds=[3, 5], **few)
    assert tuple(told) == tuple(HEADS) and {tuple(seeds) for one in told.values() for seeds in one.values()} == {(3, 5)}
    again = heads_told(network, toys, dict(again=dict(reads='each')), seeds=[5], **few)
    assert again['again'] == {figure: {5: seeds[5]} for figure, seeds in told['each level'].items()}
    for name, value in network.state_dict().items(): assert torch.equal(value, before[name]), name


def test_fewer_pictures_than_a_batch_are_one(tmp_path):
    "Heads learn from them: of two data sets that differ in the predicate alone, an untaught one is right in one."
    def scene(predicate):
        return SceneGraph([[4, 16, 20, 40], [34, 20, 50, 44]], [0, 1], [[0, 1, predicate]], (64, 64)), None

    network = STDG('small', pretrained=False, n_objects=2, n_predicates=2, fpn=16, channels=16)
    toys = [toy_database(tmp_path/str(predicate), [scene(predicate)] * 6) for predicate in (0, 1)]
    for epochs, right in ((0, 1), (60, 2)):
        told = [heads_told(network, one, dict(map={}), epochs=epochs, batch_size=64, channels=16) for one in toys]
        assert sum(one['map']['R@20'][0] for one in told) == right


def test_balance_brings_rare_predicates_forward(tmp_path):
    """Boxes that tell nothing, and a predicate that holds for one pair in four. A head says the common one of all: its
    odds are three, those of the rare one a third. Balance multiplies these by its power of three: beyond two they
    win."""
    def scene(i):
        return SceneGraph([[4, 16, 20, 40], [34, 20, 50, 44]], [0, 1], [[0, 1, int(i % 4 == 0)]], (64, 64)), None

    toys = toy_database(tmp_path/'toys', [scene(i) for i in range(24)])
    network = STDG('small', pretrained=False, n_objects=2, n_predicates=2, fpn=16, channels=16)
    heads = {'plain': dict(reads='nothing'), 'balanced': dict(reads='nothing', balance=3.)}
    told = heads_told(network, toys, heads, epochs=40, batch_size=4, channels=16)
    assert told['plain']['R@20'][0] == .75 and told['balanced']['R@20'][0] == .25


def test_what_cannot_be_read(tmp_path):
    toys = toy_database(tmp_path/'toys', 3)
    network = STDG('vit_tiny_patch16_224', pretrained=False, n_objects=2, n_predicates=2)
    with pytest.raises(ValueError, match='no level finer than its stride, 16'):
        heads_told(network, toys, dict(near=dict(reads='finer')))
    with pytest.raises(ValueError, match="reads is 'sum'; heads can read nothing, map"):
        heads_told(network, toys, dict(map={}, other=dict(reads='sum')))
