"""The four published runs: the spec's numbers, the runbook's parameters, the code behind them, and
what a trial may lack."""
import inspect
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import nbformat
import pytest
import torch
import yaml

from stdg import augmentation, backbone, train, training
from stdg.backbone import CONFIGURATIONS
from stdg.checkpoint import facts, load
from stdg.model import STDG
from stdg.training import settings

root = Path(__file__).parent.parent
configs = root/'nbs'/'configs'

# Method spec 7. The last column is the README's --lr-basenet; in depth mode it has no effect, the
# backbone learns at --lr.
TABLE = {  #            lr    wd    batch decay         epochs --lr-basenet
    'resnet50_teacher': (5e-4, 5e-5, 32, [10, 40, 50], 60, 2e-5),
    'resnet50_student': (5e-4, 1e-5, 40, [10, 40, 50], 60, 5e-5),
    'swin_s_teacher':   (1e-4, 1e-5, 40, [40, 50], 60, 1e-5),
    'swin_s_student':   (5e-4, 2e-5, 40, [10, 40, 50], 60, 5e-5)}

# Method spec 10, both lists.
OPTIONS = '''
--lr --lr-basenet --lr-raf --b-scale --epochs --lr-decay --batch-size --weight-decay --adamw
--basenet --resnet-pool0-stride --resnet-block5-dilation --swin-use-fpn --dataset --vg-cn-upsample
--vg-cn-square-edge --vg-cn-use-512 --vg-cn-group-deform --vg-cn-single-supervision
--vg-cn-single-head --cf3-deform-deform4-head --cntrnet-deform-deform4-head --cf3-deform-bn
--cntrnet-deform-bn --mode --depth-checkpoint --output --ddp --checkpoint --loader-workers
--decoder --run-metric --ema --val-interval --lr-warm-up-epochs --lr-warm-up-factor
--lr-decay-factor --clip-grad-norm --stride-apply --vg-cn-rgb --vg-cn-n-images --fix-batch-norm
--cf3-deform-use-concat --swin-drop-path-rate --momentum
'''.split()


def test_the_runbook_has_the_declared_parameters():
    "The parameters cell is made from `Settings`, comments included; so are types and defaults."
    cell = parameters_cell_of(root/'nbs'/'train.ipynb')
    assert cell == settings.parameters_cell(), 'write settings.parameters_cell() into the cell'
    shown, rare = parameters(), list(settings.parameter_help().values())[-1]
    assert shown.pop('more') == (dict, {}) and not rare.keys() & shown.keys()
    declared = asdict(settings.Settings())
    assert {**{name: declared[name] for name in rare},
            **{name: default for name, (_, default) in shown.items()}} == declared
    assert all(type(declared[name]) is kind for name, (kind, _) in shown.items())


def test_the_help_reaches_papermill_and_the_command_line(capsys):
    meaning = settings.parameter_help()['Network']['backbone'][2]
    command = [sys.executable, '-m', 'papermill', '--help-notebook',
               str(root/'nbs'/'train.ipynb')]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert meaning in ' '.join(done.stdout.split())
    with suppress(SystemExit): train.main(['--help'])
    said = capsys.readouterr().out
    for group in settings.parameter_help().values():
        for name, (kind, default, meaning) in group.items():
            assert f'  {name} ({kind}, {default}): {meaning}\n' in said


def read(name): return yaml.safe_load((configs/f'{name}.yaml').read_text())


def parameters_cell_of(path):
    "Source of the parameters cell of a notebook."
    return next(c.source for c in nbformat.read(path, as_version=4).cells
                if 'parameters' in c.metadata.get('tags', []))


def parameters():
    "Name to (type, default) of the runbook's parameters cell."
    values = {}
    exec(parameters_cell_of(root/'nbs'/'train.ipynb'), values)
    return {name: (kind, values[name]) for name, kind in values['__annotations__'].items()}


