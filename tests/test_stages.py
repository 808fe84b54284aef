"""A run of several stages: one log, all checked before the first is trained, stopped at any moment
by real signals, and never disturbed by another process."""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from stdg import begin_run, train, training
from stdg.data import SceneGraphs
from stdg.depth.precompute import prepare_hha
from stdg.testing import toy_database
from stdg.training import loop
from stdg.training.resume import (
    EXIT_SAVED,
    Interrupted,
    exclusive_run,
    read_state,
    saved_states,
    start_over,
)
from stdg.training.step import build_network

ROUNDS = int(os.environ.get('STDG_ROUNDS', 3))
TOY = train.Settings(name='whole', stages=['teacher', 'control', 'student'], size=64, epochs=1,
                     teacher_share=1., batch_size=4, pretrained=False, device='cpu', validate_every=1, save_minutes=0.,
                     warm_up=.5)
STEPS = 2  # an epoch
forked = multiprocessing.get_context('fork')


def figures(settings, database, kind):
    "Instead of `train.validation`: a figure that depends on each weight, in no time."
    def judge(model):
        return {'sgdet/R@50': float(sum(p.detach().double().sum() for p in model.parameters()))}
    return judge


def run(home, name, *stages, **changed):
    "`python -m stdg.train`, in this process."
    settings = replace(TOY, **dict(data=str(home/'toy'), name=name) | changed)
    train.write_settings(home/f'{name}.yaml', settings)
    train.main(['--config', f'{name}.yaml', *(['--stages', *stages] if stages else [])])


def no_run(capsys, home, name, *stages, **changed):
    "What a command that is refused says, in one line and with exit status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended: run(home, name, *stages, **changed)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count('\n') == 1, said
    return said


def lines(home, name, file='log'):
    return (home/'runs'/name/f'{file}.jsonl').read_text().splitlines()


def steps(written, stage):
    "Of the lines of a stage: the step, and whether it is a step and not a validation."
    records = [json.loads(line) for line in written]
    return [(r['step'], 'loss' in r) for r in records if r['stage'] == stage]


def everything(folder):
    "{name: bytes} of what a run has left but times."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and path.name not in ('timing.jsonl', '.lock', 'run.yaml')}


def narrow(*given, **more):
    "Instead of `build_network`: a network of few channels."
    return build_network(*given, **dict(fpn=16, channels=16) | more)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project folder with data and an undisturbed run of all stages."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    prepare_hha(toy_database(home/'toy', 12, [0] * 8 + [1] * 2 + [2] * 2), progress=False)
    before = os.getcwd()
    os.chdir(home)
    patch = pytest.MonkeyPatch()
    patch.setattr(train, 'validation', figures)
    patch.setattr(training, 'build_network', narrow)
    try: run(home, 'whole')
    finally:
        patch.undo()
        os.chdir(before)
    return home


@pytest.fixture
def home(project, monkeypatch):
    "The project folder, as the working one; afterwards no handler of a signal has changed."
    monkeypatch.chdir(project)
    monkeypatch.setattr(train, 'validation', figures)
    monkeypatch.setattr(training, 'build_network', narrow)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    yield project
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def copied(home, name):
    shutil.copytree(home/'runs'/'whole', home/'runs'/name)
    return home/'runs'/name


def test_more_epochs_are_refused_before_anything_is_trained(home, capsys):
    "One epoch, then two: the student cannot follow a teacher who learns on. Nothing is touched."
    before = everything(copied(home, 'longer'))
    said = (r"stage 'student': .*student-00000002.json was taught by the teacher as it was, and "
            r"this run would first train that teacher, which has 2 steps of 4.*-p resume False.*"
            r"--stages teacher control")
    assert re.search(said, no_run(capsys, home, 'longer', epochs=2))
    settings = replace(TOY, name='longer', data=str(home/'toy'), epochs=2)
    with pytest.raises(ValueError, match=said):  # as the runbook does
        train.run_stage(settings, 'teacher', train.prepare_run(settings))
    assert everything(home/'runs'/'longer') == before


