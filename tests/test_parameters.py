"""What a person gives, by papermill, YAML, make or a command line, and what becomes of it: the value
that was meant, or one line before anything is read, rendered or trained."""
import json
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import pytest
import yaml

from stdg import evaluation, prepare, train
from stdg.explore.controls import OVERLAYS, SHOW
from stdg.explore.networks import READINGS
from stdg.graph import SceneGraph
from stdg.io import parameters
from stdg.io.yaml_files import parse_yaml
from stdg.model import STDG
from stdg.runbooks import RUNBOOKS, check_parameters
from stdg.testing import TOY_VOCABULARY, loud, toy_database, toy_scene
from stdg.training import experiments, settings

root = Path(__file__).parent.parent
runbooks = {path.stem: nbformat.read(path, as_version=4)
            for path in sorted((root/'nbs').glob('*.ipynb'))}


def parameters_cell(name):
    "(source of the parameters cell, of the code cell behind it), None for a notebook without."
    cells = [cell for cell in runbooks[name].cells if cell.cell_type == 'code']
    at = [i for i, cell in enumerate(cells) if 'parameters' in cell.metadata.get('tags', [])]
    return (cells[at[0]].source, cells[at[0] + 1].source) if at else None


def run_by_papermill(name, /, **given):
    """The values of the parameters after the first cells of a runbook were run as papermill runs
    them: the parameters, the cell that it puts behind them, the check."""
    cell, checks = parameters_cell(name)
    injected = '\n'.join(['# Parameters', *(f'{k} = {v!r}' for k, v in given.items())])
    values = dict(nan=math.nan, inf=math.inf, _ih=['', cell, injected])
    for source in (cell, injected, checks): exec(source, values)
    return values


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project folder, which is the working folder."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Types from papermill and YAML

def test_every_runbook_checks_its_parameters(project):
    "The tables have the runbooks' names; every default is allowed, and of the type that is declared."
    assert set(RUNBOOKS) == {name for name in runbooks if parameters_cell(name)}
    (project/'runs'/'default').mkdir(parents=True)
    (project/'runs'/'default'/'student.safetensors').touch()
    for name, kinds in RUNBOOKS.items():
        cell, checks = parameters_cell(name)
        assert checks == (f"from stdg.runbooks import check_parameters\n\n"
                          f"check_parameters('{name}', globals())")
        declared = {}
        exec(cell, declared)
        names = declared['__annotations__']
        rare = set(list(settings.parameter_help().values())[-1]) if name == 'train' else set()
        assert set(names) == set(kinds) - rare, name
        after = run_by_papermill(name)
        for parameter, kind in names.items():
            assert after[parameter] == declared[parameter] and type(after[parameter]) is kind
    explored = RUNBOOKS['explore']
    assert set(explored['show'].words) == set(SHOW)
    assert set(explored['overlay'].words) == set(OVERLAYS)
    assert set(explored['reading'].words) == set(READINGS)


@pytest.mark.parametrize('name, given, meant', [
    ('train', dict(name=2), '2'), ('train', dict(name='my run'), 'my run'),
    ('train', dict(name="it's"), "it's"), ('train', dict(name='study/low-1'), 'study/low-1'),
    ('train', dict(lr='5e-4'), 5e-4), ('train', dict(lr=1), 1.), ('train', dict(epochs='3'), 3),
    ('train', dict(epochs=3.0), 3), ('train', dict(decay=.5), [.5]), ('train', dict(decay='0.5'), [.5]),
    ('train', dict(decay='[10, 40]'), [10., 40.]), ('train', dict(decay=(1, 2)), [1., 2.]),
    ('train', dict(stages='teacher'), ['teacher']),
    ('train', dict(stages='[teacher, student]'), ['teacher', 'student']),
    ('train', dict(stages='teacher,student'), ['teacher', 'student']),
    ('train', dict(stages="['teacher', 'student']"), ['teacher', 'student']),
    ('train', dict(resume='false'), False), ('train', dict(resume='False'), False),
    ('train', dict(resume=0), False), ('train', dict(resume='no'), False),
    ('train', dict(dry_run='on'), True), ('train', dict(teacher=None), ''),
    ('train', dict(data=2024), '2024'), ('train', dict(more='{clip: 1.0}'), dict(clip=1.)),
    ('train', dict(device='CPU'), 'cpu'), ('train', dict(clip=1), 1.),
    ('evaluate', dict(tasks='predcls'), ['predcls']),
    ('evaluate', dict(tasks='predcls,sgcls'), ['predcls', 'sgcls']),
    ('evaluate', dict(protocol='Strict'), ['strict']), ('evaluate', dict(split='TEST'), 'test'),
    ('prepare', dict(steps='check, images'), ['check', 'images']),
    ('prepare', dict(annotations='train=a.json,val=b.json'), ['train=a.json', 'val=b.json']),
    ('prepare', dict(metric=False), 'no'), ('explore', dict(pictures='a.jpg'), ['a.jpg']),
    ('study', dict(seeds='0 1 2'), [0, 1, 2]), ('study', dict(clutters='[0.1, .5]'), [.1, .5]),
    ('benchmark', dict(networks='resnet50'), ['resnet50']),
    ('benchmark_gpu', dict(batches=8), [8]), ('own_data', dict(pretrained='no'), False)])
