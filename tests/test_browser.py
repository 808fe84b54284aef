"""The explorer in JupyterLab and voila, in a real browser: what is dragged, hovered, clicked, typed
and uploaded changes what is seen.

Skipped where there is no Chromium with its driver. A picture of each state goes to the folder
$STDG_SCREENSHOTS, if that is set."""
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
from sample_network import by_heart
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from stdg.datasets.visual_genome import Database, write_annotations, write_images
from stdg.deform import sampling_points
from stdg.explore.compare import comparison_record
from stdg.explore.networks import load_network
from stdg.explore.scene import database_scene, read_scene, sampled
from stdg.explore.snapshot import BOTH, choose_shown
from stdg.graph import SceneGraph, Vocabulary
from stdg.pairs import FRAMES
from stdg.reading import PairPrior, Reading, line_cells
from stdg.rooms import build as rooms

here = Path(__file__).parent.parent
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
driver_path = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (chromium and driver_path), reason='no Chromium with '
                                'chromedriver is here: apt-get install chromium chromium-driver')

HOSTILE = ['<script>window.hacked=1</script>', '"><img src=x onerror="window.hacked=1">',
           ']]></title><script>window.hacked=1</script>', '\u202e\u200fthgir \u05d0\u05d1',
           'a' * 10_000, "'); window.hacked=1; ('",
           '</text><svg onload=window.hacked=1>', '${window.hacked=1}', '&lt;b&gt; &amp;',
           '$\\frac{1}{0}$']


# What is explored: three rooms that a network knows by heart, but for one relation that it misses,
# one that it makes up, and one that holds

