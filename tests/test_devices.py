"""Where a run computes: devices that are there and those that are not, several processes, and what
cannot be asked for at once. Without a GPU its choice is observed, not its work."""
import json
import math
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn

from stdg import evaluation, losses, train, training
from stdg.checkpoint import load
from stdg.data import SceneGraphs, loader
from stdg.inference.predictor import load_predictor
from stdg.io.devices import choose_device, current_device, device_for
from stdg.prepare import prepare
from stdg.testing import loud, toy_database
from stdg.training import distributed, experiments, log, step
from stdg.training.replay import keep_batch
from stdg.training.resume import load_state, saved_states

rounds = int(os.environ.get('STDG_ROUNDS', 3))
SMALL = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)


def machine(gpus):
    "As if this machine had so many GPUs."
    return patch.multiple('torch.cuda', is_available=lambda: gpus > 0, device_count=lambda: gpus)


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    "Four pictures to learn from, three to validate on, one for the test."
    return toy_database(tmp_path_factory.mktemp('toy'), 8, [0] * 4 + [1] * 3 + [2])


def network(seed=0, backbone='small', **changed):
    return training.build_network(seed, backbone, **SMALL | changed)


def samples(database, **options):
    return SceneGraphs(database, 'train', train=True, stride=8, **options)


# choose_device

@pytest.mark.parametrize('gpus,given,expected', [
    (0, None, 'cpu'), (0, '', 'cpu'), (0, '  ', 'cpu'), (0, 'CPU', 'cpu'), (0, ' cpu ', 'cpu'),
    (0, 'cpu:0', 'cpu'), (0, torch.device('cpu'), 'cpu'),
    (2, None, 'cuda'), (2, '', 'cuda'), (2, 'cuda', 'cuda'), (2, 'Cuda', 'cuda'), (2, 'GPU', 'cuda'),
    (2, 'cpu', 'cpu'), (2, 0, 'cuda:0'), (2, '0', 'cuda:0'), (2, 1, 'cuda:1'), (2, 'gpu:1', 'cuda:1'),
    (2, 'CUDA:1', 'cuda:1'), (2, torch.device('cuda:1'), 'cuda:1'), (2, torch.device('cuda'), 'cuda')])
def test_a_device_that_is_there(gpus, given, expected):
    with machine(gpus): assert choose_device(given) == torch.device(expected)


WRONG = ['gpus', 'cuda0', 'cuda:', 'cuda:-1', 'cuda:x', 'cuda:0,1', 'cuda 1', 'cpu:1', 'auto',
         'none', 'tpu', 'meta', 'xpu', '-1', -1, 7, '7', 'cuda:7', 'cuda:99999', .5, True, False,
         'mps', 'MPS:0', torch.device('meta'), torch.device('cuda:7'), 'x' * 10**4, '٠']
NO_GPU = ['cuda', 'gpu', '0', 0, 'CUDA:0', 'cuda\n', torch.device('cuda')]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason='mps is there')
@pytest.mark.parametrize('gpus,wrong', [(0, WRONG + NO_GPU), (2, WRONG)])
def test_a_device_that_is_not_there(gpus, wrong):
    here = 'cpu, cuda:0, cuda:1.' if gpus else 'cpu, and no GPU that PyTorch can use.'
    for given in wrong:
        with machine(gpus), pytest.raises(ValueError) as error: choose_device(given)
        said = str(error.value)
        assert f'this machine has {here} Give one that is there' in said, said
        assert str(given)[:20].strip() in said and '\n' not in said and len(said) < 250


def test_a_broken_driver_is_no_gpu():
    "PyTorch may count GPUs that it cannot use."
    with patch.multiple('torch.cuda', is_available=lambda: False, device_count=lambda: 2):
        assert choose_device().type == 'cpu'
        with pytest.raises(ValueError, match='no GPU that PyTorch can use'): choose_device('cuda')


