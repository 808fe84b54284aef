"""What a GPU computes compared with a CPU, and training on a GPU.

Skipped where there is none."""
import json
import math
import os
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch

from stdg import data, decode, deform, losses, train, training
from stdg.checkpoint import load
from stdg.datasets.visual_genome import Database
from stdg.depth.precompute import prepare_hha
from stdg.evaluation import core as evaluation
from stdg.evaluation import latency
from stdg.rooms import build as rooms
from stdg.testing import loud
from stdg.training.resume import saved_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
TINY = dict(epochs=2, batch_size=4, lr=1e-3, lr_backbone=1e-3, decay=(), warm_up=.5, progress=False,
            device='cuda')


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rooms')
    rooms.make_rooms(folder, 16, 4, 4, size=96)
    prepare_hha(Database(folder), progress=False)
    return Database(folder)


def network(database, mode='rgb'):
    sizes = dict(n_objects=len(database.vocabulary.objects),
                 n_predicates=len(database.vocabulary.predicates))
    return training.build_network(0, 'small', mode, pretrained=False, **sizes)


def samples(database, mode='rgb'):
    inputs = dict(rgb=('rgb',), depth=('hha',), combine=('rgb', 'hha'))[mode]
    return data.SceneGraphs(database, 'train', inputs, train=True, stride=8)


def records(folder): return [json.loads(line) for line in open(folder/'log.jsonl')]


@pytest.mark.parametrize('mode', ['rgb', 'combine'])
def test_terms_are_those_of_the_cpu(database, mode):
    batch = next(iter(data.loader(samples(database, mode), 4)))
    def terms(device):
        model = network(database, mode).to(device).train()
        return {k: float(v.detach()) for k, v in training.loss_terms(model, batch).items()}
    assert terms('cpu') == pytest.approx(terms('cuda'), rel=2e-2)


@pytest.mark.parametrize('channels', [(64, 32), (32, 32)])
def test_ways_of_the_deformable_convolution(channels):
    layer = deform.DeformConv(*channels).cuda()
    x = torch.randn(2, channels[0], 9, 12, device='cuda', requires_grad=True)
    offsets = torch.randn(2, 18, 9, 12, device='cuda', requires_grad=True)
    results = []
    for way in (None, deform.gather_then_project, deform.project_then_gather, deform.definition):
        layer.way = way
        out = layer(x, offsets)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, offsets))])
    for other in results[1:]:
        for a, b in zip(results[0], other): torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    layer.way = None
    with torch.autocast('cuda', dtype=torch.bfloat16):
        half = layer(x.bfloat16(), offsets.bfloat16())
    exact = layer(x.bfloat16().float(), offsets.bfloat16().float())
    error, largest = float((half - exact).abs().max()), float(exact.abs().max())
    assert half.dtype == torch.float32
    assert error < .02 * largest, 'products are rounded, places are not'


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_training_in_each_precision(database, tmp_path, precision):
    model = training.fit(network(database, 'combine'), samples(database, 'combine'), tmp_path,
                         'student', precision=precision, **TINY | dict(epochs=6))
    losses = [r['loss'] for r in records(tmp_path)]
    assert len(losses) == 24 and all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < .9 * np.mean(losses[:4])
    assert next(model.parameters()).is_cuda
    assert all(torch.isfinite(p).all() for p in model.parameters())
    times = json.loads((tmp_path/'timing.jsonl').read_text().splitlines()[-1])
    assert times['memory'] > 0 and times['backward'] > 0 and times['teacher'] > 0


def test_resumed_and_compiled_training(database, tmp_path):
    """After a stop the run goes on from the same state; on a GPU sums are not ordered, so equality
    is not to the bit."""
    whole = training.fit(network(database), samples(database), tmp_path/'whole', 'control', **TINY)
    training.fit(network(database), samples(database), tmp_path/'cut', 'control', **TINY, steps=3)
    again = training.fit(network(database), samples(database), tmp_path/'cut', 'control', **TINY)
    assert saved_states(tmp_path/'cut'/'states', 'control')[-1].stem == 'control-00000008'
    for a, b in zip(records(tmp_path/'whole'), records(tmp_path/'cut')):
        assert a['loss'] == pytest.approx(b['loss'], rel=.05)
    assert all(torch.isfinite(p).all() for p in again.parameters())
    saved = load(tmp_path/'cut'/'control.safetensors')
    assert len(whole.state_dict()) == len(saved.state_dict())
    thrifty = training.fit(network(database), samples(database), tmp_path/'thrifty', 'control',
                           **TINY, recompute=True, accumulate=2, clip=1.)
    compiled = training.fit(network(database), samples(database), tmp_path/'compiled', 'control',
                            **TINY, compile=True)
    assert all(torch.isfinite(p).all() for model in (thrifty, compiled) for p in model.parameters())