@pytest.mark.parametrize('name', TABLE)
def test_numbers_of_the_spec(name):
    lr, weight_decay, batch, decay, epochs, lr_basenet = TABLE[name]
    backbone, stage = name.rsplit('_', 1)
    config = read(name)
    expected = dict(name=name, stages=[stage], backbone=backbone, lr=lr,
                    lr_backbone=lr if stage == 'teacher' else lr_basenet, weight_decay=weight_decay,
                    batch_size=batch, decay=decay, epochs=epochs, warm_up=1, ema=.01, size=512,
                    scale=[.7, 1.5], stretch=[.75, 1.33], colour=True, overlap=True,
                    hold_out=0, pretrained=True, weights='')
    assert {k: config[k] for k in expected} == expected
    assert 'steps' not in config, 'a trial is asked for on the command line'


@pytest.mark.parametrize('path', sorted(configs.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_key_is_a_parameter_of_its_type(path):
    known = parameters()
    for key, value in yaml.safe_load(path.read_text()).items():
        assert key in known, f'{path.name}: train.ipynb has no parameter {key}'
        kind = known[key][0]
        fits = type(value) is kind or (kind is float and type(value) is int)
        assert fits, f'{path.name}: {key} is {value!r}, a {kind.__name__} is needed'
        if kind is list:
            assert {type(v) for v in value} <= {int, float, str}
            assert {isinstance(v, str) for v in value} == {key == 'stages'}


@pytest.mark.parametrize('name', TABLE)
def test_every_released_option_is_spoken_of(name):
    text = (configs/f'{name}.yaml').read_text()
    words = re.sub('[,():;.]', ' ', text).split()
    assert not [option for option in OPTIONS if option not in words]
    if name.endswith('teacher'):
        option = f'--lr-basenet {TABLE[name][-1]:.0e}'.replace('e-0', 'e-')
        assert f'{option} had NO EFFECT' in text


@pytest.mark.parametrize('name', TABLE)
def test_optimiser_is_the_published_one(name):
    config, tiny = read(name), dict(n_objects=2, n_predicates=1, pretrained=False, fpn=16,
                                    channels=16)
    network = STDG('small', 'depth' if name.endswith('teacher') else 'rgb', **tiny)
    ours = training.optimiser(network, config['lr'], config['lr_backbone'], config['weight_decay'])
    theirs = training.optimiser(network, config['lr'], TABLE[name][-1], config['weight_decay'],
                                released=True)
    assert [g['lr'] for g in ours.param_groups] == [g['lr'] for g in theirs.param_groups]
    for group in ours.param_groups:
        assert (group['betas'], group['eps']) == ((.9, .999), 1e-6)
        assert group['weight_decay'] == config['weight_decay']
    factor = lambda epoch: training.schedule(epoch, config['warm_up'], config['decay'])
    first = config['decay'][0]
    assert [factor(e) for e in (0, 1, first)] == [.001, 1, 1]
    assert factor(.5) == pytest.approx(.001**.5)
    assert factor(first + .5) == pytest.approx(.1**.5)
    assert factor(60) == pytest.approx(.1**len(config['decay']))


def test_numbers_that_are_fixed_in_the_code():
    default = lambda function: {k: p.default
                                for k, p in inspect.signature(function).parameters.items()}
    colour = default(augmentation.photometry)
    assert colour['jpeg'] == .1 and colour['grey'] == .01
    assert default(augmentation.geometry)['flip'] == .5 and settings.Settings().ema == .01
    ranges = default(augmentation.jitter)
    assert [ranges[k] for k in ('brightness', 'contrast', 'saturation', 'hue')] == [.4, .1, .4, .1]
    numbers = {name: {k: CONFIGURATIONS[name].get(k) for k in ('stride', 'fpn', 'transformer',
        'drop_path_rate', 'head_norm')} for name in ('resnet50', 'swin_s')}
    assert numbers == dict(resnet50=dict(stride=16, fpn=0, transformer=False, drop_path_rate=None,
                                         head_norm=None),
                           swin_s=dict(stride=16, fpn=768, transformer=True, drop_path_rate=.2,
                                       head_norm=None))


@pytest.fixture
def offline(monkeypatch):
    """No network and an empty cache; timm's own attempt, which takes most of a minute, must not be
    made."""
    def refused(*args, **kwargs): raise URLError('Name or service not known')
    def late(*args, pretrained=False, create=backbone.timm.create_model, **kwargs):
        assert not pretrained, 'timm was asked to fetch'
        return create(*args, **kwargs)
    monkeypatch.setattr(backbone, 'urlopen', refused)
    monkeypatch.setattr(backbone, 'try_to_load_from_cache', lambda *args: None)
    monkeypatch.setattr(backbone.timm, 'create_model', late)


def test_weights_that_cannot_be_fetched(offline):
    with pytest.raises(ConnectionError, match=r'resnet18.a1_in1k cannot be fetched .*Name or '
                       r'service.*https://\S+/model.safetensors on another machine.*-p weights'):
        training.check_start(['teacher'], 'resnet18.a1_in1k')
    pretrained, notes = training.check_start(['teacher'], 'resnet18.a1_in1k', trial=True)
    assert pretrained is False and len(notes) == 1 and '\n' not in notes[0]
    assert notes[0].startswith(
        'TRIAL WITHOUT IMAGENET: the backbone begins from random weights.')
    started = training.check_start(['teacher'], 'resnet18.a1_in1k', False)
    assert started == (False, []), 'random weights were asked for: no note'


def test_a_host_that_answers_or_a_cache_leaves_the_rest_to_timm(monkeypatch):
    def not_found(*args, **kwargs): raise HTTPError('url', 404, 'not found', {}, None)
    monkeypatch.setattr(backbone, 'try_to_load_from_cache', lambda *args: None)
    monkeypatch.setattr(backbone, 'urlopen', not_found)
    backbone._check_fetchable('resnet18.a1_in1k')
    asked = []
    monkeypatch.setattr(backbone, 'urlopen', lambda request,
                        timeout: asked.append((request.method, timeout))
                        or SimpleNamespace(close=lambda: None))
    backbone._check_fetchable('resnet18.a1_in1k')
    assert asked == [('HEAD', 10)]
    monkeypatch.setattr(backbone, 'try_to_load_from_cache', lambda repository,
                        file: '/cache' if file == 'pytorch_model.bin' else None)
    backbone._check_fetchable('resnet18.a1_in1k')
    assert len(asked) == 1, 'nobody is asked when the cache has them'


def test_a_local_file_of_weights_begins_both_networks(tmp_path, monkeypatch):
    whole = backbone.timm.create_model('resnet18.tv_in1k').state_dict()
    torch.save(whole, tmp_path/'resnet18.pth')
    monkeypatch.setattr(backbone, 'urlopen', lambda *args, **kwargs: pytest.fail('the network was '
        'asked'))
    begins, notes = training.check_start(['teacher'], 'resnet18.tv_in1k',
                                         str(tmp_path/'resnet18.pth'))
    network = training.build_network(0, 'resnet18.tv_in1k', 'depth', 3, 2, pretrained=begins)
    assert not notes
    assert torch.equal(network.network.backbone.body.state_dict()['layer4.1.conv2.weight'],
                       whole['layer4.1.conv2.weight'])
    (tmp_path/'cut.pth').write_bytes((tmp_path/'resnet18.pth').read_bytes()[:5000])
    for trial in (False, True):
        with pytest.raises(ValueError, match='cut.pth is not a whole file of weights'):
            training.check_start(['teacher'], 'resnet18.tv_in1k', str(tmp_path/'cut.pth'),
                                 trial=trial)


def test_student_without_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="needs a teacher: -p teacher "
                       "runs/<name>/teacher.safetensors"):
        training.check_start(['student'], 'small', False)
    _, notes = training.check_start(['student'], 'small', False, trial=True)
    assert len(notes) == 1 and notes[0].startswith('TRIAL WITHOUT A TEACHER')
    assert '\n' not in notes[0]
    for trial in (False, True):
        with pytest.raises(FileNotFoundError, match='gone.safetensors is missing'):
            training.check_start(['student'], 'small', False, tmp_path/'gone.safetensors',
                                 trial=trial)
        assert training.check_start(['teacher', 'student'], 'small', False, trial=trial) == (False,
            [])


def papermill(home, name, *values, **environment):
    "The command of the config's first lines, in an empty project folder."
    (home/'settings.ini').touch()
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3', '-f',
               str(configs/f'{name}.yaml'), str(root/'nbs'/'train.ipynb'), str(home/'out.ipynb'),
               *values]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=3000,
                          env={**os.environ, **environment})