def test_a_certain_meaning_is_taken(project, name, given, meant):
    (parameter, _), = given.items()
    value = run_by_papermill(name, **given)[parameter]
    assert value == meant and type(value) is type(meant)


@pytest.mark.parametrize('name, given, said', [
    ('train', dict(epochs='two'), "epochs is 'two'; a whole number from 1 up is needed"),
    ('train', dict(epochs=2.5), 'epochs is 2.5'), ('train', dict(epochs=0), 'epochs is 0'),
    ('train', dict(epochs=True), 'epochs is True'), ('train', dict(epochs=None), 'epochs is None'),
    ('train', dict(batch_size=0), 'batch_size is 0; a whole number from 1 up'),
    ('train', dict(seed=-1), 'seed is -1; a whole number from 0 to'),
    ('train', dict(lr=math.nan), 'lr is nan; a number above 0'),
    ('train', dict(lr=math.inf), 'lr is inf'), ('train', dict(lr='5,0e-4'), "lr is '5,0e-4'"),
    ('train', dict(ema=0), 'ema is 0; a number above 0 to 1'), ('train', dict(ema=1.5), 'ema is 1.5'),
    ('train', dict(warm_up=-1), 'warm_up is -1'), ('train', dict(size=1), 'size is 1'),
    ('train', dict(size=-5), 'size is -5'), ('train', dict(clutter=2), 'clutter is 2'),
    ('train', dict(decay=[40, 10]), 'none smaller than the one before'),
    ('train', dict(decay='later'), "'later' is not"), ('train', dict(decay={}), 'decay is {}'),
    ('train', dict(scale=[2, 1]), 'scale is'), ('train', dict(scale=1.5), '1 are given'),
    ('train', dict(stages='teachr'), "did you mean 'teacher'"),
    ('train', dict(stages=[]), 'a list of one or more'),
    ('train', dict(stages=['teacher', 'teacher']), 'all different'),
    ('train', dict(resume='maybe'), "resume is 'maybe'; True or False"),
    ('train', dict(resume=2), 'resume is 2'), ('train', dict(precision='bf16'), "mean 'bfloat16'"),
    ('train', dict(name='../other'), "no '.', '..'"), ('train', dict(name='/tmp/x'), "no '/' at the st"),
    ('train', dict(name=''), 'this is empty'), ('train', dict(name=2.5), 'give it to papermill by -r'),
    ('train', dict(name=None), 'name is None'), ('train', dict(device='gpu'), "did you mean 'cuda'"),
    ('train', dict(device=0), "did you mean 'cuda:0'"), ('train', dict(more=3), 'more is 3'),
    ('train', dict(epoch=3), "there is no parameter 'epoch'; did you mean 'epochs'?"),
    ('train', dict(batchsize=4), "did you mean 'batch_size'?"),
    ('evaluate', dict(tasks='predcl'), "did you mean 'predcls'"),
    ('evaluate', dict(tasks=[]), '0 are given'), ('evaluate', dict(shard=2, of_shards=2), 'from 0'),
    ('evaluate', dict(check_point='x'), "did you mean 'checkpoint'?"),
    ('evaluate', dict(keep_thresholds=True), 'keep_thresholds needs a checkpoint'),
    ('predict', dict(top=-1), 'top is -1'), ('predict', dict(checkpoint=''), "checkpoint is ''"),
    ('explore', dict(show='truht'), "did you mean 'truth'"), ('explore', dict(number=0), 'number is 0'),
    ('prepare', dict(kind='coco'), 'kind is'), ('prepare', dict(steps='check,imags'), "'images'"),
    ('prepare', dict(step='check'), "did you mean 'steps'"), ('prepare', dict(raw='gone'), 'gone is missing'),
    ('own_data', dict(n_images='few'), "n_images is 'few'"),
    ('study', dict(seeds=[1, 1]), 'all different'), ('study', dict(clutters=.5), '1 are given'),
    ('study', dict(n_train=4), 'batch_size is 8, n_train 4'),
    ('benchmark', dict(networks='resnet5'), "did you mean 'resnet50'"),
    ('benchmark_gpu', dict(precisions='float8'), 'precisions is')])
