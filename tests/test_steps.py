"""Ten steps of training against a plain loop that is written out here: losses, learning rates,
gradients, weights and averages of each step. And on which pictures a run is judged.

The loop takes the network, the batches and the terms of the loss from the package; the schedule,
the parameter groups, clipping, the optimiser's step and the moving average are its own, after
section 7 of the method spec.

As a script (`python test_steps.py FOLDER RANK PORT`) it is one of two processes that train."""
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stdg import checkpoint, data, evaluation, losses, train, training
from stdg.checkpoint import facts, load
from stdg.datasets.visual_genome import Database
from stdg.depth.precompute import prepare_hha
from stdg.evaluation.thresholds import choose_thresholds
from stdg.graph import TASKS, SceneGraph
from stdg.testing import loud, toy_database, toy_scene
from stdg.training.resume import load_state, saved_states
from stdg.training.settings import TERMS
from stdg.training.step import Average, check_step, optimiser

PICTURES, BATCH, EPOCHS = 10, 2, 2
STEPS = PICTURES // BATCH  # in an epoch
HEADS, BACKBONE, DECAY, EMA, CLIP, SEED = 1e-3, 2e-4, .03, .07, 100., 5
WARM_UP, FALLS = .6, (1.2, 1.5)  # both end or begin within an epoch
OPTIONS = dict(epochs=EPOCHS, batch_size=BATCH, loss_weights={}, lr=HEADS, lr_backbone=BACKBONE, weight_decay=DECAY,
               warm_up=WARM_UP, decay=FALLS, ema=EMA, clip=CLIP, seed=SEED, save_minutes=0,
               keep=99, device='cpu', progress=False)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    database = toy_database(tmp_path_factory.mktemp('toy'), PICTURES, [0] * PICTURES)
    prepare_hha(database, progress=False)
    return data.SceneGraphs(database, 'train', ('rgb', 'hha'), train=True, stride=8)


def network():
    "A student, and a teacher that points somewhere, often too far to be copied."
    sizes = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)
    teacher = training.build_network(1, 'small', 'depth', zero_offsets=False, **sizes)
    student = training.build_network(2, 'small', 'combine', **sizes)
    state = teacher.network.state_dict()
    far = [name for name in state if 'pre_head.blocks' in name and '.conv.' in name]
    for name in far: state[name] *= 60
    student.teacher.load_state_dict(state)
    assert far
    return student


def factor(step):
    "Of both learning rates, when `step` steps have been taken."
    epoch = step / STEPS
    factor = .001 ** (1 - epoch / WARM_UP) if epoch < WARM_UP else 1.
    for fall in FALLS:
        if epoch > fall: factor *= .1 ** (epoch - fall) if epoch < fall + 1 else .1
    return factor


def floats(pictures, model):
    "What the network reads: bytes less the mean of ImageNet over its deviation."
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    pictures = (pictures.float() / 255 - mean) / deviation
    return pictures.contiguous(memory_format=torch.channels_last)


def terms_of(model, batch):
    "The terms of the loss, {name: scalar}, and the share of the teacher's offsets below 10."
    rgb, hha = floats(batch['rgb'], model), floats(batch['hha'], model)
    with torch.no_grad(): taught = model.teacher.offsets(hha)
    detection, relation, offsets = model.network(rgb)
    terms = {}
    for name, term in losses.detection_loss(detection, batch['targets']).items():
        terms[f'detection_{name}'] = term
    for name, term in losses.relation_loss(relation, batch['targets']).items():
        terms[f'relation_{name}'] = term
    near = torch.cat([(t.abs() < 10).flatten() for t in taught])
    return terms | dict(teaching=losses.teaching_loss(offsets, taught)), float(near.double().mean())


def total(tensors): return [float(tensor.detach().double().sum()) for tensor in tensors]