def check_trial(home, name, batch, size):
    "What two steps must have left."
    printed = ''.join(o.get('text', '') for c in nbformat.read(home/'out.ipynb', as_version=4).cells
                      for o in c.get('outputs', []))
    out = home/'runs'/name
    lines = [json.loads(line) for line in open(out/'log.jsonl')]
    assert [(r['stage'], r['step']) for r in lines] == [('student', 1), ('student', 2)]
    assert all(r['teaching'] > 0 for r in lines)
    record, results = facts(out/'student.json'), json.loads((out/'results.json').read_text())
    assert record['size'] == size and record['training']['step'] == 2
    assert record['config']['backbone'] == results['settings']['backbone'] == name.rsplit('_', 1)[0]
    assert results['settings']['batch_size'] == batch and results['notes'] == record['notes']
    assert all(note in printed for note in record['notes'])
    assert any('WITHOUT A TEACHER' in note for note in record['notes'])
    assert record['pretrained'] is results['settings']['pretrained'] is (
        not any('WITHOUT IMAGENET' in note for note in record['notes']))
    assert set(results['rows']) == {'frequency prior', 'student (RGB, taught)'}
    assert (out/'prediction-0.png').exists() and (out/'offsets.png').exists()
    return record


def test_trial_of_the_full_network_on_small_pictures(tmp_path):
    "The quoted command, but for the size of pictures and batch; nothing can be fetched."
    done = papermill(tmp_path, 'resnet50_student', '-p', 'steps', '2', '-p', 'size', '96', '-p',
                     'batch_size', '4', '-p', 'n_train', '8', '-p', 'n_test', '2',
                     HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path/'empty'))
    assert done.returncode == 0, done.stderr[-4000:]
    record = check_trial(tmp_path, 'resnet50_student', 4, 96)
    assert record['pretrained'] is False
    load(tmp_path/'runs'/'resnet50_student'/'student.safetensors')