def test_what_cannot_be_meant_is_one_error(project, name, given, said):
    (project/'runs'/'default').mkdir(parents=True)
    (project/'runs'/'default'/'student.safetensors').touch()
    with pytest.raises(ValueError) as error: run_by_papermill(name, **given)
    assert said in str(error.value) and '\n' not in str(error.value)
    assert len(str(error.value)) < 500


def test_all_faults_are_in_one_error():
    with pytest.raises(ValueError) as error: run_by_papermill('train', epoch=3, seed=-1, lr='x')
    said = str(error.value)
    assert all(part in said for part in ("'epoch'; did you mean", 'seed is -1', "lr is 'x'"))


def test_a_name_given_by_hand_is_not_papermills():
    "Only the cell that papermill has put there is looked at: notebooks may have variables."
    values = run_by_papermill('own_data')
    values |= dict(epoch=3, _ih=['', 'epoch = 3', '# Parameters of mine\nx = 1', '# Parameters\nf()'])
    check_parameters('own_data', values)


def test_papermill_stops_before_anything_is_made(project):
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3',
               str(root/'nbs'/'train.ipynb'), 'out.ipynb', '-p', 'name', '2', '-p', 'epoch', '3',
               '-p', 'decay', '0.5', '-p', 'seed', '-1']
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode and 'ValueError: seed is -1; a whole number from 0' in done.stderr
    assert "there is no parameter 'epoch'; did you mean 'epochs'?" in done.stderr
    assert 'name is' not in done.stderr and 'decay is' not in done.stderr
    assert {path.name for path in project.iterdir()} == {'settings.ini', 'out.ipynb'}


def ends(capsys, main, arguments):
    "(exit status, what was said on the error stream) of a command that ends."
    with pytest.raises(SystemExit) as end: main(arguments)
    said = capsys.readouterr()
    assert not said.out
    return end.value.code, said.err


# What does not go together

@pytest.mark.parametrize('change, said', [
    (dict(n_train=4, batch_size=8), 'batch_size is 8, n_train 4: fewer pictures'),
    (dict(hold_out=2000), 'none is left to train'),
    (dict(overfit=4, batch_size=8), 'overfit is 4, batch_size 8'),
    (dict(accumulate=16), 'accumulate is 16'),
    (dict(validate_every=1, n_val=0), 'n_val and hold_out are both 0'),
    (dict(validate_every=1, best='R@50'), "best is 'R@50'"), (dict(patience=2), 'patience is 2')])
def test_what_does_not_go_together(project, capsys, change, said):
    "It is said before a run; but what a run of an earlier version has written is read."
    with pytest.raises(ValueError, match=said): train.settings_of(change)
    (project/'run.yaml').write_text(yaml.safe_dump(change))
    code, line = ends(capsys, train.main, ['--config', 'run.yaml'])
    assert code == 2 and line.startswith('python -m stdg.train: run.yaml: ') and said in line
    assert train.read_settings('run.yaml') == settings.Settings(**change)


# YAML