def test_a_network_on_a_gpu_stays_there():
    "The device `meta` stands for a GPU."
    away, here = nn.Linear(1, 1, device='meta'), nn.Linear(1, 1)
    with machine(2):
        for none in (None, '', ' '):
            assert device_for(away, none).type == 'meta' and device_for(here, none).type == 'cuda'
        assert str(device_for(away, 'cpu')) == 'cpu' and str(device_for(here, 'cuda:1')) == 'cuda:1'
        with pytest.raises(ValueError, match="'cuda:2': this machine has"): device_for(away, 'cuda:2')


# a run stays on its device

@pytest.fixture
def moves(monkeypatch):
    "The devices that networks are moved to."
    seen, to = [], nn.Module.to
    def record(self, *args, **options):
        seen.append(str((torch.device('cpu') if not args else args[0])))
        return to(self, 'cpu', memory_format=torch.channels_last)
    monkeypatch.setattr(nn.Module, 'to', record)
    return seen


def test_a_run_told_cpu_stays_on_the_cpu(database, tmp_path, monkeypatch, moves):
    """Training, validation and the choice of thresholds, on a machine whose GPU would be taken by
    default."""
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    settings = train.Settings(name='told', data=str(database.folder), size=64, epochs=1,
                              batch_size=4, pretrained=False, validate_every=1, device='cpu', keep=0,
                              stages=['control'])
    # AdamW asks a GPU that is counted whether it records a graph
    graphs = patch('torch.optim.Optimizer._accelerator_graph_capture_health_check', lambda _: None)
    with machine(2), graphs:
        model = train.train_stage(settings, 'control', (database, False, []))
        assert len(moves) >= 3 and set(moves) == {'cpu'}, 'fit, validation, thresholds'
        moves.clear()
        with torch.no_grad(), patch('torch.cuda.synchronize', lambda *_: None):
            dataset = SceneGraphs(database, 'val')
            next(evaluation.predictions(model, dataset, progress=False, device='cpu'))
            evaluation.measure_latency(model, dataset, (1,), 1, 0, 'cpu')
        assert set(moves) == {'cpu'}
        assert evaluation.machine('cpu').count('no GPU')
    assert 'thresholds' in json.loads((tmp_path/'runs'/'told'/'control.json').read_text())
    times = json.loads((tmp_path/'runs'/'told'/'timing.jsonl').read_text().splitlines()[0])
    assert 'memory' not in times, 'that of a GPU, which this run does not use'


def test_validation_is_where_the_network_is(database):
    "Not where the settings say: under torchrun each process has its own."
    model = loud(network())
    settings = train.Settings(validate_every=1, device='cuda')
    judge = train.validation(settings, database, 'rgb')
    figures = dict({task: {'R@20': .5} for task in train.TASKS}, AP50=.25)
    with patch('stdg.evaluation.records', return_value=[]) as made, \
            patch('stdg.evaluation.figures', return_value=figures):
        assert judge(model)['AP50'] == .25
    assert made.call_args.kwargs['device'] == torch.device('cpu')


def test_the_clock_and_the_memory_are_those_of_the_device():
    asked = []
    class Event:
        def __init__(self, enable_timing): pass
        def record(self, stream=None): asked.append(stream)
    with patch('torch.cuda.Event', Event), patch('torch.cuda.current_stream', str):
        log.Stopwatch(torch.device('cuda:1')).lap('data')
    assert asked == ['cuda:1', 'cuda:1']
    with patch('torch.cuda.device', str):
        assert current_device(torch.device('cuda:1')) == 'cuda:1'


def test_a_run_on_the_cpu_pins_no_memory(database):
    "Pinned memory would take a GPU that the run was told to leave alone."
    with machine(2):
        assert not loader(samples(database), 2, device='cpu').pin_memory
        assert loader(samples(database), 2, device='cuda:1').pin_memory


# several processes

def torchrun(rank, world):
    return patch.dict(os.environ, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))