def _altered(scene):
    """The truth less its last relation, with one more that holds, if there is one, and one that
    does not."""
    rows = scene.truth.relations.tolist()
    known = {tuple(row) for row in rows} | {tuple(row) for row in scene.holds.tolist()}
    taken = {frozenset(row[:2]) for row in rows}
    free = lambda row: frozenset(row[:2]) not in taken
    holds, n = [row for row in scene.holds.tolist() if free(row)][:1], len(scene.truth)
    taken |= {frozenset(row[:2]) for row in holds}
    wrong = next([s, o, 0] for s in range(n) for o in range(n) if s != o and free([s, o])
                 and (s, o, 0) not in known)
    return SceneGraph(scene.truth.boxes, scene.truth.labels, [*rows[:-1], *holds, wrong],
                      scene.truth.size)


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A project folder with rooms, a network and the runbook; and rooms whose classes have hostile
    names, with a network for them."""
    folder = tmp_path_factory.mktemp('project')
    (folder/'settings.ini').touch()
    rooms.make_rooms(folder/'data'/'rooms', 0, 0, 3, size=96, workers=1, seed=3)
    database = Database(folder/'data'/'rooms')
    scenes = [database_scene(database, i) for i in range(3)]
    network = by_heart(scenes, [_altered(scene) for scene in scenes], database.vocabulary, 96)
    network.save(folder/'runs'/'tests'/'student.safetensors',
                 vocabulary=database.vocabulary.to_json(), size=96)
    asks = by_heart(scenes, [scene.truth for scene in scenes], database.vocabulary, 96, relation='pairs')
    asks.save(folder/'runs'/'pairs'/'student.safetensors', vocabulary=database.vocabulary.to_json(), size=96,
              reading=Reading('pairs').to_json())
    names = database.vocabulary
    strange = Vocabulary([f'{HOSTILE[i % 10]}{i // 10 or ""}' for i in range(len(names.objects))],
                         HOSTILE[:len(names.predicates)])
    bad = folder/'data'/'strange'
    write_images(bad, [dict(image=scene.picture, image_id=i + 1) for i, scene in enumerate(scenes)],
                 3, 96)
    write_annotations(bad, [scene.truth for scene in scenes], np.full(3, 2), strange, 96)
    n, p = len(strange.objects), len(strange.predicates)
    half = PairPrior(np.full((n, n, p), 9), np.full((n, n), 18), strange.to_json())
    network.save(folder/'runs'/'strange <b>&\u202e'/'student.safetensors',
                 vocabulary=strange.to_json(), size=96, prior=half.to_json(),
                 reading=Reading('lines', prior=1., table=half).to_json())
    return folder


# A server and a browser, both ended whatever happens

def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _family(pid):
    "Numbers of a process and of all that it has started."
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: parents[int(stat.parent.name)] = int(stat.read_text().rsplit(')', 1)[1].split()[1])
        except (OSError, IndexError): pass
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def listening(pids):
    "Addresses (hexadecimal, as /proc/net/tcp has them) at which these processes listen."
    inodes, found = set(), []
    for pid in pids:
        for fd in Path(f'/proc/{pid}/fd').glob('*'):
            try: inodes.add(os.readlink(fd))
            except OSError: pass
    for table in ('tcp', 'tcp6'):
        for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
            address, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == '0A' and f'socket:[{inode}]' in inodes: found.append(address.split(':')[0])
    return found


class Server:
    "JupyterLab or voila with a home of its own, at 127.0.0.1."
    def __init__(self, folder, home, *command):
        self.port = _free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        settings = home/'settings'/'@jupyterlab'/'apputils-extension'
        settings.mkdir(parents=True)
        (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", '
            '"checkForUpdates": false}')
        own = dict(HOME=home, JUPYTER_CONFIG_DIR=home/'config', JUPYTER_DATA_DIR=home/'data',
                   JUPYTERLAB_SETTINGS_DIR=home/'settings',
                   JUPYTERLAB_WORKSPACES_DIR=home/'workspaces',
                   JUPYTER_RUNTIME_DIR=home/'runtime', IPYTHONDIR=home/'ipython',
                   PYTHONPATH=os.pathsep.join(filter(None,
                                                     [str(here), os.environ.get('PYTHONPATH')])),
                   ANYWIDGET_HMR='0')
        self.log = open(home/'server.log', 'w')
        self.process = subprocess.Popen([sys.executable, '-m',
                                         *(part.format(port=self.port) for part in command)],
                                        cwd=folder, env={**os.environ,
                                                         **{k: str(v) for k, v in own.items()}},
                                        stdout=self.log, stderr=subprocess.STDOUT,
                                        start_new_session=True)

    def wait(self, path, seconds=60):
        for _ in range(5 * seconds):
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            try: return urllib.request.urlopen(self.url + path, timeout=2)
            except OSError: time.sleep(.2)
        raise TimeoutError(Path(self.log.name).read_text()[-3000:])

    def stop(self):
        family = _family(self.process.pid)
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: pass
        for pid in family:
            try: os.kill(pid, 9)
            except ProcessLookupError: pass
        self.process.wait()
        self.log.close()


class Page:
    "A browser and what the tests do with it."
    def __init__(self, home):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ('headless=new', 'no-sandbox', 'disable-gpu', 'window-size=1360,1500',
                         'no-first-run', 'disable-sync', 'disable-background-networking',
                         'disable-component-update', 'disable-quic',
                         'disable-dev-shm-usage', 'force-device-scale-factor=1',
                         f'user-data-dir={home}'): options.add_argument(f'--{argument}')
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        self.driver = webdriver.Chrome(options=options,
                                       service=webdriver.ChromeService(driver_path))
        self.shots = Path(os.environ['STDG_SCREENSHOTS']) if os.environ.get(
            'STDG_SCREENSHOTS') else home
        self.shots.mkdir(parents=True, exist_ok=True)

    def find(self, css): return self.driver.find_elements('css selector', css)
    def one(self, css): return self.wait(lambda: self.find(css), css)[0]
    def run(self, script, *arguments): return self.driver.execute_script(script, *arguments)
    def actions(self): return ActionChains(self.driver, duration=40)
    def shot(self, name): self.driver.save_screenshot(str(self.shots/f'{name}.png'))

    def wait(self, ready, what='', seconds=60):
        return WebDriverWait(self.driver, seconds, .1,
                             [StaleElementReferenceException, IndexError]).until(lambda _: ready(),
            what)

    def show(self):
        self.run("document.querySelector('.stdg-explorer').closest('.jp-Cell').scrollIntoView()")
    def pixels(self, css):
        return np.asarray(Image.open(io.BytesIO(self.one(css).screenshot_as_png)).convert(
            'RGB')).astype(int)
    def keys(self, css):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => "
                        "e.dataset.key)", css)
    def painted(self):
        return int(self.run("return document.querySelector('.stdg-explorer').dataset.painted"))
    def text(self, css):
        return self.run("return document.querySelector(arguments[0]).textContent", css)
    def attribute(self, css, name):
        return self.run("return document.querySelector(arguments[0]).getAttribute(arguments[1])",
                        css, name)

    def hover(self, css, x=.5, y=.5, click=False):
        """Move the mouse to a place in the first such element, as shares of its width and height.
        (Selenium's own way scrolls the page.)"""
        self.one(css)
        left, top, width, height = self.run(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.x, "
            "r.y, r.width, r.height]", css)
        actions = self.actions()
        actions.w3c_actions.pointer_action.move_to_location(round(left + x * width),
            round(top + y * height))
        (actions.click() if click else actions).perform()

    def away(self): self.hover('.stdg-readout')

    def type(self, label, value):
        "Write a number into the read-out of a slider."
        readout = self.control(label, '.widget-readout')
        readout.click()
        self.actions().key_down(Keys.CONTROL).send_keys('a').key_up(Keys.CONTROL).send_keys(
            str(value), Keys.ENTER).perform()
        self.wait(lambda: float(self.control(label, '.widget-readout').text) == value,
                  f'{label}: {value}')
        self.settle()

    def control(self, label, css):
        "The part `css` of the control that is so called."
        return next(box.find_element('css selector', css)
                    for box in self.find('.jupyter-widgets:has(> label)')
                    if box.find_element('css selector', 'label').text == label)

    def choose(self, label, text):
        before, picker = self.painted(), Select(self.control(label, 'select'))
        if picker.first_selected_option.text == text: return
        picker.select_by_visible_text(text)
        self.wait(lambda: self.painted() > before, f'{label}: {text}')

    def settle(self): time.sleep(.25)
    def unit(self): return float(self.attribute('.stdg-image', 'viewBox').split()[2]) / 96

    def problems(self):
        "What the browser has complained about since it was last asked."
        return [entry['message'] for entry in self.driver.get_log('browser')
                if entry['level'] == 'SEVERE' and 'favicon' not in entry['message']]


@pytest.fixture(scope='module')
def lab(work, tmp_path_factory):
    server = Server(work, tmp_path_factory.mktemp('home'), 'jupyterlab', '--allow-root',
                    '--no-browser', '--ip=127.0.0.1', '--port={port}', '--ServerApp.port_retries=0',
                    '--ServerApp.token=secret', f'--ServerApp.root_dir={work}')
    try:
        server.wait('/api/status?token=secret')
        yield server
    finally: server.stop()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp('browser'))
    try: yield page
    finally: page.driver.quit()


