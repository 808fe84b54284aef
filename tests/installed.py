"""Wheel and source distribution, built, checked, and used where no checkout is: `python installed.py
[FOLDER]`, by default a folder of the system's for temporary things, which is removed again.

Builds both of the files that git tracks; `twine check`; the wheel alone into an empty environment; there
`core_only.py`, and `stdg predict` as a user types it. Needs the package index, 7 GB of disk and some
minutes; pip's settings count (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL of PyTorch's builds for CPUs, ...)."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATIC = {'stdg/static/explorer.js', 'stdg/static/explorer.css', 'stdg/static/coco_names.json'}


def run(*command, cwd, **environment):
    "Run a program and return what it prints; what it says is shown if it fails."
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=inherited | environment, text=True,
                          capture_output=True)
    if done.returncode: raise SystemExit(f'{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}')
    return done.stdout


def checkout(folder):
    "A copy of the tracked files in `folder`; building in place would leave things there."
    for name in run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\0'):
        if not name or not (ROOT/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, folder/name)
    return folder


def built(folder):
    "The wheel, made from the source distribution, both checked."
    run(sys.executable, '-m', 'build', '--outdir', folder/'dist', checkout(folder/'source'), cwd=folder)
    found = sorted((folder/'dist').iterdir())
    run(sys.executable, '-m', 'twine', 'check', '--strict', *found, cwd=folder)
    source, wheel = found if found[0].suffix == '.gz' else found[::-1]
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT/'stdg').rglob('*.py')}
    assert names >= STATIC | modules, sorted((STATIC | modules) - names)
    assert all(name.startswith(('stdg/', 'stdg-')) for name in names), 'the wheel holds the package alone'
    print(f'{source.name}: {source.stat().st_size / 1e6:.1f} MB; {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB')
    return wheel


def environment(folder, what):
    "The programs of an empty environment with `what` of the index, or of a file; says how large it is."
    venv.create(folder, with_pip=True)
    bin = folder/('Scripts' if os.name == 'nt' else 'bin')
    start = time.monotonic()
    run(bin/'python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', what, cwd=folder)
    seconds = time.monotonic() - start
    files = [path for path in folder.rglob('*') if path.is_file() and not path.is_symlink()]
    theirs = sum(path.stat().st_size for path in files if {'nvidia', 'triton', 'cuda'} & set(path.parts))
    most = sum(path.stat().st_size for path in files)
    print(f'{what}: {seconds:.0f} s, {most / 1e6:.0f} MB, of these {theirs / 1e6:.0f} MB of CUDA and Triton')
    return bin


def predicts(bin, folder):
    "What the core does, and `stdg` as it is typed, in `folder`."
    print(run(bin/'python', Path(__file__).with_name('core_only.py'), folder, cwd=folder).splitlines()[-1])
    graph = run(bin/'stdg', 'predict', 'album/1.png', '-c', 'loud.safetensors', '--top', '2', cwd=folder)
    assert len(graph.splitlines()) == 2, graph
    where = run(bin/'python', '-c', 'import stdg; print(stdg.__file__)', cwd=folder).strip()
    assert Path(where).is_relative_to(bin.parent), f'{where} is not what was installed'
    assert all((Path(where).parent.parent/name).is_file() for name in STATIC)
    print(run(bin/'stdg', '--version', cwd=folder))


def main(folder):
    wheel = built(folder)
    (folder/'work').mkdir()
    predicts(environment(folder/'core', str(wheel)), folder/'work')


if __name__ == '__main__':
    if sys.argv[1:]: main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as folder: main(Path(folder))
