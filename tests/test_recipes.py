"""The recipes: what their heads say, and one of them from a repository of the Hub's form to a network
that predicts. Backbones of five families, which train a step and are exported; others are refused."""
import io
import os
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_estimation import tiny_dpt

from stdg import backbone, checkpoint, prepare, rooms, train, training
from stdg.backbone import Backbone, check_name, check_size
from stdg.begin_run import read_settings
from stdg.data import SceneGraphs, loader
from stdg.datasets.visual_genome import Database
from stdg.depth.precompute import prepare_hha
from stdg.inference import predict
from stdg.inference.export import NAMES, Deployed, OnnxModel, export_onnx
from stdg.inference.hub import Model
from stdg.io.files import write_json
from stdg.model import recomputed
from stdg.testing import TOY_VOCABULARY, loud, toy_database
from stdg.training import costs
from stdg.training.settings import Settings, check_together
from stdg.training.step import TrainStep, optimiser

os.environ['HF_HUB_OFFLINE'] = '1'
root = Path(__file__).parent.parent
RECIPES = dict(indoor_vg=(9538, 733, 4403), vg150=(73538, 4844, 27032))  # pictures of each split
FAMILIES = ['vit_tiny_patch16_224', 'convnext_atto', 'resnet18', 'mobilenetv3_small_050', 'fastvit_t8',
            'mobilevit_xxs']
SMALL = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)


def recipe(name): return (root/'nbs'/'configs'/f'{name}.yaml').read_text(encoding='utf-8')


@pytest.mark.parametrize('data', RECIPES)
def test_heads(data):
    "What a recipe takes is what `costs` reckons of its own numbers; its commands are those of its files."
    pair = [check_together(read_settings(root/'nbs'/'configs'/f'{data}_{stage}.yaml'))
            for stage in ('teacher', 'student')]
    teacher, student = pair
    named = dict(name=student.name, stages=['student'], teacher=f'runs/{teacher.name}/teacher.safetensors')
    assert asdict(student) == asdict(replace(teacher, **named)), 'else they could not teach and learn'
    assert teacher.stages == ['teacher'] and student.backbone in costs.WORK
    asked = (student.precision, student.reading, student.suppress, student.prior)
    assert asked == ('bfloat16', 'chosen', 'chosen', True) and student.validate_every
    lines = costs.head(sum(RECIPES[data]), RECIPES[data][0], student.epochs, student.batch_size, student.backbone)
    for settings in pair:
        head = recipe(settings.name).partition('\nname: ')[0]
        assert '\n'.join(lines) in head, 'take the lines of stdg.training.costs.head'
        commands = [line[4:] for line in head.splitlines() if re.match('#   (python|papermill) ', line)]
        first, *others = map(shlex.split, commands)
        given = prepare._parser().parse_args(first[first.index('stdg.prepare') + 1:])
        assert given.raw.startswith('hub:maelic/') and given.folder == f'data/{settings.data}'
        assert given.depth.endswith(f'/{settings.depth_source}') and given.size == [settings.size]
        for one, command in zip(pair, others, strict=True):
            assert command[:2] == ['papermill', '-f'] and command[2] == f'nbs/configs/{one.name}.yaml'
            assert (root/command[2]).is_file() and (root/command[3]).is_file()


def test_a_card_without_cores_waits_for_pictures(monkeypatch):
    "Two cores load 96.6 pictures a second, whatever the card could learn from; hours follow."
    monkeypatch.setitem(costs.CARDS, 'H200', costs.Card(989, 4800, 139, 2))
    name = 'convnext_tiny.fb_in22k_ft_in1k'
    assert costs.rate(name, 'student', 'H200') == costs.rate(name, 'teacher', 'H200') == 96.6
    assert costs.costs('H200', 10, 9660, 36)['student'] == pytest.approx(1)
    with pytest.raises(KeyError): costs.costs('abacus', 1, 1, 1)
    assert costs.memory('swin_s', 4) == pytest.approx(4 * .776)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    database = toy_database(tmp_path_factory.mktemp('toy'), 4, [0, 0, 1, 2])
    prepare_hha(database, progress=False)
    return database


def batch_of(database):
    dataset = SceneGraphs(database, 'train', ('rgb', 'hha'), train=True, stride=16)
    return next(iter(loader(dataset, batch_size=2)))


