"Own pictures, the way a user goes: the installed command, the runbook, and `stdg.predict`."
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import stdg
from stdg.graph import SceneGraph, Vocabulary
from stdg.model import STDG
from stdg.testing import loud

root = Path(__file__).parent.parent
NAMES = Vocabulary(['disc', '<script>alert(1)</script>'], ['beside', ']]>"'])


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A project folder with a network that claims much at random, and an album of three pictures,
    one of them cut off."""
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    torch.manual_seed(0)
    model = STDG('small', n_objects=2, n_predicates=2, pretrained=False, fpn=16, channels=16)
    loud(model).save(home/'net.safetensors', vocabulary=NAMES.to_json(), size=96,
                     thresholds=dict(objects=.6, triplets=.2))
    (home/'album').mkdir()
    rng = np.random.default_rng(0)
    for name in ('a.png', 'b.jpg', 'c.webp'):
        Image.fromarray(rng.integers(0, 255, (61, 94, 3), dtype=np.uint8)).save(home/'album'/name)
    (home/'album'/'b.jpg').write_bytes((home/'album'/'b.jpg').read_bytes()[:500])
    return home


def test_installed_command(home):
    command = [Path(sys.executable).parent/'stdg', 'predict', 'album/a.png', '-c',
               'net.safetensors', '-o', 'graph.json', '--draw', 'graph.svg']
    subprocess.run(command, cwd=home, check=True, timeout=120)
    record = json.loads((home/'graph.json').read_text())
    graph = SceneGraph.from_json(record, NAMES)
    assert len(graph.relations) and graph.size == (61, 94) and float(graph.boxes[:, 2].max()) <= 94
    found = stdg.predict(home/'album'/'a.png', home/'net.safetensors').graph()
    assert torch.equal(found.relations, graph.relations)
    assert torch.allclose(found.boxes, graph.boxes, atol=.01)
    assert '<script' not in (home/'graph.svg').read_text()


def test_command_without_network_says_what_to_do(home):
    done = subprocess.run([Path(sys.executable).parent/'stdg', 'predict', 'album/a.png'], cwd=home,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'give --checkpoint, or run make train first' in done.stderr


def test_runbook(home):
    """The runbook shows the sound pictures, names the broken one, escapes the labels, and writes
    all graphs."""
    (home/'values.yaml').write_text(yaml.safe_dump(dict(pictures='album',
                                                        checkpoint='net.safetensors',
                                                        out='graphs.jsonl', top=7)))
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar',
               str(root/'nbs'/'predict.ipynb'), 'out.ipynb', '-k', 'python3', '-f', 'values.yaml']
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [output for cell in nbformat.read(home/'out.ipynb', as_version=4).cells
               for output in cell.get('outputs', [])]
    shown = [output['data']['text/html'] for output in outputs
             if 'text/html' in output.get('data', {})]
    said = ''.join(output.get('text', '') for output in outputs)
    assert len(shown) == 2
    assert all(html.count('<img') == 2 and '<script' not in html for html in shown)
    assert 'b.jpg: the picture is not read' in said and '2 pictures done now, 1 failed' in said
    records = [json.loads(line) for line in (home/'graphs.jsonl').read_text().splitlines()]
    assert [record['file'] for record in records if 'error' not in record] == ['a.png', 'c.webp']
    assert all(len(record.get('relations', [])) <= 7 for record in records)


def test_released_network_has_names(home):
    """A network with Visual Genome's numbers of classes and no names of its own gets Visual
    Genome's."""
    model = STDG('small', pretrained=False, fpn=16, channels=16)
    found = stdg.predict(home/'album'/'a.png', model, size=64)
    assert found.vocabulary == Vocabulary.visual_genome()