def test_yaml_says_what_is_meant(project):
    text = '''
name: 007
lr: 5e-4
lr_backbone: 1
resume: no
decay: 0.5
stages: teacher
epochs: 2.0
teacher:
'''
    (project/'run.yaml').write_bytes('\ufeff'.encode() + text.encode())
    read = train.read_settings('run.yaml')
    assert read == settings.Settings(name='007', lr=5e-4, lr_backbone=1., resume=False, decay=[.5],
                                     stages=['teacher'], epochs=2)
    for name in ('1e5', 'no', '2.50', '1:30', '0x1F', '2026-11-27', 'null', '~x', 'a: b', '#1', "'"):
        train.write_settings('run.yaml', replace(read, name=name))
        assert train.read_settings('run.yaml').name == name


def nest(levels=30):
    "Nine times nine times nine ... of a word, in a kilobyte."
    lines = ['a0: &a0 [x, x]']
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return '\n'.join([*lines, f'epochs: *a{levels - 1}'])


@pytest.mark.parametrize('text, said', [
    (nest(), 'more than 10000 values'), ('[' * 100_000, 'deeper than 20'),
    ('- ' * 5000 + 'x', 'deeper than 20'), ('x: ' + '[1, ' * 15 + ']' * 15, ''),
    ('epochs: &a [*a]', 'is a part of'), ('epochs: 2\nepochs: 3', "'epochs' stands there twice"),
    ('epochs: !!python/object/apply:os.system [ls]', 'is not read'), ('epochs: !!int x', 'is not read'),
    ('epochs: [', 'line 1'), ('{a: 1}: 2', 'unhashable'), ('a: 1\n---\nb: 1', 'single document'),
    ('epochs: *b', 'undefined alias'), ('3', 'holds no parameters'), ('', 'holds no parameters'),
    ('- epochs', 'holds no parameters'), ('epoch: 3', "did you mean 'epochs'"),
    ('x' * 300_000, 'more than 262,144 bytes'), ('\0', 'special characters'),
    ('1: 2', "there is no parameter 1"), ('epochs: ' + '9' * 6000, 'epochs is'),
    ('<<: {epochs: two}', "epochs is 'two'")])
def test_hostile_yaml_is_one_line(project, text, said):
    (project/'run.yaml').write_text(text)
    with pytest.raises(ValueError) as error: train.read_settings('run.yaml')
    assert 'run.yaml' in str(error.value) and said in str(error.value)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_damaged_files_of_runs_are_named(project):
    "Those that runs write for themselves, which other programs read again."
    run = experiments.Run('toy', dict(decay=(shared := [1.]), scale=shared))
    run.folder.mkdir(parents=True)
    file = run.folder/'parameters.yaml'
    file.write_text(yaml.safe_dump(dict(run.parameters, name='toy')))
    assert '&id001' in file.read_text() and not experiments.finished(run), 'aliases of old files'
    for text in ('a: [', '', 'toy'):
        file.write_text(text)
        with pytest.raises(ValueError, match='parameters.yaml.*Remove .*toy'): experiments.finished(run)
    (run.folder/'results.json').write_text(json.dumps(dict(rows=dict(x=dict(sgdet=None)))))
    with pytest.raises(ValueError, match='has no figure sgdet/R@50'):
        experiments.gather([replace(run, configuration='a')], ['sgdet/R@50'])


def test_every_settings_file_is_read_as_it_is_written(project):
    for name, change in dict(usual={}, odd=dict(name='no', teacher='random', decay=[1, 2],
                                                trackers=['wandb'], lr=1e-5)).items():
        given = settings.Settings(**change)
        train.write_settings(f'{name}.yaml', given)
        assert train.read_settings(f'{name}.yaml') == given
    for path in (root/'nbs'/'configs').glob('*.yaml'):
        assert asdict(train.read_settings(path)) == asdict(settings.Settings()) | {
            k: v for k, v in yaml.safe_load(path.read_text()).items()}


# Command lines