@pytest.mark.parametrize('name', FAMILIES)
def test_a_step(name, toy):
    """Of student and teacher, in bfloat16 and recomputed: the loss is finite, every weight of the
    backbone but those of unused ends learns, and the teacher's stay."""
    model = training.build_network(0, name, 'combine', **SMALL).train()
    check_size(name, 64, 16, 16)
    step = TrainStep(model, optimiser(model, 1e-3, 1e-3, 0), precision='bfloat16')
    before = {k: v.clone() for k, v in model.named_parameters()}
    with recomputed(model.network):
        for _ in range(2):  # offsets begin at zero, so what leads to them learns in the second step
            terms, found = step.gradient(batch_of(toy))
            assert len(terms) == 9 and np.isfinite(found['loss']) and found['grad_norm'] > 0
            step.apply()
    still = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
    assert {k for k in still if k.startswith('teacher')} == {k for k in before if k.startswith('teacher')}
    body = {k for k in before if k.startswith('network.backbone.body')}
    assert len(still & body) <= .1 * len(body), sorted(still & body)


def small_part(name):
    "A `Model` of this family with less of the same: three blocks, or one in each stage."
    torch.manual_seed(0)
    model = training.build_network(0, name, 'rgb', **SMALL | dict(zero_offsets=False, prior=.4)).eval()
    parts = model.network
    if name.startswith('vit'):
        body = parts.backbone.body
        body.model.blocks, body.out_indices = body.model.blocks[-3:], (0, 1, 2)
    else:
        for i in range(4):
            stage = parts.backbone.body.get_submodule(f'stages_{i}')
            stage.blocks = stage.blocks[:1]
    return Model(loud(model), dict(vocabulary=TOY_VOCABULARY.to_json(), size=64))


def check_export(model, path):
    "An ONNX file gives what the package gives, for one picture and for three."
    export_onnx(model, path)
    run, deployed = OnnxModel(path, threads=1), Deployed(model.network)
    for n in (1, 3):
        pictures = torch.randint(0, 256, (n, 3, model.size, model.size), dtype=torch.uint8)
        found, wanted = (dict(zip(NAMES, outputs)) for outputs in (run(pictures), deployed(pictures)))
        objects = wanted['scores'] > 0
        assert objects.any(1).all() and (wanted['counts'] > 5).all()
        for one in NAMES:
            ours, theirs = torch.as_tensor(found[one]), wanted[one]
            if one in ('boxes', 'labels'): ours, theirs = ours[objects], theirs[objects]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 if one in ('boxes', 'points') else 1e-5)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', pytest.param(
    'fastvit_t8', marks=pytest.mark.skipif(not os.environ.get('STDG_FULL_SIZE'), reason='STDG_FULL_SIZE=1 runs it'))])
def test_export(name, tmp_path): check_export(small_part(name), tmp_path/'a.onnx')


@pytest.mark.skipif(not os.environ.get('STDG_FULL_SIZE'), reason='a minute: STDG_FULL_SIZE=1 runs it')
@pytest.mark.parametrize('name', FAMILIES)
def test_export_of_the_whole(name, tmp_path):
    network = training.build_network(0, name, 'rgb', **SMALL | dict(zero_offsets=False, prior=.4)).eval()
    check_export(Model(loud(network), dict(vocabulary=TOY_VOCABULARY.to_json(), size=64)), tmp_path/'a.onnx')


def test_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    "A backbone that reads other sizes only is one line at the command line, and no room is rendered."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').touch()
    settings = dict(name='r', data='rooms_96', size=96, n_train=8, pretrained=False, stages=['control'])
    for name, reason in (('coatnet_pico_rw_224', 'cannot read pictures of 96 x 96 pixels .*made for 224 x 224'),
                         ('vit_small_patch14_dinov2', r'levels of stride \[14, 14, 14\], not 16. Take a ResNet'),
                         ('inception_v3', 'makes 4 x 4 cells of pictures of 96 x 96'),
                         ('resnet18.unknown', "no weights 'unknown' of resnet18. There are a1_in1k, ")):
        (tmp_path/'run.yaml').write_text(yaml.safe_dump(settings | dict(backbone=name)))
        with pytest.raises(SystemExit) as stopped: train.main(['--config', 'run.yaml'])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and '\n' not in said and re.search(reason, said), said
        assert name in said and not (tmp_path/'data').exists() and not (tmp_path/'runs').exists()


def test_no_access_to_levels(monkeypatch):
    "What timm raises in whichever way is one line; so is a size for which only the real device says no."
    def refuses(name, features_only=False, **_): raise RuntimeError('features_only not implemented\n for it')
    with monkeypatch.context() as patch:
        patch.setattr(backbone.timm, 'create_model', refuses)
        with pytest.raises(ValueError, match="'resnet18': timm gives no access to its levels "
                           r"\(features_only not implemented for it\). Take a ResNet"): Backbone('resnet18', 16)
    tried = []
    def cells(name, stride, fpn, side, device):
        tried.append(device)
        if device == 'meta': raise NotImplementedError('no meta kernel')
        return 4, 4
    monkeypatch.setattr(backbone, '_cells', cells)
    check_size('resnet18', 64)
    assert tried == ['meta', 'cpu'], 'what PyTorch cannot do without numbers is no fault of the network'
    check_name('resnet18.a1_in1k')


