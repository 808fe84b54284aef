"Boxes of any detector become the objects of a graph: formats, places, mistakes, and the command."
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import stdg
from stdg import cli, fields
from stdg.decode import ideal_output
from stdg.graph import SceneGraph, Vocabulary
from stdg.inference import Predictor, load_predictor
from stdg.inference.box_formats import BoxFile, read_boxes
from stdg.inference.given_boxes import MOST, GivenBoxes, coco_names
from stdg.model import STDG
from stdg.reading import PairPrior, Reading

root = Path(__file__).parent.parent
NAMES = Vocabulary(['cup', 'table', 'traffic light'], ['on', 'near'])
BOXES = [[12., 8, 30, 25], [40, 30, 80, 50], [60, 5, 75, 20]]
LABELS, SCORES = ['cup', 'table', 'traffic light'], [.9, .8, .7]
CANVAS = 96


def network_of(relations=(((0, 1, 0)), ((2, 1, 1))), size=(61, 94), **facts):
    """A `Predictor` whose fields are the ideal ones of BOXES, on a picture of `size` (height, width),
    and a little noise."""
    torch.manual_seed(0)
    model = STDG('small', n_objects=3, n_predicates=2, pretrained=False, fpn=16, channels=16)
    k = CANVAS / max(size)
    scale = [round(size[1] * k) / size[1], round(size[0] * k) / size[0]]
    corner = [(CANVAS - round(side * k)) // 2 for side in size[::-1]]
    boxes = torch.tensor(BOXES) * torch.tensor(scale * 2) + torch.tensor(corner * 2)
    graph = SceneGraph(boxes, [0, 1, 2], list(relations), (CANVAS, CANVAS))
    ideal = ideal_output(fields.encode(graph, 3, 2, (CANVAS, CANVAS), model.stride))
    noise = torch.Generator().manual_seed(1)
    detection, relation = (part + .03 * torch.rand(part.shape, generator=noise) for part in ideal)
    detection, relation = detection.clamp(min=0), relation.clone()
    detection[:3] = detection[:3].clamp(max=1) * .95
    relation[:, 0] = relation[:, 0].clamp(0, 1) * .9
    model.forward = lambda image: tuple(part.expand(len(image), *part.shape)
                                        for part in (detection, relation))
    facts = dict(vocabulary=NAMES.to_json(), size=CANVAS, thresholds=dict(objects=.5, triplets=.1)) | facts
    return Predictor(model, facts=facts)


def picture(size=(61, 94)):
    return np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)


def table(found, place, n):
    "Predicate scores (n, n, P) of the pairs of `found`, whose object i is number place[i]."
    scores = torch.zeros(n, n, found.predicates.shape[1])
    scores[tuple(place[found.pairs].T)] = found.predicates
    return scores


# Parity: a network's own boxes


@pytest.mark.parametrize('relations', ['lines', 'votes'])
@pytest.mark.parametrize('size', [(61, 94), (120, 83)])
def test_a_networks_own_boxes_given_back_are_related_as_before(relations, size):
    "The same pairs, in the same order, with the same scores, whatever the shape of the picture."
    counts = np.arange(18).reshape(3, 3, 2)
    prior = PairPrior(counts, counts.sum(2) + 20, NAMES.to_json())
    reading = Reading(relations=relations, power=2.).to_json() | dict(prior=.5 * (relations == 'lines'))
    network = network_of(size=size, reading=reading, prior=prior.to_json())
    own, = network([torch.from_numpy(picture(size)).permute(2, 0, 1)])
    sure = (own.scores > .5).nonzero()[:, 0]
    assert len(sure) == 3
    torch.testing.assert_close(own.boxes[sure][own.labels[sure].argsort()], torch.tensor(BOXES), atol=1., rtol=0)
    given = stdg.predict(picture(size), network, boxes=own.boxes[sure], labels=own.labels[sure],
                         scores=own.scores[sure])
    assert torch.equal(given.boxes, own.boxes[sure]) and torch.equal(given.scores, own.scores[sure])
    among = [i for i, pair in enumerate(own.pairs.tolist()) if set(pair) <= set(sure.tolist())]
    assert len(among) >= 2
    if relations == 'lines': assert own.pairs[among].tolist() == sure[given.pairs].tolist()
    before, after = table(own, torch.arange(len(own)), len(own)), table(given, sure, len(own))
    torch.testing.assert_close(after[sure][:, sure], before[sure][:, sure], atol=1e-5, rtol=1e-4)
    assert after.amax() > .05


