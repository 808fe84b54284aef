"""Pictures: what is drawn is what was given, hostile labels stay text, and everything works without
graphviz' program."""
import json
import shutil
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from stdg import draw
from stdg.draw import boxes, figures
from stdg.draw import graphs as dot
from stdg.draw.style import HIT, MISS, as_picture, class_colour, own_axes
from stdg.graph import Prediction, SceneGraph, Vocabulary

VG = Vocabulary.visual_genome()
HOSTILE = ['<script>alert(1)</script>', ']]>', '"quoted\\" & \'single\'', '\\N \\G', '$\\frac{$',
           '$x_$', '<<b>bold</b>>', 'tab\tline\nnull\x00\ud800',
           'x' * 10_000, 'ça Ω 猫']
needs_dot = pytest.mark.skipif(shutil.which('dot') is None, reason="graphviz' program dot is not "
                               "installed")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture(params=['dot', 'no dot'])
def program(request, monkeypatch):
    "With graphviz' program, and without it."
    if request.param == 'no dot': monkeypatch.setenv('PATH', '')
    elif shutil.which('dot') is None: pytest.skip("graphviz' program dot is not installed")


def scene(size=(120, 160)):
    labels = [VG.object_index(name) for name in ('cup', 'table', 'chair', 'chair')]
    truth = SceneGraph([[20, 20, 50, 50], [10, 45, 110, 100], [100, 40, 150, 110],
                        [0, 60, 20, 110]], labels, size=size, relations=[
        [0, 1, VG.predicate_index('on')], [2, 1, VG.predicate_index('near')],
        [2, 1, VG.predicate_index('near')], [3, 1, VG.predicate_index('near')]])
    predicates = np.zeros((3, 50))
    for row, (name, score) in zip(predicates, [('on', .9), ('behind', .8), ('near', .02)]):
        row[VG.predicate_index(name)] = score
    boxes = np.vstack([truth.boxes[:3].numpy() + 1, [[60, 0, 90, 20]]])
    prediction = Prediction(boxes, [*labels[:3], VG.object_index('lamp')], [.9, 1, .8, .1],
                            [[0, 1], [2, 1], [3, 1]], predicates, size)
    return np.full((*size, 3), 200, np.uint8), truth, prediction


def texts(ax): return [text.get_text() for text in ax.texts]


def parse(svg):
    "All text of an SVG, which must be well-formed and hold no script."
    root = ElementTree.fromstring(svg)
    assert not [e for e in root.iter() if str(e.tag).endswith('script')]
    return ' '.join(root.itertext())


# Images

@pytest.mark.parametrize('image', [np.zeros((120, 160, 3), np.uint8), np.full((120, 160, 3), 1.5),
                                   torch.rand(3, 120, 160), torch.rand(1, 120, 160),
                                   np.zeros((120, 160))])
def test_images_of_every_kind(image):
    assert as_picture(image).shape[:2] == (120, 160)
    draw.image_boxes(image, scene()[1], VG).figure.canvas.draw()


def test_odd_images_are_refused():
    for shape in [(2, 5, 5), (5,), (1, 3, 5, 5)]:
        with pytest.raises(ValueError, match='an image has shape'): as_picture(np.zeros(shape))


def test_a_class_keeps_its_colour():
    assert class_colour('cup') == class_colour('cup')
    colours = [class_colour(name) for name in VG.objects]
    assert len(set(colours)) > 50
    for colour in [*colours, HIT, MISS]:
        linear = np.array([c / 12.92 if c < .04 else ((c + .055) / 1.055) ** 2.4
                           for c in matplotlib.colors.to_rgb(colour)])
        assert 1.05 / (linear @ (.2126, .7152, .0722)
                       + .05) > 4.5, f'white letters cannot be read on {colour}'


