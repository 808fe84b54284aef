"The runbook itself, by papermill, at toy size: every stage, every figure, every file."
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from stdg.checkpoint import facts, load, reading

root = Path(__file__).parent.parent
SMALL = dict(size=96, n_train=24, n_val=2, n_test=6, epochs=1, teacher_share=1., batch_size=8, pretrained=False,
             warm_up=.5, stages=['teacher', 'control', 'student'])


def papermill(home, **values):
    """Run the runbook in project folder `home`; returns the exit code, the end of what was printed,
    and the text outputs of the notebook."""
    (home/'values.yaml').write_text(yaml.safe_dump(SMALL | values))
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar',
               str(root/'nbs'/'train.ipynb'), str(home/'out.ipynb'), '-k', 'python3', '-f',
               'values.yaml']
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=500)
    cells = nbformat.read(home/'out.ipynb', as_version=4).cells
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    text = ''.join(output.get('text', '') for output in outputs)
    return done.returncode, done.stderr[-4000:], text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A toy run in an empty project folder; returns its folder."
    home = tmp_path_factory.mktemp('project')
    (home/'settings.ini').touch()
    code, said, _ = papermill(home, name='toy')
    assert code == 0, said
    return home


def test_every_file_is_there(run):
    found = {path.name for path in (run/'runs'/'toy').iterdir()}
    assert found >= {'teacher.safetensors', 'teacher.json', 'student.safetensors', 'student.json',
                     'control.safetensors', 'control.json', 'log.jsonl', 'results.json'}
    assert not [name for name in found
                if 'partial' in name or name.endswith(('.pkl', '.pt', '.pth'))]


def test_thresholds_are_kept_with_each_network(run):
    for stage in ('teacher', 'control', 'student'):
        kept = facts(run/'runs'/'toy'/f'{stage}.safetensors')['thresholds']
        assert 0 <= kept['triplets'] <= 1 and 0 <= kept['objects'] <= 1 and kept['images'] == 2
        assert set(kept['at']['objects']) == {'precision', 'recall', 'f1'}


def test_results(run):
    results = json.loads((run/'runs'/'toy'/'results.json').read_text())
    rows = results['rows']
    trained = {'teacher': 'teacher (HHA)', 'control': 'control (RGB)', 'student': 'student (RGB, taught)'}
    assert [name for name in rows if not name.endswith(' + prior')] == ['untrained', 'frequency prior',
                                                                        *trained.values()]
    for stage, title in trained.items():
        chosen = reading(run/'runs'/'toy'/f'{stage}.safetensors')
        assert results['readings'][stage] == chosen.to_json()
        assert (f'{title} + prior' in rows) == chosen.has_prior, 'both rows, where there is a prior'
    for name, row in rows.items():
        tasks = ['predcls'] if name == 'frequency prior' else ['sgdet', 'sgcls', 'predcls']
        for task in tasks:
            for figure in ('R', 'ng-R', 'mR', 'ng-mR'):
                assert all(0 <= row[task][f'{figure}@{k}'] <= 1 for k in (20, 50, 100))
        if len(tasks) == 3: assert 0 <= row['AP50'] <= 1
    assert results['machine'] and results['seconds'] > 0
    assert results['notes'] == [], 'only a trial has notes'
    assert results['settings']['images'] == [24, 2, 6]
    assert results['settings']['pretrained'] is False


def test_log_has_every_term(run):
    records = [json.loads(line) for line in open(run/'runs'/'toy'/'log.jsonl')]
    assert {r['stage'] for r in records} == {'teacher', 'control', 'student'}
    assert all(math.isfinite(r['loss']) for r in records)
    terms = {k for k in records[-1] if k.startswith(('detection', 'relation', 'teaching'))}
    assert terms == {'detection_heatmap', 'detection_size', 'detection_offset', 'relation_predicate',
                     'relation_related', 'teaching'}
    for record in records:
        total = sum(record[term] for term in terms if term in record)
        assert abs(total - record['loss']) < 1e-3 * record['loss']


def test_teacher_is_inside_the_student_unchanged(run):
    teacher, student = (load(run/'runs'/'toy'/f'{stage}.safetensors')
                        for stage in ('teacher', 'student'))
    pairs = zip(teacher.network.state_dict().values(), student.teacher.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert facts(run/'runs'/'toy'/'student.json')['training']['stage'] == 'student'
    assert all(facts(run/'runs'/'toy'/f'{stage}.json')['pretrained'] is False
               for stage in ('teacher', 'control', 'student'))


def test_notebook_shows_pictures(run):
    notebook = nbformat.read(run/'out.ipynb', as_version=4)
    pictures = sum('image/png' in output.get('data', {}) for cell in notebook.cells
                   for output in cell.get('outputs', []))
    assert pictures >= 6


QUICK = dict(stages=['control'], untrained=False, pictures=False, backbone='test_resnet.r160_in1k')


@pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
def test_devices_share_the_work(run):
    """From the notebook, in processes beside it: the same files and the same lines as of one
    process. (Batch norms see half of a batch each, so the numbers differ.)"""
    code, said, text = papermill(run, name='pair', devices=2, more=dict(device='cpu'),
                                 validate_every=1, **QUICK)
    assert code == 0 and 'pair/control.safetensors' in text, said
    code, said, _ = papermill(run, name='one', validate_every=1, more=dict(device='cpu'), **QUICK)
    assert code == 0, said
    pair, one = ([json.loads(line) for line in open(run/'runs'/name/'log.jsonl')]
                 for name in ('pair', 'one'))
    assert [r.keys() for r in pair] == [r.keys() for r in one]
    assert len(pair) == 4 and 'sgdet/R@50' in pair[-1]
    assert (run/'runs'/'pair'/'control.best.safetensors').exists()
    assert (run/'runs'/'pair'/'results.json').exists()


@pytest.mark.skipif(os.cpu_count() < 2, reason='one processor core')
def test_traceback_of_a_process_is_in_the_notebook(run):
    code, said, text = papermill(run, name='broken', devices=2, more=dict(device='cpu'), lr=1e30,
                                 **QUICK)
    message = 'control, step 1: '
    assert code == 1 and message in text and 'is not finite on images' in text, text
    assert 'Traceback' in text
    assert '2 processes of stdg.train ended with exit code' in said
    kept = sorted(path.name for path in run.glob('runs/broken/*.safetensors'))
    assert kept == [f'control-00000001-{rank}.replay.safetensors' for rank in range(2)]


def test_too_many_devices(run):
    code, said, _ = papermill(run, name='many', devices=999, **QUICK)
    assert code == 1 and 'devices=999, but this machine has' in said


def test_dry_run_trains_and_writes_nothing(run):
    code, said, text = papermill(run, name='dry', dry_run=True)
    assert code == 0, said
    assert 'student: ' in text and 'GiB' in text and 'h in all on one device' in text, text
    assert not list(run.glob('runs/dry/*.safetensors'))
    assert not (run/'runs'/'dry'/'results.json').exists()


def test_overfit_is_judged_on_what_it_saw(run):
    code, said, _ = papermill(run, name='few', overfit=8, epochs=2, **QUICK)
    results = json.loads((run/'runs'/'few'/'results.json').read_text())
    assert code == 0 and results['rows']['control (RGB)']['images'] == 8, said
    assert facts(run/'runs'/'few'/'control.json')['training']['step'] == 2