def _notebook(work, name, **parameters):
    "The runbook with other values in its parameters cell, as a new notebook of the project."
    notebook = nbformat.read(here/'nbs'/'explore.ipynb', 4)
    cell = next(cell for cell in notebook.cells if cell.id == 'parameters')
    cell.source += ''.join(f'\n{key} = {value!r}' for key, value in parameters.items())
    nbformat.write(notebook, work/name)


def _run_all(page, lab, name):
    page.driver.get(f'{lab.url}/lab/tree/{name}?token=secret&reset')
    page.one('.jp-NotebookPanel-toolbar')
    page.wait(lambda: '| Idle' in page.one('#jp-main-statusbar').text, 'the kernel is idle')
    page.actions().key_down(Keys.CONTROL).send_keys('b').key_up(Keys.CONTROL).perform()
    _menu(page, 'Run', 'Run All Cells')
    page.one('.stdg-explorer[data-painted]')
    page.show()
    page.settle()


def _menu(page, *path):
    "Choose in JupyterLab's menus."
    next(item for item in page.find('.lm-MenuBar-item') if item.text == path[0]).click()
    for depth, text in enumerate(path[1:], 1):
        item = page.wait(lambda: next((item for menu in page.find('.lm-Menu')[depth - 1:depth]
                                       for item in menu.find_elements('css selector',
            '.lm-Menu-item') if item.text.startswith(text)), None), text)
        page.actions().move_to_element(item).click().perform()


@pytest.fixture(scope='module')
def open_explorer(work, lab, page):
    "The runbook, run to its end in JupyterLab."
    _notebook(work, 'explore.ipynb', checkpoints=[str(work/'runs'/run/'student.safetensors')
                                                  for run in ('tests', 'pairs')],
              data='rooms', show='prediction')
    _run_all(page, lab, 'explore.ipynb')
    return page


@pytest.fixture(scope='module')
def known(work):
    "What Python computes of the first room: scene, reading, record."
    scene = database_scene(Database(work/'data'/'rooms'), 0)
    reading = read_scene(scene, *load_network(work/'runs'/'tests'/'student.safetensors'))
    return scene, reading, comparison_record(reading.predictions['sgdet'], reading.vocabulary,
                                             scene.truth, scene.holds, 'sgdet',
                                             (reading.seen['sgdet'], reading.truth))


# The tests, in the order of a visit

def test_shows_what_python_has_computed(open_explorer, known):
    page, (scene, _, graph) = open_explorer, known
    objects, triplets = choose_shown(graph)
    assert set(page.keys('.stdg-box')) == set(objects)
    assert page.keys('.stdg-edge') == list(triplets) == page.keys('.stdg-table tr')
    assert len(triplets) >= 4
    assert set(page.keys('.stdg-node')) == {t[end] for t in triplets.values() for end in 'so'}
    page.shot('prediction')
    picture = page.pixels('.stdg-image')
    assert picture.std() > 20
    assert page.run(
        "return document.querySelector('.stdg-image').getAttribute('aria-label')").startswith(
        f'RGB of {scene.name} with {len(objects)} predicted boxes: ')
    judged = page.run("return [...document.querySelectorAll('td.stdg-judged')].map(e => e.textContent)")
    assert judged == ['✓ true' if t['holds'] else '✕ not true' for t in triplets.values()]
    assert set(judged) == {'✓ true', '✕ not true'} and page.text('.stdg-precision') == ', '.join(
        f'P@{k} {100 * part:.0f} %' for k, part in zip((5, 10), graph['precision']))
    assert page.control('reading', 'select').get_attribute('disabled'), 'it is read as published'
    assert not page.problems()


def test_listens_on_loopback_alone(open_explorer, lab):
    addresses = listening(_family(lab.process.pid))
    assert len(addresses) > 5, 'the server and the sockets of its kernel'
    assert set(addresses) <= {'0100007F', '00000000000000000000000001000000',
                              '0000000000000000FFFF00000100007F'}