def test_depth_map_leaves_missing_grey():
    depth = np.array([[0, 1], [np.nan, 3], [-1, np.inf]])
    ax = draw.depth_map(depth)
    assert ax.images[0].get_array().mask.tolist() == [[True, False], [True, False], [True, True]]
    assert matplotlib.colors.to_hex(ax.images[0].cmap.get_bad()) == '#bfbfbf'
    draw.depth_map(np.zeros((4, 4))).figure.canvas.draw()  # nothing measured at all


def test_hha_and_rgbd(tmp_path):
    hha = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    axes = draw.hha_channels(hha)
    assert np.array_equal(axes[0].images[0].get_array(), hha[..., 0] - 38.)
    assert np.array_equal(axes[2].images[0].get_array(), hha[..., 2])
    figure = draw.rgbd(hha, np.ones((12, 16)), hha)
    figure.savefig(tmp_path / 'rgbd.pdf')
    assert (tmp_path / 'rgbd.pdf').stat().st_size > 1000
    with pytest.raises(ValueError, match='HHA has shape'): draw.hha_channels(hha[..., :2])


def test_figures_do_not_pile_up():
    image, truth, prediction = scene()
    for _ in range(3): draw.side_by_side(image, truth, prediction, VG)
    assert not plt.get_fignums()


# Boxes

def test_boxes_are_where_they_are():
    image, truth, prediction = scene()
    ax = draw.image_boxes(image, truth, VG)
    drawn = [[p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()]
             for p in ax.patches if isinstance(p, Rectangle)]
    assert np.allclose(drawn, truth.boxes) and texts(ax) == ['cup', 'table', 'chair #1', 'chair #2']
    assert matplotlib.colors.to_hex(ax.patches[0].get_edgecolor()) == class_colour('cup')
    own = plt.subplots()[1]
    assert draw.image_boxes(image, prediction, VG, ax=own) is own
    assert texts(own) == ['table 1.00', 'cup 0.90', 'chair 0.80']
    assert texts(draw.image_boxes(image, prediction, VG, min_score=0, top=2)) == ['table 1.00',
        'cup 0.90']


def frames(ax):
    "Rectangles of the labels that are shown, as drawn."
    ax.figure.canvas.draw()
    return np.array([text.get_bbox_patch().get_window_extent().extents for text in ax.texts
                     if text.get_visible()]).reshape(-1, 4)


def shared(rectangles): return np.triu(boxes.overlap(rectangles, rectangles), 1).max()


@pytest.mark.parametrize('dpi', [60, 150, 300])
@pytest.mark.parametrize('n, width', [(9, 3.4), (20, 3.4), (60, 3.4), (100, 7.1), (20, 1.2)])
def test_labels_stay_inside_and_apart(n, width, dpi):
    rng = np.random.default_rng(n)
    corner = rng.uniform(0, 150, (n, 2))
    crowd = SceneGraph(np.hstack([corner, corner + rng.uniform(5, 50, (n, 2))]),
                       rng.integers(0, 150, n), [])
    ax = draw.image_boxes(np.zeros((200, 200, 3), np.uint8), crowd, VG,
                          ax=own_axes(None, width, width))
    ax.figure.set_dpi(dpi)
    shown = frames(ax)
    assert shared(shown) < 1e-6 and len(shown) > 3
    assert (shown[:, :2] >= ax.bbox.min - 1e-6).all() and (shown[:, 2:] <= ax.bbox.max + 1e-6).all()
    assert min(text.get_fontsize() for text in ax.texts) >= 6
    note = ax.figure.texts[0]
    assert note.get_visible() == (len(shown) < n)
    assert len(shown) == n or note.get_text() == f'{n - len(shown)} labels without room'


