"""Steps that nobody waits for, and nothing computed twice: the same numbers, and where it goes wrong the same step."""
import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stdg import losses
from stdg.data import SceneGraphs, loader
from stdg.depth.precompute import prepare_hha
from stdg.io.tensors import TensorFile
from stdg.pairs import Asked, Pairs
from stdg.testing import toy_database
from stdg.training import loop, step
from stdg.training.log import Stopwatch
from stdg.training.loop import fit
from stdg.training.step import TrainStep, build_network, optimiser

TINY = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)
OPTIONS = dict(epochs=3, batch_size=2, lr=1e-3, warm_up=0, decay=(), ema=.2, progress=False, keep=0, device='cpu')


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    database = toy_database(tmp_path_factory.mktemp('toys'), 6, [0] * 6)
    prepare_hha(database, progress=False)
    return database


def network(mode='rgb', backbone='test_resnet.r160_in1k', **more):
    numbers = dict(TINY, stride=16, zero_offsets=False, **more) if backbone.startswith('test') else dict(TINY, **more)
    return build_network(0, backbone, mode, **numbers)


def samples(database, model, **more):
    return SceneGraphs(database, 'train', model.training_inputs, train=True, stride=model.stride,
                       scale=(1, 1), stretch=(1, 1), colour=False, **more)


def state(model): return [tensor.clone() for tensor in model.state_dict().values()]


def same(one, other): return all(map(torch.equal, one, other)) and len(one) == len(other)


class Watched(TorchDispatchMode):
    "Notes what a GPU is waited for: copies from device to device, and what must know a number."
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **kwargs or {}), str(function)
        places = args[1] if name.startswith(('aten.index.', 'aten.index_put')) else ()
        by_mask = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in places)
        if 'local_scalar' in name or 'nonzero' in name or 'masked_select' in name or by_mask: self.seen.append(name)
        if 'copy' in name and torch.is_tensor(out):
            source = args[1] if 'copy_' in name and len(args) > 1 else args[0]
            if source.device.type != out.device.type: self.seen.append(name)
        return out


def waits_of(work, *inputs):
    with Watched() as watched: work(*inputs)
    return watched.seen


def queue(one, batch):
    "Two steps that nobody waits for."
    for _ in range(2):
        one.guard(one.launch(batch))
        one.apply()


@pytest.fixture(scope='module')
def batch(database):
    model = network('combine')
    return next(iter(loader(samples(database, model), 2, 0)))


@pytest.mark.parametrize('relation', ['fields', 'pairs'])
def test_no_step_on_a_gpu_waits(database, monkeypatch, relation):
    """On a GPU that PyTorch only pretends to have, whatever must know a number raises. (It has no backward pass
    there; see the next test. Pairs are made on the processor before.)"""
    monkeypatch.setattr(step, 'Stopwatch', lambda device: Stopwatch('cpu'))
    here = network('combine', relation=relation)
    batch = next(iter(loader(samples(database, here, relation=relation), 2, 0)))
    asked = {parts: step.asked_of(here, batch['targets'], parts) for parts in (1, 2)}
    with warnings.catch_warnings(), FakeTensorMode() as mode:
        warnings.simplefilter('ignore')
        with torch.device('cuda'): model = network('combine', relation=relation).train()
        def backward(loss):
            for p in model.parameters():
                if p.requires_grad: p.grad = torch.empty_like(p)
        monkeypatch.setattr(torch.Tensor, 'backward', backward)
        def moved(part):
            if part is None: return None
            if isinstance(part, dict): return {name: moved(one) for name, one in part.items()}
            if isinstance(part, tuple): return type(part)(*map(moved, part))
            return torch.empty_like(mode.from_tensor(part), device='cuda')
        given, ours = moved(batch), optimiser(model, 1e-3, 1e-3, 0.)
        on_gpu = {parts: [moved(part) for part in whole] for parts, whole in asked.items()}
        monkeypatch.setattr(step, 'asked_of', lambda model, targets, parts=1: on_gpu[parts])
        balance = dict(shift=torch.zeros(2)) if relation == 'pairs' else {}  # made on the processor
        for options in (dict(clip=1.), dict(accumulate=2), dict(of_pairs=balance)):
            one = TrainStep(model, ours, **options)
            assert one.device.type == 'cuda' and waits_of(queue, one, given) == [], options
        assert waits_of(lambda: torch.tensor([.5], device='cuda')), 'a number that is sent is seen'
        with pytest.raises((DataDependentOutputException, RuntimeError)): one.gradient(given)
        monkeypatch.setattr(losses, 'gathers', lambda tensor: True)
        with pytest.raises(DynamicOutputShapeException): queue(one, given)