def test_decoding_and_evaluation(database):
    model, test = network(database).eval(), data.SceneGraphs(database, 'test')
    here = {device: evaluation.evaluate(model, test, intervals=0, device=device, progress=False)
            for device in ('cpu', 'cuda')}
    for task in ('sgdet', 'sgcls', 'predcls'):
        assert here['cpu'][task]['R@100'] == pytest.approx(here['cuda'][task]['R@100'], abs=.05)
    picture = data.network_input(model.cuda(), test[0]['rgb'][None])
    with torch.no_grad(): fields = [field.float() for field in loud(model)(picture)]
    for task in ('sgdet', 'sgcls', 'predcls'):
        ours, theirs = (decode.decode_batch(*(field.to(device) for field in fields), task,
                                            [test.truth(0)], model.stride)[0]
                        for device in ('cuda', 'cpu'))
        assert len(theirs) and len(theirs.pairs), 'there is something to compare'
        for name in ('boxes', 'labels', 'scores', 'pairs', 'predicates'):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=f'{task} {name}')


def judge(database, **changed):
    settings = train.Settings(validate_every=1, best='AP50', **changed)
    return train.validation(settings, database, 'rgb')


def test_a_gpu_by_its_number(database, tmp_path):
    """The last GPU of the machine, named, from the first step to the thresholds: the network stays
    on it, clock and figures of memory are its own, and no other has anything to do."""
    last = torch.device('cuda', torch.cuda.device_count() - 1)
    others = range(last.index)
    before = [torch.cuda.memory_allocated(i) for i in others]
    for i in others: torch.cuda.reset_peak_memory_stats(i)
    options = TINY | dict(device=str(last), best='AP50', validate_every=1)
    model = training.fit(network(database), samples(database), tmp_path, 'control',
                         judge(database), **options)
    assert next(model.parameters()).device == last
    times = json.loads((tmp_path/'timing.jsonl').read_text().splitlines()[-1])
    assert times['memory'] > 0 and times['backward'] > 0
    test = data.SceneGraphs(database, 'test')
    for _ in evaluation.predictions(model, test, progress=False): pass
    latency.measure_latency(model, test, (1,), 2, 1)
    assert next(model.parameters()).device == last, 'without a device it stays where it is'
    ahead = training.forecast(model, samples(database), 3, **options)
    assert 0 < ahead['memory'] < 16
    assert [torch.cuda.max_memory_allocated(i) for i in others] == before
    assert torch.cuda.current_device() == 0, 'the current device is put back'


def test_the_cpu_on_a_machine_with_a_gpu(database, tmp_path):
    "A run that was told so takes nothing of the GPU."
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = training.fit(network(database), samples(database), tmp_path, 'control', judge(database),
                         **TINY | dict(device='cpu', epochs=1, best='AP50', validate_every=1))
    assert not next(model.parameters()).is_cuda
    assert 'memory' not in json.loads((tmp_path/'timing.jsonl').read_text().splitlines()[-1])
    assert torch.cuda.max_memory_allocated() == before
    assert ', no GPU, ' in latency.machine('cpu') and ', no GPU, ' not in latency.machine('cuda:0')


def test_a_step_left_out_in_float16(database, tmp_path):
    "The second step has a loss that is not finite; the scale falls and the run goes on."
    calls, exact = [], losses.detection_loss
    def poisoned(*fields):
        calls.append(None)
        worse = math.nan if len(calls) == 2 else 1.
        return {name: term * worse for name, term in exact(*fields).items()}
    with patch('stdg.losses.detection_loss', poisoned):
        model = training.fit(network(database), samples(database), tmp_path, 'control', skip=1,
                             precision='float16', **TINY)
    assert ['left_out' in line for line in records(tmp_path)] == [i == 1 for i in range(8)]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def torchrun(database, tmp_path, processes, **changed):
    "(exit code, what was printed) of a run of so many processes."
    (tmp_path/'settings.ini').touch()
    settings = train.Settings(name='shared', data=str(database.folder), size=96, pretrained=False,
                              epochs=1, batch_size=4, stages=['control'], validate_every=1,
                              best='AP50', **changed)
    train.write_settings(tmp_path/'run.yaml', settings)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               f'--nproc_per_node={processes}', '-m', 'stdg.train', '--config', 'run.yaml']
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True,
                          text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_torchrun_on_gpus(database, tmp_path):
    "Each process on a GPU of its own, as many as there are, two at most; one too many is refused."
    gpus = torch.cuda.device_count()
    code, said = torchrun(database, tmp_path, min(gpus, 2), sync_bn=gpus > 1)
    assert code == 0, said
    saved = load(tmp_path/'runs'/'shared'/'control.safetensors')
    test = data.SceneGraphs(database, 'test')
    assert evaluation.evaluate(saved, test, intervals=0, progress=False)['images'] == len(test)
    code, said = torchrun(database, tmp_path, gpus + 1)
    assert code and f'devices={gpus + 1}, but this machine has {gpus} GPUs' in said
    code, said = torchrun(database, tmp_path, 2, device='cuda:0')
    assert code and ("device 'cuda:0' is one GPU" in said or 'but this machine has 1 GPUs' in said)
