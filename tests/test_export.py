"""Exported networks: parity of ONNX and torch.export files with the package, and what a file says
of itself."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sample_network import same_graph

from stdg import decode
from stdg.calibration import Calibration
from stdg.data import network_input
from stdg.graph import Vocabulary
from stdg.inference.export import (
    NAMES,
    PAIR_NAMES,
    Deployed,
    OnnxModel,
    export_onnx,
    export_program,
    finish,
    finish_pairs,
)
from stdg.inference.hub import Model
from stdg.io.files import write_json
from stdg.model import STDG
from stdg.reading import PairPrior, Reading

OBJECTS, PREDICATES = 20, 5
names = Vocabulary([f'class {i}' for i in range(OBJECTS)],
                   [f'predicate {i}' for i in range(PREDICATES)])


def model(backbone='small', size=96, **numbers):
    "A network that was not trained, whose norms are not at identity and whose offsets are not 0."
    torch.manual_seed(0)
    network = STDG(backbone, n_objects=OBJECTS, n_predicates=PREDICATES, pretrained=False,
                   **dict(dict(zero_offsets=False, prior=.15), **numbers)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -.1, .1), (module.running_var, .6, 1.6),
                                      (module.weight.data, .8, 1.2), (module.bias.data, -.1, .1)):
                tensor.uniform_(low, high)
    return Model(network,
                 dict(vocabulary=names.to_json(), size=size, training=dict(stage='student'),
                      metrics=dict(AP50=.5)))


def pictures(n, size):
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 3, size, size),
        dtype=np.uint8))


def matched(a, b):
    """For each row of `a` (N, D), a class and lengths, the row of `b` that is it, to 1e-4 of its
    longest length; rounding may have changed their order."""
    far, partner = torch.cdist(a.double(), b.double(),
                               compute_mode='donot_use_mm_for_euclid_dist').min(1)
    assert (far <= 1e-4 * b[partner, 1:].abs().amax(1).clamp(min=10)).all()
    assert len(partner.unique()) == len(b) == len(a)
    return partner


def objects_of(image):
    return torch.cat([1000. * image['labels'][:, None], image['boxes'],
                      10 * image['scores'][:, None]], 1)
def candidates_of(image):
    return torch.cat([1000. * image['predicates'][:, None],
                      image['points'].transpose(0, 1).flatten(1),
                      10 * image['confidences'][:, None]], 1)


def check_tensors(found, wanted):
    "Two batches of `NAMES` are the same within 1e-4."
    images = [zip(*[torch.as_tensor(t) for t in outputs]) for outputs in (found, wanted)]
    for ours, theirs in zip(*images):
        ours, theirs = dict(zip(NAMES, ours)), dict(zip(NAMES, theirs))
        for name in ('scores', 'confidences'):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
        assert ours['counts'] == theirs['counts']
        objects = matched(objects_of(ours), objects_of(theirs))
        candidates = matched(candidates_of(ours), candidates_of(theirs))
        assert torch.equal(objects[ours['ends']], theirs['ends'][:, candidates])


def check_prediction(a, b):
    "Two predictions are the same within 1e-4, up to the order of equals."
    rows = [torch.cat([1000. * p.labels[:, None], p.boxes, 10 * p.scores[:, None]], 1)
            for p in (a, b)]
    partner = matched(*rows)
    tables = [dict(zip(map(tuple, pairs.tolist()), p.predicates))
              for pairs, p in ((partner[a.pairs], a), (b.pairs, b))]
    assert tables[0].keys() == tables[1].keys() and a.size == b.size
    for pair, row in tables[0].items():
        torch.testing.assert_close(row, tables[1][pair], rtol=1e-4, atol=1e-4)
    ranked = [p.predicates.amax(1) * p.scores[p.pairs].prod(1) for p in (a, b)]
    torch.testing.assert_close(*ranked, rtol=1e-4, atol=1e-4)


def decoded(model, batch):
    "What the package itself makes of pictures."
    with torch.no_grad(): fields = model.network(network_input(model.network, batch))
    return decode.decode_batch(*fields, stride=model.network.stride)


def check_file(model, path):
    "An ONNX file against the package, tensors and predictions, one picture and three."
    deployed, runner = Deployed(model.network), OnnxModel(path, threads=1)
    for n in (1, 3):
        batch = pictures(n, model.size)
        outputs = runner(batch)
        check_tensors(outputs, deployed(batch))
        for image, expected in zip(zip(*outputs), decoded(model, batch)):
            assert len(expected.pairs) > 5
            check_prediction(finish(*image, n_predicates=PREDICATES, size=(model.size, model.size)),
                             expected)
    return runner


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The small network and its ONNX file."
    network = model()
    path = tmp_path_factory.mktemp('onnx')/'small.onnx'
    export_onnx(network, path)
    return network, path


def test_small(small): check_file(*small)


def test_head_norm_and_zero_offsets_and_bgr(tmp_path):
    network = model(head_norm=False, zero_offsets=True, colour_order='BGR')
    export_onnx(network, tmp_path/'a.onnx')
    check_file(network, tmp_path/'a.onnx')


def test_resnet50(tmp_path):
    network = model('resnet50', 128)
    export_onnx(network, tmp_path/'a.onnx')
    check_file(network, tmp_path/'a.onnx')
    # all weights are within
    assert os.path.getsize(tmp_path/'a.onnx') > 4 * sum(p.numel()
                                                        for p in network.network.parameters())


def test_swin_s(tmp_path):
    """The published Swin network with fewer repetitions of the same block (whole, it takes minutes
    to export), padded windows and shifted ones."""
    network = model('swin_s', 128, fpn=64, channels=64, prior=.4)
    parts = network.network.network
    body, transformer = parts.backbone.body, parts.detection.layers
    for stage in (body.layers_1, body.layers_2, body.layers_3): stage.blocks = stage.blocks[:2]
    for stage in (body.layers_0, transformer): stage.blocks = stage.blocks[:1]
    export_onnx(network, tmp_path/'a.onnx')
    check_file(network, tmp_path/'a.onnx')


@pytest.mark.parametrize('suppress', ['none', 'soft'])
def test_a_network_that_is_read_along_lines(tmp_path, suppress):
    """Its file answers as its checkpoint does: the graph asks about all pairs, and prior, suppression and power
    are those of its reading."""
    counts = np.random.default_rng(0).integers(0, 9, (OBJECTS, OBJECTS, PREDICATES))
    prior = PairPrior(counts, counts.sum(2) + 9, names.to_json())
    fitted = Calibration((1.5, .4, .3), ((2., .1),) * PREDICATES, (-1., -2.))
    reading = Reading('lines', tau=3., objects=12, power=2., suppress=suppress, prior=.5, table=prior,
                      calibration=fitted)
    shown = reading.shown()  # second names that have chances go where people look
    ours = model(size=64)
    ours.facts.update(reading=reading.to_json(), prior=prior.to_json())
    export_onnx(ours, tmp_path/'lines.onnx')
    export_program(ours, tmp_path/'lines.pt2')
    runner, program = OnnxModel(tmp_path/'lines.onnx'), torch.export.load(tmp_path/'lines.pt2').module()
    assert runner.names == PAIR_NAMES and not runner.asks_pairs and runner.reading.to_json() == shown.to_json()
    assert shown.suppress == ('hard' if suppress == 'none' else suppress)
    for n in (1, 3):
        given = pictures(n, 64)
        with torch.no_grad():
            fields = ours.network(network_input(ours.network, given))
            wanted = decode.decode_batch(*fields, stride=ours.network.stride, reading=shown)
        for way in (runner(given), program(given)):
            for image, graph in zip(zip(*map(torch.as_tensor, way)), wanted):
                same_graph(finish_pairs(*image, shown), graph)
                assert len(graph.pairs) == 12 * 11
    picture = np.random.default_rng(1).integers(0, 255, (90, 60, 3), dtype=np.uint8)
    same_graph(runner.predict(picture), ours.predict(picture))


def test_program(tmp_path):
    "A `torch.export` file, loaded where this package is not imported."
    network = model('resnet18', 96, stride=8, fpn=16, channels=16)
    export_program(network, tmp_path/'a.pt2')
    np.savez(tmp_path/'in.npz', one=pictures(1, 96), three=pictures(3, 96))
    code = """