def test_relations_are_those_of_the_boxes_that_are_given():
    graph = stdg.predict(picture(), network_of(), boxes=BOXES, labels=LABELS).graph(min_score=.3)
    assert set(graph.sentences()) == {'cup on table', 'traffic light near table'}
    other = stdg.predict(picture(), network_of(), boxes=BOXES[:2], labels=['table', 'cup'],
                         scores=[.1, .2])
    assert len(other.graph(min_object=None).boxes) == 2, 'all that is given is shown'
    assert [NAMES.objects[i] for i in other.labels] == ['table', 'cup']


# Places


def test_a_picture_that_was_stored_lying_takes_boxes_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = Image.fromarray(picture())
    shown.rotate(90, expand=True).save(tmp_path/'turned.png', exif=exif)
    shown.save(tmp_path/'plain.png')
    network, how = network_of(), dict(boxes=BOXES, labels=LABELS, scores=SCORES)
    turned, plain = (stdg.predict(tmp_path/name, network, **how) for name in ('turned.png', 'plain.png'))
    assert turned.size == (61, 94) and turned.boxes.tolist() == BOXES
    assert torch.equal(turned.pairs, plain.pairs) and torch.equal(turned.predicates, plain.predicates)
    content = dict(images=[dict(id=1, file_name='turned.png', width=61, height=94)],
                   annotations=[], categories=[])
    with pytest.raises(ValueError, match='turned.png: the boxes are for a picture of 61 x 94 pixels, '
                       'and it has 94 x 61; .* as it is shown, upright'):
        stdg.predict(tmp_path/'turned.png', network, boxes=content)


def test_a_batch_and_one_by_one_are_the_same():
    network, other = network_of(), [[10, 10, 50, 40]]
    pixels = [torch.from_numpy(picture()).permute(2, 0, 1), torch.from_numpy(picture((70, 70))).permute(2, 0, 1)]
    together = network(pixels, ['a', 'b'], [BOXES, other], labels=[LABELS, ['cup']])
    listed = stdg.predict(pixels, network, boxes=[BOXES, other], labels=[LABELS, ['cup']], batch_size=1)
    for a, b, boxes in zip(together, listed, (BOXES, other)):
        assert a.boxes.tolist() == b.boxes.tolist() == boxes and a.scores.tolist() == [1] * len(boxes)
        assert torch.equal(a.predicates, b.predicates) and a.thresholds == dict(objects=0, triplets=.1)
    assert len(stdg.predict(picture(), network, boxes=[], labels=[]).boxes) == 0
    ready = GivenBoxes(BOXES, ['a'], NAMES, LABELS).on(0, (61, 94))
    assert torch.equal(network(pixels[:1], boxes=[ready])[0].predicates, together[0].predicates)
    for wrong, said in (([ready], '1 pictures have boxes, and 2'), ([BOXES], '2 pictures need a list'),
                        (dict(boxes=BOXES), '2 pictures need a list')):
        with pytest.raises(ValueError, match=said): network(pixels, boxes=wrong)


# Formats