def test_the_whole_run_stops_before_it_renders(tmp_path):
    done = papermill(tmp_path, 'swin_s_student')
    assert done.returncode and '-p teacher runs/<name>/teacher.safetensors' in done.stderr
    assert not (tmp_path/'data').exists()


@pytest.mark.skipif(not os.environ.get('STDG_FULL_SIZE'), reason='seven minutes and 11 GB on two '
                    'cores: STDG_FULL_SIZE=1 runs it')
def test_trial_at_full_size(tmp_path):
    done = papermill(tmp_path, 'resnet50_student', '-p', 'steps', '2')
    assert done.returncode == 0, done.stderr[-4000:]
    check_trial(tmp_path, 'resnet50_student', 40, 512)


# of every number its least and its greatest value; None: any
WHOLE = dict(seed=(0, 2**62), steps=(0, None), size=(16, 8192), n_train=(1, None), n_val=(0, None),
             n_test=(0, None), hold_out=(0, None), overfit=(0, None), epochs=(1, None),
             batch_size=(1, None), devices=(1, None), workers=(0, 1024), validate_every=(0, None),
             accumulate=(1, None), skip=(0, None), validate_images=(0, None), patience=(0, None),
             keep=(0, None), look=(0, None))
REAL = dict(clutter=(0, 1), unlabelled=(0, 1), balance=(0, 4), lr_backbone=(0, None),
            weight_decay=(0, None), warm_up=(0, None), clip=(0, None), save_minutes=(0, None),
            lr=('above', None), ema=('above', 1), teacher_share=('above', 1))