def plain_loop(dataset, left_out=()):
    "A record of each step, and {name: average}; the steps `left_out` do not take place."
    model = network().to(memory_format=torch.channels_last).train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = [p for name, p in named.items() if 'backbone' not in name]
    body = [p for name, p in named.items() if 'backbone' in name]
    adamw = torch.optim.AdamW([dict(params=heads), dict(params=body)], lr=0., betas=(.9, .999),
                              eps=1e-6, weight_decay=DECAY, fused=True)
    batches = data.loader(dataset, BATCH, SEED)
    mean, records = {name: p.detach().clone() for name, p in named.items()}, []
    for step, batch in enumerate(batch for _ in range(EPOCHS) for batch in batches):
        rates = HEADS * factor(step), BACKBONE * factor(step)
        record = dict(step=step + 1, lr=rates[0])
        if step % STEPS == 0: begun = False
        if step not in left_out:
            terms, share = terms_of(model, batch)
            loss = sum(terms.values())
            loss.backward()
            norm = float(torch.cat([p.grad.flatten() for p in heads + body]).double().norm())
            nn.utils.clip_grad_norm_(heads + body, CLIP)
            for group, rate in zip(adamw.param_groups, rates): group['lr'] = rate
            adamw.step()
            adamw.zero_grad()
            for name, p in named.items():
                if begun: mean[name] = mean[name] + EMA * (p.detach() - mean[name])
                else: mean[name] = p.detach().clone()
            begun = True
            record |= {name: float(term.detach()) for name, term in terms.items()}
            record |= dict(loss=float(loss.detach()), grad_norm=norm, taught_share=share, rates=rates)
        record['sums'] = dict(heads=total(heads), backbone=total(body), average=total(mean.values()),
                              buffers=total(model.network.buffers()))
        records.append(record)
    return records, mean


@pytest.fixture(scope='module')
def plain(dataset): return plain_loop(dataset)


def fitted(dataset, folder, model=None, **options):
    """The model that `fit` gives, and the pairs of learning rates with which the optimiser has
    taken its steps."""
    rates = []
    def note(optimiser, *_):
        assert len(optimiser.param_groups) == 2
        rates.append(tuple(group['lr'] for group in optimiser.param_groups))
    hook = register_optimizer_step_pre_hook(note)
    try: model = training.fit(model or network(), dataset, folder, 'student', **OPTIONS | options)
    finally: hook.remove()
    return model, rates


def logged(folder):
    lines = [json.loads(line) for path in sorted(folder.glob('*log*.jsonl'))
             for line in path.read_text().splitlines()]
    return [line for line in lines if 'lr' in line]


def assert_same_steps(folder, expected):
    "Every step that `fit` has logged, and every state that it has saved, is the plain loop's."
    close = lambda value: pytest.approx(value, rel=1e-6, abs=5e-6)
    for line, step in zip(logged(folder), expected, strict=True):
        assert line['lr'] == pytest.approx(step['lr'], rel=1e-9), step['step']
        for name in step.keys() - {'rates', 'sums', 'lr'}:
            assert line[name] == close(step[name]), (step['step'], name)
    model = network()
    learnt = [name for name, p in model.named_parameters() if p.requires_grad]
    buffers = [f'network.{name}' for name, _ in model.network.named_buffers()]
    states = saved_states(folder/'states', 'student')[1:]  # the first is that of the beginning
    for path, step in zip(states, expected, strict=True):
        kept, facts = load_state(path)
        assert facts['step'] == step['step']
        assert (facts['epoch'], facts['batch']) == divmod(step['step'], STEPS)
        assert {f'average.{name}' for name in learnt} == {k for k in kept if k[:8] == 'average.'}
        places = dict(heads=[name for name in learnt if 'backbone' not in name],
                      backbone=[name for name in learnt if 'backbone' in name],
                      average=[f'average.{name}' for name in learnt], buffers=buffers)
        for what, names in places.items():
            sums = total(kept[name] for name in names)
            assert sums == close(step['sums'][what]), (step['step'], what)


def test_ten_steps_are_those_of_a_plain_loop(dataset, plain, tmp_path):
    records, mean = plain
    model, rates = fitted(dataset, tmp_path)
    norms = [step['grad_norm'] for step in records]
    assert min(norms) < CLIP < max(norms), 'some gradients are clipped, some are not'
    assert all(.1 < step['taught_share'] < .9 for step in records)
    np.testing.assert_allclose(rates, [step['rates'] for step in records], rtol=1e-9)
    assert_same_steps(tmp_path, records)
    record = facts(tmp_path/'student.safetensors')
    assert record['size'] == dataset.database.size and record['training']['seed'] == SEED
    assert record['vocabulary'] == dataset.database.vocabulary.to_json()
    for kept in (model, load(tmp_path/'student.safetensors')):
        weights = dict(kept.named_parameters())
        for name in mean: torch.testing.assert_close(weights[name].detach(), mean[name])