def test_a_slider_is_dragged(open_explorer, known):
    page = open_explorer
    before, pixels, places = page.keys('.stdg-edge'), page.pixels('.stdg-graph'), page.run(PLACES)
    handle = page.control('at most', '.noUi-handle')
    page.actions().click_and_hold(handle).move_by_offset(-int(page.control('at most',
        '.noUi-base').size['width'] * .18), 0).release().perform()
    page.wait(lambda: len(page.keys('.stdg-edge')) < len(before), 'fewer edges')
    page.settle()
    after = page.keys('.stdg-edge')
    assert after == before[:len(after)]
    assert page.control('at most', '.widget-readout').text == str(len(after))
    assert (page.pixels('.stdg-graph') != pixels).any()
    assert places | page.run(PLACES) == places, 'no node has moved'
    page.shot('fewer')
    page.type('at most', 10)
    assert page.keys('.stdg-edge') == before
    handle = page.control('triplets ≥', '.noUi-handle')
    page.actions().click_and_hold(handle).move_by_offset(300, 0).release().perform()
    page.wait(lambda: not page.keys('.stdg-edge'), 'no triplet has a score of 1')
    page.type('triplets ≥', .05)
    assert page.keys('.stdg-edge') == before
    page.away()


PLACES = ("return Object.fromEntries([...document.querySelectorAll('.stdg-node')].map(e => "
          "[e.dataset.key, e.querySelector('rect').getAttribute('x') + ' ' + "
          "document.querySelector('.stdg-graph').getAttribute('viewBox')]))")


def lit(page, css):
    return set(page.run("return [...document.querySelectorAll(arguments[0])].filter(e => "
                        "e.classList.contains('stdg-lit')).map(e => e.dataset.key)", css))


def test_hovering_a_node_lights_its_box_its_rows_and_its_field(open_explorer, known):
    page, (_, reading, graph) = open_explorer, known
    pixels, key = page.pixels('.stdg-image'), page.keys('.stdg-node')[0]
    page.hover('.stdg-node')
    page.wait(lambda: lit(page, '.stdg-box') == {key}, 'its box')
    mine = {k for k, t in choose_shown(graph)[1].items() if key in (t['s'], t['o'])}
    assert lit(page, '.stdg-table tr') == mine == lit(page, '.stdg-edge')
    page.settle()
    name = reading.vocabulary.objects[graph['objects'][int(key[1:])]['c']]
    assert page.text('.stdg-readout') == f'heat-map of {name}'
    assert (abs(page.pixels('.stdg-image') - pixels).max(2) > 30).mean() > .2
    page.shot('node')
    page.away()
    page.wait(lambda: not lit(page, '[data-key]'), 'nothing is lit')


def test_hovering_an_edge_shows_the_cells_that_voted(open_explorer, known):
    page, (_, reading, graph) = open_explorer, known
    triplet = choose_shown(graph)[1][page.keys('.stdg-edge')[0]]
    page.hover('.stdg-edge text')
    page.wait(lambda: page.find('.stdg-vote'), 'votes')
    assert lit(page, '.stdg-box') == {triplet['s'], triplet['o']} == lit(page, '.stdg-node')
    assert page.text(
        '.stdg-readout') == f"confidence of {reading.vocabulary.predicates[triplet['p']]}"
    unit, (x1, y1, x2, y2) = page.unit(), graph['objects'][int(triplet['s'][1:])]['box']
    x, y = (float(page.attribute('.stdg-vote circle', name)) / unit for name in ('cx', 'cy'))
    assert x1 <= x <= x2 and y1 <= y <= y2, 'it points at the subject'
    page.settle()
    page.shot('edge')
    page.away()


def test_a_row_is_linked_too(open_explorer, known):
    page = open_explorer
    page.hover('.stdg-table tr:nth-child(2)')
    page.wait(lambda: lit(page, '.stdg-edge') == {page.keys('.stdg-edge')[1]}, 'its edge')
    page.away()


def test_a_pin_stays_while_a_slider_moves_and_escape_clears_it(open_explorer):
    page = open_explorer
    page.hover('.stdg-node', click=True)
    key = page.keys('.stdg-node')[0]
    page.away()
    page.wait(lambda: page.keys('.stdg-node.stdg-pinned') == [key]
              and lit(page, '.stdg-box') == {key}, 'pinned')
    page.type('at most', 11)
    assert page.keys('.stdg-box.stdg-pinned') == [key]
    assert page.one('.stdg-node.stdg-pinned').get_attribute('aria-pressed') == 'true'
    page.shot('pinned')
    page.one('.stdg-node').send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.find('.stdg-pinned'), 'cleared')
    page.type('at most', 10)


def test_the_keyboard_alone(open_explorer):
    page = open_explorer
    focused = lambda: page.run("const d = document.activeElement.dataset; return [d.part || "
                               "document.activeElement.getAttribute('class'), d.key]")
    press = lambda key: page.driver.switch_to.active_element.send_keys(key)
    page.run("document.querySelector('.stdg-image').focus()")
    parts = []
    for _ in range(4):
        press(Keys.TAB)
        parts.append(focused()[0])
    assert parts == ['box', 'edge', 'node', 'row prediction'] or parts == ['box', 'node', 'edge',
        'row prediction']
    press(Keys.ARROW_DOWN)
    part, key = focused()
    assert key == page.keys('.stdg-table tr')[1] and lit(page, '.stdg-edge') == {key}
    press(Keys.ENTER)
    assert page.keys('.stdg-edge.stdg-pinned') == [key]
    press(Keys.ENTER)
    assert not page.find('.stdg-pinned')
    page.run("document.querySelector('.stdg-node').focus()")
    first, seen = focused()[1], set()
    for arrow in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_LEFT) * 2:
        press(arrow)
        seen.add(focused()[1])
    assert len(seen - {first}) >= 2 and seen <= set(page.keys('.stdg-node'))
    press(Keys.SPACE)
    assert len(page.find('.stdg-node.stdg-pinned')) == 1
    page.shot('keyboard')
    press(Keys.ESCAPE)
    assert not page.find('.stdg-pinned')
    page.run("document.activeElement.blur()")