def test_each_process_has_its_own_gpu():
    for rank in range(2):
        with machine(2), torchrun(rank, 2):
            for given in (None, '', 'cuda', 'gpu'):
                assert str(distributed.own_device(given)) == f'cuda:{rank}'
            assert str(distributed.own_device('cpu')) == 'cpu'
            for one in ('cuda:0', '1', 0):
                with pytest.raises(ValueError, match="device 'cuda:.' is one GPU, and devices=2 "
                                   'need one each: name none'): distributed.own_device(one)
        with machine(1), torchrun(rank, 2), pytest.raises(ValueError, match='devices=2, but this '
                                                          'machine has 1 GPUs'):
            distributed.own_device()
        with machine(0), torchrun(rank, 2): assert str(distributed.own_device()) == 'cpu'
    with machine(2), torchrun(0, 1): assert str(distributed.own_device('cuda:1')) == 'cuda:1'
    with machine(2): assert str(distributed.own_device('cuda:1')) == 'cuda:1'


def test_the_devices_are_counted_where_the_run_computes():
    cores = os.cpu_count()
    with machine(1):
        distributed.check_devices(cores, 'cpu')
        with pytest.raises(ValueError, match='1 GPUs'): distributed.check_devices(2)
        with pytest.raises(ValueError, match='processor cores: choose'):
            distributed.check_devices(cores + 1, 'cpu')
    with machine(4):
        distributed.check_devices(4)
        distributed.check_devices(1, 'cuda:3')
        with pytest.raises(ValueError, match="device 'cuda:3' is one GPU"):
            distributed.check_devices(2, 'cuda:3')
    with machine(0), pytest.raises(ValueError, match='no GPU that PyTorch can use'):
        distributed.launch('stdg.train', [], 2, 'cuda')


PAIR = '''
import hashlib, json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from stdg import train, training
from stdg.data import SceneGraphs
from stdg.datasets.visual_genome import Database
from stdg.testing import loud
from stdg.training.distributed import all_gather, by_first, exit_worker, process_group

try: from torch.distributed import set_timeout
except ImportError: from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

data, out, small, rounds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])

def digest(module):
    whole = hashlib.sha256()
    for name, value in module.state_dict().items():
        whole.update(name.encode() + value.contiguous().numpy().tobytes())
    return whole.hexdigest()

def fail(): raise ValueError('no depth: nothing can be made')

with process_group('cpu') as device:
    rank, world = training.distributed.rank_and_world()
    found = {}
    # the first process takes longer than the others would wait elsewhere
    dist.barrier()
    set_timeout(timedelta(seconds=2), dist.group.WORLD)
    found['made'] = by_first(lambda: time.sleep(3) or 'made')
    set_timeout(timedelta(minutes=5), dist.group.WORLD)
    found['failed'] = []
    for _ in range(rounds):
        try: by_first(fail)
        except ValueError as error: found['failed'].append(str(error))
    database = Database(data)
    samples = SceneGraphs(database, 'train', train=True, stride=8)
    def network(): return loud(training.build_network(2, 'small', **small))
    # unequal validation shares: 3 pictures, then 1
    for images in (0, 1):
        settings = train.Settings(validate_every=1, validate_images=images, epochs=2, batch_size=4,
                                  relation='fields', best='AP50', warm_up=0., lr=1e-5, lr_backbone=1e-5,
                                  decay=[], keep=0)
        judge = train.validation(settings, database, 'rgb')
        model, before = network(), []
        def watched(model):
            before.append(digest(model))
            return judge(model)
        training.fit(model, samples, f'{out}/{images}', 'control', watched, device, False,
                     **train.options_of(settings, 'control'))
        found[f'{images}'] = dict(judged=before, ends=digest(model))
    settings = train.Settings(stages=['control'], pretrained=False, epochs=5, batch_size=4,
                              device='cpu')
    found['ahead'] = train.forecasts(settings, (database, False, []))['control']
    both = all_gather(found)
    if rank == 0: print('FOUND', json.dumps(both))
exit_worker()
'''


@pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
def test_two_processes(database, tmp_path):
    """The first prepares while the other waits; both judge the very network that is saved, also if
    there are fewer pictures than processes; both forecast."""
    (tmp_path/'pair.py').write_text(PAIR)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               str(tmp_path/'pair.py'), str(database.folder), str(tmp_path), json.dumps(SMALL),
               str(rounds)]
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line, = (line for line in done.stdout.splitlines() if line.startswith('FOUND '))
    first, second = json.loads(line.removeprefix('FOUND '))
    assert first.pop('made') == 'made' and second.pop('made') is None
    assert first['failed'] == ['no depth: nothing can be made'] * rounds
    assert first == second, 'judged networks, networks at the end, forecasts'
    assert done.stdout.count('control: ') == 1 and 'h in all on 2 devices' in done.stdout
    assert first['ahead']['steps'] == 5 and first['ahead']['seconds_per_step'] > 0
    for images, expected in ((0, 3), (1, 1)):
        assert len(set(first[str(images)]['judged'])) == 2, 'two epochs, two networks'
        saved = load(tmp_path/str(images)/'control.best.safetensors')
        dataset = SceneGraphs(database, 'val', limit=images or None)
        alone = evaluation.evaluate(saved, dataset, protocol='strict', intervals=0, progress=False,
                                    device='cpu', reading=train.start_reading(train.Settings(relation='fields')))
        said = json.loads((tmp_path/str(images)/'control.best.json').read_text())['metrics']
        assert alone['images'] == expected
        for name, value in said.items():
            task, _, figure = name.rpartition('/')
            assert value == (alone[task] if task else alone)[figure], name
        assert said['AP50'] > 0


# what cannot be asked for at once

@pytest.mark.parametrize('changed,said', [
    (dict(device='cuda'), "device 'cuda': this machine has cpu, and no GPU"),
    (dict(device='7'), "device is '7'; .*did you mean 'cuda:7'"),
    (dict(devices=999), 'devices=999, but this machine has'),
    (dict(accumulate=9), 'accumulate=9: with batch_size=8 each has 8 of the pictures, so 1 to 8'),
    (dict(accumulate=0), 'accumulate is 0; a whole number from 1 up'),
    (dict(batch_size=0), 'batch_size is 0; a whole number from 1 up'),
    (dict(compile=True, recompute=True), 'Choose one: compile for speed, recompute'),
    (dict(precision='fp16'), "precision is 'fp16'; one of 'float32'"),
    (dict(validate_every=1, batch_size=2, best='sgdet/R@30'), "best='sgdet/R@30' is no figure.*sgdet/R@"),
    (dict(validate_every=1, batch_size=2), 'no validation pictures, and validate_every is 1: -p hold_out')])
