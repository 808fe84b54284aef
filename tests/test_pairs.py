"""A relation head that is asked about pairs: everything that a head needs, from a checkpoint to a
killed run, and what is said of input that it cannot have."""
import copy
import json
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forked
from sample_network import same_graph

from stdg import checkpoint, decode, train, training
from stdg.calibration import Calibration
from stdg.data import SceneGraphs, loader, network_input
from stdg.datasets.visual_genome import Database
from stdg.depth.precompute import prepare_hha
from stdg.graph import SceneGraph
from stdg.inference.export import DeployedPairs, OnnxModel, export_onnx, export_program, finish_pairs
from stdg.inference.hub import Model, card_text
from stdg.inference.predictor import Predictor
from stdg.pairs import PairHead, Pairs, frequency_shift, ordered_pairs
from stdg.reading import PUBLISHED, PairPrior, Reading, suppress
from stdg.testing import TOY_VOCABULARY, loud, toy_database, toy_scene
from stdg.training import step as steps
from stdg.training.options import pair_options
from stdg.training.replay import keep_batch
from stdg.training.resume import saved_states
from stdg.training.step import Lesson, TrainStep, build_network, optimiser, seed_step

# autograd starts threads once, at the first gradient, and after an export it takes this machine for one with a
# GPU: then forked processes could learn nothing
torch.ones(1, requires_grad=True).sum().backward()

here = Path(__file__).parent
TINY = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16, zero_offsets=False)
OPTIONS = dict(epochs=2, batch_size=2, lr=1e-3, lr_backbone=1e-3, warm_up=0., decay=(), device='cpu', progress=False)
FITTED = Calibration((2.5, .8, -.2), ((1.4, .6), (.9, -.5)), (-1., -3.))
PRIOR = PairPrior(np.arange(8).reshape(2, 2, 2), np.full((2, 2), 20), TOY_VOCABULARY.to_json())


def network(mode='rgb', seed=0, relation='pairs', **more):
    return build_network(seed, 'test_resnet.r160_in1k', mode, relation=relation, **TINY | more)


def student(**more):
    model = network('combine', **more)
    model.teacher.load_state_dict(network('depth', 1, **more).network.state_dict())
    return model


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A project with toy scenes."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    scenes = [toy_scene(i) for i in range(6)]
    prepare_hha(toy_database(home/'data'/'toy', scenes, [0, 0, 0, 0, 1, 2]), progress=False)
    return home


def samples(home, inputs=('rgb', 'hha'), **more):
    how = dict(train=True, stride=network().stride, colour=False, relation='pairs') | more
    return SceneGraphs(Database(home/'data'/'toy'), 'train', inputs, **how)


@pytest.fixture(scope='module')
def batch(home): return next(iter(loader(samples(home), 4)))


# what is kept

def test_checkpoint_student_and_folder(tmp_path):
    "The head and its reading are in every file, and a file whose reading is another head's is refused."
    model = student()
    reading = Reading('pairs', suppress='hard', prior=.5, table=PRIOR)
    facts = dict(vocabulary=TOY_VOCABULARY.to_json(), size=64, reading=reading.to_json(), prior=PRIOR.to_json())
    model.save(tmp_path/'student.safetensors', **facts)
    again = checkpoint.load(tmp_path/'student.safetensors')
    assert again.config == model.config and again.network.asks_pairs and again.teacher.asks_pairs
    for name, tensor in model.state_dict().items(): assert torch.equal(tensor, again.state_dict()[name]), name
    Model.load(tmp_path/'student.safetensors').save_pretrained(tmp_path/'shared')
    shared = Model.from_pretrained(tmp_path/'shared')
    assert shared.network.teacher is None and shared.network.network.asks_pairs
    assert Reading.from_facts(shared.facts).relations == 'pairs'
    card = card_text(shared)
    assert 'read by **pairs**: the network is asked about all ordered pairs of the surest 40 boxes' in card
    assert 'read by **pairs**' in card_text(Model(network())), 'also where no reading was chosen'
    for head, way in (('pairs', 'lines'), ('fields', 'pairs')):
        with pytest.raises(ValueError, match=f"relations is '{way}', and the network's relation head is '{head}'"):
            Model(network(relation=head), dict(reading=dict(relations=way)))


# the exported graph

@pytest.fixture(scope='module')
def seen():
    "A network with many detections and pictures for it."
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8))
    return loud(network(n_predicates=2)).eval(), noise