def formats():
    "BOXES as each library or file holds them, and `classes` where numbers need it."
    ids = {name: i for i, name in coco_names()[0].items()}
    coco = [ids['cup'], ids['dining table'], ids['traffic light']]
    results = [dict(image_id=7, category_id=c, bbox=[x, y, u - x, v - y], score=s)
               for c, (x, y, u, v), s in zip(coco, BOXES, SCORES)]
    names = np.array(['cup', 'dining table', 'traffic light'])
    array, at = np.array(BOXES, np.float32), SimpleNamespace
    yield 'arrays', dict(boxes=array, labels=['CUP', 'dining_table', 'traffic-light'], scores=SCORES)
    yield 'numbers', dict(boxes=BOXES, labels=torch.tensor([0, 1, 2]), scores=torch.tensor(SCORES))
    yield 'torchvision', dict(boxes=dict(boxes=torch.tensor(BOXES), labels=torch.tensor(coco),
                                         scores=torch.tensor(SCORES, requires_grad=True)))
    yield 'supervision', dict(boxes=at(xyxy=array, mask=None, confidence=np.array(SCORES, np.float32),
                                       class_id=np.array([41, 60, 9]), data={'class_name': names}))
    yield 'supervision without names', dict(
        boxes=at(xyxy=array, confidence=np.array(SCORES), class_id=np.array([1, 2, 0]), data={}),
        classes=['traffic light', 'cup', 'table'])
    yield 'ultralytics', dict(boxes=at(names={41: 'cup', 60: 'dining table', 9: 'traffic light'}, boxes=at(
        xyxy=torch.tensor(BOXES), cls=torch.tensor([41., 60, 9]), conf=torch.tensor(SCORES))))
    yield 'COCO results', dict(boxes=results)
    yield 'COCO annotations', dict(boxes=dict(
        images=[dict(id=7, file_name='sub/photo.png', width=94, height=61), dict(id=8, file_name='o.png')],
        annotations=[dict(one, id=i, category_id=i + 1, iscrowd=0) for i, one in enumerate(results)]
        + [dict(results[0], id=9, iscrowd=1)],
        categories=[dict(id=i, name=name) for i, name in enumerate(names, 1)]))
    yield 'a graph', dict(boxes=dict(objects=[dict(name=n, box=b, score=s)
                                              for n, b, s in zip(LABELS, BOXES, SCORES)]))


@pytest.mark.parametrize('name, how', [pytest.param(*one, id=one[0]) for one in formats()])
def test_each_format_gives_the_same_boxes(name, how, tmp_path):
    def placed(**how):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            given = GivenBoxes(names=['photo.png'], vocabulary=NAMES, **how)
        return given.on(0, (61, 94)), [str(one.message) for one in said]
    found, said = placed(**how)
    assert found.boxes.tolist() == BOXES and found.boxes.dtype == torch.float32
    assert found.labels.tolist() == [0, 1, 2] and torch.allclose(found.scores, torch.tensor(SCORES))
    ids = name in ('torchvision', 'COCO results')
    assert len(said) == ids and all("COCO's category ids" in one for one in said)
    if not isinstance(how['boxes'], (dict, list)) or not name.startswith(('COCO', 'a graph')): return
    path = tmp_path/'found.json'
    path.write_text(json.dumps(how['boxes'], default=str), encoding='utf-8')
    assert torch.equal(placed(boxes=str(path))[0].boxes, found.boxes)


def test_pictures_in_a_file_are_known_by_name():
    def file(*names):
        images = [dict(id=i, file_name=name) for i, name in enumerate(names)]
        boxes = [dict(image_id=i, category_id=1, bbox=[i, 0, 5, 5]) for i in range(len(names))]
        return BoxFile(dict(images=images, annotations=boxes, categories=[dict(id=1, name='cup')]), 'f.json')
    first = lambda found: None if found is None else int(found.boxes[0, 0])
    two = file('a/x.png', 'b/x.png', 'y.png')
    assert [first(one) for one in two.of(['b/x.png', 'home/a/x.png', 'z.png', 'deep/y.png'])] == [1, 0, None, 2]
    with pytest.raises(ValueError, match='2 of its pictures are called x.png'): two.of(['c/x.png'])
    with pytest.raises(ValueError, match='no boxes for z.png; it has 3 pictures: a/x.png, b/x.png'): two.of(['z.png'])
    assert first(file('x.png').of(['renamed.png'])[0]) == 0, 'it is the only one'
    results = BoxFile([dict(image_id=i, category_id=1, bbox=[9, 0, 5, 5]) for i in (139, 'kitchen')])
    assert [first(one) for one in results.of(['000000000139.jpg', 'kitchen.png', '13.jpg'])] == [9, 9, None]


# Mistakes


def refused(match, size=(61, 94), network=None, **how):
    how = dict(boxes=BOXES, labels=LABELS) | how
    with pytest.raises(ValueError, match=match) as caught:
        stdg.predict(picture(size), network or network_of(), **how)
    assert '\n' not in str(caught.value)


