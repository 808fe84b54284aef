"""How a network's fields are read, and the prior, belong to its file: through every kind of file and
back, refused where they do not fit, chosen on validation, counted on training pictures alone."""
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from stdg import checkpoint, evaluation, train
from stdg.data import SceneGraphs
from stdg.datasets.statistics import pair_prior
from stdg.evaluation.choices import KeptFields, both_ways, choose_reading, save_reading
from stdg.graph import SceneGraph, Vocabulary
from stdg.inference import export
from stdg.inference.hub import FACTS, Model
from stdg.io.tensors import save_tensors
from stdg.metrics import FrequencyPrior
from stdg.model import STDG
from stdg.reading import LARGEST, PUBLISHED, PairPrior, Reading
from stdg.testing import TOY_VOCABULARY, toy_database, toy_scene

NAMES = TOY_VOCABULARY.to_json()
OTHER = Vocabulary(['disc', 'cube'], ['left of', 'near']).to_json()
SPLIT = [0] * 5 + [1] * 2 + [2] * 2


def small(**numbers):
    torch.manual_seed(3)
    return STDG('small', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16,
                **numbers).eval()


@pytest.fixture(scope='module')
def database(tmp_path_factory):
    "Toy pictures: five to train on, two to validate, two to test; of all, which relations hold."
    return toy_database(tmp_path_factory.mktemp('data')/'toy', 9, SPLIT, dense=[[[0, 1, 0]]] * 9)


@pytest.fixture(scope='module')
def network(): return small()


@pytest.fixture
def path(network, tmp_path):
    network.save(tmp_path/'net.safetensors', vocabulary=NAMES, size=64)
    return tmp_path/'net.safetensors'


def a_prior(names=NAMES):
    rng = np.random.default_rng(0)
    return PairPrior(rng.integers(0, 5, (2, 2, 2)), rng.integers(5, 9, (2, 2)), names)


def a_reading(**changed):
    return Reading(**dict(relations='lines', tau=2., suppress='soft', overlap=.7, power=2., prior=1.,
                          prior_detected=.5, epsilon=.001, table=a_prior()) | changed)


def same(one, other):
    return one.to_json() == other.to_json() and one.table.table().equal(other.table.table())


def written_onnx(model, path, monkeypatch, **wrong):
    """`export_onnx` with a graph of one node in place of the network: what is tested is its record, in which
    somebody has put what is `wrong`."""
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
             for name in ('picture', 'boxes')]
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['picture'], ['boxes'])], 'one',
                                   value[:1], value[1:])
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10)
    record = {}
    def save(partial):
        onnx.helper.set_model_props(plain, dict(stdg=json.dumps(json.loads(record['stdg']) | wrong)))
        onnx.save(plain, partial)
    made = SimpleNamespace(model=SimpleNamespace(metadata_props=record), save=save)
    monkeypatch.setattr(torch.export, 'export', lambda *_, **__: None)
    monkeypatch.setattr(torch.onnx, 'export', lambda *_, **__: made)
    export.export_onnx(model, path)


def test_through_every_file_and_back(path, tmp_path, monkeypatch):
    reading = a_reading()
    save_reading(path, reading)
    assert same(checkpoint.reading(path), reading)
    model = Model.load(path)
    model.save(tmp_path/'copy.safetensors')
    assert same(checkpoint.reading(tmp_path/'copy.safetensors'), reading)
    (tmp_path/'copy.json').unlink()
    assert checkpoint.facts(tmp_path/'net.json')['prior'] == reading.table.to_json()
    model.save_pretrained(tmp_path/'shared')
    again = Model.from_pretrained(tmp_path/'shared')
    assert same(Reading.from_facts(again.facts), reading)
    assert same(Reading.from_facts(json.loads((tmp_path/'shared'/FACTS).read_text())), reading)
    card = (tmp_path/'shared'/'README.md').read_text()
    for said in ('beta = 1 for given boxes, 0.5 for detected', 'epsilon = 0.001', 'agreement with the ann',
                 'read by **lines** (tau = 2 cells)', 'soft (IoU 0.7)', 'to the power 2'):
        assert said in card, said
    written_onnx(model, tmp_path/'net.onnx', monkeypatch)
    exported = export.OnnxModel(tmp_path/'net.onnx')
    assert same(exported.reading, reading)
    # its graph gives votes, for which the thresholds of that reading do not hold
    nothing = [np.zeros(s) for s in ((1, 1, 4), (1, 1), (1, 1), 1, (1, 0), (1, 0), (1, 2, 0), (1, 2, 0))]
    monkeypatch.setattr(export.OnnxModel, '__call__', lambda self, pictures: [
        a.astype(int) if i in (1, 3, 4, 7) else a for i, a in enumerate(nothing)])
    exported.facts['thresholds'] = dict(objects=.7, triplets=.6)
    picture = np.zeros((20, 20, 3), np.uint8)
    assert exported.predict(picture).thresholds != exported.facts['thresholds']
    for name in ('reading', 'prior'): exported.facts.pop(name)
    assert exported.predict(picture).thresholds == exported.facts['thresholds']