import sys, numpy as np, torch
program = torch.export.load('a.pt2').module()
for name, batch in np.load('in.npz').items():
    np.savez(f'{name}.npz', *[t.numpy() for t in program(torch.from_numpy(batch))])
assert 'stdg' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, n in (('one', 1), ('three', 3)):
        outputs = list(np.load(tmp_path/f'{name}.npz').values())
        check_tensors(outputs, Deployed(network.network)(pictures(n, 96)))
        for image, expected in zip(zip(*outputs), decoded(network, pictures(n, 96))):
            check_prediction(finish(*image, n_predicates=PREDICATES, size=(96, 96)), expected)


def test_a_file_of_onnx_says_what_it_is(small):
    network, path = small
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [('', 20)]
    assert not any(t.external_data for t in graph.graph.initializer)
    facts = json.loads({p.key: p.value for p in graph.metadata_props}['stdg'])
    assert facts['format'] == 'stdg' and facts['version'] == 1 and facts['size'] == 96
    assert facts['vocabulary'] == names.to_json() and facts['metrics'] == dict(AP50=.5)
    assert STDG(**facts['config'], pretrained=False).config == network.network.config
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
              for o in (*graph.graph.input, *graph.graph.output)}
    assert shapes == dict(picture=['batch', 3, 96, 96], boxes=['batch', 100, 4],
                          labels=['batch', 100], scores=['batch', 100], counts=['batch'],
                          predicates=['batch', 720], confidences=['batch', 720],
                          points=['batch', 2, 720, 2], ends=['batch', 2, 720])