def test_wrong_boxes_are_one_clear_error():
    network = network_of()
    bad = lambda i, value: [*BOXES[:i], value, *BOXES[i + 1:]]
    for match, how in (
            ('box 1: NaN or infinity', dict(boxes=bad(1, [1, 2, np.inf, 4]))),
            (r'box 2: x2 < x1 or y2 < y1 \[60.0, 5.0, 15.0, 15.0\]', dict(boxes=bad(2, [60, 5, 15, 15]))),
            ('They look like x, y, width, height', dict(boxes=[[x, y, u - x, v - y] for x, y, u, v in BOXES])),
            ('shares of the picture. Multiply', dict(boxes=(np.array(BOXES) / [94, 61, 94, 61]))),
            ('none of the 3 boxes lies in the picture of 94 x 61', dict(boxes=np.array(BOXES) + 500)),
            ('3 boxes, 2 labels and 3 scores', dict(labels=LABELS[:2])),
            ('3 boxes, 3 labels and 1 scores', dict(scores=[1])),
            ('3 boxes have no labels', dict(labels=None)),
            ('box 0: the score is nan', dict(scores=[np.nan, 1, 1])),
            ('box 2: the score is 70.* Are these per cent', dict(scores=[.9, .8, 70])),
            ("'mug', 'tabel' .did you mean 'table'.*unknown='skip'", dict(labels=['mug', 'tabel', 'cup'])),
            ('does not know: number 3. ', dict(labels=[0, 1, 3])),
            ("'mug' is to be 'cupp', .* did you mean 'cup'|did you mean 'cup'",
             dict(labels=['mug', 'cup', 'cup'], classes={'mug': 'cupp'})),
            ("labels is 'cup'; a list with one for each", dict(labels='cup')),
            ("classes is '3'; {label of the detector", dict(classes=3)),
            ("unknown is 'drop'; it is 'error' or 'skip'", dict(unknown='drop')),
            (r'boxes have the shape \(12,\)', dict(boxes=np.array(BOXES).ravel())),
            ('numbers are needed', dict(boxes=[['a', 'b', 'c', 'd']] * 3)),
            ('labels, scores and classes belong to boxes', dict(boxes=None))):
        refused(match, network=network, **how)
    detections = SimpleNamespace(xyxy=np.array(BOXES), confidence=None, class_id=np.array([0, 1, 2]), data={})
    refused('whose numbers these are cannot be known', network=network, boxes=detections, labels=None)


def test_what_can_be_done_is_done_and_said():
    network = network_of()
    boxes = [*BOXES, [200, 10, 240, 30], [5, 5, 5, 20], [80, 50, 120, 70]]
    with pytest.warns(UserWarning) as said:
        found = stdg.predict(picture(), network, boxes=boxes, labels=[*LABELS, 'cup', 'cup', 'mug'],
                             classes={'mug': 'cup'})
    assert found.boxes.tolist() == [*BOXES, [80, 50, 94, 61]]
    assert [str(one.message) for one in said] == [
        '1 boxes outside the picture are left out (box 3)', '1 boxes without an area are left out (box 4)',
        '1 boxes reach over the border and are clipped']
    with pytest.warns(UserWarning, match="1 boxes of classes .* 'mug'.*; they are left out"):
        found = stdg.predict(picture(), network, boxes=BOXES, labels=['mug', *LABELS[1:]], unknown='skip')
    assert found.boxes.tolist() == BOXES[1:]
    rng = np.random.default_rng(0)
    start, sure = rng.uniform(0, 40, (1000, 2)), rng.uniform(0, 1, 1000)
    with pytest.warns(UserWarning, match='of 1000 boxes the surest 128 are kept'):
        found = stdg.predict(picture(), network, boxes=np.hstack([start, start + 20]), labels=[0] * 1000,
                             scores=sure)
    assert len(found) == MOST and np.isclose(float(found.scores.min()), np.sort(sure)[-MOST])


@pytest.mark.parametrize('content, said', [
    ('', 'is empty'), ('{"a": 1}', 'holds no boxes: COCO results'), ('3', 'holds no boxes'),
    ('[{"image_id": 1}]', 'entry 0 is .*image_id, category_id and bbox'),
    ('{"images": [], "annotations": []}', 'it has 0 pictures'), ('[]', 'it has 0 pictures'),
    ('{"images": 1, "annotations": []}', 'each of its images needs'),
    ('{"images": [], "annotations": null}', 'are no list'),
    ('{"boxes": [[1, 2, 3, null]], "labels": ["cup"]}', 'numbers are needed'),
    ('{"boxes": [[1, 2, 30, NaN]], "labels": ["cup"]}', 'box 0: NaN'),
    ('[{"image_id": 1, "category_id": 91, "bbox": [1, 2, 30, 4]}]', 'number 91'),
    ('[{"image_id": 1, "category_id": 47, "bbox": [60, 20, 80, 50]}]', 'these look like x1, y1, x2, y2'),
    ('[{"image_id": 1, "category_id": 47, "bbox": [60, 20, -8, 50]}]', 'a negative width'),
    ('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "category_id": 4, '
     '"bbox": [1, 2, 3, 4]}], "categories": [{"id": 5, "name": "cup"}]}', 'category 4, which is not among')])