def test_files_without_a_reading_are_read_as_published(path, tmp_path):
    "What an earlier version wrote."
    assert checkpoint.reading(path) == PUBLISHED
    model = Model.load(path)
    assert Reading.from_facts(model.facts) == PUBLISHED
    assert 'No prior speaks' in model.generate_model_card().text
    assert both_ways('net', checkpoint.reading(path)) == dict(net=PUBLISHED)


WRONG = {
    'another vocabulary': (dict(prior=a_prior(OTHER).to_json()), "objects 1 is 'cube' instead of 'square'"),
    'negative counts': (dict(prior=a_prior().to_json() | dict(counts=[[0, 1, 0, -3]])), 'never negative'),
    'negative pairs': (dict(prior=a_prior().to_json() | dict(pairs=[[0, 1, -3]])), 'never negative'),
    'a part of a count': (dict(prior=a_prior().to_json() | dict(counts=[[0, 1, 0, .5]])), 'whole numbers'),
    'other sizes': (dict(prior=PairPrior(np.ones((3, 3, 2)), np.ones((3, 3))).to_json()), r'knows \[2, 2, 2\]'),
    'an unknown field': (dict(reading=dict(colour='red')), 'are known; found'),
    'a value that is none': (dict(reading=dict(tau=-1)), 'tau is -1'),
    'no table': (dict(reading=dict(prior=.5)), 'there is no table'),
    'no record': (dict(reading=[1]), 'are known; found'),
    'no prior': (dict(prior='much'), 'shape, names, counts and pairs')}


def refused(why, named, work, *given):
    "In one line that names the file."
    with pytest.raises(ValueError) as error: work(*given)
    said = str(error.value)
    assert re.search(why, said) and named in said and '\n' not in said and len(said) < 600, said


def test_refused_when_written(path, network):
    before = path.with_suffix('.json').read_bytes()
    for wrong, why in WRONG.values():
        refused(why, 'net.safetensors', lambda wrong=wrong: checkpoint.add_facts(path, **wrong))
        refused(why, '', Model, network, dict(vocabulary=NAMES, size=64) | wrong)
    assert path.with_suffix('.json').read_bytes() == before


@pytest.mark.parametrize('what', ['another vocabulary', 'negative counts', 'an unknown field'])
def test_refused_when_read(what, path, network, tmp_path, monkeypatch):
    "Whatever kind of file it is in."
    wrong, why = WRONG[what]
    facts, before = dict(vocabulary=NAMES, size=64), path.with_suffix('.json').read_bytes()
    alien = json.loads(before) | wrong
    path.with_suffix('.json').write_text(json.dumps(alien))
    for read in (checkpoint.facts, checkpoint.reading, checkpoint.load, Model.load):
        refused(why, 'net.json', read, path)
    refused(why, 'bad.safetensors', lambda: network.save(tmp_path/'bad.safetensors', **facts | wrong))
    assert not (tmp_path/'bad.safetensors').exists()
    # such a record inside of the tensors, and in the folder of a model, and in an ONNX file
    network.save(tmp_path/'fine.safetensors', **facts)
    record = json.loads((tmp_path/'fine.json').read_text())
    record.pop('digest')
    save_tensors(tmp_path/'fine.safetensors', network.state_dict(), record | wrong)
    (tmp_path/'fine.json').unlink()
    refused(why, 'fine.safetensors', checkpoint.load, tmp_path/'fine.safetensors')
    shared, model = tmp_path/'shared', Model(network, facts)
    model.save_pretrained(shared)
    (shared/FACTS).write_text(json.dumps(json.loads((shared/FACTS).read_text()) | wrong))
    refused(why, FACTS, Model.from_pretrained, shared)
    written_onnx(model, tmp_path/'net.onnx', monkeypatch, **wrong)
    refused(why, 'net.onnx', export.OnnxModel, tmp_path/'net.onnx')
    model.facts |= wrong
    refused(why, '', export.export_onnx, model, tmp_path/'refused.onnx')
    assert not (tmp_path/'refused.onnx').exists()