def test_refused_before_anything_is_trained(changed, said, tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    folder = toy_database(tmp_path/'data'/'toy', 3, [0, 0, 2]).folder
    before = sorted(tmp_path.rglob('*'))
    with machine(0), pytest.raises(ValueError, match=said) as error:
        train.prepare_run(train.Settings(**dict(dict(data='toy', size=64, pretrained=False, batch_size=8), **changed)))
    assert '\n' not in str(error.value) and folder.exists()
    assert sorted(tmp_path.rglob('*')) == before, 'no HHA, no run'


@pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
def test_refused_for_two_processes(database):
    for changed, said in ((dict(accumulate=5), 'in 2 processes each has 4 of the pictures, so 1 to 4'),
                          (dict(batch_size=3), '2 processes cannot share a batch of 3'),
                          (dict(sync_bn=True), 'on GPUs only. Set it to False')):
        settings = train.Settings(**dict(dict(device='cpu', devices=2, batch_size=8), **changed))
        with pytest.raises(ValueError, match=said): train.check_machine(settings)
    train.check_machine(train.Settings(device='cpu', devices=2, batch_size=8, accumulate=4))
    train.check_machine(train.Settings(device='cpu', devices=64, batch_size=64, dry_run=True))


def test_fit_refuses_before_it_writes(database, tmp_path):
    for options, said in ((dict(accumulate=5), '1 to 4 parts'), (dict(device='cuda:9'), 'cuda:9'),
                          (dict(compile=True, recompute=True), 'Choose one')):
        with pytest.raises(ValueError, match=said):
            training.fit(network(), samples(database), tmp_path/'no', 'control', progress=False,
                         **dict(batch_size=4) | options)
    assert not (tmp_path/'no').exists()


def test_a_device_is_checked_before_a_file_is_read(tmp_path):
    missing = tmp_path/'none.safetensors'
    with machine(0):
        with pytest.raises(ValueError, match='no GPU'): load_predictor(missing, device='cuda')
        with pytest.raises(ValueError, match='no GPU'): load_predictor(network(), device='cuda')


# float16, frozen norms, replay

def test_a_step_left_out_in_float16(database, tmp_path, monkeypatch):
    "The third of eight steps has a loss that is not finite: the scale is halved, the rest is taken."
    calls, detection_loss = [], losses.detection_loss
    def poisoned(fields, *rest):
        calls.append(None)
        terms = detection_loss(fields, *rest)
        return terms | {name: term * math.nan for name, term in terms.items()} \
            if len(calls) == 3 else terms
    monkeypatch.setattr(losses, 'detection_loss', poisoned)
    scales, gradient = [], step.TrainStep.gradient
    def watched(self, batch):
        found = gradient(self, batch)
        scales.append(self.scaler.get_scale())
        return found
    monkeypatch.setattr(step.TrainStep, 'gradient', watched)
    model = training.fit(network(), samples(database), tmp_path, 'control', precision='float16',
                         skip=1, epochs=4, batch_size=2, warm_up=0, decay=(), progress=False,
                         device='cpu')
    overflows = [i for i, (a, b) in enumerate(zip(scales, scales[1:])) if b == a / 2]
    assert len(scales) == 8 and 2 in overflows
    lines = [json.loads(line) for line in open(tmp_path/'log.jsonl')]
    assert ['left_out' in line for line in lines] == [i == 2 for i in range(8)]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    _, facts = load_state(saved_states(tmp_path/'states', 'control')[-1])
    assert facts['scaler']['scale'] == scales[-1] and facts['skipped'] == 1


@pytest.mark.parametrize('finite', [False, True])
def test_dropping_halves_the_scale(database, finite):
    "Whether the gradient has overflowed or only the loss was not finite; and again and again."
    model = network().train()
    one = training.TrainStep(model, training.optimiser(model, 1e-3, 1e-3, 0.), precision='float16')
    batch = next(iter(loader(samples(database), 2)))
    before = {k: v.clone() for k, v in dict(model.named_parameters()).items()}
    for n in range(1, 4):
        one.gradient(batch)
        if not finite: one.learnt[0].grad.fill_(math.inf)
        one.drop()
        assert one.scaler.get_scale() == 2**16 / 2**n
        assert all(p.grad is None for p in one.learnt)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    one.gradient(batch)
    one.apply()
    assert not all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    exact = training.TrainStep(model, training.optimiser(model, 1e-3, 1e-3, 0.))
    exact.gradient(batch)
    exact.drop()
    assert all(p.grad is None for p in exact.learnt)


@pytest.mark.parametrize('backbone,frozen', [('small', 3), ('resnet18.tv_in1k', 2)])
def test_frozen_norms_stay_frozen_when_synchronised(backbone, frozen, monkeypatch):
    "`_wrapped` replaces batch norms as it does on GPUs; nothing here needs one."
    changed = {} if backbone == 'small' else dict(frozen=frozen, stride=16)
    model = network(backbone=backbone, **changed).train()
    norms = nn.modules.batchnorm._BatchNorm
    def still(): return {n for n, m in model.named_modules() if isinstance(m, norms) and not m.training}
    before, learnt = still(), {n for n, p in model.named_parameters() if p.requires_grad}
    assert before
    monkeypatch.setattr(step, 'rank_and_world', lambda: (0, 2))
    monkeypatch.setattr(step, 'DistributedDataParallel', lambda network, device_ids: network)
    step._wrapped(model.network, torch.device('cuda:0'), True)
    synced = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert synced and not any(type(m) is nn.BatchNorm2d for m in model.network.modules())
    for mode in (True, False, True): model.train(mode)
    assert still() == before
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learnt


def test_replay_draws_as_the_process_did(database, tmp_path):
    "A network that drops paths at random, in the second of two processes."
    model = network(backbone='convnext_atto', stride=16, drop_path_rate=.5).train()
    batch = next(iter(loader(SceneGraphs(database, 'train', train=True, stride=16), 4)))
    def terms(rank):
        with (patch('stdg.training.step.rank_and_world', lambda: (rank, 2)),
              patch.dict(keep_batch.__globals__, rank_and_world=lambda: (rank, 2))):
            keep_batch(tmp_path/'odd.safetensors', model, batch, seed=0, step=3)
            step.seed_step(0, 3)
        return {name: float(term.detach()) for name, term in step.loss_terms(model, batch).items()}
    assert terms(0) != terms(1) == training.replay(tmp_path/'odd.safetensors')
    record = json.loads((tmp_path/'odd.json').read_text())
    assert record.pop('rank') == 1
    (tmp_path/'odd.json').write_text(json.dumps(record))  # as an earlier version wrote it
    assert training.replay(tmp_path/'odd.safetensors') == terms(0)


# what is judged

def wrong_sets(database):
    plain = SceneGraphs(database, 'val')
    changed = []
    for name in ('augment', 'colour', 'overlap'):
        changed.append(SceneGraphs(database, 'val'))
        setattr(changed[-1], name, True)
    return [samples(database), samples(database, augment=False),
            *changed, torch.utils.data.Subset(plain, [0]),
            torch.utils.data.ConcatDataset([plain, plain]), [plain[0]]]


def test_nothing_made_for_training_is_judged(database, tmp_path):
    model = network()
    judges = [lambda dataset: evaluation.check_fit(model, dataset),
              lambda dataset: next(evaluation.predictions(model, dataset)),
              lambda dataset: next(evaluation.records(model, dataset)),
              lambda dataset: evaluation.evaluate(model, dataset, progress=False),
              lambda dataset: evaluation.figures([], dataset),
              lambda dataset: evaluation.evaluate_prior(database, dataset),
              lambda dataset: evaluation.store(tmp_path/'no', model, dataset),
              lambda dataset: evaluation.choose_thresholds(model, dataset),
              lambda dataset: evaluation.measure_latency(model, dataset)]
    for dataset in wrong_sets(database):
        for judge in judges:
            with pytest.raises(ValueError, match='cannot be judged') as error: judge(dataset)
            assert '\n' not in str(error.value)
    assert not (tmp_path/'no').exists()
    for split in ('train', 'val'): evaluation.check_fit(model, SceneGraphs(database, split))


def test_a_shard_that_is_not_there(database):
    for shard in ((2, 2), (-1, 2), (0, 0), (3, 2)):
        with pytest.raises(ValueError, match='number i, from 0 on, of n'):
            list(evaluation.records(network(), SceneGraphs(database, 'val'), shard=shard))
    empty = evaluation.records(network(), SceneGraphs(database, 'val', limit=1), shard=(1, 2),
                               progress=False, device='cpu')
    assert list(empty) == []


# studies and preparation

def test_a_study_checks_devices_first(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    for parameters in (dict(device='cuda'), dict(more=dict(device='cuda'))):
        with machine(0), pytest.raises(ValueError, match="run 'a': device 'cuda': this machine has"):
            experiments.run_study([experiments.Run('a', parameters)])
    with machine(2), pytest.raises(ValueError, match="run 'a': device 'cuda:1' is one GPU, but the "
                                   'runs of a study share all'):
        experiments.run_study([experiments.Run('a', dict(more=dict(device='cuda:1')))])
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('visible,expected', [(None, '010'), ('', '010'), ('2,3', '232')])
def test_a_study_shares_the_gpus_that_it_was_given(visible, expected, tmp_path, monkeypatch):
    "Numbers in CUDA_VISIBLE_DEVICES are those of the machine, and not to be numbered anew."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    got = []
    monkeypatch.setattr(experiments, 'child_process', lambda *_, env, **__: got.append(
        env['CUDA_VISIBLE_DEVICES']))
    with machine(2):
        for slot in range(3): experiments._start(experiments.Run(f'{slot}', {}), 1, slot)
    assert ''.join(got) == expected


def test_prepare_checks_the_device_first(tmp_path):
    with machine(0), pytest.raises(ValueError, match="device 'cuda': this machine has cpu, and no GPU"):
        prepare(tmp_path/'db', tmp_path/'raw', device='cuda')
    assert not (tmp_path/'db').exists()