def test_mistakes_of_train_are_one_line(project, capsys):
    (project/'folder').mkdir()
    files = dict(bad='epochs: two', broken='a: [', empty='', unknown='epoch: 3', good='stages: [student]',
                 none='data: none\npretrained: false', teacher='stages: [student]\nteacher: folder')
    for name, text in files.items(): (project/f'{name}.yaml').write_text(text)
    for arguments, part in (('', '--config'), ('--config gone.yaml', 'gone.yaml is missing'),
                            ('--config folder', 'folder is a folder'),
                            ('--config bad.yaml', "epochs is 'two'"),
                            ('--config broken.yaml', 'not YAML'), ('--config empty.yaml', 'empty.yaml'),
                            ('--config unknown.yaml', "did you mean 'epochs'"),
                            ('--config good.yaml --stages studnt', "did you mean 'student'"),
                            ('--config good.yaml --stages teacher', 'has the stages student'),
                            ('--config good.yaml --sta', '--sta'), ('--config teacher.yaml', 'folder'),
                            ('--config none.yaml', 'VG-SGG-dicts.json is missing')):
        code, said = ends(capsys, train.main, arguments.split())
        assert code == 2 and part in said and said.count('\n') == 1, (arguments, said)
        assert said.startswith('python -m stdg.train: ')