def test_a_run_that_is_resumed_within_an_epoch_takes_the_same_steps(dataset, plain, tmp_path):
    records, mean = plain
    first = fitted(dataset, tmp_path, steps=7)[1]
    model, rates = fitted(dataset, tmp_path)
    assert (len(first), len(rates)) == (7, 3)
    np.testing.assert_allclose(first + rates, [step['rates'] for step in records], rtol=1e-9)
    assert_same_steps(tmp_path, records)
    weights = dict(model.named_parameters())
    for name in mean: torch.testing.assert_close(weights[name].detach(), mean[name])


def test_a_step_that_is_left_out_leaves_nothing_behind(dataset, tmp_path):
    """The network gives no number in the third step, nor in the sixth, which is the first of an epoch
    and the last before the run is resumed: weights, averages, and what the batch norms have counted
    are as before, the rates go on, and the average begins with the next step that is taken."""
    model, calls = network(), []
    def break_some(_, inputs, fields):
        calls.append(1)
        if len(calls) not in (3, 6): return fields
        return [f * float('nan') for f in fields[:2]] + [fields[2]]
    model.network.register_forward_hook(break_some)
    records, mean = plain_loop(dataset, left_out={2, 5})
    first = fitted(dataset, tmp_path, model, skip=2, steps=6)[1]
    model, rates = fitted(dataset, tmp_path, model, skip=2)
    assert_same_steps(tmp_path, records)
    assert all('left_out' in logged(tmp_path)[step] for step in (2, 5)) and len(calls) == 10
    np.testing.assert_allclose(first + rates, [step['rates'] for step in records if 'rates' in step])
    assert all(records[step]['sums'] == records[step - 1]['sums'] for step in (2, 5))


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs /proc')
def test_the_log_is_on_the_disk_before_the_state_that_counts_its_lines(dataset, tmp_path, monkeypatch):
    did, flush, rename = [], os.fsync, os.replace
    def fsync(handle):
        did.append(os.path.basename(os.readlink(f'/proc/self/fd/{handle}')))
        flush(handle)
    def replace(a, b):
        did.append(f'renamed {os.path.basename(b)}')
        rename(a, b)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    fitted(dataset, tmp_path, steps=2)
    states = [f'renamed student-{step:08d}.json' for step in range(3)]
    assert [name for name in did if name in states] == states
    for before, after in zip([None, *states], states):
        since = did[did.index(before) if before else 0:did.index(after)]
        assert [name for name in since if name.endswith('log.jsonl')], (before, after)


