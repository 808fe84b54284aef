"""A network that recognises a few pictures, made in a second and without training: its last layers
are solved for."""
import numpy as np
import torch

from stdg import fields
from stdg.data import network_input
from stdg.decode import cell_grid, ideal_output
from stdg.explore.scene import on_canvas
from stdg.inference.predictor import letterbox
from stdg.model import STDG


def _solve(layer, inputs, outputs):
    """Set the 1x1 convolution `layer` so that it makes `outputs` (n, out) of `inputs` (n, in) as
    nearly as it can."""
    inputs, outputs = (x.double().numpy() for x in (inputs, outputs))
    scale = inputs.std()
    with_one = np.hstack([inputs / scale, np.ones((len(inputs), 1))])
    products = with_one @ with_one.T + 1e-6 * np.eye(len(inputs))
    weights = with_one.T @ np.linalg.solve(products, outputs)
    layer.weight.data = torch.tensor(weights[:-1].T / scale, dtype=torch.float32)[:, :, None, None]
    layer.bias.data = torch.tensor(weights[-1], dtype=torch.float32)


def _flat(x): return x.movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def by_heart(scenes, graphs, vocabulary, canvas, channels=640, sure=6., **more):
    """A `STDG` in mode 'combine' that finds `graphs` (one `SceneGraph` a scene, in its pixels) in
    the pictures of `scenes`; its teacher is untrained, and so is a head of pairs (`relation='pairs'`,
    one of `more` arguments of `STDG`), which says and looks at random."""
    torch.manual_seed(0)
    sizes = dict(n_objects=len(vocabulary.objects), n_predicates=len(vocabulary.predicates))
    model = STDG('small', 'combine', pretrained=True, channels=channels, head_norm=False,
                 zero_offsets=False, **sizes, **more).eval()
    boxed = [letterbox(torch.from_numpy(scene.picture.copy()).permute(2, 0, 1), canvas)
             for scene in scenes]
    targets = [fields.encode(on_canvas(graph, scale, corner, canvas), *sizes.values(),
                             (canvas, canvas), model.stride)
               for graph, (_, scale, corner) in zip(graphs, boxed)]
    detection, relation = (torch.stack(side) for side in zip(*map(ideal_output, targets)))
    logit = lambda p: (2 * p.clamp(0, 1) - 1) * sure
    pictures = torch.stack([picture for picture, *_ in boxed])
    features = model.network.backbone(network_input(model, pictures))
    seen = model.network.detection.pre_head(features)[0]
    layers = model.network.detection.layers
    for branch, wanted in ((layers.heatmap, logit(detection[:, :-4])),
                           (layers.offset, detection[:, -4:-2]),
                           (layers.size, detection[:, -2:])):
        _solve(branch[-1], _flat(branch[:-1](seen)), _flat(wanted))
    if model.network.asks_pairs:
        for head in (model.network.relation, model.teacher.relation):
            head.answer_layers[-1].bias.zero_()
            for layer in (head.offset, head.attention): layer.weight.normal_(0, .3)
        return model
    vectors = relation[:, :, 1:5] - cell_grid(*relation.shape[-2:]).repeat(2, 1, 1)
    wanted = torch.cat([logit(relation[:, :, :1]), vectors, relation[:, :, 5:]], 2)
    seen = model.network.relation.pre_head(features)[0]
    _solve(model.network.relation.layer, _flat(seen), _flat(wanted.flatten(1, 2)))
    return model


def same_graph(found, wanted):
    """Two predictions of one picture are the same: objects within 1e-3, up to the order of equals, and the
    tables of their pairs within 1e-5."""
    rows = [torch.cat([1000. * p.labels[:, None], p.boxes, 100 * p.scores[:, None]], 1).double()
            for p in (found, wanted)]
    far, partner = torch.cdist(*rows, compute_mode='donot_use_mm_for_euclid_dist').min(1)
    assert len(found) == len(wanted) == len(partner.unique()) and (far < 1e-3).all()
    tables = [dict(zip(map(tuple, pairs.tolist()), p.predicates)) for pairs, p in
              ((partner[found.pairs], found), (wanted.pairs, wanted))]
    assert tables[0].keys() == tables[1].keys()
    for pair, row in tables[0].items(): torch.testing.assert_close(row, tables[1][pair], rtol=1e-4, atol=1e-5)
    if not len(found.pairs): return
    ranks = [p.predicates.amax(1) * p.scores[p.pairs].prod(1) for p in (found, wanted)]
    torch.testing.assert_close(*ranks, rtol=1e-4, atol=1e-5)  # in the same order, too