def test_one_stage_goes_on_and_the_log_of_the_others_stays(home, capsys):
    "The remedy that the message names. Then the teacher has changed, and that is said up front."
    copied(home, 'earlier')
    before, times = lines(home, 'earlier'), lines(home, 'earlier', 'timing')
    run(home, 'earlier', 'teacher', 'control', epochs=2)
    after = lines(home, 'earlier')
    assert after[:len(before)] == before and lines(home, 'earlier', 'timing')[:6] == times
    one_epoch = [(1, True), (2, True), (2, False)]
    assert steps(after, 'student') == one_epoch
    for stage in ('teacher', 'control'):
        assert steps(after, stage) == one_epoch + [(3, True), (4, True), (4, False)]
    said = "stage 'student': .*taught by another teacher: the teacher's weights have changed since"
    assert re.search(said, no_run(capsys, home, 'earlier', epochs=2))
    assert lines(home, 'earlier') == after
    run(home, 'earlier', 'control', epochs=3)
    assert steps(lines(home, 'earlier'), 'student') == one_epoch


def test_a_crash_costs_the_lines_of_its_own_stage_alone(home):
    """What a crash has left behind the state of a stage is dropped: its own lines, and half of the
    last one. States of an older version, which knew the length of the file, are read as well."""
    for name, older in (('crashed', False), ('older', True)):
        out = copied(home, name)
        before = lines(home, name)
        lost = [json.dumps(dict(stage='teacher', step=step, loss=9.)) for step in (3, 4)]
        foreign = 'not ours'
        whole = [*before[:2], foreign, *before[2:], *lost]
        (out/'log.jsonl').write_text('\n'.join(whole) + '\n{"stage": "teacher", "st')
        with open(out/'timing.jsonl', 'a') as file: file.write(lost[0] + '\n')
        if older:
            for path in saved_states(out/'states'):
                facts = json.loads(path.read_text())
                del facts['lines'], facts['judged']
                path.write_text(json.dumps(facts | dict(version=1, log=7)))
        run(home, name, 'teacher', epochs=2)
        after = lines(home, name)
        assert after[:-3] == [*before[:2], foreign, *before[2:]]
        assert [json.loads(line)['step'] for line in after[-3:]] == [3, 4, 4]
        assert not set(lost) & set(after)
        assert steps(lines(home, name, 'timing'), 'teacher') == [(n, False) for n in (1, 2, 3, 4)]


def test_every_stage_is_checked_first(home, capsys):
    for name, harm, stages, said in (
            ('damaged', lambda path: path.with_suffix('.safetensors').write_bytes(b'1'), (),
             "stage 'student': .*student-00000002.safetensors has 1 bytes.*Remove student-00000002"),
            ('settings', lambda path: None, (), "stage 'teacher': .*batch_size was 4, is 2"),
            ('gone', lambda path: path.with_suffix('.safetensors').unlink(), ('student',),
             "stage 'student': .*student-00000002.safetensors is missing")):
        out = copied(home, name)
        harm(saved_states(out/'states', 'student')[-1])
        before = everything(out)
        changed = dict(batch_size=2) if name == 'settings' else {}
        assert re.search(said, no_run(capsys, home, name, *stages, **changed))
        assert everything(out) == before
    with pytest.raises(ValueError, match="stages .'techer'. must be some of"):
        train.check_stages(TOY, (None, None, []), ['techer'])
    assert not (home/'runs'/'x').exists()


class Crash(BaseException):
    "Stands in for a kill, which leaves the same files."


