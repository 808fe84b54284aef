"""Studies: the runs of the real one fit the runbook, one goes through at toy size, and a killed one
leaves nothing behind."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from scipy.stats import ttest_1samp, ttest_rel
from test_configs import parameters

from stdg import train
from stdg.training import experiments as study

root = Path(__file__).parent.parent


def test_every_parameter_is_one_of_the_runbook():
    runs = study.taught_or_not('study', n_train=10, n_val=0, n_test=10, size=64, backbone='small',
                               pretrained=True, epochs=1, decay=[.5], batch_size=2, workers=0)
    for run in runs:
        assert run.parameters.keys() <= parameters().keys()
        settings = train.Settings(**run.parameters, name=run.name)
        for name in run.parameters:
            kind = parameters()[name][0]
            assert kind in (type(getattr(settings, name)), float), name


def test_a_toy_study_of_real_runs(tmp_path, monkeypatch):
    """16 pictures, three runs that train, in the order that they need each other, and a table of
    the results."""
    (tmp_path/'settings.ini').touch()
    (tmp_path/'nbs').symlink_to(root/'nbs')
    monkeypatch.chdir(tmp_path)
    runs = study.taught_or_not('toy', (0, 1), dict(low=.1), n_train=16, n_val=0, n_test=4, size=64,
                               backbone='test_resnet.r160_in1k', pretrained=False, epochs=1, decay=[1.])
    runs = [run for run in runs if run.seed == 0 and run.configuration in ('', 'nobody', 'depth')]
    did = study.run_study(runs, min(os.cpu_count(), 2), progress=False)
    assert len(did) == 3 and did[0] == 'toy/low-0-teacher'
    found = study.summary(study.gather(runs), 'nobody')
    assert set(found['low clutter']) == {'nobody', 'depth'}
    assert 'depth' in str(study.StudyTable(found))
    results = [json.loads((run.folder/'results.json').read_text())['settings'] for run in runs]
    assert {(r['seed'], r['clutter'], r['n_train']) for r in results} == {(0, .1, 16)}


SLEEP = '''
import os
import pathlib
import time
pathlib.Path('pid').write_text(str(os.getpid()))
time.sleep(300)
'''
STUDY_OF_SLEEP = '''
from stdg.training.experiments import Run, run_study
run_study([Run('a', {}, notebook='sleep.ipynb')])
'''


@pytest.mark.skipif(sys.platform != 'linux',
                    reason='only Linux tells children that their parent was killed')
def test_a_killed_study_leaves_no_process(tmp_path):
    kernel = dict(name='python3', display_name='python3', language='python')
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    notebook.cells = [nbformat.v4.new_code_cell(SLEEP)]
    nbformat.write(notebook, tmp_path/'sleep.ipynb')
    (tmp_path/'settings.ini').touch()
    parent = subprocess.Popen([sys.executable, '-c', STUDY_OF_SLEEP], cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text():
        assert time.monotonic() < end
        time.sleep(.1)
    pid = int((tmp_path/'pid').read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f'/proc/{pid}').exists():
        assert time.monotonic() < end
        time.sleep(.2)


def test_names_are_escaped_and_numbers_are_right():
    figures = {'<low>': {'none': {'AP50': {0: .1, 1: .2}}, '$x$|y': {'AP50': {0: .2, 1: .3}}}}
    found = study.summary(figures, 'none')
    table = study.StudyTable(found)
    assert '<low>' not in table._repr_html_()
    assert '+10.0 [+10.0, +10.0]' in str(table) and '15.0 ± 63.5' in str(table)
    study.plot(found).savefig(os.devnull, format='png')


def test_yaml_of_a_run_is_what_the_runbook_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = study.taught_or_not('s', (0, 1), dict(low=.1), epochs=1)[-1]
    run.folder.mkdir(parents=True)
    file = run.folder/'parameters.yaml'
    file.write_text(yaml.safe_dump(dict(run.parameters, name=run.name)))
    assert train.read_settings(file).teacher == 'runs/s/low-1-teacher/teacher.safetensors'
    assert study.finished(run) is False


def stand_in(monkeypatch, tmp_path, code):
    """Instead of papermill, `code` runs with the run's `folder`; returns what was started: (name,
    processes alive with it, threads)."""
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    started, processes = [], []
    def child(command, env, stdout, **options):
        folder = Path(command[-1]).parent
        program = f'import pathlib\nimport time\nfolder = pathlib.Path({str(folder)!r})\n{code}'
        processes.append(subprocess.Popen([sys.executable, '-c', program], stdout=stdout,
                                          stderr=subprocess.STDOUT))
        alive = sum(process.poll() is None for process in processes)
        started.append((folder.name, alive, env['OMP_NUM_THREADS']))
        return processes[-1]
    monkeypatch.setattr(study, 'child_process', child)
    return started, processes


def test_so_many_at_once_and_in_the_order_of_their_needs(tmp_path, monkeypatch):
    code = "time.sleep(.4)\n(folder/'results.json').write_text('{}')"
    started, _ = stand_in(monkeypatch, tmp_path, code)
    runs = [study.Run('s/last', {}, needs=('s/a', 's/c')),
            *(study.Run(f's/{name}', dict(values=(1, 2))) for name in 'abcd')]
    did = study.run_study(runs, 2, progress=False)
    assert did[-1] == 's/last' and started[-1][0] == 'last'
    assert [name for name, *_ in started[:4]] == list('abcd')
    assert max(alive for _, alive, _ in started) == 2
    assert {threads for *_, threads in started} == {str(max(os.cpu_count() // 2, 1))}
    assert study.run_study(runs, 2, progress=False) == [] and len(started) == 5


def test_results_of_another_time_do_not_count(tmp_path, monkeypatch):
    """Results that were there before the run started are not its own; one that leaves none has
    failed, and is tried again."""
    started, _ = stand_in(monkeypatch, tmp_path, "")
    run = study.Run('s/a', dict(seed=1))
    run.folder.mkdir(parents=True)
    (run.folder/'results.json').write_text('{}')
    said = ('1 runs failed and 0 that need them(.|\n)*s/a: it wrote no results.json '
            '.*train.ipynb')
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=said):
            study.run_study([run], 1, progress=False)
        assert len(started) == attempt and not study.finished(run)
    with pytest.raises(ValueError, match='seed was 1, is 2'):
        study.run_study([study.Run('s/a', dict(seed=2))])


def test_an_interrupted_study_ends_its_runs(tmp_path, monkeypatch):
    started, processes = stand_in(monkeypatch, tmp_path, 'time.sleep(300)')
    def interrupt(seconds): raise KeyboardInterrupt
    monkeypatch.setattr(study, 'time', SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        study.run_study([study.Run(name, {}) for name in 'abc'], 2, progress=False)
    assert len(started) == 2 and all(process.poll() is not None for process in processes)


def test_intervals_are_those_of_scipy():
    values, base = [.31, .35, .28, .4, .33], [.3, .31, .29, .33, .3]
    for level in (.95, .8):
        low, high = ttest_1samp(values, 0).confidence_interval(level)
        assert study.interval(values, level) == pytest.approx((.334, low, high))
    figures = dict(base={'m': dict(enumerate(base))}, new={'m': dict(enumerate(values))})
    found = study.summary({'': figures}, 'base')['']['new']['m']
    expected = ttest_rel(values, base).confidence_interval()
    assert found['difference']['interval'] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"'new' has seeds \[9\] that 'base' does not have"):
        study.summary({'': {'base': {'m': {1: .1}}, 'new': {'m': {1: .1, 9: .2}}}}, 'base')


def test_the_notebook_shows_the_levers():
    "Its table is what the package makes of the stored figures, and what it says of them is so."
    record = json.loads((root/'figures'/'levers.json').read_text())
    kept, = [c.source for c in nbformat.read(root/'nbs'/'levers.ipynb', as_version=4).cells
             if c.id == 'kept-results']
    assert str(study.StudyTable(record['found'])).strip() in kept and record['date'] in kept
    found, = record['found'].values()
    assert list(found) == list(study.LEVERS) and len(record['seconds']) == 17
    def gain(lever, metric, before='as it was'):
        return 100 * (found[lever][metric]['mean'] - found[before][metric]['mean'])
    both = 'batch of 4, heat-map x 4'
    assert [round(gain('heat-map x 4', m)) for m in ('AP50', 'sgdet/R@50', 'sgdet/P@5')] == [8, 7, 7]
    assert round(gain('batch of 4', 'predcls/R@50')) == 4
    assert [round(gain(both, m, 'heat-map x 4')) for m in ('AP50', 'sgdet/R@50')] == [4, 4]
    assert gain('batch of 2, heat-map x 4', 'AP50', both) < 0
    assert [round(gain('batch of 4, heat-map x 8', m, both)) for m in ('AP50', 'predcls/P@5')] == [2, -4]
    assert all(gain(lever, 'AP50') < 0 for lever in ('cosine', 'cosine, twice the rates', 'half the rates',
                                                    'longer average', 'unlabelled .75'))
    for lever, changes in study.LEVERS.items():
        if lever == both: assert changes == dict(batch_size=4, loss_weights=train.Settings().loss_weights)


def test_a_table_of_one_seed_has_no_intervals():
    one = {'': {'base': {'m': {3: .5}}, 'new': {'m': {3: .625}}}}
    said = str(study.StudyTable(study.summary(one, 'base')))
    assert '| base | 50.0 |' in said and '| new | 62.5 / +12.5 |' in said and 'nan' not in said


def test_the_notebook_shows_the_study():
    "Its tables are what the package makes of the stored figures."
    record = json.loads((root/'figures'/'study.json').read_text())
    kept, = [c.source for c in nbformat.read(root/'nbs'/'study.ipynb', as_version=4).cells
             if c.id == 'kept-results']
    assert str(study.StudyTable(record['found'])).strip() in kept
    assert record['date'] in kept and record['runs'] == 50
    assert [record['settings'][name] for name in ('n_train', 'epochs')] == [2000, 1]
    cells = [cell for line in kept.splitlines() if '±' in line for cell in line.split('| ')]
    assert sum(cell.startswith('**') for cell in cells) == 6
