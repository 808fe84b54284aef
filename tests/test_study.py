"Studies: the runs of the real one fit the runbook, one goes through at toy size, and a killed one leaves nothing behind."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from stdg import study, train
from test_configs import parameters

root = Path(__file__).parent.parent


def test_every_parameter_is_one_of_the_runbook():
    runs = study.taught_or_not('study', n_train=10, n_val=0, n_test=10, size=64, backbone='small', pretrained=True, epochs=1, decay=[.5], batch_size=2, workers=0)
    for run in runs:
        assert run.parameters.keys() <= parameters().keys()
        settings = train.Settings(**run.parameters, name=run.name)
        for name, (kind, _) in parameters().items(): assert type(getattr(settings, name)) is kind or kind is float, name


def test_a_toy_study_of_real_runs(tmp_path, monkeypatch):
    "16 pictures, three runs that train, in the order that they need each other, and a table of what came out."
    (tmp_path/'settings.ini').touch()
    (tmp_path/'nbs').symlink_to(root/'nbs')
    monkeypatch.chdir(tmp_path)
    runs = study.taught_or_not('toy', (0, 1), dict(low=.1), n_train=16, n_val=0, n_test=4, size=64, backbone='resnet10t.c3_in1k', pretrained=False, epochs=1, decay=[1.])
    runs = [run for run in runs if run.seed == 0 and run.configuration in ('', 'nobody', 'depth')]
    did = study.run_study(runs, min(os.cpu_count(), 2), progress=False)
    assert len(did) == 3 and did[0] == 'toy/low-0-teacher'
    found = study.summary(study.gather(runs), 'nobody')
    assert set(found['low clutter']) == {'nobody', 'depth'} and 'depth' in str(study.StudyTable(found))
    results = [json.loads((run.folder/'results.json').read_text())['settings'] for run in runs]
    assert {(r['seed'], r['clutter'], r['n_train']) for r in results} == {(0, .1, 16)}


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells children that their parent was killed')
def test_a_killed_study_leaves_no_process(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    notebook.cells = [nbformat.v4.new_code_cell("import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(300)")]
    nbformat.write(notebook, tmp_path/'sleep.ipynb')
    (tmp_path/'settings.ini').touch()
    parent = subprocess.Popen([sys.executable, '-c', "from stdg.study import Run, run_study\nrun_study([Run('a', {}, notebook='sleep.ipynb')])"], cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text(): assert time.monotonic() < end; time.sleep(.1)
    pid = int((tmp_path/'pid').read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f'/proc/{pid}').exists(): assert time.monotonic() < end; time.sleep(.2)


def test_names_are_escaped_and_numbers_are_right():
    figures = {'<low>': {'none': {'AP50': {0: .1, 1: .2}}, '$x$|y': {'AP50': {0: .2, 1: .3}}}}
    found = study.summary(figures, 'none')
    table = study.StudyTable(found)
    assert '<low>' not in table._repr_html_() and '+10.0 [+10.0, +10.0]' in str(table) and '15.0 ± 63.5' in str(table)
    study.plot(found).savefig(os.devnull, format='png')


def test_yaml_of_a_run_is_what_the_runbook_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = study.taught_or_not('s', (0, 1), dict(low=.1), epochs=1)[-1]
    run.folder.mkdir(parents=True)
    (run.folder/'parameters.yaml').write_text(yaml.safe_dump(dict(run.parameters, name=run.name)))
    assert train.read_settings(run.folder/'parameters.yaml').teacher == 'runs/s/low-1-teacher/teacher.safetensors' and study.finished(run) is False