@pytest.fixture
def hears_ctrl_c():
    "Also where a shell has put the tests into the background, which makes them deaf to it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_asked_to_stop_at_any_moment(home, monkeypatch, hears_ctrl_c):
    """A run is asked to stop while data are prepared, in the last step of a stage, in its final
    validation, while thresholds are chosen, between two stages, in the last step of all; Ctrl-C and
    a crash come between. The same command goes on each time, and all is as if it had not been."""
    def ask(number=signal.SIGTERM): os.kill(os.getpid(), number)

    def once(where, name, act, when=lambda *given: True):
        "Replace `where.name` by a function that acts before it, the first time that `when` holds."
        true, acted = getattr(where, name), []
        @functools.wraps(true)
        def first(*given, **more):
            if not acted and when(*given):
                acted.append(1)
                act()
            return true(*given, **more)
        monkeypatch.setattr(where, name, first)
        return acted

    def at(stage, step): return lambda run, *rest: (run.stage, run.done) == (stage, step)
    def crash(): raise Crash

    out, stages = home/'runs'/'stopped', ('teacher', 'control')
    moments = [
        (begin_run, 'prepare_hha', ask, lambda *given: True, Interrupted, 'what was done is kept', []),
        (loop, '_one_step', ask, at('teacher', 1), Interrupted, 'teacher: .*after step 2 is saved',
         ['teacher']),
        (loop, '_checkpoint', ask, lambda run, name, **_: name == 'teacher.best', Interrupted,
         'teacher: .*after step 2 is saved', ['teacher']),
        (loop, 'mark_state', crash, lambda *given: True, Crash, None, ['teacher']),
        (train, '_choose', lambda: ask(signal.SIGUSR1), lambda *given: True, Interrupted,
         'what was done is kept', ['teacher']),
        (train, 'begin', ask, lambda settings, *rest: rest[-1] == 'control' and
         'thresholds' in (out/'teacher.json').read_text(), Interrupted, 'what was done is kept',
         ['teacher']),
        (loop, '_one_step', lambda: ask(signal.SIGINT), at('control', 1), SystemExit, None,
         ['teacher']),
        (loop, '_one_step', lambda: [ask(), ask()], at('control', 1), Interrupted,
         'control: .*after step 2 is saved', ['teacher', 'control'])]
    for where, name, act, when, error, said, there in moments:
        acted = once(where, name, act, when)
        with pytest.raises(error, match=said) as raised: run(home, 'stopped', stages=list(stages))
        if error is not Crash:
            assert raised.value.code == (EXIT_SAVED if error is Interrupted else 130)
        assert acted and sorted(path.stem for path in out.glob('*.safetensors')
                                if 'best' not in path.stem) == sorted(there)
        if 'after step 2' in (said or ''):
            assert not read_state(saved_states(out/'states', there[-1])[-1])['judged']
    run(home, 'stopped', stages=list(stages))
    whole, found = everything(home/'runs'/'whole'), everything(out)
    ours = {name: data for name, data in whole.items() if 'student' not in name}
    ours['log.jsonl'] = b''.join(line for line in whole['log.jsonl'].splitlines(True)
                                 if b'"student"' not in line)
    assert found == ours


def apart(work, *given):
    "Start `work(*given)` in a forked process of its own, which exits with what it returns."
    def call():
        for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, signal.SIG_DFL)
        os._exit(work(*given))
    process = forked.Process(target=call)
    process.start()
    return process


def ended(process):
    process.join(60)
    return process.exitcode


def refused(work):
    "Exit code 7 if `work` finds that another process trains there."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said): work()
    except BlockingIOError as error: said.write(str(error))
    except SystemExit as ended: assert ended.code == 2
    return 7 if 'another process trains in' in said.getvalue() else 8


def test_nobody_starts_over_what_is_being_trained(home, monkeypatch):
    """While a run trains, and between two of its stages, another process starts it over, goes on
    with it, or calls a stage from a notebook: refused, and nothing is touched."""
    out, tries = home/'runs'/'busy', []
    settings = replace(TOY, name='busy', data=str(home/'toy'), stages=['teacher', 'control'])
    prepared = train.prepare_run(settings)
    at_once = functools.partial(exclusive_run, seconds=.1)
    def others():
        train.exclusive_run = at_once
        works = (lambda: start_over(out, .1), lambda: train._train(settings, prepared,
                 ['teacher'], 'cpu', True), lambda: train.run_stage(settings, 'teacher', prepared))
        return 7 if all(refused(work) == 7 for work in works) else 1
    one_step, begin = loop._one_step, train.begin
    def disturb():
        before = everything(out)
        tries.append(ended(apart(others)))
        assert everything(out) == before
    def at_step(stage_run, *rest):
        if stage_run.stage == 'teacher' and stage_run.done == 1: disturb()
        return one_step(stage_run, *rest)
    def at_begin(settings, database, pretrained, stage):
        if stage == 'control' and (out/'teacher.safetensors').exists(): disturb()
        return begin(settings, database, pretrained, stage)
    monkeypatch.setattr(loop, '_one_step', at_step)
    monkeypatch.setattr(train, 'begin', at_begin)
    run(home, 'busy', stages=settings.stages)
    assert tries == [7, 7]
    assert (out/'control.safetensors').read_bytes() == (
        home/'runs'/'whole'/'control.safetensors').read_bytes()


