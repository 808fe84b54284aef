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
            assert type(getattr(settings, name)) is parameters()[name][0] or parameters()[name][
                0] is float, name


def test_a_toy_study_of_real_runs(tmp_path, monkeypatch):
    """16 pictures, three runs that train, in the order that they need each other, and a table of
    what came out."""
    (tmp_path/'settings.ini').touch()
    (tmp_path/'nbs').symlink_to(root/'nbs')
    monkeypatch.chdir(tmp_path)
    runs = study.taught_or_not('toy', (0, 1), dict(low=.1), n_train=16, n_val=0, n_test=4, size=64,
                               backbone='resnet10t.c3_in1k', pretrained=False, epochs=1, decay=[1.])
    runs = [run for run in runs if run.seed == 0 and run.configuration in ('', 'nobody', 'depth')]
    did = study.run_study(runs, min(os.cpu_count(), 2), progress=False)
    assert len(did) == 3 and did[0] == 'toy/low-0-teacher'
    found = study.summary(study.gather(runs), 'nobody')
    assert set(found['low clutter']) == {'nobody',
                                         'depth'} and 'depth' in str(study.StudyTable(found))
    results = [json.loads((run.folder/'results.json').read_text())['settings'] for run in runs]
    assert {(r['seed'], r['clutter'], r['n_train']) for r in results} == {(0, .1, 16)}


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells children that their parent '
                    'was killed')
def test_a_killed_study_leaves_no_process(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3',
        display_name='python3', language='python')))
    notebook.cells = [nbformat.v4.new_code_cell("import os, time, "
                                                "pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(300)")]
    nbformat.write(notebook, tmp_path/'sleep.ipynb')
    (tmp_path/'settings.ini').touch()
    parent = subprocess.Popen([sys.executable, '-c', "from stdg.training.experiments import Run, "
                               "run_study\nrun_study([Run('a', {}, notebook='sleep.ipynb')])"],
                              cwd=tmp_path)
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
    assert '<low>' not in table._repr_html_() and '+10.0 [+10.0, +10.0]' in str(
        table) and '15.0 ± 63.5' in str(table)
    study.plot(found).savefig(os.devnull, format='png')


def test_yaml_of_a_run_is_what_the_runbook_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = study.taught_or_not('s', (0, 1), dict(low=.1), epochs=1)[-1]
    run.folder.mkdir(parents=True)
    (run.folder/'parameters.yaml').write_text(yaml.safe_dump(dict(run.parameters, name=run.name)))
    assert train.read_settings(run.folder
                               /'parameters.yaml').teacher == 'runs/s/low-1-teacher/teacher.safetensors' and study.finished(run) is False


def stand_in(monkeypatch, tmp_path, code):
    """Instead of papermill, `code` runs with the run's `folder`; returns what was started: (name,
    processes alive with it, threads)."""
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    started, processes = [], []
    def child(command, env, stdout, **options):
        folder = Path(command[-1]).parent
        processes.append(subprocess.Popen([sys.executable, '-c', 'import time, pathlib\nfolder = '
                                           f'pathlib.Path({str(folder)!r})\n{code}'], stdout=stdout,
                                          stderr=subprocess.STDOUT))
        started.append((folder.name, sum(process.poll() is None for process in processes),
                        env['OMP_NUM_THREADS']))
        return processes[-1]
    monkeypatch.setattr(study, 'child', child)
    return started, processes


def test_so_many_at_once_and_in_the_order_of_their_needs(tmp_path, monkeypatch):
    started, _ = stand_in(monkeypatch, tmp_path, "time.sleep(.4); "
                          "(folder/'results.json').write_text('{}')")
    runs = [study.Run('s/last', {}, needs=('s/a', 's/c')),
            *(study.Run(f's/{name}', dict(values=(1, 2))) for name in 'abcd')]
    did = study.run_study(runs, 2, progress=False)
    assert did[-1] == 's/last' and started[-1][0] == 'last' and [name
        for name, *_ in started[:4]] == list('abcd')
    assert max(alive for _, alive, _ in started) == 2 and {threads
        for *_, threads in started} == {str(max(os.cpu_count() // 2, 1))}
    assert study.run_study(runs, 2, progress=False) == [] and len(started) == 5


def test_results_of_another_time_do_not_count(tmp_path, monkeypatch):
    """Results that lay there before the run began are not its own; one that leaves none has failed,
    and is tried again."""
    started, _ = stand_in(monkeypatch, tmp_path, "")
    run = study.Run('s/a', dict(seed=1))
    run.folder.mkdir(parents=True)
    (run.folder/'results.json').write_text('{}')
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match='1 runs failed and 0 that need them(.|\n)*s/a: it '
                           'wrote no results.json .*train.ipynb'):
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
    found = study.summary({'': {'base': {'m': dict(enumerate(base))},
                                'new': {'m': dict(enumerate(values))}}}, 'base')['']['new']['m']
    assert found['difference']['interval'] == pytest.approx(ttest_rel(values,
        base).confidence_interval())
    with pytest.raises(ValueError, match=r"'new' has seeds \[9\] that 'base' does not have"):
        study.summary({'': {'base': {'m': {1: .1}}, 'new': {'m': {1: .1, 9: .2}}}}, 'base')


def test_readme_shows_the_study():
    "The README's tables are what the package makes of the stored figures."
    root = Path(__file__).parent.parent
    record, readme = json.loads((root/'figures'/'study.json').read_text()), (root
        /'README.md').read_text()
    assert str(study.StudyTable(record['found'])).strip() in readme and record[
        'date'] in readme and record['runs'] == 50
    assert [record['settings'][name] for name in ('n_train', 'epochs')] == [2000,
        1] and sum(cell.startswith('**') for line in readme.splitlines() if '±' in line
                   for cell in line.split('| ')) == 6