def test_predict_needs_no_network_in_torch(small, tmp_path):
    network, path = small
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3),
                                                      dtype=np.uint8)).save(tmp_path/'photo.png')
    runner = OnnxModel(path)
    check_prediction(runner.predict(tmp_path/'photo.png'), network.predict(tmp_path/'photo.png'))
    assert runner.vocabulary == names and runner.predict(tmp_path/'photo.png').size == (70, 110)
    with pytest.raises(FileNotFoundError, match='none.png is missing'):
        runner.predict(tmp_path/'none.png')


def test_the_exported_copy_is_apart(small):
    "Export leaves the network as it was: its ways, its mode, its gradients."
    network = model()
    network.network.train()
    Deployed(network.network)
    assert network.network.training
    assert all(getattr(layer, 'way', None) is None for layer in network.network.modules())
    assert any(p.requires_grad for p in network.network.parameters())


def test_a_combined_network_is_exported_without_its_teacher():
    network = STDG('small', 'combine', n_objects=OBJECTS, n_predicates=PREDICATES, pretrained=False,
                   fpn=16, channels=16, prior=.15).eval()
    alone = Deployed(network)
    assert alone.network.teacher is None
    check_tensors(alone(pictures(1, 96)), Deployed(network.student())(pictures(1, 96)))


def test_room_for_too_few():
    network = model(fpn=16, channels=16)
    whole, part = ([t[0] for t in Deployed(network.network, top)(pictures(1, 96))]
                   for top in (4096, 50))
    assert whole[3] == part[3] > 50
    with pytest.warns(UserWarning, match=f'{int(whole[3])} candidates, of which 50 were kept'):
        few = finish(*part, n_predicates=PREDICATES)
    every = finish(*whole, n_predicates=PREDICATES)
    scores = dict(zip(map(tuple, every.pairs.tolist()), every.predicates))
    assert 0 < len(few.pairs) < len(every.pairs)
    for pair, row in zip(map(tuple, few.pairs.tolist()), few.predicates):
        assert bool((row <= scores[pair]).all()) and row.max() == scores[pair].max()


