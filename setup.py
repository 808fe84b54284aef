"""Installs the package from settings.ini, the one place where nbdev, pip and CI read the project's
facts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
ending = '_requirements'
extras = {name.removesuffix(ending): cfg[name].split() for name in cfg if name.endswith(ending)}
extras['all'] = [f"{cfg['lib_name']}[{','.join(name for name in extras if name not in ('dev', 'site', 'wandb'))}]"]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
      author=cfg['author'],
    author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
      keywords=cfg['keywords'],
    classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists()
      else '',
    long_description_content_type='text/markdown', python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['stdg', 'stdg.*']), package_data={'stdg': ['static/*']},
      zip_safe=False,
    install_requires=cfg['requirements'].split(),
      entry_points=dict(console_scripts=cfg['console_scripts'].split()),
    extras_require=extras,
)
