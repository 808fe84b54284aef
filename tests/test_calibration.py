"""Scores as probabilities: fitted to what is known, chosen only where it helps pictures it was not fitted to, and
kept with the network."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from stdg import checkpoint, metrics
from stdg.calibration import ENOUGH, Calibration, calibrated, under_surer
from stdg.decode import decode_tasks, detect
from stdg.evaluation import choices
from stdg.evaluation.choices import choose_reading, save_reading
from stdg.explore.networks import load_network
from stdg.graph import Prediction, SceneGraph
from stdg.inference.hub import FACTS, Model
from stdg.inference.predictor import Predictor
from stdg.io.tensors import TensorFile
from stdg.matching import box_claims, boxes_found
from stdg.model import STDG
from stdg.reading import PUBLISHED, PairPrior, Reading, suppress
from stdg.testing import TOY_VOCABULARY

FITTED = Calibration((2.5, .8, -.2), ((1.4, .6), (.9, -.5)))
SECOND = replace(FITTED, overlaps=(-1., -3.))  # names of what a surer box has named
CELLS, CLASSES = 12, 2
CANDIDATES = choices._candidates


def small():
    torch.manual_seed(3)
    return STDG('small', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16).eval()


def fields(seed=0, b=2):
    "Fields with some dozen peaks and confident cells everywhere."
    rng = torch.Generator().manual_seed(seed)
    detection = torch.rand(b, CLASSES + 4, CELLS, CELLS, generator=rng)
    detection[:, -2:] = 1 + 3 * detection[:, -2:]
    relation = torch.rand(b, 2, 7, CELLS, CELLS, generator=rng)
    relation[:, :, 1:5] *= CELLS
    return detection, relation


def truths(b=2):
    boxes = torch.tensor([[0., 0, 40, 40], [30, 30, 90, 80], [5, 50, 20, 90]])
    return [SceneGraph(boxes, torch.tensor([0, 1, 0]), torch.tensor([[0, 1, 0]]), (96, 96))] * b


@pytest.mark.parametrize('relations', ['votes', 'lines'])
def test_scores_are_calibrated_and_nothing_else_changes(relations):
    plain, fitted = Reading(relations, objects=100), Reading(relations, objects=100, calibration=FITTED)
    batch = fields()
    before, after = (decode_tasks(*batch, ('sgdet', 'predcls'), truths(), 8, reading=how) for how in (plain, fitted))
    for one, other in zip(before['sgdet'], after['sgdet']):
        sure = FITTED.of_objects(one.boxes, one.scores)
        order = sure.argsort(descending=True, stable=True)
        place, order = order.argsort(), order[:(sure > 0).sum()]  # where there is no peak there is no object
        assert torch.equal(other.scores, sure[order]) and torch.equal(other.boxes, one.boxes[order])
        assert torch.equal(other.labels, one.labels[order]) and not torch.equal(other.scores, one.scores)
        if relations == 'votes': continue  # they depend on the objects' scores
        said = {tuple(pair): row for pair, row in zip(other.pairs.tolist(), other.predicates)}
        there = (one.scores[one.pairs] > 0).all(1)
        assert len(said) == there.sum() > 100
        for pair, row in zip(place[one.pairs[there]].tolist(), one.predicates[there]):
            assert torch.allclose(said[tuple(pair)], FITTED.of_predicates(row[None])[0])
    for one, other in zip(before['predcls'], after['predcls']):
        assert torch.equal(other.scores, one.scores) and len(other.pairs) == len(one.pairs) > 0
        said = {tuple(pair): row for pair, row in zip(other.pairs.tolist(), other.predicates)}
        for pair, row in zip(one.pairs.tolist(), one.predicates):
            assert torch.allclose(said[tuple(pair)], FITTED.of_predicates(row[None])[0])


def test_the_names_of_given_boxes_are_calibrated_too():
    readings = Reading('lines'), Reading('lines', calibration=FITTED)
    before, after = (decode_tasks(*fields(), ('sgcls',), truths(), 8, reading=how)['sgcls'] for how in readings)
    for one, other in zip(before, after):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(other.scores, FITTED.of_objects(one.boxes, one.scores))


def test_what_is_suppressed_is_decided_by_the_chances():
    "A small box may be surer than the large one that it overlaps, and less likely to be right."
    detection = torch.zeros(1, CLASSES + 4, CELLS, CELLS)
    detection[0, 0, 5, 5], detection[0, 1, 5, 6] = .5, .6
    detection[0, -2:, 5, 5], detection[0, -2:, 5, 6] = 6., 5.
    relation = torch.zeros(1, 2, 7, CELLS, CELLS)
    assert detect(detection, 8)[1][0, 0] == 1
    big = replace(FITTED, objects=(1., 8., 0.))
    for fitted, first in ((None, 1), (big, 0)):
        how = Reading('lines', suppress='hard', overlap=.3, calibration=fitted)
        found, = decode_tasks(detection, relation, stride=8, reading=how)['sgdet']
        assert found.labels.tolist() == [first]


def test_a_second_name_is_as_likely_as_was_fitted():
    plain, fitted = Reading('lines', objects=100), Reading('lines', objects=100, calibration=SECOND)
    before, after = (decode_tasks(*fields(), stride=8, reading=how)['sgdet'] for how in (plain, fitted))
    for one, other in zip(before, after):
        alone = FITTED.of_objects(one.boxes, one.scores)
        under = under_surer(one.boxes, one.labels, one.scores)
        lower = ((alone.logit() - under[0] - 3 * under[1]).sigmoid() * (alone > 0)).sort(descending=True)[0]
        assert torch.allclose(other.scores, lower[lower > 0], atol=1e-6)
        assert min(part.max() for part in under) > .5 and len(other.scores) == (one.scores > 0).sum()
    given = [decode_tasks(*fields(), ('sgcls',), truths(), 8, reading=how)['sgcls'] for how in
             (fitted, replace(fitted, calibration=FITTED))]
    for one, other in zip(*given): assert torch.equal(one.scores, other.scores)


def test_where_people_look_a_thing_has_one_name(tmp_path):
    reading, path = Reading('lines', overlap=.3, calibration=SECOND), tmp_path/'net.safetensors'
    small().save(path, vocabulary=TOY_VOCABULARY.to_json(), size=64)
    save_reading(path, reading)
    ready, picture = Predictor(path), torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert ready.reading == replace(reading, suppress='hard') and not ready.changed
    assert checkpoint.reading(path) == reading, 'its file says how it is judged'
    assert load_network(path)[-1] == ready.reading, 'and so it is in the explorer'
    greatest = lambda found: box_iou(found.boxes, found.boxes).nan_to_num(0).fill_diagonal_(0).max()
    one, every = ready([picture])[0], ready.read_as(suppress='none')([picture])[0]
    assert greatest(one) <= .3 + 1e-6 < .5 < greatest(every) and len(one.boxes) < len(every.boxes)
    rows = lambda found: {*zip(map(tuple, found.boxes.tolist()), found.labels.tolist(), found.scores.tolist())}
    assert rows(one) < rows(every), 'the surest names stay as they were'
    assert 'hard (IoU 0.3) of what is shown' in Model.load(path).generate_model_card().text


def test_the_released_decoder_knows_no_calibration():
    for one, other in zip(*(decode_tasks(*fields(), released=True, stride=8, reading=Reading(calibration=how))['sgdet']
                            for how in (None, FITTED))):
        assert torch.equal(one.scores, other.scores) and torch.equal(one.predicates, other.predicates)


def test_through_every_file_and_back(tmp_path):
    reading = Reading('lines', suppress='soft', calibration=SECOND)
    small().save(tmp_path/'net.safetensors', vocabulary=TOY_VOCABULARY.to_json(), size=64)
    save_reading(tmp_path/'net.safetensors', reading)
    assert checkpoint.reading(tmp_path/'net.safetensors') == reading
    model = Model.load(tmp_path/'net.safetensors')
    model.save_pretrained(tmp_path/'shared')
    again = Model.from_pretrained(tmp_path/'shared')
    assert Reading.from_facts(again.facts) == reading
    assert Reading.from_facts(json.loads((tmp_path/'shared'/FACTS).read_text())) == reading
    card = (tmp_path/'shared'/'README.md').read_text()
    assert 'Scores of objects and predicates are **calibrated**' in card
    assert 'calibrated' not in Model(small()).generate_model_card().text
    assert TensorFile(tmp_path/'net.safetensors', '').record('', lambda *_: None)['reading']['calibration']


@pytest.mark.parametrize(('wrong', 'why'), [
    (dict(objects=[1, 0, 0], predicates=[[1, 0]] * 3), 'of 3 predicates, the network knows 2'),
    (dict(objects=[1, 0, 0]), 'objects and predicates are needed'),
    (dict(objects=[0, 0, 0], predicates=None), 'the first above 0'),
    (dict(objects=[1, float('inf'), 0], predicates=None), 'three numbers'),
    (dict(objects=[1, 0, 0], predicates=None, overlaps=[0, '1']), 'two numbers'),
    (dict(objects=[1, 0, True], predicates=None), 'three numbers'),
    ([1, 0, 0], 'objects and predicates are needed')])
def test_a_record_that_does_not_fit_is_refused(tmp_path, wrong, why):
    path = tmp_path/'net.safetensors'
    small().save(path, vocabulary=TOY_VOCABULARY.to_json(), size=64)
    record = json.loads(path.with_suffix('.json').read_text())
    record['reading'] = PUBLISHED.to_json() | dict(calibration=wrong)
    path.with_suffix('.json').write_text(json.dumps(record))
    with pytest.raises(ValueError, match=why) as error: checkpoint.facts(path)
    assert str(path.with_suffix('')) in str(error.value)


def test_another_network_s_calibration_is_refused():
    three = Calibration(predicates=((1., 0.),) * 3)
    with pytest.raises(ValueError, match='of 3 predicates, the scores are of 2'):
        decode_tasks(*fields(), ('predcls',), truths(), 8, reading=Reading('lines', calibration=three))


class Kept:
    """In the place of `KeptFields`: eighty made pictures in eight batches, of which it is known what is true. Scores
    of objects are true chances to `honest`, else bent; of the second predicate, too. With `second` each thing has its
    other name as well, of a score that is hardly lower."""
    images = 80
    def __init__(self, honest, second=False):
        rng = np.random.default_rng(1)
        self.batches, self.made = [(None, None, [None] * 10)] * 8, []
        bend = lambda chance: chance if honest else 1 / (1 + ((1 - chance) / chance) ** .3)
        for _ in range(self.images):
            corner = 64. * np.stack(np.meshgrid(range(3), range(3)), -1).reshape(9, 2)
            side = rng.choice([16., 48], 9)
            boxes = np.concatenate([corner, corner + side[:, None]], 1)
            labels, chance = rng.integers(0, 2, 9), rng.beta(2, 2, 9)
            chance = np.where(side > 20, .5 + chance / 2, chance / 2)
            claimed = np.where(rng.random(9) < chance, labels, 1 - labels)
            scores = bend(chance)
            if not honest: scores = np.where(side > 20, scores * .7, scores)
            pairs = np.argwhere(~np.eye(9, dtype=bool))
            said = rng.beta(.5, 2, (len(pairs), 2))
            holds = rng.random(said.shape) < said
            if not honest: said[:, 1] = said[:, 1] ** .2
            q, p = holds.nonzero()
            graph = SceneGraph(torch.tensor(boxes), torch.tensor(labels),
                               torch.tensor(np.column_stack([pairs[q], p])), (200, 200))
            if second:
                row = np.full((9, 9), -1)
                row[tuple(pairs.T)] = np.arange(len(pairs))
                row = np.tile(row, (2, 2))
                pairs, said = np.argwhere(row >= 0), said[row[row >= 0]]
                boxes, claimed = np.tile(boxes, (2, 1)), np.concatenate([claimed, 1 - claimed])
                scores = np.concatenate([scores, scores * .95])
            self.made.append((Prediction(*map(torch.tensor, (boxes, claimed, scores, pairs, said)), (200, 200)), graph))

    def answers(self, task, *readings):
        for i, (one, graph) in enumerate(self.made):
            how = readings[i // 10 % len(readings)]
            fitted = how.calibration or Calibration()
            scores = fitted.of_objects(one.boxes, one.scores, one.labels) if task == 'sgdet' else torch.ones(9)
            scores = suppress(one.boxes, scores, how.suppress, how.overlap)
            labels = one.labels if task == 'sgdet' else graph.labels
            yield Prediction(one.boxes, labels, scores, one.pairs, fitted.of_predicates(one.predicates),
                             one.size), graph, graph

    def figures(self, task, *readings):
        evaluator = metrics.Evaluator(task, 2, protocol='strict')
        for answer in self.answers(task, *readings): evaluator.update(*answer)
        return evaluator.compute()


@pytest.fixture
def chosen(monkeypatch):
    def choose(kept, start, **how):
        monkeypatch.setattr(choices, 'KeptFields', lambda *_, **__: kept)
        return choose_reading(small(), None, None, start, **how)
    return choose


def test_bent_scores_are_straightened(chosen):
    kept = Kept(honest=False)
    reading, said = chosen(kept, Reading('lines'))
    tried = [row for row in said['tried'] if 'calibration' in row]
    assert len(tried) == 2 and tried[0]['calibration'] is None
    assert tried[0]['figure'] < tried[1]['figure'] and json.dumps(said)
    assert reading.calibration.to_json() == tried[1]['calibration'] and reading.power == 1
    slopes = [a for a, _ in reading.calibration.predicates]
    assert slopes[1] > 1.3 * slopes[0] and reading.calibration.objects[0] > 2
    assert kept.figures('sgdet', reading)['P@5'] > 1.2 * kept.figures('sgdet', Reading('lines'))['P@5']


def test_second_names_are_kept_where_their_chances_are_worth_more_than_a_rule(chosen):
    kept = Kept(honest=True, second=True)
    with pytest.MonkeyPatch.context() as patch:  # given boxes, which have no second names, play no part here
        patch.setattr(choices, '_candidates', lambda *how: [row for row in CANDIDATES(*how) if row[0] == 'sgdet'])
        reading, said = chosen(kept, Reading('lines'), suppress='chosen')
    rules = [row for row in said['tried'] if 'suppress' in row]
    best = max(rules[:4], key=lambda row: row['figure'])
    assert [row['suppress'] for row in rules] == ['hard', 'hard', 'soft', 'soft', best['suppress'], 'none']
    assert reading.suppress == 'none' and reading.calibration.overlaps[0] < -.1 and json.dumps(said)
    assert rules[-1]['figure'] > max(row['figure'] for row in rules[:-1])
    assert reading.shown() == replace(reading, suppress='hard') and reading.shown().overlap == .5
    again, _ = chosen(Kept(honest=True), Reading('lines'), suppress='hard')
    assert again.suppress == 'hard' and not (again.calibration and again.calibration.overlaps), 'a fixed rule stays'


def test_no_figure_comes_from_pictures_that_were_fitted(chosen, monkeypatch):
    kept, asked = Kept(honest=False), []
    figures = kept.figures
    monkeypatch.setattr(kept, 'figures', lambda task, *how: asked.append(how) or figures(task, *how))
    chosen(kept, Reading('lines'))
    halves = [how for how in asked if len(how) == 2]
    assert len(halves) == 1
    claims = [choices._claims(*answer) for answer in kept.answers('sgdet', Reading('lines'))]
    for how in halves:
        for half, one in enumerate(how):  # batches 0, 2, ... are read with what was fitted to 1, 3, ...
            part = [claim for i, claim in enumerate(claims) if i // 10 % 2 != half]
            *objects, _, said, holds = (torch.cat(tensors).numpy() for tensors in zip(*part))
            assert one.calibration == calibrated(*objects, said, holds)


def test_honest_scores_stay_much_as_they_are(chosen):
    reading, _ = chosen(Kept(honest=True), Reading('lines'))
    if reading.calibration is None: return
    slope, of_side, shift = reading.calibration.objects
    assert .7 < slope < 1.4 and abs(of_side) < .6 and abs(shift) < .6
    assert all(.8 < a < 1.25 and abs(b) < .5 for a, b in reading.calibration.predicates or ())


@pytest.mark.parametrize(('relations', 'better', 'naming'), [
    ('lines', 'likeliest', 'likeliest'), ('lines', 'matched', 'matched'), ('lines', None, 'matched'),
    ('votes', 'likeliest', 'matched')])
def test_who_names_given_boxes_is_chosen(chosen, monkeypatch, relations, better, naming):
    "By SGCls; of equals the published way, and for votes always that."
    kept = Kept(honest=True)
    figures = kept.figures
    def judged(task, *how):
        found = figures(task, *how)
        return found | dict({'R@50': 1., 'P@5': 1.} if task == 'sgcls' and how[0].naming == better else {})
    monkeypatch.setattr(kept, 'figures', judged)
    reading, said = chosen(kept, Reading(relations))
    assert reading.naming == naming
    tried = [row['naming'] for row in said['tried'] if 'naming' in row]
    assert tried == ['matched', 'likeliest'] * (relations == 'lines')


def test_votes_and_few_claims_are_not_calibrated(chosen):
    assert chosen(Kept(False), Reading('votes'))[0].calibration is None
    few = Kept(False)
    few.made, few.batches = few.made[:8], [(None, None, [None] * 4)] * 2
    few.images = 8
    assert chosen(few, Reading('lines'))[0].calibration is None
    single = Kept(False)
    single.batches = [(None, None, [None] * 80)]  # no other half to be judged by
    assert chosen(single, Reading('lines'))[0].calibration is None


def test_without_a_dense_truth_predicates_stay(chosen):
    kept = Kept(False)
    answers = kept.answers
    kept.answers = lambda *how: ((found, truth, None) for found, truth, _ in answers(*how))
    fitted = chosen(kept, Reading('lines'))[0].calibration
    assert fitted is not None and fitted.predicates is None


def test_ignored_things_count_neither_way():
    boxes = torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    truth = SceneGraph(boxes[:2], torch.tensor([0, 1]), torch.zeros(0, 3, dtype=torch.int64), (64, 64),
                       torch.tensor([False, True]))
    found = Prediction(boxes, torch.tensor([0, 1, 0]), torch.tensor([.9, .8, .7]), torch.tensor([[0, 2]]),
                       torch.ones(1, 2), (64, 64))
    _, scores, right, under, said, holds = choices._claims(found, truth, truth)
    assert torch.equal(scores, torch.tensor([.9, .7])) and right.tolist() == [True, False] and not under.any()
    assert said.shape == holds.shape == (0, 2)


def test_of_several_boxes_on_a_thing_the_surest_finds_it():
    "One box on two things of its class finds both and counts once; a truth without things finds nothing."
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9], [0, 0, 10, 10], [30, 30, 40, 40]])
    found = Prediction(boxes, torch.tensor([1, 0, 0, 0, 0]), torch.tensor([.9, .6, .7, .5, .8]),
                       torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), (64, 64))
    truth = lambda rows, labels: SceneGraph(rows, labels, torch.zeros(0, 3, dtype=torch.int64), (64, 64))
    which, counts = boxes_found(found, truth(boxes[:1], torch.tensor([0])))
    assert which.tolist() == [-1, -1, 0, -1, -1] and counts.all()
    which, _ = boxes_found(found, truth(boxes[[4, 0, 2]], torch.tensor([0, 1, 0])))
    assert which.tolist() == [1, -1, 2, -1, 0]
    one = Prediction(boxes[:1], torch.tensor([0]), torch.tensor([.9]), found.pairs, found.predicates, (64, 64))
    two = truth(boxes[[1, 2]], torch.tensor([0, 0]))
    which, counts = boxes_found(one, two)
    assert which.tolist() == [0] and counts.all() and box_claims(one, two)[1].tolist() == [True]
    assert boxes_found(found, truth(boxes[:0], torch.zeros(0, dtype=torch.int64)))[0].tolist() == [-1] * 5


def test_a_fit_needs_claims_of_both_kinds():
    boxes = np.tile([0., 0, 32, 32], (2 * ENOUGH, 1))
    right = np.arange(2 * ENOUGH) % 2 == 0
    assert calibrated(boxes, np.full(len(boxes), .5), right) is not None
    for some in (right | True, right & False): assert calibrated(boxes, np.full(len(boxes), .5), some) is None
    silent = calibrated(boxes, np.full(len(boxes), .5), right, np.zeros((9, 2)), np.zeros((9, 2), bool))
    assert silent.predicates == ((1., 0.), (1., 0.)), 'of what said nothing, nothing is known'


def test_a_prior_weighs_the_chances():
    prior = PairPrior(np.arange(8).reshape(2, 2, 2), np.full((2, 2), 20), TOY_VOCABULARY.to_json())
    scores, ends = torch.tensor([[.3, .6]]), torch.tensor([1])
    both = Reading('lines', prior=1., table=prior, calibration=FITTED).weigh(scores, ends, ends)
    apart = Reading('lines', prior=1., table=prior).weigh(FITTED.of_predicates(scores), ends, ends)
    assert torch.equal(both, apart)
