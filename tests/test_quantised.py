"""Networks of onnxruntime: float and in 8-bit numbers, from the command line to the figures, on a toy
network; and half precision."""
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from stdg import cli
from stdg.data import SceneGraphs
from stdg.evaluation import evaluate
from stdg.graph import Vocabulary
from stdg.inference.hub import Model
from stdg.inference.onnx_network import OnnxNetwork
from stdg.inference.predictor import Predictor, load_predictor
from stdg.inference.quantised import calibration_pictures, quantise
from stdg.model import STDG
from stdg.testing import TOY_VOCABULARY, loud, toy_database, toy_scene

PRIOR = dict(shape=[2, 2, 2], names=TOY_VOCABULARY.to_json(), counts=[[0, 1, 0, 8], [1, 0, 1, 3]],
             pairs=[[0, 1, 10], [1, 0, 10]])


def run(main, *arguments):
    "Exit status, output and errors of a command."
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try: status = main([str(one) for one in arguments])
        except SystemExit as left: status = left.code
    return status or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A folder with a network that reads along lines with a prior, its float and its int8 file, both made
    by the command, and a database."""
    folder = tmp_path_factory.mktemp('quantised')
    torch.manual_seed(0)
    network = loud(STDG('test_efficientnet', n_objects=2, n_predicates=2, pretrained=False, fpn=16,
                        channels=16, zero_offsets=False)).eval()
    network.save(folder/'net.safetensors', vocabulary=TOY_VOCABULARY.to_json(), size=64, prior=PRIOR,
                 reading=dict(relations='lines', suppress='soft', prior=.5),
                 thresholds=dict(objects=.2, triplets=.01))
    toy_database(folder/'toy', 12)
    photo = toy_scene(40, (60, 90))[1]['image']
    Image.fromarray(photo).save(folder/'photo.png')
    int8 = '--int8', '--pictures', folder/'toy', '--number', 6, '--bound', .1
    for name, *options in (('net.safetensors',), ('net.onnx', *int8)):
        status, out, err = run(cli.main, 'export', '-c', folder/name, *options)
        assert status == 0 and 'pictures of 64 pixels' in out, err
    return folder


def test_files_stand_in_for_the_checkpoint(made):
    "All facts ride along; float gives the same graph, int8 nearly, and lines say which file it was."
    ready = {name: Predictor(made/name) for name in ('net.safetensors', 'net.onnx', 'net.int8.onnx')}
    photo = torch.from_numpy(np.array(Image.open(made/'photo.png'))).permute(2, 0, 1)
    plain, same, near = (one([photo])[0] for one in ready.values())
    for one in ready.values():
        assert one.reading.to_json() == ready['net.safetensors'].reading.to_json()
        assert one.reading.prior == .5 and one.thresholds['objects'] == .2 and one.size == 64
        assert one.vocabulary == TOY_VOCABULARY
    assert len(plain.pairs) and torch.allclose(plain.scores[:8], same.scores[:8], atol=1e-4)
    assert torch.allclose(plain.boxes[:8], same.boxes[:8], atol=.01)
    assert not torch.equal(near.scores, same.scores)
    both = min(len(near), len(same))  # peaks of a network that has learnt nothing are flat: one more or less
    assert both and (near.scores[:both] - same.scores[:both]).abs().max() < .05
    record = ready['net.int8.onnx'].model.quantised
    assert record['numbers'] == 'int8' and record['pictures'] == 6 and record['change'] <= .1
    kinds = [one.data_type for one in onnx.load(made/'net.int8.onnx').graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) > 2 * len(record['kept'])
    given = ready['net.int8.onnx']([photo], boxes=[[[5, 5, 40, 40], [50, 5, 80, 50]]], labels=[[0, 1]])[0]
    assert len(given.pairs) == 2 and given.boxes.tolist()[0] == [5, 5, 40, 40]
    assert load_predictor(made/'net.int8.onnx') is load_predictor(made/'net.int8.onnx')
    lines = made/'lines.jsonl'
    assert run(cli.main, 'predict', made/'photo.png', '-c', made/'net.int8.onnx', '--jsonl', lines)[0] == 0
    assert json.loads(lines.read_text())['network'].startswith('net.int8.onnx ')


def test_evaluator_judges_a_file(made):
    "Figures of the float file are the network's own; two files are never taken for one another."
    data = SceneGraphs(toy_database(made/'toy', 12), 'test', ('rgb',))
    network, rounded = Model.load(made/'net.safetensors').network, OnnxNetwork(made/'net.int8.onnx')
    figures = [evaluate(one, data, ('sgdet', 'predcls'), intervals=0, progress=False)
               for one in (network, OnnxNetwork(made/'net.onnx'), rounded)]
    assert figures[0]['predcls']['R@50'] == pytest.approx(figures[1]['predcls']['R@50'], abs=1e-6)
    assert figures[0]['AP50'] == pytest.approx(figures[1]['AP50'], abs=1e-3)
    assert 0 <= figures[2]['AP50'] <= 1 and figures[2]['images'] == len(data)
    assert not torch.equal(rounded.digest, OnnxNetwork(made/'net.onnx').digest)


def test_a_head_of_pairs_goes_with_its_file(made):
    "In float and rounded, with suppression, prior and given boxes; and what is wrong with its head is said."
    torch.manual_seed(1)
    network = loud(STDG('test_efficientnet', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16,
                        zero_offsets=False, relation='pairs')).eval()
    reading = dict(relations='pairs', suppress='soft', power=2., prior=.5, related=.5)
    network.save(made/'pairs.safetensors', vocabulary=TOY_VOCABULARY.to_json(), size=64, prior=PRIOR, reading=reading)
    for name, *options in (('pairs.safetensors',), ('pairs.onnx', '--int8', '--pictures', made/'toy', '--number', 6,
                                                    '--bound', .2)):
        status, _, err = run(cli.main, 'export', '-c', made/name, *options)
        assert status == 0, err
    photo = torch.from_numpy(np.array(Image.open(made/'photo.png'))).permute(2, 0, 1)
    given = dict(boxes=[[[5, 5, 40, 40], [50, 5, 80, 50]]], labels=[[0, 1]])
    for more in ({}, given):
        plain, same, near = (Predictor(made/f'pairs{ending}')([photo], **more)[0]
                             for ending in ('.safetensors', '.onnx', '.int8.onnx'))
        assert len(plain.pairs) and torch.equal(plain.pairs[:8], same.pairs[:8])
        torch.testing.assert_close(plain.predicates[:8], same.predicates[:8], rtol=1e-3, atol=1e-5)
        assert not torch.equal(near.predicates, same.predicates)
    assert 'head' not in load_predictor(made/'pairs.onnx').facts, 'it is not told with each prediction'
    assert (near.predicates - plain.predicates).abs().max() < .1, 'of the boxes that were given'
    changed = onnx.load(made/'pairs.onnx')
    facts = json.loads(changed.metadata_props[0].value)
    for head in (None, facts['head'][:1000]):
        changed.metadata_props[0].value = json.dumps({**facts, 'head': head} if head else
                                                     {k: v for k, v in facts.items() if k != 'head'})
        onnx.save(changed, made/'headless.onnx')
        with pytest.raises(ValueError, match='headless.onnx: the head of pairs is missing or damaged'):
            Predictor(made/'headless.onnx')


def test_calibration_never_sees_a_test_picture(made):
    "Of a database only training pictures are taken, of a folder some are held out."
    network = Model.load(made/'net.safetensors').network
    database = toy_database(made/'toy', 12)
    of_split = {split: {np.asarray(data[i]['rgb']).tobytes() for i in range(len(data))}
                for split in ('train', 'test')
                for data in [SceneGraphs(database, split, ('rgb',), relations=False)]}
    parts = calibration_pictures(made/'toy', network, 64, 100, 100)
    seen = [{one.numpy().tobytes() for one in part} for part in parts]
    assert seen[0] | seen[1] == of_split['train'] and not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & of_split['test']
    (made/'album').mkdir()
    for i in range(8): Image.fromarray(toy_scene(i)[1]['image']).save(made/'album'/f'{i}.png')
    assert [len(part) for part in calibration_pictures(made/'album', network, 32, 5, 3)] == [6, 2]


def test_mistakes_are_said_in_one_line(made):
    "Nothing to calibrate with, an extra that is missing, other classes, a file that is exported already."
    other = Vocabulary(['a', 'b', 'c'], ['on'])
    toy_database(made/'other', 6, vocabulary=other)
    (made/'empty').mkdir()
    net = made/'net.safetensors'
    int8 = ('export', '-c', net, '--int8', '-o', made/'new.onnx', '--pictures')
    for arguments, words in (((*int8, made/'empty'), 'holds no pictures'),
                             ((*int8, made/'none'), 'none is missing'),
                             ((*int8, net), 'neither a database nor a folder'),
                             ((*int8, made/'other'), '3 object classes and 1 predicates'),
                             (('export', '-c', made/'net.int8.onnx'), 'is quantised already'),
                             (('export', '-c', made/'net.onnx'), 'is an ONNX file already'),
                             (('export', '-c', made/'net.int8.onnx', *int8[3:4], '--pictures', made/'toy'),
                              'is quantised already'),
                             (('export', '-c', net, '-o', net), 'would be overwritten'),
                             (('predict', made/'photo.png', '-c', made/'net.int8.onnx', '--size', 96),
                              'reads pictures of 64 pixels, not 96'),
                             (('predict', made/'photo.png', '-c', made/'net.int8.onnx', '--precision',
                               'bfloat16'), 'has its own numbers')):
        status, out, err = run(cli.main, *arguments)
        assert status == 2 and words in err and err.count('\n') == 1 and not out, (arguments, err)
    assert not (made/'new.onnx').exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'onnxruntime', None)
        for arguments in (int8 + (made/'toy',), ('predict', made/'photo.png', '-c', made/'net.int8.onnx')):
            load_predictor.__globals__['_loaded'].cache_clear()
            status, _, err = run(cli.main, *arguments)
            assert status == 2 and "pip install 'stdg[onnx]'" in err and err.count('\n') == 1
    model = Model.load(net)
    with pytest.raises(ValueError, match='int8 needs pictures'): quantise(model, made/'new.onnx', [], [])
    blank = [torch.zeros(3, 96, 96, dtype=torch.uint8)]
    for name, words in (('net.int8.onnx', 'is quantised already'), ('net.onnx', 'of 64 pixels, not 96')):
        with pytest.raises(ValueError, match=words):
            quantise(made/name, made/'new.onnx', blank, blank)
    data = SceneGraphs(toy_database(made/'other', 6, vocabulary=other), 'test', ('rgb',))
    with pytest.raises(ValueError, match='trained on other data'):
        evaluate(OnnxNetwork(made/'net.int8.onnx'), data, intervals=0, progress=False)


def test_a_file_of_another_vocabulary_is_refused(made):
    "Names that do not fit the network, or the prior beside them, are found when the file is opened."
    for names, words in ((['disc', 'square', 'cone'], '3 objects'), (['disc', 'cube'], 'other classes')):
        changed = onnx.load(made/'net.int8.onnx')
        facts = json.loads(changed.metadata_props[0].value)
        facts['vocabulary']['objects'] = names
        changed.metadata_props[0].value = json.dumps(facts)
        onnx.save(changed, made/'changed.onnx')
        with pytest.raises(ValueError, match=words): Predictor(made/'changed.onnx')


def test_layers_stay_float_until_the_bound_holds(made):
    "The worst stay float, the worst first; a bound that half of them do not reach leaves no file."
    model = made/'net.onnx'
    parts = calibration_pictures(made/'toy', OnnxNetwork(model), 64, 2, 1)
    with pytest.raises(ValueError, match='does not bear int8'):
        quantise(model, made/'none.onnx', *parts, bound=1e-9)
    record = quantise(model, made/'all.onnx', *parts, bound=1)
    assert not record['kept']
    bound = .8 * record['change']
    record = quantise(model, made/'some.onnx', *parts, bound=bound)
    alone = list(record['kept'].values())
    assert alone and alone == sorted(alone, reverse=True) and record['change'] <= bound
    kinds = [[one.data_type for one in onnx.load(made/f'{name}.onnx').graph.initializer].count(
        onnx.TensorProto.INT8) for name in ('all', 'some')]
    assert 0 < kinds[1] < kinds[0]
    with pytest.raises(ValueError, match="one of minmax, percentile, entropy"):
        quantise(model, made/'none.onnx', *parts, method='median')
    assert not (made/'none.onnx').exists()


def test_bfloat16_is_asked_for_and_noted(made):
    "Half precision changes the fields a little, and what it made is not continued in float32."
    photo = torch.from_numpy(np.array(Image.open(made/'photo.png'))).permute(2, 0, 1)
    plain, half = (load_predictor(made/'net.safetensors', precision=one) for one in (None, 'bfloat16'))
    assert plain.precision == 'float32' and plain.changed == {} and half.changed == dict(precision='bfloat16')
    assert half.read_as(prior=0).changed == dict(prior=0, precision='bfloat16')
    away = (plain([photo])[0].scores - half([photo])[0].scores).abs().max()
    assert 0 < away < .05
    lines = made/'half.jsonl'
    ask = ('predict', made/'photo.png', '-c', made/'net.safetensors', '--jsonl', lines)
    assert run(cli.main, *ask, '--precision', 'bfloat16')[0] == 0
    assert json.loads(lines.read_text())['precision'] == 'bfloat16'
    status, _, err = run(cli.main, *ask)
    assert status == 2 and 'another precision (bfloat16; now None)' in err
    for one in (lambda: Predictor(made/'net.safetensors', precision='int4'),
                lambda: load_predictor(half, precision='float32')):
        with pytest.raises(ValueError, match='precision'): one()