def repository(folder, counts, size):
    "Rooms as a repository of the Hub's form: parquet files of rows, and categories.json."
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    (folder/'data').mkdir(parents=True)
    number, thing = 0, 0
    for split, n in counts.items():
        rows = []
        for _ in range(n):
            room = rooms.room((3, number), size=size)
            Image.fromarray(room.image).save(file := io.BytesIO(), 'JPEG', quality=95)
            objects = [dict(id=thing + k, category_id=1 + int(c), bbox=[x1, y1, x2 - x1, y2 - y1],
                            area=(x2 - x1) * (y2 - y1), iscrowd=0)
                       for k, (c, (x1, y1, x2, y2)) in enumerate(zip(room.graph.labels, room.graph.boxes.tolist()))]
            relations = [dict(id=k, subject_id=thing + s, object_id=thing + o, predicate_id=1 + p)
                         for k, (s, o, p) in enumerate(room.graph.relations.tolist())]
            rows.append(dict(image=dict(bytes=file.getvalue(), path=None), image_id=number, width=size,
                             height=size, file_name=f'{number}.jpg', objects=objects, relations=relations))
            number, thing = number + 1, thing + len(objects)
        table = datasets.Dataset.from_list(rows).cast_column('image', datasets.Image())
        table.to_parquet(str(folder/'data'/f'{split}-00000-of-00001.parquet'))
    names = dict(categories=rooms.VOCABULARY.objects, rel_categories=rooms.VOCABULARY.predicates)
    write_json(folder/'categories.json', {kind: [dict(id=1 + i, name=name) for i, name in enumerate(some)]
                                          for kind, some in names.items()})
    return folder


def test_from_the_hub_to_a_network_that_predicts(tmp_path, monkeypatch, capsys):
    """The three commands of `indoor_vg_student.yaml`, on twelve rooms of 64 pixels with a small
    backbone: prepare from a repository, teacher, student; then a picture that it has not seen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path/'settings.ini').touch()
    repository(tmp_path/'hub', dict(train=8, val=2, test=2), 64)
    depth = tiny_dpt(tmp_path/'dpt-beit-large-512')  # by this name the recipe's `depth_source` is its file
    prepare.main(['all', '--raw', f'hub:{tmp_path/"hub"}', '--folder', 'data/indoor_vg', '--size', '64',
                  '--depth', str(depth), '--device', 'cpu'])
    assert '12 images' in capsys.readouterr().out
    database = Database(tmp_path/'data'/'indoor_vg', 64)
    assert [len(database.indices(split)) for split in ('train', 'val', 'test')] == [8, 2, 2]
    changed = dict(size=64, backbone='mobilenetv3_small_050', pretrained=False, epochs=2, batch_size=4, workers=0,
                   decay=[1], warm_up=.5, validate_every=2)
    for stage in ('teacher', 'student'):
        values = yaml.safe_load(recipe(f'indoor_vg_{stage}')) | changed
        assert Settings(**values).precision == 'bfloat16'
        (tmp_path/f'{stage}.yaml').write_text(yaml.safe_dump(values))
        if stage == 'teacher':
            ahead = train.main(['--config', 'teacher.yaml', '--dry-run'])
            said = capsys.readouterr().out
            assert ahead['teacher']['steps'] == 4 and not (tmp_path/'runs').exists()
            assert re.search(r'^memory: [0-9.]+ GiB of [0-9.]+ \(', said, re.M), said
            assert re.search(r'^disk: pictures .* MB, HHA .* MB, depth .* MB; the run writes up to [0-9]+ MB, '
                             r'[0-9.]+ [GM]B are free', said, re.M), said
        train.main(['--config', f'{stage}.yaml'])
    kept = sum(path.stat().st_size for path in (tmp_path/'runs'/'indoor_vg_student').rglob('*') if path.is_file())
    path = tmp_path/'runs'/'indoor_vg_student'/'student.safetensors'
    assert kept / 1e9 < costs.written(checkpoint.load(path)), 'no more is written than was announced'
    facts = checkpoint.facts(path)
    assert facts['config']['backbone'] == 'mobilenetv3_small_050' and facts['reading_chosen'] and facts['thresholds']
    row = int(database.indices('test')[0])
    Image.fromarray(database.image(row)).save(tmp_path/'unseen.png')
    found = predict(tmp_path/'unseen.png', path, device='cpu')
    assert found.size == (64, 64) and len(found.boxes) and len(found.pairs) and found.vocabulary == rooms.VOCABULARY
    assert torch.isfinite(found.scores).all() and found.predicates.shape[1] == len(rooms.VOCABULARY.predicates)
