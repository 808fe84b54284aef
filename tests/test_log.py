"Trackers: what TensorBoard and wandb receive, and that both write only to the run's folder."
import pytest

from stdg.training.log import Log


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    with Log(tmp_path, ['tensorboard']) as log:
        for step in range(1, 6): log.write('student', step, dict(data=.01), loss=10. - step)
    with Log(tmp_path, ['tensorboard'], step=4) as log:  # resumed after step 3
        for step in (4, 5): log.write('student', step, dict(data=.01), loss=20. - step)
    events = reader.EventAccumulator(str(tmp_path/'tensorboard'/'student')).Reload()
    assert set(events.Tags()['scalars']) == {'loss', 'data'}
    losses = [(event.step, event.value) for event in events.Scalars('loss')]
    assert losses == [(1, 9), (2, 8), (3, 7), (4, 16), (5, 15)]


def test_wandb_stays_offline_and_in_the_folder(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with Log(tmp_path, ['wandb']) as log: log.write('student', 1, dict(data=.1), loss=3.)
    assert list((tmp_path/'wandb').glob('offline-run-*/*.wandb'))