def test_a_label_is_left_out_only_where_there_is_no_room():
    rng = np.random.default_rng(0)
    taken, frame, refused = np.zeros((0, 4)), np.array([0, 0, 60, 40]), 0
    pixels = np.stack(np.meshgrid(np.arange(60), np.arange(40)), 2).reshape(-1, 2)
    for _ in range(80):
        size, low = rng.integers(3, 14, 2), rng.integers(0, 50, 2)
        box = np.array([*low, *(low + rng.integers(1, 12, 2))]).clip(0, [60, 40, 60, 40])
        place = boxes.label_place(size, box, box[None], taken, frame)
        places = np.hstack([pixels, pixels + size])
        # whole numbers: the grid misses nothing
        free = (boxes.overlap(places, taken).sum(1) == 0) & (places[:, 2:] <= frame[2:]).all(1)
        assert (place is not None) == free.any()
        refused += place is None
        if place is not None:
            assert boxes.overlap(place[None], taken).sum() == 0
            assert (place >= 0).all() and (place[2:] <= frame[2:]).all()
            taken = np.vstack([taken, place])
    assert 10 < refused < 70


def test_a_label_that_had_to_move_has_a_line_to_its_box():
    small = [[95, 95, 105, 105]] * 12
    ax = draw.image_boxes(np.zeros((200, 200, 3), np.uint8), SceneGraph(small, range(12), []), VG)
    shown = frames(ax)
    lines = [a for a in ax.get_children() if isinstance(a, matplotlib.lines.Line2D)]
    moved = [line for line in lines if line.get_visible()]
    assert len(shown) == 12 and len(lines) == 12 and 3 < len(moved) < 12
    box = np.sort(ax.transData.transform([(95, 95), (105, 105)]), 0)
    for line in moved:
        start, end = line.get_xydata()
        assert (end >= box[0] - .01).all() and (end <= box[1] + .01).all()
        frame = shown[lines.index(line)]
        assert (start >= frame[:2] - 2).all() and (start <= frame[2:] + 2).all()


def test_a_label_hides_a_large_thing_rather_than_a_small_one():
    frame, large, none = np.array([0, 0, 100, 100]), np.array([10, 10, 90, 90]), np.zeros((0, 4))
    small = np.array([10, 90, 20, 96])  # where the label of the large one would be
    assert boxes.label_place((12, 5), large, np.stack([large, small]), none, frame).tolist() == [78,
        90, 90, 95]
    above = np.array([0, 90, 100, 96])
    assert boxes.label_place((12, 5), large, np.stack([large, above, [0, 0, 100, 10]]), none,
                             frame).tolist() == [10, 85, 22, 90]


def test_graphs_of_another_vocabulary_are_refused():
    image, truth, prediction = scene()
    small = Vocabulary(['cup'], ['on'])
    for one in (truth, prediction):
        with pytest.raises(ValueError, match='vocabulary'): draw.image_boxes(image, one, small)
        with pytest.raises(ValueError, match='vocabulary'): draw.graph(one, small)
        with pytest.raises(ValueError, match='vocabulary'):
            draw.side_by_side(image, truth, prediction, small)


def test_empty_graphs_can_be_drawn(program):
    image, nothing = scene()[0], Prediction([], [], [], [], torch.zeros(0, 50))
    empty = SceneGraph([], [], [])
    for one in (nothing, empty):
        assert not texts(draw.image_boxes(image, one, VG))
        assert draw.graph(one, VG).svg() and draw.graph(one, VG).png()
    draw.side_by_side(image, empty, nothing, VG).canvas.draw()
    draw.side_by_side(image, scene()[1], nothing, VG).canvas.draw()


# Fields and offsets

def test_fields_show_target_and_prediction():
    names = Vocabulary(['cup', 'table'], ['on', 'near', '$bad'])
    target, predicted = [(torch.zeros(2, 4, 5), torch.zeros(3, 4, 5)) for _ in range(2)]
    target[0][1, 2, 3], target[1][2, 1, 1], predicted[0][1, 2, 2] = 1, 1, .7
    figure = draw.fields(torch.rand(3, 64, 80), target, predicted, names, count=1)
    shown = [ax for ax in figure.axes if len(ax.images) == 2]
    assert [ax.get_title() for ax in shown] == ['table', '$bad', '', '']
    alpha = [np.asarray(ax.images[1].get_array())[..., 3] for ax in shown]
    assert alpha[0].argmax() == 2 * 5 + 3 and alpha[2].argmax() == 2 * 5 + 2 and alpha[3].max() == 0
    chosen = draw.fields(np.zeros((64, 80)), target, predicted, names, classes=['cup'],
                         predicates=['on', 'near'])
    assert [ax.get_title() for ax in chosen.axes[:3]] == ['cup', 'on', 'near']
    figure.canvas.draw()
    with pytest.raises(ValueError, match='for 2 names'):
        draw.fields(np.zeros((64, 80)), target[::-1], predicted[::-1], names)