def _point(page, x, y, size=96):
    "Move the mouse to a pixel of the picture."
    page.hover('.stdg-image', x / size, y / size)


def test_depth_is_read_in_metres(open_explorer, known):
    page, (scene, *_) = open_explorer, known
    pixels = page.pixels('.stdg-image')
    page.choose('picture', 'depth')
    _point(page, 30.5, 60.5)
    page.wait(lambda: page.text('.stdg-readout').startswith('x 30, y 60: depth '), 'metres')
    metres = float(page.text('.stdg-readout').split(': depth ')[1].split(' m')[0])
    assert abs(metres - scene.depth[60, 30]) <= .0051
    assert (page.pixels('.stdg-image') != pixels).any(2).mean() > .5
    page.shot('depth')
    for layer in ('angle with gravity', 'height above ground', 'horizontal disparity'):
        page.choose('picture', layer)
        _point(page, 30.5, 60.5)
        page.wait(lambda: f'x 30, y 60: {layer} ' in page.text('.stdg-readout'), layer)
        value = float(page.text('.stdg-readout').split(layer)[1].split()[0])
        channel = ('angle with gravity', 'height above ground', 'horizontal disparity').index(layer)
        assert abs(value - (float(scene.hha[60, 30, channel]) - (38 if channel == 0 else 0))) <= .51
    page.shot('hha')
    page.choose('picture', 'RGB')


def test_sampling_points_are_those_of_the_network(open_explorer, known):
    page, (_, reading, _) = open_explorer, known
    page.choose('over it', 'sampling points')
    row, column = 5, 3
    _point(page, 8 * column + 4.5, 8 * row + 4.5)
    page.wait(lambda: page.find('.stdg-teacher'), 'points')
    page.settle()
    student = page.run("return [...document.querySelectorAll('circle.stdg-student')].map(e => "
                       "['cx', 'cy'].map(k => Number(e.getAttribute(k))))")
    places = sampling_points(torch.from_numpy(reading.offsets['student'][1, :18])[None])[0, :, :,
        row, column].flip(1)
    assert np.allclose(student, page.unit() * reading.frame.pixels(places.numpy() + .5), atol=.3)
    assert len(page.find('.stdg-teacher')) == 9
    assert page.text('.stdg-readout').endswith('cells apart')
    page.shot('sampling')
    page.run("document.querySelector('.stdg-image').focus()")
    before = page.text('.stdg-readout')
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.text('.stdg-readout') != before, 'the keyboard moves the place')
    page.run("document.activeElement.blur()")


def test_fields_and_vectors(open_explorer, known):
    page, (_, reading, graph) = open_explorer, known
    page.choose('over it', 'confidence')
    page.away()
    page.choose('predicate', 'on')
    on = reading.vocabulary.predicate_index('on')
    assert page.text('.stdg-readout') == 'confidence of on'
    assert page.keys('.stdg-edge') == list(choose_shown(graph, predicate=on)[1])
    page.shot('confidence')
    page.choose('over it', 'vectors')
    assert len(page.find('.stdg-vote')) == min(150, (reading.confidence[on] > .1).sum())
    page.shot('vectors')
    page.choose('predicate', 'any')
    page.choose('over it', 'class heat-map')
    name = reading.vocabulary.objects[int(reading.predictions['sgdet'].labels[0])]
    page.choose('class', name)
    assert page.text('.stdg-readout') == f'heat-map of {name}'
    page.shot('heat-map')
    page.choose('over it', 'nothing')


def _looks(page, who):
    "The sampling points that are drawn of a network: x, y in pixels of the picture, attention, frame."
    return page.run('''return [...document.querySelectorAll(`.stdg-look.stdg-${arguments[0]}`)].map(e => {
        const box = e.getBBox(), u = arguments[1];
        return [(box.x + box.width / 2) / u, (box.y + box.height / 2) / u, Number(e.dataset.attention),
                e.getAttribute('class').split('stdg-of-')[1], box.width]; })''', who, page.unit())


