"""The benchmark notebook at toy size, and the README's table of speed against the file that it
comes from."""
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
TOY = dict(repeats=1, side=128, n_objects=6, n_predicates=4, compiled=False)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "What the notebook writes. Its own cells compare every piece with its stand-in."
    out = tmp_path_factory.mktemp('benchmark')
    values = [text for k, v in TOY.items() for text in ('-p', k, str(v))]
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar',
               str(root/'nbs'/'benchmark.ipynb'), str(out/'out.ipynb'), '-k', 'python3', *values,
               '-p', 'out', str(out), '-y', '{networks: [small], exported: [small]}']
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out/'benchmark.png').stat().st_size > 5000
    return json.loads((out/'benchmark.json').read_text())


def test_every_piece_is_measured(results):
    names = ' '.join(row['name'] for row in results['rows'])
    for piece in ('HHA', 'target fields', 'loading', 'decoding', 'evaluator',
                  'deformable convolution', 'training step', 'inference', 'bytes to triplets',
                  'onnxruntime', 'int8', 'live, small', 'explorer, slowest', 'explorer, a new picture'):
        assert piece in names
    assert all(row['ms'] > 0 for row in results['rows'])
    assert sum('ratio' in row for row in results['rows']) >= 9
    for row in results['rows']:
        if 'ratio' in row:
            assert row['ratio'] == pytest.approx(row['stand_in_ms'] / row['ms'], rel=.02, abs=.01)
            assert row['stand_in']
    assert all(m['mb'] > 0 and m['stand_in_mb'] > 0 for m in results['memory'])
    assert 'threads' in results['machine']


def test_notebook_and_readme_show_what_was_measured():
    "The tables are what the notebook makes of the file: all rows there, some of them in README."
    record = json.loads((root/'figures'/'benchmark.json').read_text())
    readme = (root/'README.md').read_text()
    cells = {c.id: c.source for c in nbformat.read(root/'nbs'/'benchmark.ipynb', as_version=4).cells}
    made = {}
    exec(cells['table'], made)
    table = made['table'](record['rows'])
    assert table in cells['measured']
    speed = readme.partition('## Speed')[2].partition('\n## ')[0]
    shown = [line for line in speed.splitlines() if line.startswith('|')]
    assert len(shown) > 8 and set(shown) <= set(table.splitlines())
    for page in (cells['measured'], speed):
        assert record['machine'] in page and record['date'] in page
    share, = [row['share_of_peak'] for row in record['rows']
              if row['name'] == 'inference, resnet50']
    assert f'{share:.0%}'.replace('%', ' %') in speed
