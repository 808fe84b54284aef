"""Other lessons than the published one, and the pictures by which a run is judged while one chooses:
from the parameters to what a step is given."""
import json
import weakref

import numpy as np
import pytest
import torch

from stdg import train, training
from stdg.data import SceneGraphs, loader
from stdg.depth.precompute import prepare_hha
from stdg.testing import loud, toy_database, toy_scene
from stdg.training.step import Lesson, network_inputs

TINY = dict(n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)
LEFT, NEAR = 0, 1


def scenes(n=6, change=lambda image: image):
    made = [toy_scene(i) for i in range(n)]
    return [(graph, dict(record, image=change(record['image']))) for graph, record in made]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A project with toy scenes, the same as negatives, and two of them alone."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    holds = [[[0, 1, LEFT], [0, 1, NEAR], [1, 0, NEAR]]] * 6
    split = [0, 0, 0, 0, 1, 2]
    database = toy_database(home/'data'/'toy', scenes(), split, dense=holds)
    prepare_hha(database, progress=False)
    toy_database(home/'data'/'negative', scenes(change=lambda image: 255 - image), split)
    toy_database(home/'data'/'few', scenes(2), [0, 2])
    return home, database


def test_unlabelled_pairs_weigh_less(home):
    _, database = home
    plain, soft = (SceneGraphs(database, 'train', train=True, stride=8, augment=False, unlabelled=u) for u in (0., .75))
    before, after = (one[0]['targets']['relation'][:, 0] for one in (plain, soft))
    painted = before == 1
    assert painted.any() and torch.equal(after[painted], before[painted])
    weights = {round(float(w), 4) for w in (1 - after[~painted]) ** 4}
    assert weights == {.25, 1.}, 'a quarter is left between the two objects, all elsewhere'
    assert (after[NEAR] > 0).any(), 'of every predicate'
    assert plain.fingerprint() != soft.fingerprint()


def test_a_teacher_of_colours_sees_other_pictures(home, monkeypatch):
    "Mirrored as the student's own, and no others; HHA's teacher and the control are left alone."
    folder, database = home
    monkeypatch.chdir(folder)
    settings = train.Settings(teacher_pictures='negative', size=64)
    student = training.build_network(0, 'small', 'combine', teacher_reads='rgb', **TINY)
    dataset = train.training_set(settings, database, student)
    mirrored = set()
    for batch in loader(dataset, 2, 0):
        assert torch.equal(batch['seen'], 255 - batch['rgb'])
        own, other, _ = network_inputs(student, batch)
        assert torch.equal(other, network_inputs(student, dict(batch, rgb=batch['seen']))[0])
        for i, picture in zip(batch['index'].tolist(), batch['rgb']):
            straight = torch.from_numpy(database.image(dataset.rows[i]).copy()).permute(2, 0, 1)
            mirrored.add(bool(torch.equal(picture, straight.flip(2))))
            assert torch.equal(picture, straight) or torch.equal(picture, straight.flip(2))
    assert mirrored == {True, False}
    for model in (training.build_network(0, 'small', 'combine', **TINY), training.build_network(0, 'small', **TINY)):
        assert 'seen' not in train.training_set(settings, database, model).inputs
    settings.teacher_pictures = ''
    assert train.training_set(settings, database, student).fingerprint() != dataset.fingerprint()
    settings.teacher_pictures = 'few'
    with pytest.raises(ValueError, match='few and .*toy are not of the same pictures'):
        train.training_set(settings, database, student)


@pytest.mark.parametrize('lesson', [dict(teach='mean'), dict(teach='features'), dict(taught_parts=['relation 2'])])
def test_a_student_learns_its_lesson(home, lesson, tmp_path):
    "The distance from what it copies falls; another lesson in between is refused."
    _, database = home
    dataset = SceneGraphs(database, 'train', ('rgb', 'hha'), train=True, stride=8, colour=False)
    def student():
        model = training.build_network(0, 'small', 'combine', zero_offsets=False, **TINY)
        model.teacher.load_state_dict(training.build_network(
            1, 'small', 'depth', zero_offsets=False, **TINY).network.state_dict())
        return model
    options = dict(epochs=6, batch_size=4, lr=3e-3, lr_backbone=1e-3, warm_up=0., decay=(), device='cpu',
                   loss_weights=dict(teaching=100.))
    training.fit(student(), dataset, tmp_path, 'student', progress=False, **options, **lesson)
    lines = [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()]
    distance = [line['teaching'] for line in lines if 'teaching' in line]
    assert len(distance) == 6 and np.isfinite(distance).all() and distance[-1] < .7 * distance[0]
    assert ('taught_share' in lines[0]) == (lesson.get('teach') != 'features')
    del options['device']
    assert training.check_resume(student(), dataset, tmp_path, 'student', **options, **lesson) == (6, 6)
    with pytest.raises(ValueError, match='other settings'):
        training.check_resume(student(), dataset, tmp_path, 'student', **options)


def test_tables_of_validation_pictures_and_of_what_is_told(home):
    _, database = home
    settings = train.Settings(split='val', told=True, device='cpu')
    sets = train.judged_sets(settings, database, ['rgb'])
    assert sets['rgb'].rows == database.indices('val').tolist() == [4]
    assert train.judged_sets(train.Settings(), database, ['rgb'])['rgb'].rows == [5]
    model = loud(training.build_network(0, 'small', **TINY))
    found = train.figures_of(settings, database, model, sets, intervals=0, progress=False)
    assert found['images'] == 1 and found['told']['near']['true'] == 2 and found['told']['near']['AP'] == 1
    plain = train.figures_of(train.Settings(device='cpu'), database, model, sets, intervals=0, progress=False)
    assert 'told' not in plain


def test_a_mean_keeps_no_batch():
    "Of a teacher's answers over a whole training set one is there at a time; the mean is that of all pictures."
    alive, n = [], 9
    class Teacher:
        asks_pairs = False
        def offsets(self, pictures, pairs=None):
            alive[:] = [one for one in alive if one() is not None]
            assert len(alive) < 3, 'earlier answers are still held'
            made = pictures.mean((1, 2, 3), keepdim=True).expand(-1, 36, 2, 2).clone()
            alive.append(weakref.ref(made))
            return [made, 2 * made]
    batches = [torch.rand(1 + i % 3, 3, 4, 4) for i in range(n)]
    field = Lesson(Teacher(), 'mean', pictures=((batch, None) for batch in batches)).field
    wanted = torch.cat(batches).mean()
    for part, factor in zip(field, (1, 2)):
        assert part.shape == (1, 36, 2, 2)
        torch.testing.assert_close(part, (factor * wanted).expand_as(part))
