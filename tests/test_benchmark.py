"""The benchmark notebook at toy size, and the README's table of speed against the file that it
comes from."""
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
TOY = dict(repeats=1, side=128, n_objects=6, n_predicates=4, compiled=False, judged=0)


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
    names = [row['name'] for row in results['rows']]
    assert len(set(names)) == len(names), 'the picture and README tell rows by their names'
    names = ' '.join(names)
    for piece in ('HHA', 'target fields', 'loading', 'decoding', 'evaluator',
                  'deformable convolution', 'training step', 'inference', 'bytes to triplets', 'beside',
                  'decoding published', 'loading rooms', 'bytes to triplets, onnxruntime, float',
                  'onnxruntime', 'int8', 'live, ', 'explorer, slowest', 'explorer, a new picture'):
        assert piece in names
    assert all(row['ms'] > 0 for row in results['rows'])
    assert sum('ratio' in row for row in results['rows']) >= 9
    for row in results['rows']:
        if 'ratio' in row:
            assert row['ratio'] == pytest.approx(row['stand_in_ms'] / row['ms'], rel=.02, abs=.01)
            assert row['stand_in']
    assert all(m['mb'] > 0 and m['stand_in_mb'] > 0 for m in results['memory'])
    assert 'threads' in results['machine']


def test_peers_and_what_feeds_gpus(results):
    "Each peer at two sizes beside ours, with its work; and cores by the rates of this very run."
    peers = results['peers']
    assert [p['stands_for'] for p in peers] == ['itself', *['RelTR'] * 2, *['EGTR'] * 2, *['REACT and REACT++'] * 2]
    for peer in peers: assert min(peer[name] for name in ('ms', 'mb', 'parameters', 'gflop')) > 0, peer
    assert peers[1]['gflop'] > 2 * peers[2]['gflop'], 'at its own size it does more'
    rate, = [row['images_per_second'] for row in results['rows'] if row['name'].startswith('loading rooms')]
    row = [row for row in results['feeding'] if row['layout'].startswith('rooms')][-1]
    assert row['gpus'] == 8 and row['pictures'] == 8 * 500 and row['megabytes'] > 0
    assert row['cores'] == pytest.approx(4000 / (rate / 2), rel=.02, abs=1)


def test_readme_shows_what_is_decided_by():
    "Ten lines of the table, in their order; of a run that lacks one nothing is made, and that is said."
    cells = {c.id: c.source for c in nbformat.read(root/'nbs'/'benchmark.ipynb', as_version=4).cells}
    made = {}
    exec(cells['table'], made)
    names = [f'small, {end}' for end in made['DECIDE']]
    rows = [dict(name=name, ms=i + 1.) for i, name in enumerate(['other', *reversed(names)])]
    lines = made['readme_table'](rows).splitlines()
    assert [line.split(' | ')[0][2:] for line in lines[2:]] == names
    assert set(lines) <= set(made['table'](rows).splitlines())
    with pytest.raises(ValueError, match='nothing that ends in evaluator, 100,000'):
        made['readme_table'](rows[:1] + rows[2:])
    peer = dict(name='P', width=4, height=3, ms=12.4, mb=5, parameters=1.5, gflop=2., stands_for='Q', leaves_out='r')
    assert '| P | 4 x 3 | 12 | 5 | 1.5 | 2.0 | Q | r |' in made['peer_table']([peer]).splitlines()


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