def test_faults_of_train_keep_their_traceback(project, capsys, monkeypatch):
    (project/'run.yaml').write_text('pretrained: false')
    def raises(error):
        def act(*args): raise error
        monkeypatch.setattr(train, 'prepare_run', act)
    for error in (RuntimeError('a fault'), ValueError('of a library'), FloatingPointError('nan')):
        raises(error)
        with pytest.raises(type(error), match=str(error)): train.main(['--config', 'run.yaml'])
    monkeypatch.setattr(train, 'prepare_run', lambda settings, stages: None)
    def ours(*args): train.read_settings('gone.yaml')
    monkeypatch.setattr(train, '_train', ours)
    code, said = ends(capsys, train.main, ['--config', 'run.yaml'])
    assert code == 2 and 'gone.yaml is missing' in said and said.count('\n') == 1
    monkeypatch.setattr(train, 'process_group', lambda device: nullcontext('cpu'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(FileNotFoundError): train.main(['--config', 'run.yaml'])
    code, said = ends(capsys, train.main, ['--config', 'gone.yaml'])
    assert code == 2 and said.count('\n') == 1, 'a mistake in the command, also under torchrun'
    monkeypatch.delenv('LOCAL_RANK')
    raises(KeyboardInterrupt())
    code, said = ends(capsys, train.main, ['--config', 'run.yaml'])
    assert code == 130 and said.count('\n') == 1


def test_the_device_is_looked_for_before_rooms_are_made(project, capsys, monkeypatch):
    monkeypatch.setattr('stdg.rooms.make_rooms', lambda *args, **kwargs: pytest.fail('too late'))
    (project/'run.yaml').write_text('pretrained: false\ndevice: cuda:3')
    with pytest.raises(ValueError, match="device 'cuda:3': this machine has"):
        train.prepare_run(train.read_settings('run.yaml'))
    with pytest.raises(ValueError, match='devices=4096, but this machine has'):
        train.prepare_run(settings.Settings(devices=4096, batch_size=4096, n_train=4096))


def test_mistakes_of_prepare_are_one_line(project, capsys):
    (project/'raw').mkdir()
    (project/'a file').touch()
    good = '--raw raw --folder out'
    for arguments, part in (('', 'required'), (f'images {good} --size -5', "--size: '-5'"),
                            (f'images {good} --size 1', "--size: '1'"),
                            (f'images {good} --size big', "--size: 'big'"),
                            (f'depth {good} --shard 2/2', 'the last is 1/2'),
                            (f'depth {good} --shard 0/0', 'at least one'),
                            (f'depth {good} --shard 1', 'written 2/8'),
                            (f'depth {good} --workers -1', '--workers'),
                            (f'depth {good} --batch 0', '--batch'), (f'depth {good} --unit 0', '--unit'),
                            (f'depth {good} --device gpu', "did you mean 'cuda'"),
                            (f'depth {good} --device 0', "did you mean 'cuda:0'"),
                            (f'depht {good}', 'depht'), (f'check {good} --kind own', 'annotations'),
                            ('check --raw gone --folder out', 'gone is not a folder'),
                            ('check --raw settings.ini --folder out', 'not a folder'),
                            ('check --raw raw --folder settings.ini', 'settings.ini')):
        code, said = ends(capsys, prepare.main, arguments.split())
        assert code == 2 and part in said and said.count('\n') == 1, (arguments, said)


def test_prepare_stopped_by_hand(project, capsys, monkeypatch):
    (project/'raw').mkdir()
    def stopped(job): raise KeyboardInterrupt
    monkeypatch.setitem(prepare._DO, 'images', stopped)
    code, said = ends(capsys, prepare.main, 'images --raw raw --folder out'.split())
    assert (code, said) == (130, 'images: stopped; the same command goes on\n')


# A folder where a file is needed

def test_a_folder_given_for_a_network(project):
    folder = project/'runs'/'base'
    folder.mkdir(parents=True)
    for name in ('student', 'teacher'): (folder/f'{name}.safetensors').touch()
    for name, parameter in dict(evaluate='checkpoint', predict='checkpoint',
                                explore='checkpoints').items():
        for value, said in (('runs/base', 'this is a folder: .*base holds student.safetensors, teach'),
                            ('runs/base/studnt.safetensors', "mean 'student.safetensors'"),
                            ('runs/bse/x.safetensors', 'there is no folder')):
            with pytest.raises(ValueError, match=said):
                run_by_papermill(name, **{parameter: value})
        run_by_papermill(name, **{parameter: 'runs/base/student.safetensors'})
    alone = settings.Settings(stages=['student'], teacher='runs/base', pretrained=False)
    with pytest.raises(ValueError, match='base holds student.safetensors, teacher.safetensors'):
        train.prepare_run(alone)
    with pytest.raises(ValueError, match='weights is .*this is a folder'):
        train.prepare_run(replace(alone, teacher='random', weights='runs/base'))
    shutil.copy(folder/'student.safetensors', folder/'model.safetensors')
    assert run_by_papermill('predict', checkpoint='runs/base'), 'a shared network is a folder'


# Splits that lack something

def toy(folder, split, without=(), empty=()):
    """A database of toy scenes of this `split`; those of numbers `without` have no relation, `empty`
    no object."""
    scenes = []
    for i in range(len(split)):
        graph, record = toy_scene(i)
        if i in without: graph = SceneGraph(graph.boxes, graph.labels, [], graph.size)
        if i in empty: graph = SceneGraph(graph.boxes[:0], [], [], graph.size)
        scenes.append((graph, record))
    return toy_database(folder, scenes, split)


SMALL = settings.Settings(data='mine', size=64, batch_size=2, pretrained=False, device='cpu')


def test_what_cannot_be_trained_or_chosen_by_is_said_before(tmp_path):
    for name, split, kinds, change, said in (
            ('a', [0, 0, 1, 2], dict(without=(0, 1)), {}, 'no training picture has a relation'),
            ('b', [1, 1, 2, 2], {}, {}, 'no training picture has a relation'),
            ('c', [0, 0, 0, 2], {}, dict(batch_size=4), '3 training pictures have a relation, and ba'),
            ('d', [0, 0, 0, 2], {}, dict(hold_out=2), '1 training pictures, beside hold_out 2, have'),
            ('e', [0, 0, 2, 2], {}, dict(validate_every=1), 'no validation pictures, .*-p hold_out'),
            ('f', [0, 0, 1, 2], dict(without=(2,)), dict(validate_every=1), 'no .*by: .*best: AP50'),
            ('g', [0, 0, 1, 2], {}, dict(overlap=True), 'whose boxes overlap')):
        with pytest.raises(ValueError, match=said):
            train.check_splits(replace(SMALL, **change), toy(tmp_path/name, split, **kinds))
    by_boxes = replace(SMALL, validate_every=1, best='AP50', relation='fields')
    database = toy(tmp_path/'f', [0, 0, 1, 2], (2,))
    assert train.check_splits(by_boxes, database) == []
    values = train.validation(by_boxes, database, 'rgb')(loud(network()))
    assert math.isfinite(values['AP50'])


def network():
    return STDG('small', n_objects=len(TOY_VOCABULARY.objects),
                n_predicates=len(TOY_VOCABULARY.predicates), pretrained=False)


def test_what_cannot_be_judged_is_null_with_the_reason(tmp_path):
    "Boxes are judged where there are boxes; all names of figures are there, whatever is judged."
    model = loud(network())
    every = {name for name in settings.FIGURES if name != 'AP50' and '/P@' not in name}  # no dense truth
    for name, split, kinds, note in (
            ('whole', [0, 0, 2, 2], {}, None),
            ('no relation', [0, 0, 2, 2], dict(without=(2, 3)), 'only boxes are judged'),
            ('no object', [0, 0, 2, 2], dict(empty=(2, 3)), 'nor has any an object'),
            ('no picture', [0, 0, 0, 0], {}, 'NO TEST PICTURES')):
        database = toy(tmp_path/name, split, **kinds)
        notes = train.check_splits(SMALL, database)
        assert len(notes) == bool(note) and all(note in said for said in notes)
        test = train.judged_sets(SMALL, database, {'rgb'})
        rows = dict(prior=train.prior_figures(SMALL, database, test),
                    student=train.figures_of(SMALL, database, model, test, intervals=20, progress=False))
        rows = json.loads(json.dumps(train.rows_for_json(rows, test), allow_nan=False))
        student = rows['student']
        found = {f'{task}/{figure}': student[task][figure] for task in ('sgdet', 'sgcls', 'predcls')
                 for figure in student[task] if '@' in figure and 'predicate' not in figure}
        assert set(found) == every and rows['prior']['predcls'].keys() >= {'R@50', 'mR@50'}
        assert all((value is None) == bool(note) for value in found.values())
        assert student['images'] == (0 if name == 'no picture' else 2)
        assert (student['AP50'] is None) == (name in ('no object', 'no picture')), name
        if not note: assert evaluation.finite(rows) == rows


# make

# as if no `make test` were around
OUTERMOST = {k: v for k, v in os.environ.items() if k not in ('MAKELEVEL', 'MAKEFLAGS', 'MFLAGS', 'RUN')}


@pytest.fixture(scope='module')
def makefile(tmp_path_factory):
    "A folder with the Makefile and a `papermill` that prints its arguments, each in a line."
    home = tmp_path_factory.mktemp('make')
    shutil.copy(root/'Makefile', home)
    for name in ('setup.py', 'settings.ini', 'constraints.txt'):
        (home/name).touch()
        os.utime(home/name, (1, 1))
    bin_folder = home/'.venv'/'bin'
    bin_folder.mkdir(parents=True)
    (home/'.venv'/'installed').touch()
    program = bin_folder/'papermill'
    program.write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\n" "$one"; done\n')
    program.chmod(0o755)
    return home


@pytest.mark.parametrize('name', ['2', 'my run', "it's", 'a"b', '1.50', 'study/one', '*', '-x', '`ls`'])
def test_make_hands_the_name_on(makefile, name):
    done = subprocess.run(['make', '-s', 'train', f'RUN={name}', 'ARGS=-p clutter 0.8'], cwd=makefile,
                          env=OUTERMOST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2:9] == ['nbs/train.ipynb', f'runs/{name}/train.ipynb', '-r', 'name', name, '-p',
                          'clutter']
    assert (makefile/'runs'/name).is_dir()
    assert parameters.RunName().read(name) == name


@pytest.mark.parametrize('name', ['', '.', '..', '../x', 'a/../b', '/tmp/x', 'a//b', 'a\\b', '{x}',
                                  'a '])
def test_make_refuses_what_can_be_no_folder(makefile, name):
    there = sorted(makefile.rglob('*'))
    done = subprocess.run(['make', '-s', 'train', f'RUN={name}'], cwd=makefile, env=OUTERMOST,
                          capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith('make:')]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith(f"RUN='{name}' can be no")
    assert sorted(makefile.rglob('*')) == there and not done.stdout


def test_make_train_full_takes_name_and_arguments(makefile):
    for given, name in (([], 'full'), (['RUN=big'], 'big')):
        done = subprocess.run(['make', '-s', 'train-full', 'ARGS=-p epochs 9', *given], cwd=makefile,
                              capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[3:11] == [
            f'runs/{name}/train.ipynb', '-f', 'nbs/configs/full.yaml', '-r', 'name', name, '-p', 'epochs']


def test_lists_within_texts_are_bounded():
    "A list given as text is read by the same bounded reader."
    kind = parameters.Many(parameters.Real())
    for text in ('[' * 500 + ']', '[' + '1, ' * 20_000 + ']', '[!!python/name:os.system ]'):
        assert 'is needed' in parameters.fault('decay', text, kind)
    assert parse_yaml('[1, 2]') == kind.read('[1, 2]') == [1, 2]
    assert Namespace(size=parameters.argument(parameters.Whole(1))('3')).size == 3