def test_what_is_asked_goes_to_a_gpu_by_pinned_memory(monkeypatch):
    "Only so does the copy not wait for what the GPU still has to do."
    pinned, true_to = [], torch.Tensor.to
    pairs = Pairs(torch.zeros(2, 4), torch.eye(2), torch.zeros(2).long(), torch.zeros(1).long(), torch.ones(1).long())
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: pinned.append(tensor) or tensor)
    def to(tensor, place, non_blocking=False):
        assert non_blocking
        return true_to(tensor, 'meta' if torch.device(place).type == 'cuda' else place)
    monkeypatch.setattr(torch.Tensor, 'to', to)
    there = Asked(pairs, torch.ones(1, 2)).to('cuda')
    assert len(pinned) == 6 and all(tensor.is_meta for tensor in (*there.pairs, there.carries))
    Asked(pairs, torch.ones(1, 2)).to(torch.device('cpu'))
    assert len(pinned) == 6, 'a processor needs none'


class PretendedStream:
    "Notes who waits for whom, and does nothing."
    def __init__(self): self.waited = []

    def wait_stream(self, other): self.waited.append(other)


@pytest.mark.parametrize('relation', ['fields', 'pairs'])
@pytest.mark.parametrize('parts', [1, 2])
def test_the_teacher_beside_the_student(database, monkeypatch, relation, parts):
    "Each stream waits for the other once, all that is taught is kept for the student's, and the numbers are the same."
    model = network('combine', relation=relation).train()
    batch = next(iter(loader(samples(database, model, relation=relation), 2, 0)))
    student, teacher, kept, numbers = PretendedStream(), PretendedStream(), [], []
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: student)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: kept.append(stream))
    for stream in (None, teacher):
        torch.manual_seed(0)
        model.zero_grad()
        one = TrainStep(model, optimiser(model, 1e-3, 1e-3, 0.), accumulate=parts)
        one.stream = stream
        numbers.append(one.launch(batch))
    assert torch.equal(*numbers) and student.waited == [teacher] and teacher.waited == [student]
    assert kept == [student] * parts * (3 if relation == 'pairs' else 2)  # offsets and attention of pairs


def test_compiling_means_the_teacher_too(database, tmp_path, monkeypatch):
    "Every pass of a compiled run goes through the compiled code, and only the student's may be a CUDA graph."
    modes, passes = [], []
    def compiled(module, mode=None):
        modes.append((type(module).__name__, mode))
        def call(*inputs, **options):
            passes.append(type(module).__name__)
            return module._call_impl(*inputs, **options)
        module._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, 'compile', compiled)
    for way, mode in ((True, None), ('reduce-overhead', 'reduce-overhead')):
        model = network('combine')
        modes.clear(), passes.clear()
        fit(model, samples(database, model), tmp_path/str(way), 'student', compile=way, **OPTIONS | dict(epochs=1))
        assert modes == [('Network', mode), ('Teacher', None)]
        assert passes == ['Teacher', 'Network'] * 3


