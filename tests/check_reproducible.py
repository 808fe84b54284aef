"""Exports and cleans a copy of the notebooks, writes README.md again, and fails if anything differs
from what is here."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

here = Path(__file__).parent.parent
parts = ['nbs', 'stdg', 'settings.ini', 'pyproject.toml', 'README.md', 'setup.py',
         'tests/make_readme.py']


def main():
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/'copy'
        for part in parts:
            target = copy/part
            target.parent.mkdir(parents=True, exist_ok=True)
            if (here/part).is_dir():
                shutil.copytree(here/part, target, ignore=shutil.ignore_patterns('__pycache__',
                    '.ipynb_checkpoints'))
            else: shutil.copy(here/part, target)
        bin_folder = Path(sys.executable).parent
        for command in ([bin_folder/'nbdev_export'], [bin_folder/'nbdev_clean'],
                        [sys.executable, 'tests/make_readme.py']):
            subprocess.run(command, cwd=copy, check=True,
                           env={**os.environ, 'PYTHONPATH': str(copy)})
        changed = [path.relative_to(copy) for path in sorted(copy.rglob('*')) if path.is_file()
                   and '__pycache__' not in path.parts
                   and (not (here/path.relative_to(copy)).exists()
                        or (here/path.relative_to(copy)).read_bytes() != path.read_bytes())]
        stale = [path.relative_to(here) for path in sorted((here/'stdg').rglob('*.py'))
                 if not (copy/path.relative_to(here)).exists()]
    if changed or stale:
        sys.exit("These differ after export, clean and README: "
                 f"{[str(p) for p in changed + stale]}. "
                 "Run nbdev_export, nbdev_clean and python tests/make_readme.py, and commit what "
                 "they change.")
    print('export, clean and README reproduce what is here')


if __name__ == '__main__': main()