def test_an_edge_shows_where_a_head_of_pairs_looks(open_explorer, known, work):
    page, (scene, *_) = open_explorer, known
    before = page.keys('.stdg-edge')
    options = lambda label: [option.text for option in Select(page.control(label, 'select')).options]
    page.choose('over it', 'vectors')
    page.choose('network', 'pairs/student')
    page.wait(lambda: options('over it') == ['nothing', 'class heat-map', 'sampling points'], 'what there is')
    page.settle()
    assert options('kernel') == ['detection, 1st', 'detection, 2nd'] and not page.find('.stdg-vote')
    assert 'asked about pairs of boxes' in page.text('.stdg-message')
    reading = read_scene(scene, *load_network(work/'runs'/'pairs'/'student.safetensors'))
    record = comparison_record(reading.predictions['sgdet'], reading.vocabulary, scene.truth)
    assert page.keys('.stdg-edge') == list(choose_shown(record)[1])
    page.hover('.stdg-edge text')
    page.wait(lambda: page.find('.stdg-look'), 'points')
    page.settle()
    page.shot('pair')
    key = page.keys('.stdg-edge.stdg-lit')[0]
    triplet = record['triplets'][int(key[1:])]
    expected = sampled(reading, reading.seen['sgdet'], [[triplet['s'], triplet['o']]])
    for who in ('student', 'teacher'):
        drawn = _looks(page, who)
        assert [frame for *_, frame, _ in drawn] == [frame for frame in FRAMES for _ in range(4)]
        numbers = np.array([point[:3] for point in drawn])
        assert np.allclose(numbers[:, :2], expected[who][0, ..., :2].reshape(-1, 2), atol=.08)
        assert np.allclose(numbers[:, 2], expected[who][0, ..., 2].ravel(), atol=6e-5)
        most, least = numbers[:, 2].argmax(), numbers[:, 2].argmin()
        assert drawn[most][4] > 2 * drawn[least][4], 'what counts is large'
    assert len(page.find('.stdg-apart')) == 16 and not page.find('.stdg-faded') and len(page.find('.stdg-asked')) == 2
    said = page.text('.stdg-readout')
    assert said.startswith('● student, ◆ teacher: ') and said.endswith('looks at subjectobjectunionline')
    apart = np.linalg.norm((expected['student'] - expected['teacher'])[0, ..., :2], axis=-1) / 8
    weight = expected['teacher'][0, ..., 2]
    assert abs(float(said.split(': ')[1].split()[0]) - (apart * weight).sum() / weight.sum()) < .02
    page.away()
    page.wait(lambda: not page.find('.stdg-look'), 'gone')
    page.choose('show', 'truth')
    page.hover('.stdg-table tr:nth-child(2)')
    page.wait(lambda: page.find('.stdg-look'), 'points of a true pair')
    s, o, _ = np.unique(scene.truth.relations, axis=0)[1]
    expected = sampled(reading, reading.truth, [[s, o]])['student'][0]
    assert np.allclose([point[:2] for point in _looks(page, 'student')], expected[..., :2].reshape(-1, 2), atol=.08)
    page.away()
    page.choose('over it', 'sampling points')
    _point(page, 60.5, 44.5)
    page.wait(lambda: len(page.find('.stdg-student')) == len(page.find('.stdg-teacher')) == 9, 'cells of detection')
    page.choose('over it', 'nothing')
    page.away()
    page.choose('show', 'prediction')
    page.choose('network', 'tests/student')
    page.wait(lambda: len(options('over it')) == 5 and len(options('kernel')) == 4, 'everything again')
    assert page.keys('.stdg-edge') == before and page.attribute('.stdg-message', 'hidden') is not None


def test_truth_and_prediction_compared(open_explorer, known):
    page, (scene, _, graph) = open_explorer, known
    page.choose('show', 'both, compared')
    objects, triplets = choose_shown(graph, BOTH)
    assert {t['verdict'] for t in triplets.values()} == {'hit', 'miss', 'wrong', 'unannotated'}
    for css, items in (('.stdg-box', objects), ('.stdg-edge', triplets)):
        for verdict in ('hit', 'miss', 'wrong', 'unannotated'):
            assert set(page.keys(f'{css}.stdg-{verdict}')) == {k for k, t in items.items()
                if t['verdict'] == verdict}
    dashes = [page.one(f'.stdg-edge.stdg-{verdict} .stdg-line').value_of_css_property(
        'stroke-dasharray') for verdict in ('hit', 'miss', 'wrong', 'unannotated')]
    colours = [page.one(f'.stdg-edge.stdg-{verdict} .stdg-line').value_of_css_property('stroke')
               for verdict in ('hit', 'miss', 'wrong', 'unannotated')]
    assert len(set(dashes)) == len(set(colours)) == 4
    assert page.text('.stdg-legend') == '✓ hit○ missed✕ wrong+ holds, not annotated'
    page.away()
    page.settle()
    page.shot('compared')
    page.choose('show', 'truth')
    assert len(page.find('.stdg-box')) == len(scene.truth)
    assert set(page.keys('.stdg-edge')) == {f'T{i}' for i in range(len(graph['truth']['triplets']))}
    page.shot('truth')
    page.choose('show', 'both, compared')
    page.choose('task', 'PredCls')
    assert not page.find('.stdg-box.stdg-wrong') and len(page.find('.stdg-box')) == len(scene.truth)
    page.choose('task', 'SGDet')


def _upload(page, *paths):
    """Give files to the button, through the dialog that a script cannot see: its input is caught
    and filled."""
    page.run("HTMLInputElement.prototype.click = function () { this.className = 'caught'; "
             "document.body.append(this) }")
    page.one('.jupyter-button.widget-upload, .widget-upload button, button.widget-upload').click()
    page.one('input.caught').send_keys('\n'.join(map(str, paths)))
    page.run("document.querySelectorAll('input.caught').forEach(e => e.remove())")