@pytest.mark.parametrize('reading', [PUBLISHED, Reading('pairs', suppress='hard', overlap=.3, objects=20),
                                     Reading('pairs', suppress='soft', power=2., prior=.5, related=.5, table=PRIOR),
                                     Reading('pairs', prior=1., prior_detected=.25, table=PRIOR, objects=60),
                                     Reading('pairs', suppress='soft', calibration=FITTED),
                                     Reading('pairs', prior=.5, table=PRIOR, calibration=FITTED)])
def test_the_table_of_all_pairs_is_what_the_decoder_gives(seen, reading):
    model, pictures = seen
    with torch.no_grad():
        wanted = decode.decode_batch(*model(network_input(model, pictures)), stride=model.stride, reading=reading)
        tables = DeployedPairs(model, reading)(pictures)
    for graph, *tensors in zip(wanted, *tables):
        assert (tensors[3].diagonal() == 0).all() and len(graph.pairs)
        same_graph(finish_pairs(*tensors, reading), graph)


def test_an_onnx_file_answers_as_its_checkpoint(seen, tmp_path):
    "Suppression and prior included; one picture and several, nothing found, and a crowd."
    model, pictures = seen
    reading = Reading('pairs', suppress='hard', overlap=.3, prior=.5, related=1., table=PRIOR, calibration=FITTED)
    facts = dict(size=96, vocabulary=TOY_VOCABULARY.to_json(), reading=reading.to_json(), prior=PRIOR.to_json(),
                 thresholds=dict(objects=.2, triplets=.05))
    whole = Model(model, facts)
    export_onnx(whole, tmp_path/'net.onnx')
    runner = OnnxModel(tmp_path/'net.onnx')
    assert runner.asks_pairs and runner.reading.to_json() == reading.to_json()
    for n in (1, 3):
        with torch.no_grad(): wanted = DeployedPairs(model, reading)(pictures[:n])
        for ours, theirs in zip(zip(*runner(pictures[:n])), zip(*wanted)):
            same_graph(finish_pairs(*ours, reading), finish_pairs(*theirs, reading))
    photo = pictures[0].permute(1, 2, 0).numpy()
    found, wanted = runner.predict(photo), whole.predict(photo)
    same_graph(found, wanted)
    assert found.thresholds == wanted.thresholds == facts['thresholds'] and len(found) < 100

    silent = [array[0] for array in runner(pictures[:1])]
    silent[2][:] = 0
    nothing = finish_pairs(*silent, reading)
    assert not len(nothing) and not len(nothing.pairs)
    silent[2][0] = 1
    assert len(finish_pairs(*silent, reading)) == 1, 'one object has no pair'


