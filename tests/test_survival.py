"""A run that is killed, stopped, out of disk space or shared among processes ends as it would have
ended otherwise."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import forked

from stdg import train
from stdg.checkpoint import load
from stdg.data import loader
from stdg.training.resume import load_state, saved_states

here = Path(__file__).parent
TOY = train.Settings(name='whole', size=64, n_train=16, n_val=3, n_test=2,
                     backbone='test_resnet.r160_in1k', pretrained=False, stages=['teacher', 'student'],
                     epochs=2, teacher_share=1., batch_size=4, warm_up=.5,
                     save_minutes=0., validate_every=1, device='cpu')
STEPS = 8  # of a stage


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A project folder with data, in which a toy run has gone through undisturbed."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    assert run(home, 'whole')[0] == 0
    yield home
    shutil.rmtree(home)  # its states are large


def run(home, name, kind='none', stage='-', step=0, processes=0, **settings):
    """(exit code, what was printed) of a run, alone or in `processes` under torchrun, that is
    disturbed as `killed_run` says."""
    settings = asdict(TOY) | dict(name=name) | settings
    train.write_settings(home/f'{name}.yaml', train.Settings(**settings))
    command = [str(here/'killed_run.py'), f'{name}.yaml', kind, stage, str(step)]
    if processes:
        command = ['-m', 'torch.distributed.run', '--standalone',
                   f'--nproc_per_node={processes}', *command]
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    if settings['backbone'] == PAIR['backbone']: environment['NO_NORM'] = '1'
    done = forked(command, home, environment) if not processes else subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True,
        timeout=300)
    return done.returncode, done.stdout + done.stderr


def last(home, name, stage): return saved_states(home/'runs'/name/'states', stage)[-1]


def assert_same(home, name):
    "Every file that the undisturbed run has left is there, byte for byte."
    whole, other = home/'runs'/'whole', home/'runs'/name
    files = ['log.jsonl'] + [f'{stage}{best}.{ending}' for stage in TOY.stages
                             for best in ('', '.best') for ending in ('safetensors', 'json')]
    files += [str(last(home, 'whole', stage).with_suffix(ending).relative_to(whole))
              for stage in TOY.stages for ending in ('.safetensors', '.json')]
    for file in files: assert (whole/file).read_bytes() == (other/file).read_bytes(), file
    assert not [path for path in other.rglob('*') if 'partial' in path.name]


def test_killed_anywhere(home):
    """Five kills at random places of both stages, two of them while a state is being written; after
    each the same command."""
    places = [[(stage, step) for step in random.sample(range(1, STEPS), 4)] for stage in range(2)]
    places = sorted([places[0].pop(), places[1].pop(), *random.sample(sum(places, []), 3)])
    kinds = random.sample(['step', 'step', 'step', 'tensors', 'json'], 5)
    kills = [(kind, TOY.stages[stage], step) for kind, (stage, step) in zip(kinds, places)]
    for kill in kills: assert run(home, 'killed', *kill)[0] == -signal.SIGKILL, kills
    code, said = run(home, 'killed')
    assert code == 0, (kills, said)
    assert_same(home, 'killed')


@pytest.mark.parametrize('kind,stage,step', [('usr1', 'student', 2), ('term', 'teacher', 3)])
def test_asked_to_stop(home, kind, stage, step):
    code, said = run(home, kind, kind, stage, step)
    message = (f'{stage}: asked to stop, the state after step {step + 1} is saved; the same '
               'command goes on from there')
    assert code == 75 and message in said, said
    assert load_state(last(home, kind, stage))[1]['step'] == step + 1
    assert run(home, kind)[0] == 0
    assert_same(home, kind)


def test_full_disk(home):
    code, said = run(home, 'full', 'full', 'student', 5)
    assert code == 1 and 'could not be written' in said and 'Is the disk full?' in said, said
    tensors, facts = load_state(last(home, 'full', 'student'))
    assert facts['step'] == 5 and tensors
    assert run(home, 'full')[0] == 0
    assert_same(home, 'full')


def test_what_a_resumed_run_must_agree_on(home, monkeypatch):
    monkeypatch.chdir(home)
    backbones = 'config.backbone was .test_resnet.r160_in1k., is .resnet18.tv_in1k.'
    for change, message in ((dict(batch_size=8), 'other settings: batch_size was 4, is 8'),
                            (dict(backbone='resnet18.tv_in1k'), f'other settings: {backbones}'),
                            (dict(hold_out=4), 'was written by a run on other data')):
        settings = train.Settings(**asdict(TOY) | change)
        with pytest.raises(ValueError, match=f'teacher-00000008.json.*{message}.*-p resume False'):
            train.train_stage(settings, 'teacher', train.prepare_run(settings))
    assert_same(home, 'whole')


def test_more_processes_than_pictures():
    dataset = type('Few', (), dict(training=True, __len__=lambda self: 9))()
    said = ('4 processes cannot share a batch of 2 pictures: make the batch size a multiple of 4, '
            'or take fewer devices')
    with pytest.raises(ValueError, match=said): loader(dataset, 2, share=(0, 4))


needs_two = pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
# 20 steps of stage 2
PAIR = dict(backbone='test_convnext.r160_in1k', epochs=5, validate_every=0, lr=1e-4, lr_backbone=1e-4,
            stages=['student'], teacher='random', relation='fields')  # jitter of pairs is each process's own


@pytest.fixture(scope='module')
def alone(home):
    "20 steps of one process."
    code, said = run(home, 'alone', **PAIR)
    assert code == 0, said
    return [json.loads(line) for line in open(home/'runs'/'alone'/'log.jsonl')]


def assert_close(home, name, alone):
    "Weights and log of a run differ from those of one process by rounding alone."
    def weights(name):
        network = load(home/'runs'/name/'student.safetensors').network
        return torch.cat([p.detach().flatten() for p in network.parameters()])
    assert len(alone) == 20 and float((weights('alone') - weights(name)).abs().max()) < 1e-6
    lines = [json.loads(line) for line in open(home/'runs'/name/'log.jsonl')]
    for a, b in zip(alone, lines, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {'stage'}: assert a[key] == pytest.approx(b[key], rel=1e-3), key
    epochs = [sum(line['loss'] for line in alone[i:i + 4]) for i in range(0, 20, 4)]
    assert epochs[-1] < epochs[0]


@needs_two
def test_two_processes_are_as_one(home, alone):
    code, said = run(home, 'pair', processes=2, **PAIR)
    assert code == 0, said
    assert load_state(last(home, 'pair', 'student'))[1]['processes'] == 2
    assert_close(home, 'pair', alone)


@needs_two
def test_a_dead_process_ends_the_others_and_one_goes_on(home, alone):
    start = time.monotonic()
    code, said = run(home, 'dead', 'raise', 'student', 11, processes=2, **PAIR)
    assert code == 1 and 'RuntimeError: this process has a bug' in said, said
    took = time.monotonic() - start
    assert took < 90, 'the survivor is ended at once, and does not wait for the dead'
    assert 0 < load_state(last(home, 'dead', 'student'))[1]['step'] <= 11
    code, said = run(home, 'dead', **PAIR)
    assert code == 0, said
    assert_close(home, 'dead', alone)


@needs_two
def test_torchrun_is_asked_to_stop(home):
    """SIGTERM to torchrun, as a cluster or a notebook sends it: the processes save, and one process
    resumes the run."""
    settings = train.Settings(**asdict(TOY) | dict(name='asked', epochs=400))
    train.write_settings(home/'asked.yaml', settings)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '-m', 'stdg.train', '--config', 'asked.yaml']
    torchrun = subprocess.Popen(command, cwd=home, env=dict(os.environ, OMP_NUM_THREADS='1'),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 100
    while not (home/'runs'/'asked'/'teacher.safetensors').exists():
        assert time.monotonic() < end
        time.sleep(.2)
    torchrun.send_signal(signal.SIGTERM)
    said = torchrun.communicate(timeout=60)[0]
    step = load_state(last(home, 'asked', 'teacher'))[1]['step']
    assert torchrun.returncode == 1, said
    assert f'asked to stop, the state after step {step} is saved' in said, said
    code, said = run(home, 'asked', epochs=step // 4 + 1, stages=['teacher'])
    assert code == 0, said
    lines = [json.loads(line) for line in open(home/'runs'/'asked'/'log.jsonl')]
    steps = [line['step'] for line in lines if 'loss' in line]
    assert steps == list(range(1, 4 * (step // 4 + 1) + 1))