def test_offsets_are_drawn_in_pixels():
    teacher, student = torch.zeros(36, 6, 8), torch.zeros(36, 6, 8)
    teacher[2 * 4, 1, 2], teacher[2 * 4 + 1, 1, 2] = .5, -1  # dy, dx of the middle tap in block 2
    teacher[18:] = 9  # block 1
    figure = draw.offsets(np.zeros((96, 128, 3)), teacher, student, cells=[(1, 2)])
    arrows = figure.axes[0].collections[0]
    assert len(arrows.U) == 9 and (arrows.U[4], arrows.V[4]) == (-16, 8)
    assert not arrows.U[[0, 1, 2, 3, 5, 6, 7, 8]].any()
    assert arrows.get_offsets()[4].tolist() == [40, 24]
    assert not figure.axes[1].collections[0].U.any()
    mean = figure.axes[2].collections[0]
    assert np.allclose(mean.U.reshape(6, 8)[1, 2], -16 / 9) and len(mean.U) == 48
    first = draw.offsets(np.zeros((96, 128, 3)), teacher, student, cells=[(1, 2)], block=1)
    assert (first.axes[0].collections[0].U == 9 * 16).all()
    draw.offsets(np.zeros((96, 128, 3)), teacher, student).canvas.draw()
    with pytest.raises(ValueError, match='offsets have shape'):
        draw.offsets(np.zeros((96, 128)), teacher[:18], student)
    with pytest.raises(ValueError, match='field of 6 x 8'):
        draw.offsets(np.zeros((96, 128)), teacher, student, cells=[(6, 0)])


# Graphs

def test_graph_of_truth_and_prediction():
    _, truth, prediction = scene()
    picture = draw.graph(truth, VG)
    assert [label for label, _ in picture.nodes] == ['cup', 'table', 'chair #1', 'chair #2']
    # repeated once
    assert [(s, o, label) for s, o, label, _ in picture.edges] == [(0, 1, 'on'), (2, 1, 'near'),
        (3, 1, 'near')]
    picture = draw.graph(prediction, VG, min_score=.1)
    assert [label for label, _ in picture.nodes] == ['cup', 'table', 'chair']
    assert [label for *_, label, _ in picture.edges] == ['on 0.81', 'behind 0.64']
    assert len(draw.graph(prediction, VG, top=1).edges) == 1
    alone = draw.graph(SceneGraph(truth.boxes, truth.labels, []), VG)
    assert len(alone.nodes) == 4 and not alone.edges
    with pytest.raises(ValueError, match="engine 'neat0' is not one of"):
        draw.graph(truth, VG, engine='neat0')


def test_graph_picture_shows_itself(program, tmp_path):
    picture = draw.graph(scene()[1], VG)
    text = parse(picture._repr_svg_())
    assert all(word in text for word in ('cup', 'table', 'chair #1', 'chair #2', 'on', 'near'))
    assert picture._repr_png_().startswith(b'\x89PNG') and picture.source.startswith('digraph')
    for kind, magic in (('svg', b'<?xml'), ('png', b'\x89PNG'), ('pdf', b'%PDF')):
        assert picture.save(tmp_path / 'new' / f'graph.{kind}').read_bytes().startswith(magic)
    with pytest.raises(ValueError, match='saved as .svg, .pdf or .png'):
        picture.save(tmp_path / 'graph')