def test_a_program_answers_where_this_package_is_not_imported(seen, tmp_path):
    "Soft suppression, whose rounds are a loop of the program; one picture and several."
    model, pictures = seen
    reading = Reading('pairs', suppress='soft', power=2., related=.5)
    export_program(Model(model, dict(size=96, reading=reading.to_json())), tmp_path/'net.pt2')
    np.save(tmp_path/'in.npy', pictures)
    code = """
import sys, numpy as np, torch
program, pictures = torch.export.load('net.pt2').module(), torch.from_numpy(np.load('in.npy'))
for n in (1, 3): np.savez(f'{n}.npz', *[part.numpy() for part in program(pictures[:n])])
assert 'stdg' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for n in (1, 3):
        with torch.no_grad(): wanted = DeployedPairs(model, reading)(pictures[:n])
        for ours, theirs in zip(zip(*np.load(tmp_path/f'{n}.npz').values()), zip(*wanted)):
            same_graph(finish_pairs(*ours, reading), finish_pairs(*theirs, reading))


class _Suppressed(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, boxes, scores): return suppress(boxes, scores, self.how, .3)


@pytest.mark.parametrize('how', ['hard', 'soft'])
def test_suppression_in_an_exported_graph_is_the_decoders(how, tmp_path):
    "The rounds of suppression, one loop in the graph, against the same in Python; equal scores among them."
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    corner = torch.rand(3, 30, 2) * 6
    boxes, scores = torch.cat([corner, corner + 1 + torch.rand(3, 30, 2) * 3], 2), torch.rand(3, 30).round(decimals=1)
    program = torch.export.export(_Suppressed(how), (boxes, scores))
    torch.onnx.export(program, (), dynamo=True, opset_version=20, verbose=False, input_names=['boxes', 'scores'],
                      output_names=['left']).save(tmp_path/'left.onnx')
    session = runtime.InferenceSession(tmp_path/'left.onnx', providers=['CPUExecutionProvider'])
    found, = session.run(None, dict(boxes=boxes.numpy(), scores=scores.numpy()))
    wanted = suppress(boxes, scores, how, .3)
    assert 0 < (wanted < scores).sum() < scores.numel()
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-7)


# training

def still(model):
    "`model` whose norms do not look at the batch."
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm): module.eval()
    return model


def gradient(batch, model=None, precision='float32', parts=1, **more):
    "(terms, facts, gradients) of a batch."
    model = still((model or student()).train())
    one = TrainStep(model, optimiser(model, 1e-3, 1e-3, 0.), parts, precision, **more)
    seed_step(0, 0)
    terms, facts = one.gradient(batch)
    return terms, facts, [p.grad for p in one.learnt]


def same_step(one, other, **near):
    assert one[0] == pytest.approx(other[0], rel=1e-4) and one[1] == pytest.approx(other[1], rel=1e-3)
    for a, b in zip(one[2], other[2]): torch.testing.assert_close(a, b, **dict(rtol=1e-3, atol=2e-5) | near)


def test_one_gradient_however_it_is_computed(batch):
    "In parts, with blocks computed twice, and in bfloat16 nearly."
    whole = gradient(batch)
    assert all(g is not None and g.isfinite().all() for g in whole[2]) and whole[0]['teaching'] > 0
    for parts in (2, 3): same_step(gradient(batch, parts=parts), whole)
    model = student()
    with training.loop.recomputed(model.network): same_step(gradient(batch, model), whole)
    half = gradient(batch, precision='bfloat16')
    assert all(g.isfinite().all() for g in half[2])
    assert half[0] == pytest.approx(whole[0], rel=.05) and half[0] != whole[0]


def test_the_head_compiles_for_any_number_of_pairs():
    torch.manual_seed(0)
    head = PairHead(8, 2, 2, channels=8, width=16, zero_offsets=False).eval()
    quick = torch.compile(head, backend='eager', dynamic=True, fullgraph=True)
    features = torch.randn(2, 8, 6, 6)
    for n in (3, 5):
        corner, image = torch.rand(n, 2) * 3, torch.zeros(n, dtype=torch.int64)
        boxes, classes = torch.cat([corner, corner + 1], 1), torch.eye(2)[torch.arange(n) % 2]
        pairs = Pairs(boxes, classes, image, *ordered_pairs(image))
        grads = [torch.autograd.grad(f(features, pairs).logits.sum(), head.value[0].weight)[0] for f in (head, quick)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def _share(rank, folder, batch):
    "One of two processes with every second picture; what it gives is written."
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    part = {k: v[rank::2] for k, v in batch.items() if k != 'targets'}
    part['targets'] = {k: v[rank::2] for k, v in batch['targets'].items()}
    torch.save(gradient(part), f'{folder}/{rank}.pt')
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_two_processes_are_as_one(batch, tmp_path, monkeypatch):
    """Each process draws its own jitter; without any, and with all pairs asked, their mean is the gradient of
    the whole batch. With it the two still agree with each other."""
    fork = multiprocessing.get_context('fork')
    plain = steps.training_pairs
    for jitter in (0., .08):
        monkeypatch.setattr(steps, 'training_pairs', partial(plain, jitter=jitter))
        folder = tmp_path/str(jitter)
        folder.mkdir()
        both = [fork.Process(target=_share, args=(rank, folder, batch)) for rank in (0, 1)]
        for process in both: process.start()
        for process in both: process.join(120)
        assert [process.exitcode for process in both] == [0, 0]
        one, other = (torch.load(folder/f'{rank}.pt', weights_only=True) for rank in (0, 1))
        assert one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))
        if not jitter: same_step(one, gradient(batch))


LESSONS = dict(weights=dict(loss_weights=dict(relation_predicate=2., relation_related=0.)), balance=dict(balance=1.),
               mean=dict(teach='mean'), features=dict(teach='features'), part=dict(taught_parts=['relation 2']),
               detection=dict(taught_parts=['detection 1']))


def test_options_of_a_stage(home, tmp_path):
    "What each option changes in the terms of the first step, against a plain run."
    dataset = samples(home)
    def first(name, data=dataset, **options):
        training.fit(student(), data, tmp_path/name, 'student', **OPTIONS | dict(steps=1), **options)
        line, = [json.loads(line) for line in (tmp_path/name/'log.jsonl').read_text().splitlines()]
        return line
    plain = first('plain')
    found = {name: first(name, **options) for name, options in LESSONS.items()}
    soft = first('soft', samples(home, unlabelled=.5))
    assert found['weights']['relation_predicate'] == pytest.approx(2 * plain['relation_predicate'], rel=1e-4)
    assert found['weights']['relation_related'] == 0 < plain['relation_related']
    assert found['balance']['relation_predicate'] < plain['relation_predicate']
    assert found['balance']['relation_related'] == plain['relation_related']
    assert soft['relation_predicate'] < plain['relation_predicate']
    assert found['mean']['teaching'] not in (0, plain['teaching']) and found['features']['teaching'] > 0
    assert 'taught_share' not in found['features']
    alone = found['detection']['teaching']  # the mean of two heads, of which one is not taught
    assert 0 < alone < plain['teaching'] and 0 < found['part']['teaching'] < plain['teaching']
    with pytest.raises(ValueError, match='no features of its own to copy'):
        Lesson(student().teacher, 'features', ['relation 1', 'relation 2'])


def test_balance_counts_what_is_learnt(tmp_path):
    "A repeated annotation counts once, and with `overlap` only boxes that overlap."
    boxes = [[4, 4, 20, 20], [10, 10, 30, 30], [40, 40, 60, 60]]
    rows = [[0, 2, 0], [1, 2, 0], [2, 0, 0], [0, 1, 1], [0, 1, 1]]
    scene = SceneGraph(boxes, [0, 1, 1], rows, (64, 64)), None
    database = toy_database(tmp_path/'toy', [scene] * 6, [0] * 4 + [1, 2])
    for overlap, counts in ((False, [12, 4]), (True, [0, 4])):
        how = dict(stride=16, relation='pairs', overlap=overlap, augment=False)
        dataset = SceneGraphs(database, 'train', train=True, **how)
        batch = next(iter(loader(dataset, 4)))['targets']
        learnt = batch['relations'][..., 2]
        assert learnt[learnt >= 0].bincount(minlength=2).tolist() == counts
        assert torch.equal(pair_options(dataset, train.Settings(balance=1.))['shift'], frequency_shift(counts, 1.))


def test_a_student_like_its_teacher_has_nothing_to_learn(batch):
    "The same weights, pictures and pairs: a lesson of exactly nothing in both heads, in evaluation mode."
    model = network('combine', teacher_reads='rgb')
    model.set_teacher(network('rgb'))
    with torch.no_grad():
        for one in (model.network, model.teacher): one.relation.offset.weight.normal_(0, .5)
        model.network.load_state_dict(model.teacher.state_dict())
    assert steps.loss_terms(model.eval(), batch)['teaching'] == 0
    assert steps.loss_terms(model.train(), batch)['teaching'] > 0, "a student's batch norms see its batch"


SETTINGS = dict(data='toy', size=64, backbone='test_resnet.r160_in1k', pretrained=False, relation='pairs', epochs=2,
                teacher_share=1., batch_size=2, warm_up=.5, save_minutes=0., device='cpu', validate_every=0,
                stages=['teacher', 'student'], prior=False, suppress='none')


def run(home, name, kind='none', stage='-', step=0, **settings):
    "(exit code, what was printed) of a run that is disturbed as `killed_run` says."
    train.write_settings(home/f'{name}.yaml', train.Settings(name=name, **SETTINGS | settings))
    done = forked([str(here/'killed_run.py'), f'{name}.yaml', kind, stage, str(step)], home,
                  dict(os.environ, OMP_NUM_THREADS='1'))
    return done.returncode, done.stdout + done.stderr


def test_other_teachers(home, monkeypatch, tmp_path):
    "One that has learnt nothing, one of colours that sees other pictures; and a run that overfits."
    monkeypatch.chdir(home)
    database = Database(home/'data'/'toy')
    scenes = [(graph, dict(record, image=255 - record['image'])) for graph, record in map(toy_scene, range(6))]
    toy_database(home/'data'/'negative', scenes, [0, 0, 0, 0, 1, 2])
    settings = train.Settings(name='others', **SETTINGS | dict(stages=['student'], teacher='random', overfit=2))
    def first(name):
        model, data = train.begin(settings, database, False, 'student')
        training.fit(model, data, tmp_path/name, 'student', **OPTIONS | dict(steps=1))
        return model, data, json.loads((tmp_path/name/'log.jsonl').read_text())
    model, data, line = first('random')
    assert model.teacher.relation.offset.weight.any() and line['teaching'] > 0 and len(data) == 2
    control, _ = train.begin(settings, database, False, 'control')
    control.save(tmp_path/'control.safetensors', vocabulary=TOY_VOCABULARY.to_json())
    settings.teacher, settings.teacher_pictures = str(tmp_path/'control.safetensors'), 'negative'
    model, data, line = first('colours')
    assert model.teacher_reads == 'rgb' and data.inputs == ('rgb', 'seen') and np.isfinite(line['teaching'])
    assert torch.equal(data[0]['seen'], 255 - data[0]['rgb'])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_killed_run_ends_as_an_undisturbed_one(home, monkeypatch):
    "Killed in the teacher's stage and the student's: the same bytes. And another head is no continuation."
    assert run(home, 'whole')[0] == 0
    for stage, step in (('teacher', 3), ('student', 2)): assert run(home, 'killed', 'step', stage, step)[0] == -9
    assert run(home, 'killed')[0] == 0
    files = [f'{stage}.{ending}' for stage in ('teacher', 'student') for ending in ('safetensors', 'json')]
    for file in (*files, 'log.jsonl'):
        assert (home/'runs'/'whole'/file).read_bytes() == (home/'runs'/'killed'/file).read_bytes(), file
    assert saved_states(home/'runs'/'killed'/'states', 'student')

    code, said = run(home, 'whole', relation='fields')
    assert code == 2 and "config.relation was 'pairs', is not set" in said and 'Traceback' not in said
    teacher = str(home/'runs'/'whole'/'teacher.safetensors')
    code, said = run(home, 'other', stages=['student'], teacher=teacher, relation='fields')
    assert code == 2 and "the teacher's relation head is 'pairs', the student's 'fields'" in said


def test_a_batch_that_is_not_finite_is_played_again(batch, home, tmp_path):
    model = student()
    with torch.no_grad(): model.network.relation.answer_layers[-1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match='relation_predicate, relation_related, grad_norm'):
        training.fit(model, samples(home), tmp_path, 'student', **OPTIONS)
    kept, = tmp_path.glob('*.replay.safetensors')
    terms = training.replay(kept)
    odd = [name for name, value in terms.items() if not np.isfinite(value)]
    assert odd == ['relation_predicate', 'relation_related']
    whole = student()
    keep_batch(tmp_path/'one.safetensors', whole, batch, seed=3, step=7)
    seed_step(3, 7, 0)
    wanted = {name: float(value) for name, value in steps.loss_terms(whole.train(), batch).items()}
    assert training.replay(tmp_path/'one.safetensors') == wanted


# what cannot be

def test_pictures_without_a_pair(batch):
    "Nothing annotated, one object, and none at all: a finite step of detection alone."
    few = copy.deepcopy(batch)
    few['targets']['relations'] = few['targets']['relations'][:, :0]
    for objects, related in ((2, True), (1, False), (0, False)):
        few['targets']['labels'][:, objects:] = -1
        terms, facts, grads = gradient(few)
        assert all(map(np.isfinite, (*terms.values(), *facts.values()))) and all(g.isfinite().all() for g in grads)
        assert (terms['relation_related'] > 0) == related
        same_step(gradient(few, parts=2), (terms, facts, grads))


def test_boxes_from_anywhere(seen):
    "One, none, without an area, over the border, 128 and 1,000 of them."
    model, pictures = seen
    ready = Predictor(model, 96, facts=dict(vocabulary=TOY_VOCABULARY.to_json()), device='cpu')
    def ask(boxes): return ready([pictures[0]], boxes=[boxes], labels=[[0] * len(boxes)])[0]
    assert not len(ask(np.zeros((0, 4))).pairs) and not len(ask([[1., 2, 30, 40]]).pairs)
    two = ask([[1., 2, 30, 40], [20, 20, 60, 90]])
    assert sorted(map(tuple, two.pairs.tolist())) == [(0, 1), (1, 0)]
    with pytest.warns(UserWarning, match='without an area') as said:
        odd = ask([[1., 2, 30, 40], [5, 5, 5, 9], [20, 20, 60, 130], [200, 200, 220, 230]])
    assert len(odd) == 2 and 'outside the picture' in str([str(one.message) for one in said])
    corner = np.random.default_rng(0).uniform(0, 60, (1000, 2))
    many = np.concatenate([corner, corner + 20], 1)
    assert len(ask(many[:128]).pairs) == 128 * 127
    with pytest.warns(UserWarning, match='of 1000 boxes the surest 128 are kept'): assert len(ask(many)) == 128
    fields = model(network_input(model, pictures[:1]))[1]
    flat = [(torch.tensor([[5., 5, 5, 5], [5, 5, 5, 5]]), torch.tensor([0, 1]), torch.ones(2))]
    table = decode.decode_given(fields, flat, model.stride, Reading('pairs'))[0].predicates
    assert table.isfinite().all() and len(table) == 2


def test_classes_that_are_no_distribution(seen):
    model, pictures = seen
    fields = model(network_input(model, pictures[:1]))[1]
    boxes, image = torch.tensor([[0., 0, 2, 2], [1, 1, 4, 4]]), torch.zeros(2, dtype=torch.int64)
    pairs = Pairs(boxes, torch.tensor([[.5, .4], [1, 0]]), image, *ordered_pairs(image))
    with pytest.raises(ValueError, match='are no distribution: from 0 on, with the sum 1'): fields.ask(pairs)
    assert fields.ask(pairs._replace(classes=torch.tensor([[.5, .5], [1, 0]])))[0].shape == (2, 2)


def test_what_a_head_cannot_answer_is_said(seen):
    "A class that it does not know, and a weight that is not a number."
    model, pictures = copy.deepcopy(seen[0]), seen[1]
    given = lambda label: [(torch.tensor([[5., 5, 25, 25], [15, 5, 40, 45]]), torch.tensor([0, label]), torch.ones(2))]
    ask = lambda label: decode.decode_given(model(network_input(model, pictures[:1]))[1], given(label), model.stride,
                                            Reading('pairs'))
    assert len(ask(1)[0].pairs) == 2
    with pytest.raises(ValueError, match='label 2, the head of pairs knows 2 classes'): ask(2)
    with torch.no_grad(): model.network.relation.answer_layers[-1].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match='relation fields hold NaN.*the network has diverged'): ask(1)


def test_another_head_is_told_in_one_line(seen):
    model, pictures = seen
    for own, other in (('pairs', 'fields'), ('fields', 'pairs')):
        with pytest.raises(ValueError, match=rf"differ in \['relation'\]: the teacher's relation head is '{other}', "
                                             f"the student's '{own}'. Take a teacher with relation='{own}'"):
            network('combine', relation=own).set_teacher(network('depth', relation=other))
    image = network_input(model, pictures[:1])
    with pytest.raises(ValueError, match="relations is 'lines', and the network has a head of pairs"):
        decode.decode_batch(*model(image), stride=model.stride, reading=Reading('lines'))
    with pytest.raises(ValueError, match="relations is 'pairs', and the network has fields, no pairs"):
        decode.decode_batch(*network(relation='fields').eval()(image), stride=model.stride, reading=Reading('pairs'))
    for head, values, said in (
            ('fields', dict(balance=1.), 'it is for a head of pairs'),
            ('pairs', dict(loss_weights=dict(relation_object=2.)), "no 'relation_object' in the loss of a head"),
            ('fields', dict(loss_weights=dict(relation_related=2.)), "no 'relation_related' in the loss"),
            ('pairs', dict(teach='features', taught_parts=['relation 1']), 'Teach its offsets')):
        with pytest.raises(ValueError, match=said): train.settings_of(dict(relation=head, **values))


def test_a_gradient_is_the_same_with_several_threads():
    "Sums over the pairs of an object are taken in one order, so that a run ends with the same bits."
    before, image = torch.get_num_threads(), torch.zeros(40, dtype=torch.int64)
    corner = torch.rand(40, 2) * 8
    pairs = Pairs(torch.cat([corner, corner + 2], 1), torch.eye(2)[torch.arange(40) % 2], image, *ordered_pairs(image))
    head, features = PairHead(8, 2, 2, 32), torch.randn(1, 8, 10, 10)
    def gradients():
        return torch.autograd.grad(head(features, pairs).logits.square().sum(), list(head.parameters()))
    torch.set_num_threads(4)
    try: found = [gradients() for _ in range(12)]
    finally: torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