def test_only_the_same_network_and_teacher_go_on(dataset, tmp_path):
    fitted(dataset, tmp_path, steps=1)
    said = facts(tmp_path/'student.safetensors')['training']
    assert said == dict(stage='student', step=1, epochs=1 / (len(dataset) // BATCH), seed=SEED)
    sizes = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16)
    wider = training.build_network(2, 'small', 'combine', channels=24, **sizes)
    another = network()
    with torch.no_grad(): next(another.teacher.parameters()).add_(1)
    options = {name: OPTIONS[name] for name in OPTIONS.keys() - {'device', 'progress'}}
    assert training.check_resume(network(), dataset, tmp_path, 'student', **options)[0] == 1
    for model, what in ((wider, 'config.channels was 16, is 24'), (another, 'was taught by another teacher')):
        with pytest.raises(ValueError, match=what):
            training.check_resume(model, dataset, tmp_path, 'student', **options)


def test_weights_of_the_terms_and_a_cosine(dataset, plain, tmp_path):
    weights = dict(relation_subject=.25, relation_object_scale=0, teaching=3)
    changed = dict(loss_weights=weights, schedule='cosine', steps=3)
    rates = fitted(dataset, tmp_path, **changed)[1]
    expected = [HEADS * (.001 ** (1 - e / WARM_UP) if e < WARM_UP else
                         .5 + .5 * np.cos(np.pi * (e - WARM_UP) / (EPOCHS - WARM_UP)))
                for e in (0, .2, .4)]
    np.testing.assert_allclose([heads for heads, _ in rates], expected, rtol=1e-9)
    line, before = logged(tmp_path)[0], plain[0][0]
    of_fields = [name for name in TERMS if name not in ('relation_predicate', 'relation_related')]
    for name in of_fields:
        assert line[name] == pytest.approx(before[name] * weights.get(name, 1), rel=1e-5), name
    assert line['loss'] == pytest.approx(sum(line[name] for name in of_fields), rel=1e-5)
    model = network().to(memory_format=torch.channels_last).train()
    terms, _ = terms_of(model, next(iter(data.loader(dataset, BATCH, SEED))))
    sum(term * weights.get(name, 1) for name, term in terms.items()).backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    assert line['grad_norm'] == pytest.approx(float(norm), rel=1e-5)
    later = dict({**OPTIONS, **changed}, steps=0)
    for name in ('device', 'progress'): del later[name]
    ready = lambda **more: training.check_resume(network(), dataset, tmp_path, 'student',
                                                 **{**later, **more})
    assert ready() == (3, 2 * STEPS)
    for more, what in (dict(epochs=3), 'epochs was 2, is 3'), (dict(loss_weights={}), 'teaching was 3.0, is not set'):
        with pytest.raises(ValueError, match=what): ready(**more)


def test_states_say_of_new_parameters_only_what_is_not_as_before(dataset, tmp_path):
    fitted(dataset, tmp_path, steps=1)
    said = load_state(saved_states(tmp_path/'states', 'student')[-1])[1]['settings']
    assert not {'schedule', 'loss_weights', 'epochs'} & said.keys() and said['ema'] == EMA


def test_what_is_not_there_is_said():
    start = ['student'], 'test_resnet.r160_in1k', False
    assert training.check_start(*start, 'random', trial=True) == (False, [])
    (said,) = training.check_start(*start, trial=True)[1]
    assert said.startswith('TRIAL WITHOUT A TEACHER')
    with pytest.raises(ValueError, match="the stage 'student' needs a teacher"): training.check_start(*start)


def test_which_steps_can_be_taken():
    "Of batch, parts and processes the greatest that go together, and one more; and what excludes itself."
    def check(processes=1, **given):
        usual = dict(batch_size=8, accumulate=1, precision='float32', compile=False,
                     recompute=False, sync_bn=False)
        check_step(SimpleNamespace(**usual | given), processes, 'cpu')
    for fine in (dict(accumulate=8), dict(processes=2, accumulate=4), dict(processes=8),
                 dict(batch_size=1), dict(sync_bn=True), dict(compile=True), dict(recompute=True),
                 dict(precision='bfloat16'), dict(processes=3, batch_size=9, accumulate=3)):
        check(**fine)
    for wrong, said in (
            (dict(accumulate=9), 'accumulate=9: with batch_size=8 each has 8 .* 1 to 8 parts'),
            (dict(accumulate=0), 'accumulate=0'),
            (dict(processes=2, accumulate=5), 'accumulate=5: .* in 2 processes each has 4'),
            (dict(batch_size=0), 'batch_size=0: a step needs a picture'),
            (dict(processes=3), '3 processes cannot share a batch of 8 .* a multiple of 3'),
            (dict(processes=16), '16 processes cannot share a batch of 8'),
            (dict(compile=True, recompute=True), 'compile=True and recompute=True'),
            (dict(sync_bn=True, processes=2), 'sync_bn=True: .* on GPUs only'),
            (dict(precision='float64'), "precision 'float64' is unknown")):
        with pytest.raises(ValueError, match=said): check(**wrong)


def test_defaults_of_schedule_and_average():
    assert [training.schedule(epoch) for epoch in (0, .5, 1, 99)] == pytest.approx(
        [.001, .001 ** .5, 1, 1])
    layer = nn.Linear(1, 1, bias=False)
    average = Average(layer)
    with torch.no_grad(): layer.weight += 1
    start = float(average.mean[0])
    average.update()
    assert float(average.mean[0]) == pytest.approx(start + .01)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert Average(frozen).mean == []


@pytest.mark.parametrize('mode', ['rgb', 'depth', 'combine'])
def test_rates_of_the_released_groups(mode):
    "In the released code the backbone of a teacher learns as fast as its heads."
    model = training.build_network(0, 'small', mode, n_objects=2, n_predicates=2, pretrained=False,
                                   fpn=16, channels=16)
    for released in (False, True):
        heads, body = optimiser(model, .5, .2, .1, released).param_groups
        expected = .5 if released and mode == 'depth' else .2
        assert (heads['lr'], body['lr'], heads['base'], body['base']) == (.5, expected, .5, expected)
        for group in (heads, body):
            assert (group['weight_decay'], group['eps'], group['betas']) == (.1, 1e-6, (.9, .999))
        named = {id(p): name for name, p in model.named_parameters()}
        assert all('backbone' in named[id(p)] for p in body['params'])
        assert not any('backbone' in named[id(p)] for p in heads['params'])


def noisy_scene(i):
    "A toy scene with one to three relations."
    graph, record = toy_scene(i)
    relations = np.array([(0, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0)])
    chosen = np.random.default_rng(i).permutation(4)[:1 + i % 3]
    return SceneGraph(graph.boxes, graph.labels, relations[chosen], graph.size), record


def loud_begin(*given, begin=train.begin):
    "`stdg.train.begin` with a network that detects much, so that there is something to judge."
    model, dataset = begin(*given)
    return loud(model), dataset


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A project folder with a database of three splits."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    toy_database(home/'data'/'toy', [noisy_scene(i) for i in range(14)], [0] * 4 + [1] * 4 + [2] * 6)
    return home


def share(home, rank, port):
    "The work of one of two processes, as torchrun would start it."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                      MASTER_ADDR='localhost', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    os.chdir(home)
    train.begin = loud_begin
    train.main(['--config', 'run.yaml'])


def judged(home, name, processes, monkeypatch):
    "Train with validation in one process or two; returns the folder."
    settings = train.Settings(name=name, data='toy', size=64, stages=['control'], pretrained=False,
                              epochs=2, batch_size=4, lr=1e-5, lr_backbone=1e-5, warm_up=0.,
                              validate_every=1, best='predcls/ng-R@20', device='cpu',
                              relation='fields', reading='votes', suppress='none', prior=False)  # else recall is 1
    train.write_settings(home/'run.yaml', settings)
    if processes == 1:
        monkeypatch.chdir(home)
        monkeypatch.setattr(train, 'begin', loud_begin)
        train.main(['--config', 'run.yaml'])
        return home/'runs'/name
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(home)]
    started = [subprocess.Popen([*command, str(rank), str(port)], stderr=subprocess.PIPE, text=True)
               for rank in range(processes)]
    for process in started:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    return home/'runs'/name


