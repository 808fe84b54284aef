"""Runs `stdg.train` on a YAML file and ends it at a given step: `python killed_run.py run.yaml KIND
STAGE STEP`.

KIND is 'step' (SIGKILL as that step begins), 'tensors' (SIGKILL in the middle of writing the
tensors of that step's state), 'json' (SIGKILL between tensors and JSON), 'full' (no file may grow
past 64 kB from that step on), 'usr1' or 'term' (that signal as the step begins), 'raise' (an error;
under torchrun in process 1 alone) or 'none'."""
import os
import resource
import signal
import sys

from stdg import train
from stdg.backbone import OTHER
from stdg.io import tensors
from stdg.training import loop, resume

config, kind, stage, step = sys.argv[1:]
step = int(step)
one_step, save_state = loop._one_step, loop.save_state
save_file, write_json = tensors.save_file, resume.write_json
# batch norms see what their own process sees
if 'NO_NORM' in os.environ: OTHER['head_norm'] = False
now = ['', -1]  # of the state that is being written


def kill(): os.kill(os.getpid(), signal.SIGKILL)


def at_step(run, batch, log):
    if (run.stage, run.done) == (stage, step):
        if kind == 'step': kill()
        if kind == 'full': resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        if kind in ('usr1', 'term'):
            os.kill(os.getpid(), signal.SIGUSR1 if kind == 'usr1' else signal.SIGTERM)
        if kind == 'raise' and int(os.environ.get('RANK', 1)) == 1:
            raise RuntimeError('this process has a bug')
    return one_step(run, batch, log)


def at_state(folder, stage, step, *rest):
    now[:] = stage, step
    save_state(folder, stage, step, *rest)


def at_tensors(numbers, path, **more):
    save_file(numbers, path, **more)
    if kind == 'tensors' and now == [stage, step]:
        with open(path, 'r+b') as file: file.truncate(os.path.getsize(path) // 2)
        kill()


def at_json(path, record):
    if kind == 'json' and now == [stage, step]: kill()
    write_json(path, record)


loop._one_step, loop.save_state = at_step, at_state
tensors.save_file, resume.write_json = at_tensors, at_json
train.main(['--config', config])