def test_two_start_over_at_once(home):
    for number in range(ROUNDS):
        out, log = home/'runs'/f'twice-{number}', b'{"stage": "teacher", "step": 1}'
        (out/'states').mkdir(parents=True)
        for i in range(40):
            for ending in ('json', 'safetensors'): (out/'states'/f'a-{i:08d}.{ending}').touch()
        (out/'log.jsonl').write_bytes(log)
        together = forked.Barrier(2)
        def work(): return together.wait() and start_over(out) or start_over(out) or 0
        assert [ended(process) for process in [apart(work) for _ in range(2)]] == [0, 0]
        assert not list((out/'states').iterdir())
        assert (out/'log.previous.jsonl').read_bytes() == log and not (out/'log.jsonl').exists()
        shutil.rmtree(out)


def test_few_of_many_replay_files_stay(home, tmp_path):
    settings = replace(TOY, data=str(home/'toy'))
    database, *_ = train.prepare_run(settings)
    model = narrow(0, 'small', 'rgb', pretrained=False, n_objects=2, n_predicates=2)
    with torch.no_grad(): model.network.relation.layer.bias.fill_(float('nan'))
    samples = SceneGraphs(database, 'train', ('rgb',), train=True, stride=8)
    training.fit(model, samples, tmp_path, 'odd', progress=False, batch_size=1, epochs=1, skip=8,
                 keep=0)
    kept = sorted(path.name for path in tmp_path.glob('*.replay.*'))
    assert kept == [f'odd-0000000{step}-0.replay.{ending}' for step in (0, 1, 2, 7)
                    for ending in ('json', 'safetensors')]
    assert len((tmp_path/'log.jsonl').read_text().splitlines()) == 8


PAIR = """
import os
import signal
import sys
import time
from contextlib import nullcontext

from stdg import train, training
from stdg.training.distributed import process_group

def figures(settings, database, kind):
    def judge(model):
        if settings.name == 'cut':
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {'sgdet/R@50': float(sum(p.detach().double().sum() for p in model.parameters()))}
    return judge

with process_group('cpu') as device:
    train.validation, train.exit_worker, build = figures, lambda: None, training.build_network
    training.build_network = lambda *given, **more: build(*given, **more, fpn=16, channels=16)
    train.process_group = lambda device: nullcontext('cpu')
    for name in ('pair', 'cut'): train.main(['--config', f'{name}.yaml'])
"""


@pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
def test_two_processes_save_before_a_slow_validation(home):
    """Asked to stop in a validation that takes longer than a process of torchrun may: the state is
    saved already, exit status 75; what is resumed is what was not disturbed."""
    (home/'pair.py').write_text(PAIR)
    for name in ('pair', 'cut'):
        train.write_settings(home/f'{name}.yaml', replace(TOY, name=name, data=str(home/'toy'),
                                                          stages=['control']))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               'pair.py']
    done = subprocess.run(command, cwd=home, env=dict(os.environ, OMP_NUM_THREADS='1'),
                          capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and 'exitcode  : 75' in said, said
    assert 'control: asked to stop, the state after step 2 is saved' in said, said
    facts = read_state(saved_states(home/'runs'/'cut'/'states', 'control')[-1])
    assert facts['processes'] == 2 and not facts['judged']
    run(home, 'cut', stages=['control'])
    pair, cut = everything(home/'runs'/'pair'), everything(home/'runs'/'cut')
    assert pair == cut and json.loads(pair['log.jsonl'].splitlines()[-1])['sgdet/R@50']
