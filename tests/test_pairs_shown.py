"""What is shown of a network that is asked about pairs: the explorer's records beside those of a network of
fields, the points that are asked of student and teacher, and the figures of the runbook."""
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from test_architecture import root

from stdg import depth, draw, evaluation, fields, train
from stdg.data import SceneGraphs, network_input
from stdg.draw.looking import pair_points
from stdg.explore.controls import as_published
from stdg.explore.networks import READINGS
from stdg.explore.records import Records
from stdg.explore.scene import png_bytes, sampled, upload_scene
from stdg.explore.widget import Explorer, explore
from stdg.graph import SceneGraph, Vocabulary
from stdg.model import STDG
from stdg.pairs import Pairs
from stdg.reading import PUBLISHED, Reading
from stdg.testing import TOY_VOCABULARY, loud, toy_database


def network(mode='combine', relation='pairs', seed=0, **more):
    torch.manual_seed(seed)
    return loud(STDG('small', mode, n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16,
                     zero_offsets=False, **dict(relation=relation) | more)).eval()


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A folder with six toy scenes and four runs: `pairs`, with a student that keeps its teacher, a control and a
    teacher; `fields`, with a student; `mixed`, a control of pairs beside a teacher of fields; and `odd`, the other
    way round."""
    folder = tmp_path_factory.mktemp('shown')
    database = toy_database(folder/'toys', 6)
    depth.precompute.prepare_hha(database, 'metric')
    kinds, paths = dict(student='combine', control='rgb', teacher='depth'), {}
    runs = dict(pairs=dict.fromkeys(kinds, 'pairs'), fields=dict(student='fields'),
                mixed=dict(control='pairs', teacher='fields'), odd=dict(control='fields', teacher='pairs'))
    made = {(mode, relation): network(mode, relation) for mode in kinds.values() for relation in ('fields', 'pairs')}
    for run, heads in runs.items():
        for stage, relation in heads.items():
            paths[f'{run}/{stage}'] = folder/run/f'{stage}.safetensors'
            reading = Reading('pairs' if relation == 'pairs' else 'votes')
            made[kinds[stage], relation].save(paths[f'{run}/{stage}'], vocabulary=TOY_VOCABULARY.to_json(), size=64,
                                              reading=reading.to_json())
    records = Records(paths, dict(toys=database), 'test', 'metric')
    return SimpleNamespace(folder=folder, database=database, records=records)


def points(record, who): return np.frombuffer(record['sampling'][who], '<i2').reshape(-1, 4, 4, 3)


# The explorer

def test_student_and_teacher_are_asked_about_the_same_pair(here):
    "By hand: the boxes in cells, one class each, the pair; HHA for the teacher."
    model, _, _, _, _ = here.records.network('pairs/student')
    reading = here.records.reading('toys', 1, 'pairs/student')
    record = here.records.graph_record('toys', 1, 'pairs/student', 'sgdet')
    data = SceneGraphs(here.database, 'test', ('rgb', 'hha'))[0]
    found = reading.seen['sgdet']
    for who, kind, one in (('student', 'rgb', model.network), ('teacher', 'hha', model.teacher)):
        with torch.no_grad(): _, values, _ = one(network_input(model, data[kind][None], kind))
        for number, triplet in enumerate(record['triplets'][:5]):
            ends = [triplet[end] for end in 'so']
            asked = Pairs(found.boxes[ends] / 8, torch.eye(2)[found.labels[ends]], torch.zeros(2, dtype=torch.int64),
                          torch.tensor([0]), torch.tensor([1]))
            _, sampling = values.ask(asked)
            at = 8 * values.head.places(asked, sampling.offsets)[0]
            exact = torch.cat([10 * at, 1e4 * sampling.attention[0, ..., None]], -1)
            assert np.abs(points(record, who)[number] - exact.numpy()).max() < .6
    assert (points(record, 'student') != points(record, 'teacher')).any()


def test_heads_of_all_kinds_side_by_side(here):
    "Which network has points of pairs, and of whom; offsets of cells are there for both heads of fields."
    expected = {'pairs/student': {'student', 'teacher'}, 'pairs/control': {'student', 'teacher'},
                'pairs/teacher': {'teacher'}, 'mixed/control': {'student'}, 'odd/control': set(),
                'fields/student': set()}
    for name, who in expected.items():
        record = here.records.graph_record('toys', 1, name, 'predcls')
        sent, said = record['sampling'], here.records.reading_record('toys', 1, name)
        assert set(sent) == who and said['pairs'] == bool(who)
        asks, of_teacher = bool(who), name.split('/')[0] in ('pairs', 'odd')
        heads = {seer: len(sent) // (2 * 36 * 8 * 8) for seer, sent in said['offsets'].items()}
        assert heads == {seer: 1 if (of_teacher if seer == 'teacher' else asks) else 2 for seer in heads}
        assert set(heads) == ({'teacher'} if name.endswith('teacher') else {'student', 'teacher'})
        assert bool(said['confidence']) != asks and (not asks or not said['votes'])
        for seer in who: assert len(points(record, seer)) == len(record['triplets']) + len(record['truth']['triplets'])


def test_a_network_of_fields_is_shown_as_before(here):
    "Its records are those without any pair; what it says is decoded from its own fields."
    model, *_ = here.records.network('fields/student')
    reading = here.records.reading('toys', 2, 'fields/student')
    data = SceneGraphs(here.database, 'test', ('rgb', 'hha'))[1]
    with torch.no_grad():
        detection, relation, own = model.network(network_input(model, data['rgb'][None]))
        theirs = model.teacher.offsets(network_input(model, data['hha'][None], 'hha'))
    near = lambda ours, own: ours.shape == tuple(own.shape) and np.allclose(ours, own, atol=1e-4)
    assert near(reading.confidence, relation[0, :, 0]) and near(reading.heat, detection[0, :-4])
    assert near(reading.offsets['student'], torch.cat(own)) and near(reading.offsets['teacher'], torch.cat(theirs))
    assert near(reading.output[1], relation)
    assert reading.pair_fields == {} == sampled(reading, reading.truth, [[0, 1]])


def test_each_task_and_reading_of_a_head_of_pairs(here):
    for task in ('sgdet', 'sgcls', 'predcls'):
        for how in READINGS if task == 'predcls' else (READINGS[0], READINGS[3]):
            record = here.records.graph_record('toys', 1, 'pairs/student', task, how)
            assert (record['triplets'] or task == 'sgcls') and not record['lines']  # there all scores are 0
            assert len(points(record, 'teacher')) == len(record['triplets']) + len(record['truth']['triplets'])
    assert as_published(Reading('pairs')) and as_published(PUBLISHED) and not as_published(Reading('lines'))
    assert not as_published(Reading('pairs', suppress='hard'))


def test_a_picture_of_ones_own_and_one_thing_alone(here):
    "Without HHA no teacher looks; without two things nobody does."
    scene = here.records.scene('toys', 1)
    here.records.own.append(upload_scene(png_bytes(scene.picture[:40]), 'half.png'))
    record = here.records.graph_record('own', 1, 'pairs/student', 'sgdet')
    assert set(record['sampling']) == {'student'} and len(points(record, 'student')) == len(record['triplets'])
    reading = here.records.reading('own', 1, 'pairs/student')
    x, y = points(record, 'student')[..., 0] / 10, points(record, 'student')[..., 1] / 10
    (_, top), (_, step) = reading.frame.corner, reading.frame.scale
    assert top == 12 and step == 1, 'the picture begins twelve pixels below the edge of the canvas'
    triplet = record['triplets'][0]
    at, _ = pair_points(reading.pair_fields['student'], reading.seen['sgdet'], [[triplet['s'], triplet['o']]], 8)
    assert np.allclose(x[0], at[0, ..., 0], atol=.06) and np.allclose(y[0], at[0, ..., 1] - 12, atol=.06)
    one = SceneGraph([[1, 1, 9, 9]], [0], [])
    assert pair_points(reading.pair_fields['student'], one, np.zeros((0, 3), int), 8)[0].shape == (0, 4, 4, 2)
    assert sampled(reading, one, [[0, 0]])['student'].shape == (1, 4, 4, 3)


def test_controls_follow_the_network(here):
    "From fields to pairs and back, as a user would; what is chosen and not there is let go and said."
    names = ('fields/student', 'pairs/student')
    explorer = explore({name: here.records.checkpoints[name] for name in names}, here.folder/'toys',
                       overlay='vectors', head='relation, 1st', task='predcls')
    assert isinstance(explorer, Explorer) and explorer.view.message == ''
    control = explorer.controls
    control.network.value = 'pairs/student'
    assert (control.overlay.value, control.head.value) == ('nothing', 'detection, 1st')
    assert 'no confidence and no vectors' in explorer.view.message and control.reading.disabled
    control.overlay.value = 'sampling points'
    assert not control.head.disabled and control.object_class.disabled and 'no teacher' not in explorer.view.message
    assert explorer.snapshot()[:4] == b'\x89PNG'
    for name in names * 2:
        control.network.value = name
        assert control.overlay.value == 'sampling points'
        assert ('asked about pairs' in explorer.view.message) == (name == 'pairs/student')
    control.network.value = 'fields/student'
    assert control.head.value == 'relation, 1st' and len(control.overlay.options) == 5
    explorer.close()
    alone = explore(here.records.checkpoints['pairs/student'], here.folder/'toys', overlay='confidence', task='predcls')
    assert alone.controls.overlay.value == 'nothing' and alone.view.base
    alone.close()


# Figures

def cell(name): return next(c.source for c in nbformat.read(root/'nbs'/'train.ipynb', 4).cells if c.id == name)


@pytest.mark.parametrize('relation', ['fields', 'pairs'])
def test_the_runbooks_figures(here, relation):
    "Its cells, run on toys: heat-maps, offsets, and of pairs the points of teacher and student."
    shown, drawn = network(relation=relation), {}
    settings = train.Settings(data=str(here.folder/'toys'), size=64)
    seen = train.judged_set(settings, here.database, 'test', 'rgb')
    predictions = evaluation.predictions(shown, seen, ('sgdet',), batch_size=2, progress=False,
                                         reading=Reading('pairs' if relation == 'pairs' else 'lines'))
    space = dict(found=list(zip(range(1), predictions)), pictures=True, shown=shown, seen=seen, database=here.database,
                 settings=settings, networks=dict(student=shown), fields=fields, draw=draw, torch=torch, train=train,
                 network_input=network_input, show=lambda figure, name: drawn.update({name: figure}))
    for name in ('fields', 'offsets'): exec(cell(name), space)
    panels = 4 if relation == 'fields' else 2
    assert set(drawn) == {'fields.png', 'offsets.png'} | ({'sampling.png'} if relation == 'pairs' else set())
    titled = [ax.get_title() for ax in drawn['fields.png'].axes if ax.get_title()]
    assert titled == [*TOY_VOCABULARY.objects, *TOY_VOCABULARY.predicates][:panels] or set(titled) <= {
        *TOY_VOCABULARY.objects, *TOY_VOCABULARY.predicates} and len(titled) == panels
    if relation == 'fields': return
    axes = drawn['sampling.png'].axes
    assert [ax.get_ylabel() for ax in axes] == ['teacher', 'student'] and axes[0].get_title() == 'disc left of square'
    assert all(len(ax.collections) == 4 and len(ax.patches) == 2 for ax in axes)


def test_a_figure_says_what_is_wrong_and_shows_names_as_they_are(here):
    reading = here.records.reading('toys', 1, 'pairs/student')
    picture = here.records.scene('toys', 1).picture
    bad = Vocabulary(['$\\frac{1}{0}$', 'b\n' + 'c' * 90], ['<b>', 'on'])
    figure = draw.sampling(picture, reading.truth, bad, reading.pair_fields, [[0, 1, 0], [1, 0, 1]], stride=8)
    figure.canvas.draw()
    assert figure.axes[0].get_title().startswith('$\\frac{1}{0}$ <b> b c') and len(figure.axes) == 4
    for networks, rows, why in (({}, [[0, 1, 0]], '1 pairs and 0 networks'),
                                (reading.pair_fields, [[0, 0, 0]], 'itself'),
                                (reading.pair_fields, [[0, 2, 0]], 'rows 0 to 2 of 2 boxes')):
        with pytest.raises(ValueError, match=why):
            draw.sampling(picture, reading.truth, TOY_VOCABULARY, networks, rows, stride=8)
    with pytest.raises(ValueError, match='vocabulary'):
        draw.sampling(picture, reading.truth, Vocabulary(['a'], ['on']), reading.pair_fields, stride=8)