@pytest.mark.parametrize('seed', range(20))
def test_finish_is_the_decoder(seed):
    "Votes of random tensors, against `stdg.decode.relate` with points that lie on the objects."
    rng = np.random.default_rng(seed)
    n, k, p = int(rng.integers(1, 12)), int(rng.integers(0, 200)), 4
    corner = rng.uniform(0, 400, (n, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + 20], 1)
    falling = lambda low, high, n: np.sort(rng.uniform(low, high, n).astype(np.float32))[::-1].copy()
    scores, confidence = falling(.5, 1, n), falling(.1001, .6, k)
    ends, predicate = rng.integers(0, n, (2, k)), rng.integers(0, p, k)
    points = ((boxes[:, :2] + boxes[:, 2:]) / 2)[ends]
    ours = finish(boxes, np.zeros(n, int), scores, np.int64(k), predicate, confidence, points, ends,
                  p)
    candidate = (torch.zeros(k, dtype=torch.int64),
                 *map(torch.from_numpy, (predicate, confidence, points)))
    objects = [(torch.from_numpy(boxes), torch.from_numpy(scores))]
    (pairs, table), = decode.relate(candidate, objects, p, filtered=True)
    assert torch.equal(ours.pairs, pairs) and torch.equal(ours.predicates, table)


def test_a_failed_export_leaves_what_was_there(small, tmp_path, monkeypatch):
    _, path = small
    shutil.copy(path, tmp_path/'a.onnx')
    before = (tmp_path/'a.onnx').read_bytes()
    def full(self, partial, **how):
        open(partial, 'wb').write(b'x' * 100)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch.onnx.ONNXProgram, 'save', full)
    with pytest.raises(OSError, match='a.onnx could not be written: No space left on device'):
        export_onnx(model('resnet18', 64, stride=16, fpn=8, channels=8), tmp_path/'a.onnx')
    assert (tmp_path/'a.onnx').read_bytes() == before and os.listdir(tmp_path) == ['a.onnx']


def test_foreign_files(small, tmp_path):
    _, path = small
    write_json(tmp_path/'a.onnx', dict(a=1))
    with pytest.raises(ValueError, match='a.onnx is not a whole ONNX file'):
        OnnxModel(tmp_path/'a.onnx')
    graph = onnx.load(path)
    for facts in ('{}', '[]', '{',
                  json.dumps(dict(config=dict(n_objects=1, n_predicates=1), size=10**9))):
        graph.metadata_props[0].value = facts
        onnx.save(graph, tmp_path/'b.onnx')
        with pytest.raises(ValueError, match='b.onnx was not written by '
                           'stdg.inference.export.export_onnx'):
            OnnxModel(tmp_path/'b.onnx')


def test_the_extra_is_asked_for_when_it_is_needed(tmp_path):
    "Importing works without it; the first call that needs it names the remedy."
    code = """
import sys
for name in ('onnx', 'onnxscript', 'onnxruntime'): sys.modules[name] = None
from stdg.inference.export import OnnxModel, export_onnx, export_program
from stdg.model import STDG
from stdg.inference.hub import Model
network = STDG('resnet18', n_objects=2, n_predicates=1, pretrained=False, stride=16, fpn=8, channels=8)
model = Model(network, dict(size=64))
for ask in (lambda: export_onnx(model, 'a.onnx'), lambda: OnnxModel('a.onnx')):
    try: ask()
    except ImportError as error: print(error)
export_program(model, 'a.pt2')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = "is not installed; it comes with pip install 'stdg[onnx]'"
    needs = 'a network in ONNX needs'
    assert done.stdout.splitlines() == [f'{needs} {name}, which {said}' for name in ('onnx', 'onnxruntime')]
    assert os.listdir(tmp_path) == ['a.pt2']