@pytest.mark.parametrize('relation', ['fields', 'pairs'])
def test_no_part_of_a_step_asks(database, monkeypatch, relation):
    """The whole step on a processor, with the losses of a GPU: nothing is asked, and the numbers are the same. (The
    pairs are made on the processor before, where asking is free.)"""
    model = network('combine', relation=relation).train()
    batch = next(iter(loader(samples(database, model, relation=relation), 2, 0)))
    asked = step.asked_of(model, batch['targets'])
    monkeypatch.setattr(step, 'asked_of', lambda *inputs: asked)
    before, found = state(model), []
    for gathers in (losses.gathers, lambda tensor: False):
        monkeypatch.setattr(losses, 'gathers', gathers)
        model.load_state_dict(dict(zip(model.state_dict(), before)))
        one = TrainStep(model, optimiser(model, 1e-3, 1e-3, 0.), clip=.5)
        found.append([one.launch(batch), *(p.grad.clone() for p in one.learnt)])
        one.optimiser.zero_grad()
        asks = waits_of(queue, one, batch)
    assert asks == [], asks
    for one, other in zip(*found): torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    losses_only = waits_of(lambda: TrainStep(model, optimiser(model, 1e-3, 1e-3, 0.)).launch(batch).sum().item())
    assert losses_only == ['aten._local_scalar_dense.default']


def lines(folder):
    "What the log says of each step, but for the times."
    return [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]


def test_looking_seldom_changes_nothing(database, tmp_path):
    "Steps that are looked at one by one, every two and at the end of an epoch give the same, bit for bit."
    found = {}
    for look in (1, 2, 50):
        model = network()
        fit(model, samples(database, model), tmp_path/str(look), 'control', look=look, **OPTIONS)
        found[look] = state(model), lines(tmp_path/str(look))
    assert same(found[1][0], found[2][0]) and same(found[1][0], found[50][0])
    assert found[1][1] == found[2][1] == found[50][1] and len(found[1][1]) == 9


@pytest.mark.parametrize('bad', (0, 4, 8))
def test_a_step_that_is_not_finite_is_named_however_late(database, tmp_path, monkeypatch, bad):
    """Step `bad` has a loss or a gradient that is NaN: the same message and file as if each step were looked
    at, the weights of before that step, and steps after it have changed nothing."""
    true_terms, found = step.terms_of, {}
    for look in (1, 4):
        model, before, calls = network(), [], []
        def terms_of(*inputs, calls=calls, model=model, before=before, **options):
            terms = true_terms(*inputs, **options)
            if len(calls) == bad:
                before.extend(p.detach().clone() for p in model.parameters())
                if bad == 4:  # the loss is finite, its gradient is not
                    terms['relation_object'] += inputs[0][0][:, 0].square().sum().mul(0).sqrt()
                else: terms['detection_size'] = terms['detection_size'] * math.nan
            calls.append(1)
            return terms
        monkeypatch.setattr(step, 'terms_of', terms_of)
        out = tmp_path/str(look)
        with pytest.raises(FloatingPointError) as error:
            fit(model, samples(database, model), out, 'control', look=look, **OPTIONS)
        assert same(list(model.parameters()), before)
        file, = out.glob('*.replay.safetensors')
        kept = TensorFile(file, '').tensors()
        found[look] = (str(error.value).replace(str(out), ''), file.name, lines(out), kept, len(calls))
    (said, name, log, kept, calls), (later, other, log_too, kept_too, more) = found[1], found[4]
    assert said == later and f'step {bad}:' in said and ('detection_size' in said) == (bad != 4)
    assert name == other and log == log_too and calls == bad + 1
    assert more == bad // 3 * 3 + 3, 'it is seen at the end of the epoch'
    learnt = [key for key in kept if not key.endswith(('running_mean', 'running_var', 'num_batches_tracked'))]
    assert kept.keys() == kept_too.keys() and all(torch.equal(kept[key], kept_too[key]) for key in learnt)


def test_statistics_are_those_before_the_bad_step(database, tmp_path, monkeypatch):
    "What batch norms have seen of a step that is not finite, and of those after it, is put back."
    seen, true_look = {}, loop.look_at
    def look(run, log):
        seen['after'] = [b.clone() for b in run.model.network.buffers()]
        return true_look(run, log)
    true_terms, model, before = step.terms_of, network(), []
    def terms_of(*inputs, **options):
        terms = true_terms(*inputs, **options)
        if not before: before.extend([0])
        else: terms['detection_size'] = terms['detection_size'] * math.inf
        return terms
    first = []
    true_queue = loop.queue_step
    def queue(run, batch):
        true_queue(run, batch)
        if not first: first.extend(b.clone() for b in run.model.network.buffers())
    for name, change in (('look_at', look), ('queue_step', queue)): monkeypatch.setattr(loop, name, change)
    monkeypatch.setattr(step, 'terms_of', terms_of)
    with pytest.raises(FloatingPointError, match='step 1: detection_size'):
        fit(model, samples(database, model), tmp_path, 'control', look=3, **OPTIONS)
    assert same(list(model.network.buffers()), first) and not same(seen['after'], first)