def test_limits_of_every_number():
    defaults = asdict(settings.Settings())
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert numbers == WHOLE.keys() | REAL.keys()
    for name, (least, most) in (WHOLE | REAL).items():
        step = 1 if name in WHOLE else 1e-9
        lowest = 1e-300 if least == 'above' else least
        allowed, refused = [lowest], [0. if least == 'above' else least - step]
        allowed += [10**9] if most is None else [most]
        refused += [] if most is None else [most + step]
        for value in allowed: assert settings.check_values({name: value})[name] == value, name
        for value in refused:
            with pytest.raises(ValueError, match=f'^{name} is '): settings.check_values({name: value})


def test_limits_of_lists():
    for name in ('scale', 'stretch'):
        assert settings.check_values({name: [1e-300, 7]})[name] == [1e-300, 7.]
        for wrong in ([1.], [1., 2., 3.], [2., 1.], [0., 1.], []):
            with pytest.raises(ValueError, match=f'^{name} '): settings.check_values({name: wrong})
    assert settings.check_values(dict(decay=[]))['decay'] == []
    for wrong in (dict(decay=[2, 1]), dict(decay=[-1]), dict(stages=[]),
                  dict(stages=['teacher', 'teacher']), dict(trackers=['wandb', 'wandb']),
                  dict(trackers=['paper'])):
        with pytest.raises(ValueError, match=f'^{next(iter(wrong))} '): settings.check_values(wrong)
    for word in ('backbone', 'depth_source', 'best', 'name'):
        with pytest.raises(ValueError, match=f'^{word} is'): settings.check_values({word: ''})
    for word in ('teacher', 'weights', 'device'):
        assert settings.check_values({word: ''})[word] == ''


def test_the_rarer_defaults():
    "Those that stand in no runbook."
    rare = dict(teach='offsets', taught_parts=list(settings.PARTS), teacher_pictures='',
                unlabelled=0., balance=0., device='',
                accumulate=1, compile=False, look=0, beside=False, sync_bn=False, clip=0., skip=0,
                released=False, validate_images=0, best='sgdet/R@50', patience=0, keep=2,
                save_minutes=10., trackers=[], told=False)
    assert list(rare) == list(list(settings.parameter_help().values())[-1])
    declared = asdict(settings.Settings())
    assert {name: declared[name] for name in rare} == rare


@pytest.mark.parametrize('fits,does_not', [
    (dict(n_train=8), dict(n_train=7)),
    (dict(hold_out=1992), dict(hold_out=1993)),
    (dict(n_train=2000, hold_out=1999, batch_size=1), dict(n_train=2000, hold_out=2000, batch_size=1)),
    (dict(overfit=8), dict(overfit=7)),
    (dict(accumulate=8), dict(accumulate=9)),
    (dict(data='rooms'), dict(data=' ')),
    (dict(validate_every=1, n_val=1), dict(validate_every=1, n_val=0)),
    (dict(validate_every=1, n_val=0, hold_out=1), dict(validate_every=2, n_val=0)),
    (dict(validate_every=0, n_val=0), dict(validate_every=1, n_val=0)),
    (dict(validate_every=1, best='AP50'), dict(validate_every=1, best='AP')),
    (dict(validate_every=1, best='predcls/A@20'), dict(validate_every=1, best='sgdet/A@20')),
    (dict(validate_every=1, patience=1), dict(patience=1))])
def test_what_goes_together_and_what_just_does_not(fits, does_not):
    settings.check_together(settings.Settings(**{'batch_size': 8, **fits}))
    with pytest.raises(ValueError): settings.check_together(settings.Settings(**{'batch_size': 8, **does_not}))