def test_a_hostile_prior_takes_no_memory(path):
    "Its size is known before a table is made."
    import tracemalloc
    huge = dict(shape=[4096, 4096, 2], names=None, counts=[], pairs=[])
    assert 4096 ** 2 * 2 >= LARGEST
    tracemalloc.start()
    for prior in (huge, huge | dict(shape=[10 ** 9] * 3), huge | dict(shape=[2, 2, 10 ** 30])):
        with pytest.raises(ValueError, match='the network knows'): checkpoint.add_facts(path, prior=prior)
        with pytest.raises(ValueError, match='shape must|names must|.'):
            PairPrior.from_json(prior | dict(shape=[4096, 4096, 4096]))
    assert tracemalloc.get_traced_memory()[1] < 2 ** 22
    tracemalloc.stop()


def test_only_training_pictures_are_counted(tmp_path, database):
    "Neither validation pictures nor those held out, nor test pictures, whatever is in them."
    graphs = [toy_scene(i)[0] for i in range(9)]
    prior = pair_prior(database)
    plain = FrequencyPrior(2, 2).fit(graphs[:5])
    assert (prior.counts == plain.counts).all() and (prior.pairs == plain.pairs).all()
    assert prior.names == NAMES and prior.counts.sum() == 5
    turned = [(SceneGraph(g.boxes, g.labels, [[1, 0, 1]], g.size) if i >= 5 else g, None)
              for i, g in enumerate(graphs)]
    other = pair_prior(toy_database(tmp_path/'other', turned, SPLIT))
    assert (prior.counts == other.counts).all() and (prior.pairs == other.pairs).all()
    none_held = toy_database(tmp_path/'held', turned, [0] * 7 + [2] * 2)
    assert pair_prior(none_held, 2).counts[0, 1, 0] == 3 and pair_prior(none_held).counts[1, 0, 1] == 2


def figures(network, database, reading):
    found = evaluation.evaluate(network, SceneGraphs(database, 'test'), intervals=0, progress=False,
                                protocol='strict', reading=reading)
    return {task: {name: value for name, value in found[task].items() if '@' in name}
            for task in ('predcls', 'sgcls', 'sgdet')}


def test_without_its_prior_a_network_is_read_alone(database, network):
    reading = Reading('lines', prior=1., table=pair_prior(database))
    with torch.no_grad(): network.network.relation.layer.bias.view(-1, 7)[:, 0] = torch.tensor([-1., 1.])
    alone, off, on = (figures(network, database, way) for way in
                      (Reading('lines'), reading.without_prior(), reading))
    assert repr(off) == repr(alone) and on['predcls']['R@50'] == 1 > off['predcls']['R@50']
    detected = figures(network, database, replace(reading, prior_detected=0.))
    assert repr(detected['sgdet']) == repr(off['sgdet']) and detected['predcls'] == on['predcls']


def test_a_choice_reads_the_same_fields_as_evaluation(database, network):
    kept = KeptFields(network, SceneGraphs(database, 'test'), batch_size=1)
    for reading in (Reading(), Reading('lines', suppress='hard', prior=.5, table=pair_prior(database))):
        expected = figures(network, database, reading)
        for task in expected:
            found = kept.figures(task, reading)
            assert repr({name: found[name] for name in expected[task]}) == repr(expected[task])
    assert 'P@5' in found