@pytest.mark.parametrize('network', [torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)])
def test_statistics_of_any_network_are_kept(network):
    "With and without running statistics; those that a bad step has seen are not noted."
    run = SimpleNamespace(model=SimpleNamespace(network=network), buffers=None,
                          step=SimpleNamespace(device=torch.device('cpu'), halted=None))
    loop._Run.keep_buffers(run)
    before = [b.clone() for b in network.buffers()]
    for b in network.buffers(): b.add_(1)
    run.step.halted = torch.ones(())
    loop._Run.keep_buffers(run)
    loop._Run.restore_buffers(run)
    assert same(list(network.buffers()), before)


def test_a_short_run_is_not_compiled(database, tmp_path, capsys):
    "`compile='auto'` says once what was chosen and why, and the run is as it would have been."
    found = []
    for name in (False, 'auto'):
        model = network()
        fit(model, samples(database, model), tmp_path/str(name), 'control', compile=name, **OPTIONS)
        found.append((state(model), lines(tmp_path/str(name))))
        assert model.network._compiled_call_impl is None
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith('control: compile: eager, since 1 more steps of '), said


def test_a_run_that_is_compiled_in_the_middle_agrees(database, tmp_path, monkeypatch):
    "Where compiling pays (a clock says so, and no compiler changes the code) the rest of the run is compiled."
    clock, found = iter(range(10**6)), []
    true_trial = loop.Trial
    class Trial(true_trial):
        def _now(self): return next(clock) * (.1 if self.model.network._compiled_call_impl else 100.)
    monkeypatch.setattr(loop, 'Trial', Trial)
    def compiled(module, **_): module._compiled_call_impl = module._call_impl  # the code of no compiler
    monkeypatch.setattr(torch.nn.Module, 'compile', compiled)
    for name in (False, 'auto'):
        model = network()
        options = dict(OPTIONS, epochs=7)
        fit(model, samples(database, model), tmp_path/str(name), 'control', compile=name, **options)
        found.append((state(model), model.network._compiled_call_impl is not None))
    assert same(found[0][0], found[1][0]) and [one[1] for one in found] == [False, True]


def test_the_notebook_for_gpus_runs_through(tmp_path):
    "On a processor at toy size: every way of a step but the compiled ones, and inference; and what has no time."
    path = Path(__file__).parent.parent/'nbs'/'benchmark_gpu.ipynb'
    cells = {cell.id: cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code'}
    given = dict(batches=[2, 1], networks=['small'], precisions=['float32'], compiled=False, side=64, steps=1,
                 minutes=9., out=str(tmp_path))
    declared = {line.split(':')[0] for line in cells.pop('parameters').splitlines()}
    assert declared == given.keys() and 'check_parameters' in cells.pop('check-parameters')
    space = dict(given)
    for source in cells.values(): exec(source, space)
    found = json.loads((tmp_path/'gpu.json').read_text())
    ways = [(row['batch'], row['way']) for row in found['rows']]
    assert ways == [(2, 'queued'), (1, 'queued'), (2, 'waiting'), (2, 'beside')]
    assert all(row['images_per_second'] > 0 and .5 < sum(row['parts'].values()) < 1.1 for row in found['rows'])
    assert [(row['what'], row['batch']) for row in found['inference']] == [
        ('network', 1), ('bytes to triplets', 1), ('network', 32), ('bytes to triplets', 32), ('from metres', 32)]
    assert not found['left_out'] and found['minutes'] < 9
    space['minutes'] = 0
    space['row']('small', 2, 'float32', 'queued')
    assert space['left_out'] == ['small 2 float32 queued'] and len(space['rows']) == 4