@pytest.mark.filterwarnings('ignore:class numbers are taken')
def test_a_file_that_is_something_else(tmp_path, content, said):
    (tmp_path/'f.json').write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        stdg.predict(picture(), network_of(), boxes=tmp_path/'f.json')
    assert '\n' not in str(caught.value)


# The command


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A working folder with three pictures, a network that knows where BOXES are, and their file."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'album').mkdir()
    for name in ('a.png', 'b.png', 'c.png'): Image.fromarray(picture()).save(tmp_path/'album'/name)
    network = network_of()
    network.path = tmp_path/'net.safetensors'
    network.path.write_text('the weights')
    monkeypatch.setattr(cli, 'load_predictor', lambda path, size, device, prior, suppress, _:
                        load_predictor(network, size, device, prior, suppress))
    images = [dict(id=i, file_name=name) for i, name in enumerate(('a.png', 'b.png', 'd.png'))]
    boxes = [dict(image_id=0, category_id=c, bbox=[x, y, u - x, v - y]) for c, (x, y, u, v) in enumerate(BOXES)]
    categories = [dict(id=i, name=name) for i, name in enumerate(LABELS)]
    (tmp_path/'found.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))
    return tmp_path


@pytest.fixture
def run(home, capsys):
    def run(*arguments):
        try: code = cli.main(['predict', *map(str, arguments), '-c', 'net.safetensors'])
        except SystemExit as ended: code = ended.code
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return code, said.out, said.err
    return run


def test_command_with_boxes(home, run):
    code, said, err = run('album/a.png', '--boxes', 'found.json', '-o', 'graph.json', '--draw', 'graph.svg')
    record = json.loads((home/'graph.json').read_text())
    assert (code, said, err) == (0, '', '') and (home/'graph.svg').stat().st_size
    assert sorted(one['box'] for one in record['objects']) == BOXES
    assert record['boxes'].startswith('found.json ') and record['min_object'] == 0
    assert {(record['objects'][r['subject']]['name'], r['predicate']) for r in record['relations'][:2]} == {
        ('cup', 'on'), ('traffic light', 'near')}
    code, said, _ = run('album/a.png', '--boxes', 'found.json', '--top', 1)
    assert code == 0 and len(said.splitlines()) == 1

    again = 'album', '--boxes', 'found.json', '--jsonl', 'g.jsonl'
    code, said, err = run(*again)
    lines = [json.loads(line) for line in (home/'g.jsonl').read_text().splitlines()]
    assert code == 0 and '2 pictures done' in said
    assert 'found.json has no boxes for 1 pictures, which are left out: c.png' in err
    assert [(one['file'], len(one['objects'])) for one in lines] == [('a.png', 3), ('b.png', 0)]
    assert run(*again)[0] == 0 and 'another min_object, boxes' in run('album', '--jsonl', 'g.jsonl')[2]
    code, said, err = run('album', '--jsonl', 'g.jsonl', '--boxes', 'found.json', '--all-names')
    assert code == 0, 'suppression is none in any case'


def test_command_with_boxes_that_are_wrong(home, run):
    def refused(*arguments):
        code, said, err = run(*arguments)
        assert code == 2 and said == '' and len(err.splitlines()) == 1, (code, said, err)
        return err
    one = 'album/a.png', '--boxes'
    assert 'none.json' in refused(*one, 'none.json')
    (home/'odd.json').write_text('{"boxes": [[1, 2, 30, 40]], "labels": ["mug"]}')
    assert "'mug'" in refused(*one, 'odd.json') and '--unknown skip' in refused(*one, 'odd.json')
    assert 'has the boxes of one picture; 3' in refused('album', '--boxes', 'odd.json', '--jsonl', 'x.jsonl')
    assert "no such class (did you mean 'cup'?)" in refused(*one, 'odd.json', '--classes', 'mug=cupp')
    assert 'pairs such as mug=cup' in refused(*one, 'odd.json', '--classes', 'mug')
    assert '--unknown: they are for --boxes' in refused('album/a.png', '--unknown', 'skip')
    assert 'is read here' in refused(*one, 'found.json', '-o', 'found.json')
    (home/'found.json').write_text((home/'found.json').read_text().replace('a.png', 'x.png'))
    assert 'no boxes for album/a.png; it has 3 pictures' in refused(*one, 'found.json')
    code, said, err = run(*one, 'odd.json', '--unknown', 'skip')
    assert code == 0 and err.startswith('stdg predict: 1 boxes of classes') and len(err.splitlines()) == 1
    code, said, err = run(*one, 'odd.json', '--classes', 'mug=cup', '-o', 'g.json')
    assert code == 0 and json.loads((home/'g.json').read_text())['objects'][0]['name'] == 'cup'
    assert 'there is no table' in refused('album/a.png', '--prior', '.5')
    assert '--prior' in refused('album/a.png', '--prior', 'much')


def test_runbook_with_boxes(home, monkeypatch, capsys):
    "The cells of the runbook, in this process, with other values of its parameters."
    (home/'settings.ini').touch()
    network = network_of()
    network.path = home/'net.safetensors'
    monkeypatch.setattr('stdg.inference.load_predictor', lambda path, **how: load_predictor(network, **how))
    cells = {cell.id: cell.source for cell in nbformat.read(root/'nbs'/'predict.ipynb', 4).cells}
    values = {}
    exec(cells['parameters'], values)
    values.update(pictures='album', checkpoint='net.safetensors', boxes='found.json', out='g.jsonl', show='1',
                  top=2, all_names='yes')
    for name in ('check-parameters', 'setup', 'show', 'all'): exec(cells[name], values)
    said = capsys.readouterr()
    assert 'which are left out: c.png' in said.err and 'shows objects from 0.00' in said.out
    assert 'cup on table' in said.out and '2 pictures done now, 0 failed' in said.out
    assert len((home/'g.jsonl').read_text().splitlines()) == 2


# Prior and names


def test_the_prior_can_be_switched_off_and_names_shown_again(tmp_path):
    counts = np.zeros((3, 3, 2))
    counts[0, 1] = 0, 90  # a cup is near a table, says the table
    prior = PairPrior(counts, counts.sum(2) + 1, NAMES.to_json())
    reading = Reading(relations='lines', prior=1., table=prior, suppress='hard')
    network = network_of(reading=reading.to_json(), prior=prior.to_json())
    how = dict(boxes=BOXES, labels=LABELS)
    weighed, seen = (stdg.predict(picture(), network, prior=prior, **how) for prior in (None, 0))
    first = lambda found: NAMES.predicates[found.predicates[found.pairs.tolist().index([0, 1])].argmax()]
    assert first(weighed) == 'near' and first(seen) == 'on'
    assert network.changed == {} and network.read_as(prior=0).changed == dict(prior=0)
    twice = network_of(((0, 1, 0),), reading=Reading(suppress='hard').to_json())
    fields_of = twice.model.forward
    def two_names(image):
        detection, relation = fields_of(image)
        detection = detection.clone()
        detection[:, 2] = torch.maximum(detection[:, 2], detection[:, 0] * .9)  # each cup, a light too
        return detection, relation
    twice.model.forward = two_names
    sure = lambda found: sorted(NAMES.objects[i] for i in found.labels[found.scores > .5])
    assert sure(stdg.predict(picture(), twice)) == ['cup', 'table', 'traffic light']
    assert sure(stdg.predict(picture(), twice, suppress='none')) == ['cup', 'table', 'traffic light', 'traffic light']
    given = stdg.predict(picture(), twice, boxes=[BOXES[0]] * 2, labels=['cup', 'table'])
    assert len(given) == 2, 'whoever gives two boxes means two'


def test_reading_a_format_needs_no_library():
    assert read_boxes(dict(boxes=[], labels=[])).boxes.shape == (0, 4)
    assert read_boxes(SimpleNamespace(xyxy=np.zeros((0, 4)), class_id=np.array([]), confidence=None,
                                      data={})).scores.shape == (0,)