def test_a_picture_is_uploaded_and_a_bad_one_is_refused(open_explorer, known, tmp_path):
    page, (scene, *_) = open_explorer, known
    drawn = lambda: page.run("return ['.stdg-image', '.stdg-graph', '.stdg-tables'].map(css => "
                             "document.querySelector(css).innerHTML)")
    page.away()
    before, painted = drawn(), page.painted()
    (tmp_path/'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n no picture')
    _upload(page, tmp_path/'bad.png')
    page.wait(lambda: page.text('.stdg-message').startswith('bad.png: the picture is not read'),
              'it is said what is wrong')
    page.settle()
    assert page.painted() == painted and drawn() == before, 'nothing else changes'
    page.shot('refused')
    name = '<img src=x onerror=window.hacked=1>.png'
    Image.fromarray(np.asarray(scene.picture)[:, ::-1]).resize((300, 220)).save(tmp_path/name)
    _upload(page, tmp_path/name)
    page.wait(lambda: page.painted() > painted and page.text('.stdg-readout') == f'RGB of {name}',
              'it is shown')
    page.settle()
    assert page.text('.stdg-message').startswith('Nobody has annotated')
    assert not page.find('.stdg-explorer img') and not page.find('.stdg-legend span')
    x, y, width, height = map(float, page.attribute('.stdg-image', 'viewBox').split())
    assert abs(width / height - 300 / 220) < .02 and page.run('return window.hacked') is None
    page.shot('uploaded')
    page.choose('pictures', 'rooms')
    page.wait(lambda: page.text('.stdg-readout') == 'RGB of rooms 1', 'back again')
    assert page.attribute('.stdg-message', 'hidden') is not None


def _luminance(page, css, name='background-color'):
    numbers = page.run(
        'return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]', css,
        name).split('(')[1].rstrip(')').split(',')[:3]
    return sum(w * (v / 12.92 if v <= .04045 else ((v + .055) / 1.055) ** 2.4)
               for w, v in zip((.2126, .7152, .0722), (float(n) / 255 for n in numbers)))


def _contrast(a, b): return (max(a, b) + .05) / (min(a, b) + .05)


def test_the_dark_theme(open_explorer):
    page = open_explorer
    page.choose('show', 'both, compared')
    page.away()
    read = lambda: (_luminance(page, '.stdg-graph'),
                    *(_luminance(page, css, name) for css, name in (
        ('.stdg-help', 'color'), ('.stdg-table td', 'color'), ('.stdg-edge.stdg-hit text', 'fill'),
        ('.stdg-edge.stdg-miss text', 'fill'), ('.stdg-edge.stdg-wrong text', 'fill'),
        ('.stdg-edge.stdg-unannotated text', 'fill'))))
    light = read()
    _menu(page, 'Settings', 'Theme', 'JupyterLab Dark')
    page.wait(lambda: page.run("return document.body.dataset.jpThemeLight") == 'false'
              and _luminance(page, '.stdg-graph') < .1, 'dark')
    page.settle()
    page.shot('dark')
    dark = read()
    assert light[0] > .9 and all(_contrast(light[0], ink) >= 4.5
                                 for ink in light[1:]) and all(_contrast(dark[0], ink) >= 4.5
        for ink in dark[1:]), (light, dark)
    _menu(page, 'Settings', 'Theme', 'JupyterLab Light')
    page.wait(lambda: page.run("return document.body.dataset.jpThemeLight") == 'true', 'light')


def test_nothing_has_gone_wrong_so_far(open_explorer): assert not open_explorer.problems()


def _delete(lab, path):
    urllib.request.urlopen(urllib.request.Request(f'{lab.url}{path}?token=secret',
                                                  method='DELETE')).close()


def test_saved_and_opened_again_it_is_a_picture(open_explorer, work, lab):
    page = open_explorer
    image = ("document.querySelector('.stdg-explorer').closest('.jp-OutputArea')"
             ".querySelector('img')")
    page.wait(lambda: page.run(f'return !!{image}'), 'the picture that stays')
    assert not page.run(f'return {image}.offsetParent'), 'while the view lives, the picture is hidden'
    time.sleep(4)  # the picture is renewed two seconds after the last change
    page.actions().key_down(Keys.CONTROL).send_keys('s').key_up(Keys.CONTROL).perform()
    def outputs():
        "Of the saved notebook; none while JupyterLab is writing it."
        try: cells = nbformat.read(work/'explore.ipynb', 4).cells
        except nbformat.reader.NotJSONError: return []
        return [output for cell in cells for output in cell.get('outputs', [])]
    page.wait(lambda: any('image/png' in output.get('data', {}) for output in outputs()), 'saved')
    assert [set(output.get('data', ()))
            for output in outputs()][-3:] == [{'application/vnd.jupyter.widget-view+json'},
                                              {'image/png'}, {'text/html'}]
    for session in json.load(urllib.request.urlopen(f'{lab.url}/api/sessions?token=secret')):
        _delete(lab, f"/api/sessions/{session['id']}")
    page.driver.get('about:blank')
    page.driver.get(f'{lab.url}/lab/tree/explore.ipynb?token=secret&reset')
    image = page.one('.jp-OutputArea-output img')
    page.wait(lambda: image.is_displayed() and page.run('return arguments[0].naturalWidth',
                                                        image) > 900, 'the picture stands there')
    page.wait(lambda: '| Idle' in page.one('#jp-main-statusbar').text, 'a new kernel')
    page.settle()
    seen = page.run("return document.querySelector('.jp-Notebook').innerText")
    assert 'widget' not in seen.lower().replace('one call, one widget',
                                                '') and not page.find('.stdg-explorer'), seen
    page.run("arguments[0].scrollIntoView({block: 'center'})", image)
    page.shot('reopened')
    assert all('model not found' in problem
               for problem in page.problems()), 'JupyterLab alone says that the widget is gone, in its console'


