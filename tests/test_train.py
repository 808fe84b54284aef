"The runbook itself, by papermill, at toy size: every stage, every figure, every file."
import json
import math
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from stdg.checkpoint import facts, load

root = Path(__file__).parent.parent
SMALL = dict(size=96, n_train=24, n_val=2, n_test=6, epochs=1, batch_size=8, pretrained=False, warm_up=.5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A toy run in an empty project folder; returns its folder."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    values = [text for k, v in SMALL.items() for text in ('-p', k, str(v))]
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(root/'nbs'/'train.ipynb'), str(home/'out.ipynb'), '-k', 'python3', *values, '-p', 'name', 'toy']
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def test_every_file_is_there(run):
    found = {path.name for path in (run/'runs'/'toy').iterdir()}
    assert found >= {'teacher.safetensors', 'teacher.json', 'student.safetensors', 'student.json', 'control.safetensors', 'control.json', 'log.jsonl', 'results.json'}
    assert not [name for name in found if 'partial' in name or name.endswith(('.pkl', '.pt', '.pth'))]


def test_results(run):
    results = json.loads((run/'runs'/'toy'/'results.json').read_text())
    rows = results['rows']
    assert set(rows) == {'untrained', 'frequency prior', 'teacher (HHA)', 'control (RGB)', 'student (RGB, taught)'}
    for name, row in rows.items():
        tasks = ['predcls'] if name == 'frequency prior' else ['sgdet', 'sgcls', 'predcls']
        for task in tasks:
            for figure in ('R', 'ng-R', 'mR', 'ng-mR'):
                assert all(0 <= row[task][f'{figure}@{k}'] <= 1 for k in (20, 50, 100))
        if len(tasks) == 3: assert 0 <= row['AP50'] <= 1
    assert results['machine'] and results['seconds'] > 0
    assert results['notes'] == [], 'a whole run does without nothing'
    assert results['settings']['images'] == [24, 2, 6] and results['settings']['pretrained'] is False


def test_log_has_every_term(run):
    records = [json.loads(line) for line in open(run/'runs'/'toy'/'log.jsonl')]
    assert {r['stage'] for r in records} == {'teacher', 'control', 'student'}
    assert all(math.isfinite(r['loss']) for r in records)
    terms = {k for k in records[-1] if k.startswith(('detection', 'relation', 'teaching'))}
    assert len(terms) == 9 and all(abs(sum(r[t] for t in terms if t in r) - r['loss']) < 1e-3 * r['loss'] for r in records)


def test_teacher_is_inside_the_student_unchanged(run):
    teacher, student = load(run/'runs'/'toy'/'teacher.safetensors'), load(run/'runs'/'toy'/'student.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(teacher.network.state_dict().values(), student.teacher.state_dict().values()))
    assert facts(run/'runs'/'toy'/'student.json')['training']['stage'] == 'student'
    assert all(facts(run/'runs'/'toy'/f'{stage}.json')['pretrained'] is False for stage in ('teacher', 'control', 'student'))


def test_notebook_shows_pictures(run):
    notebook = nbformat.read(run/'out.ipynb', as_version=4)
    pictures = sum('image/png' in output.get('data', {}) for cell in notebook.cells for output in cell.get('outputs', []))
    assert pictures >= 6