def wheel(n=9):
    "A hub and its rim, tied in both directions and twice."
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    centre = np.vstack([[100, 100],
                        np.column_stack([100 + 80 * np.cos(angle), 100 + 80 * np.sin(angle)])])
    rows = [row for i in range(1, n + 1) for row in ([0, i, i], [i, 0, i + 1], [0, i, i + 9],
                                                     [i, i % n + 1, 30])]
    return SceneGraph(np.hstack([centre - 10, centre + 10]), range(20, 21 + n), rows)


def test_nothing_in_a_graph_hides_anything(program):
    picture = draw.graph(wheel(), VG)
    layout = picture.layout
    assert len(layout.nodes) == 10 and len(layout.labels) == len(layout.curves) == 36
    assert shared(np.vstack([layout.nodes, layout.labels])) < .1
    corners = np.vstack([layout.nodes.reshape(-1, 2), layout.labels.reshape(-1, 2), *layout.curves])
    assert (corners >= 0).all() and (corners <= layout.size).all()
    for (s, o, *_), curve in zip(picture.edges, layout.curves):
        for node, end in ((s, curve[0]), (o, curve[-1])):
            (x1, y1, x2, y2), (x, y) = layout.nodes[node], end
            assert np.hypot(max(x1 - x, 0, x - x2),
                            max(y1 - y, 0, y - y2)) < 4, 'an edge begins and ends at its nodes'


@pytest.mark.parametrize('size', [(2, 2), (7, 3), (12, 12)])
def test_a_graph_fits_its_axes_and_letters_fit_their_nodes(program, size):
    picture = draw.graph(wheel(), VG)
    ax = picture.draw(plt.subplots(figsize=size)[1])
    ax.figure.canvas.draw()
    patches = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    nodes = np.array([p.get_window_extent().extents for p in patches])
    assert (nodes[:, :2] >= ax.bbox.min - 1).all() and (nodes[:, 2:] <= ax.bbox.max + 1).all()
    for node, text in zip(nodes, ax.texts):
        letters = text.get_window_extent().extents
        assert (letters[:2] >= node[:2] - 1).all() and (letters[2:] <= node[2:] + 1).all()
    sizes = {round(text.get_fontsize() / dot.NODE, 3) for text in ax.texts[:10]}
    assert len(sizes) == 1 and sizes.pop() <= 1


@needs_dot
def test_no_text_of_a_label_reaches_dot():
    picture = draw.graph(SceneGraph([[0, 0, 9, 9]] * 2, [0, 1], [[0, 1, 0]]),
                         Vocabulary(['secret', 'hidden'], ['unseen']))
    assert not any(word in dot._rooms(picture).source for word in ('secret', 'hidden', 'unseen'))
    assert 'secret' in picture.source


def test_without_dot_left_is_left(monkeypatch):
    monkeypatch.setenv('PATH', '')
    picture = draw.graph(scene()[1], VG)
    ax = picture.draw()
    assert sorted(texts(ax)) == sorted([label for label, _ in picture.nodes]
                                       + [label for *_, label, _ in picture.edges])
    assert len([p for p in ax.patches if isinstance(p, FancyArrowPatch)]) == len(picture.edges)
    middle = picture.layout.nodes[:, [0, 2]].mean(1)
    assert middle[3] < middle[1] < middle[2]  # left in the picture, left in the graph


def test_objects_at_one_place_and_self_relations(program):
    graph = SceneGraph([[0, 0, 10, 10]] * 5, range(5), [[0, 0, 1], [0, 1, 2], [0, 1, 3], [1, 0, 2]])
    picture = draw.graph(graph, VG)
    parse(picture.svg())
    ax = picture.draw()
    ax.figure.canvas.draw()
    assert np.isfinite([text.get_position() for text in ax.texts]).all()
    assert shared(np.vstack([picture.layout.nodes, picture.layout.labels])) < .1