def _shows_its_lines(page, path, folder):
    "Beside the edge that is pointed at stand the confident cells on its line, and no others."
    scene = database_scene(Database(folder), 0)
    reading = read_scene(scene, *load_network(path))
    found, frame = reading.predictions['sgdet'], reading.frame
    record = comparison_record(found, reading.vocabulary, scene.truth, scene.holds, 'sgdet',
                               (reading.seen['sgdet'], reading.truth))
    objects, triplets = choose_shown(record, BOTH)
    key = next(k for k in page.keys('.stdg-edge') if k.startswith('t'))
    page.hover(f'.stdg-edge[data-key="{key}"] text')
    page.wait(lambda: page.find('.stdg-vote'), 'cells')
    page.settle()
    triplet = triplets[key]
    boxes = torch.tensor([objects[triplet[end]]['box'] for end in 'so'])
    scale, corner = (torch.tensor(pair) for pair in (frame.scale, frame.corner))
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 * scale + corner) / frame.stride
    _, cells, times = line_cells(centres[:1].float(), centres[1:].float(), frame.cells)
    sure = reading.confidence[triplet['p']].ravel() > .1
    expected = {cell for cell, n in zip(cells.tolist(), times[0].tolist()) if n and sure[cell]}
    places = page.run("return [...document.querySelectorAll('.stdg-vote .stdg-cell')].map(e => "
                      "[e.getAttribute('cx'), e.getAttribute('cy')])")
    pixels = np.array(places, float) / page.unit()
    column, row = np.floor((pixels * frame.scale + frame.corner) / frame.stride).astype(int).T
    assert set((row * frame.cells[1] + column).tolist()) == expected and len(expected) > 3
    page.shot('lines')


def test_hostile_names_are_shown_and_not_obeyed(work, lab, page):
    _notebook(work, 'strange.ipynb',
              checkpoints=[str(work/'runs'/'strange <b>&\u202e'/'student.safetensors')],
              data='strange', show='both, compared', overlay='class heat-map')
    _run_all(page, lab, 'strange.ipynb')
    shown = page.run("return document.querySelector('.stdg-explorer').textContent")
    assert '<script>window.hacke' in shown and '\u202e' not in shown and 'a' * 500 not in shown
    for css in ('.stdg-box', '.stdg-node', '.stdg-edge'):
        page.hover(css)
        page.settle()
    page.shot('hostile')
    _shows_its_lines(page, work/'runs'/'strange <b>&\u202e'/'student.safetensors', work/'data'/'strange')
    scores = lambda: page.run("return [...document.querySelectorAll('.stdg-score')].map(e => "
                              "Number(e.textContent))")
    before = scores()
    page.choose('reading', 'as published')
    assert max(scores()) > 1.5 * max(before) and 'another scale' in page.text('.stdg-message')
    options = page.run("return [...document.querySelectorAll('.widget-dropdown option')].map(e => "
                       "e.textContent.replaceAll('\\u00a0', ' '))")
    assert any(option.startswith('"><img src=x') for option in options)
    assert max(map(len, options)) <= 40
    assert page.run('return window.hacked') is None
    assert not page.find('.stdg-explorer script, .stdg-explorer img, .stdg-explorer foreignObject, '
                         '.stdg-explorer [onload], .stdg-explorer [onerror]')
    assert not page.find('.widget-dropdown script') and not page.problems()


def test_voila_serves_it(work, page, tmp_path):
    _notebook(work, 'served.ipynb', checkpoints=[str(work/'runs'/'tests'/'student.safetensors')],
              data='rooms')
    server = Server(work, tmp_path, 'voila', 'served.ipynb', '--no-browser', '--Voila.ip=127.0.0.1',
                    '--port={port}')
    try:
        page.wait(lambda: _up(server), 'voila is up')
        page.driver.get(server.url)
        page.one('.stdg-explorer[data-painted] .stdg-node')
        page.settle()
        assert set(listening(_family(server.process.pid))) <= {'0100007F',
            '00000000000000000000000001000000', '0000000000000000FFFF00000100007F'}
        page.hover('.stdg-node')
        page.wait(lambda: lit(page, '.stdg-box'), 'linked')
        page.shot('voila')
        # its own page asks a CDN for icons; the explorer needs none
        of_voila = [problem for problem in page.problems() if 'fontawesome' not in problem]
        assert not of_voila
        assert not any(image.is_displayed() for image in page.find('.jp-OutputArea-output img'))
    finally: server.stop()


def _up(server):
    assert server.process.poll() is None, Path(server.log.name).read_text()[-3000:]
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', server.port)) == 0