def test_what_is_fixed_is_not_chosen(database, network):
    dataset = SceneGraphs(database, 'val')
    found, chosen = choose_reading(network, dataset, None, Reading('lines', suppress='hard'))
    assert found.relations == 'lines' and found.suppress == 'hard' and not found.has_prior
    names = {name for row in chosen['tried'] for name in row} - {'task', 'figure'}
    assert names == {'tau', 'suppress', 'overlap', 'power', 'naming'}
    found, chosen = choose_reading(network, dataset, pair_prior(database), PUBLISHED, 'chosen', 'chosen')
    tried = [{name: row[name] for name in row if name not in ('task', 'figure')} for row in chosen['tried']]
    assert {row.get('relations') for row in tried} >= {'votes', 'lines'}
    assert {row.get('suppress') for row in tried} - {None} == {'hard', 'soft'} and chosen['images'] == 2


# In a run

TOY = train.Settings(name='run', stages=['control'], size=64, epochs=1, batch_size=4, pretrained=False,
                     device='cpu', warm_up=.5, keep=0, relation='fields')


@pytest.fixture
def run(tmp_path, monkeypatch, database):
    "A function that trains a stage in an empty project; it returns (notes, facts of its network)."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    def trained(**changed):
        settings = replace(TOY, **dict(data=str(database.folder)) | changed)
        prepared = train.prepare_run(settings)
        train.train_stage(settings, 'control', prepared)
        return prepared[2], checkpoint.facts(f'runs/{settings.name}/control.safetensors')
    return trained


def test_a_run_chooses_and_keeps(run):
    asked = dict(validate_every=1, best='AP50', keep=1)
    notes, facts = run(**asked)
    folder = Path('runs/run')
    assert notes == [] and facts['reading_chosen']['images'] == 2
    best = checkpoint.facts(folder/'control.best.safetensors')
    for one in (facts, best):
        assert one['reading']['relations'] == 'lines' and 'thresholds' in one
        assert one['thresholds']['images'] == 2
        reading = Reading.from_facts(one)
        if reading.has_prior: assert reading.table.counts.sum() == 5, 'the training pictures'
    # an earlier version has chosen thresholds, and no reading: it stays as it was
    new = ('reading', 'reading_chosen', 'prior')
    older = {name: value for name, value in facts.items() if name not in new}
    digest = json.loads((folder/'control.json').read_text())['digest']
    (folder/'control.json').write_text(json.dumps(older | dict(digest=digest)))
    assert checkpoint.reading(folder/'control.safetensors') == PUBLISHED
    # (nothing is left to train, so the same command only looks what is to be chosen)
    assert 'reading' not in run(**asked)[1]


def test_as_published_nothing_is_chosen(run):
    notes, facts = run(reading='votes', suppress='none', prior=False)
    assert notes == [] and not facts.keys() & {'reading', 'prior', 'reading_chosen'}
    assert 'thresholds' in facts


@pytest.mark.parametrize('changed', [dict(steps=1), dict(split=[0] * 7 + [2] * 2)],
                         ids=['a trial', 'no validation pictures'])
def test_where_nothing_can_be_chosen_that_is_said(run, tmp_path, changed):
    if 'split' in changed:
        changed = dict(data=str(toy_database(tmp_path/'toy', 9, changed['split']).folder))
    notes, facts = run(**changed, suppress='hard')
    assert [note for note in notes if note.startswith('READING NOT CHOSEN')] == notes[-1:]
    assert 'by lines, without a prior, suppression: hard' in notes[-1]
    assert Reading.from_facts(facts) == Reading('lines', suppress='hard') and 'prior' not in facts
    assert 'thresholds' not in facts


def test_parameters_name_what_they_may_be():
    for wrong in (dict(reading='line'), dict(suppress='some'), dict(prior='much')):
        with pytest.raises(ValueError, match=f'^{[*wrong][0]} is .*needed'): train.Settings(**wrong)
    fields = dict(relation='fields')
    assert train.start_reading(train.Settings(reading='chosen', **fields)) == Reading('lines')
    assert train.start_reading(train.Settings(reading='votes', suppress='soft', **fields)) == Reading(suppress='soft')
    assert train.start_reading(train.Settings(suppress='soft')) == Reading('pairs', suppress='soft')
    with pytest.raises(ValueError, match="reading is 'votes', and relation 'pairs'"):
        train.settings_of(dict(reading='votes'))