@pytest.mark.filterwarnings('ignore:Glyph')  # the default font has no such letters
@pytest.mark.parametrize('label', HOSTILE)
def test_hostile_labels_stay_text(program, label):
    image = np.zeros((80, 80, 3), np.uint8)
    vocabulary = Vocabulary([label, 'cup'], [label + ' ', 'on'])
    truth = SceneGraph([[0, 0, 30, 30], [40, 40, 70, 70]], [0, 1], [[0, 1, 0], [1, 0, 1]])
    prediction = Prediction(truth.boxes, [0, 1], [.9, .9], [[0, 1]], [[.8, .1]])
    for one in (truth, prediction):
        picture = draw.graph(one, vocabulary)
        svg = picture.svg()
        text = parse(svg)
        assert '<script' not in svg and ']]>' not in svg and 'xxxx' * 20 not in svg
        assert len(picture.source) < 3000
        assert len(picture.nodes) == 2 and picture.png().startswith(b'\x89PNG')
        if picture.has_program() and len(label) < 28 and label.isprintable():
            assert label in text.replace('\xa0', ' ')
    draw.image_boxes(image, prediction, vocabulary).figure.canvas.draw()
    draw.side_by_side(image, truth, prediction, vocabulary).canvas.draw()
    draw.fields(image, *[(torch.rand(2, 5, 5), torch.rand(2, 5, 5))] * 2, vocabulary).canvas.draw()


def test_side_by_side_tells_hits_from_misses(program, tmp_path):
    image, truth, prediction = scene()
    figure = draw.side_by_side(image, truth, prediction, VG, min_score=.05)
    hex = matplotlib.colors.to_hex
    colours = [{text.get_text(): hex(text.get_bbox_patch().get_facecolor()) for text in ax.texts}
               for ax in figure.axes[:2]]
    assert colours[0] == {'cup': HIT, 'table': HIT, 'chair #1': HIT, 'chair #2': MISS}
    assert colours[1] == {'table 1.00': HIT, 'cup 0.90': HIT, 'chair 0.80': HIT, 'lamp 0.10': MISS}
    left, right = figures._compare(truth, prediction, .05, 12)
    assert left[3] == [HIT, MISS, MISS]  # on; near, near
    assert right[3] == [HIT, MISS]  # on; behind
    assert [text.get_text() for text in figure.legends[0].texts] == ['in both', 'in one only']
    for kind in ('png', 'pdf', 'svg'):
        figure.savefig(tmp_path / f'pair.{kind}')
        assert (tmp_path / f'pair.{kind}').stat().st_size > 5000


# Loss curves

def test_loss_curves_from_file_and_records(tmp_path):
    records = [dict(step=s, stage=stage, loss=2. / (s + 1), heatmap=1., lr=.1,
                    **({'teaching': .5} if stage == 'student' else {}))
               for stage in ('teacher', 'student') for s in range(60)]
    records.insert(3, dict(stage='teacher', event='validation', AP50=.2))
    path = tmp_path / 'log.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    for log in (path, str(path), records):
        figure = draw.loss_curves(log)
        assert [ax.get_title() for ax in figure.axes[:3]] == ['loss', 'heatmap', 'teaching']
        assert [t.get_text() for t in figure.axes[0].get_legend().texts] == ['teacher', 'student']
        assert np.allclose(figure.axes[0].lines[0].get_ydata(), [2. / (s + 1) for s in range(60)])
    figure.savefig(tmp_path / 'loss.png')
    draw.loss_curves([dict(step=0, loss=1.)]).canvas.draw()
    draw.loss_curves([dict(step=0, stage='$\\frac{$', loss=1.)] * 2).canvas.draw()


def test_broken_logs(tmp_path):
    path = tmp_path / 'log.jsonl'
    with pytest.raises(FileNotFoundError, match='log.jsonl: there is no such log'):
        draw.loss_curves(path)
    path.write_text('')
    with pytest.raises(ValueError, match='log.jsonl: no record has a step and a loss'):
        draw.loss_curves(path)
    path.write_text('{"step": 0, "loss": 1}\n{"step"')
    with pytest.raises(ValueError, match='log.jsonl, line 2: not JSON'): draw.loss_curves(path)