def figures_on(model, dataset):
    found = evaluation.evaluate(model, dataset, protocol='strict', intervals=0, progress=False,
                                device='cpu')
    return {f'{task}/{name}': value for task in TASKS for name, value in found[task].items()
            if '@' in name and isinstance(value, float)} | dict(AP50=found['AP50'])


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.skipif(
    os.cpu_count() < 2, reason='one processor core'))])
def test_a_run_is_judged_on_the_validation_pictures(home, processes, monkeypatch):
    "What is logged, the best network and the thresholds come from them, never from test pictures."
    folder = judged(home, f'by{processes}', processes, monkeypatch)
    database = Database(home/'data'/'toy')
    val, test = (data.SceneGraphs(database, split) for split in ('val', 'test'))
    best = load(folder/'control.best.safetensors')
    expected, others = figures_on(best, val), figures_on(best, test)
    kept = facts(folder/'control.best.json')
    assert kept['metrics'] == pytest.approx(expected)
    for name in ('predcls/ng-R@20', 'predcls/ng-mR@20', 'AP50'):
        assert expected[name] != pytest.approx(others[name], rel=1e-3), name
    lines = [json.loads(line) for path in sorted(folder.glob('*log*.jsonl'))
             for line in path.read_text().splitlines()]
    validated = [line for line in lines if 'AP50' in line]
    assert [line['step'] for line in validated] == [1, 2]
    best_line = max(validated, key=lambda line: line['predcls/ng-R@20'])
    assert {name: best_line[name] for name in expected} == pytest.approx(expected)
    found = facts(folder/'control.json')['thresholds']
    last = load(folder/'control.safetensors')
    how = dict(progress=False, device='cpu', reading=checkpoint.reading(folder/'control.safetensors'))
    assert found == choose_thresholds(last, val, **how)
    assert found != choose_thresholds(last, test, **how) | dict(images=4)


if __name__ == '__main__': share(*sys.argv[1:])
