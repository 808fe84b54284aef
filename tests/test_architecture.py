"""The shape of the repository: sizes, names, floors, and the names that others call."""
import ast
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

root = Path(__file__).parent.parent
modules = sorted(p for p in (root/'stdg').rglob('*.py') if p.name != '_modidx.py')
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
config = configparser.ConfigParser()
config.read(root/'tests'/'architecture.ini')

# Others call these: names and meanings stay.
PUBLIC = '''
stdg.predict stdg.graph.SceneGraph stdg.graph.Prediction stdg.hha.encode stdg.depth.pseudo_depth
stdg.fields.encode stdg.losses.detection_loss stdg.losses.relation_loss stdg.losses.teaching_loss
stdg.decode.decode stdg.metrics.evaluate stdg.model.STDG stdg.checkpoint.from_released
stdg.checkpoint.load stdg.released.main stdg.prepare.main stdg.train.main stdg.cli.main
stdg.rooms.make_rooms stdg.draw.side_by_side stdg.training.fit stdg.evaluation.evaluate
stdg.inference.Predictor stdg.explore.Explorer
'''.split()


@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_are_callable(name):
    module, attribute = name.rsplit('.', 1)
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize('path', modules, ids=lambda p: str(p.relative_to(root)))
def test_modules_stay_short(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 400, 'two ideas: split it'


def test_notebooks_stay_short_and_have_names_of_their_own():
    "nbdev reports bare file names, and two notebooks of one name would render to one page."
    long = {p.name: n for p in notebooks if p.stem != 'tutorial'
            and (n := len(nbformat.read(p, as_version=4).cells)) > 60}
    assert not long
    names = [re.sub(r'^\d+_', '', p.stem).lower() for p in notebooks]
    assert len(names) == len(set(names))


def test_classes_are_whole():
    "No method is attached to a class from outside."
    def attached(tree):
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        targets = [target for node in ast.walk(tree) if isinstance(node, ast.Assign)
                   for group in node.targets
                   for target in (group.elts if isinstance(group, ast.Tuple) else [group])]
        return [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)
                and isinstance(t.value, ast.Name) and t.value.id in classes]
    assert attached(ast.parse('class A: pass\nA.f, b = 1, 2')) == ['A.f']
    found = {path.name: attached(ast.parse(path.read_text(encoding='utf-8'))) for path in modules}
    assert not {name: what for name, what in found.items() if what}


def test_no_private_name_crosses_modules():
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and (node.level or 'stdg' in (node.module or '')):
                private = [a.name for a in node.names if a.name.startswith('_')]
                assert not private, f'{path}: {private}'


def test_the_house_has_few_rooms_on_few_floors():
    house = config['importlinter:contract:house']
    floors = [line.strip().split(' | ') for line in house['layers'].splitlines() if line.strip()]
    boxes = {name for floor in floors for name in floor}
    there = {p.stem if p.is_file() else p.name for p in (root/'stdg').iterdir()
             if p.suffix == '.py' or p.is_dir()} - {'__init__', '_modidx', 'static', '__pycache__'}
    assert boxes == there and len(boxes) <= 33 and len(floors) <= 9


def test_predicting_does_not_import_the_evaluator_or_the_trainer():
    "In a process of its own, since this one has imported everything."
    code = 'import sys, stdg.inference.predictor; print(*[m for m in sys.modules if "stdg" in m])'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            check=True).stdout.split()
    assert 'stdg.decode' in loaded
    strangers = ('stdg.evaluation', 'stdg.training', 'stdg.train', 'stdg.rooms', 'stdg.explore')
    assert not [name for name in loaded if name.startswith(strangers)]


def test_the_sidebar_leads_to_every_notebook():
    def pages(entry):
        if isinstance(entry, str): return [entry]
        if isinstance(entry, list): return [page for item in entry for page in pages(item)]
        return pages(entry.get('contents', [])) + ([entry['href']] if 'href' in entry else [])
    sidebar = yaml.safe_load((root/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))
    found = pages(sidebar['website']['sidebar']['contents'])
    expected = [str(p.relative_to(root/'nbs')) for p in notebooks]
    assert sorted(found) == sorted(expected)


def test_links_and_names_of_notebooks_lead_somewhere():
    wings = '|'.join(p.name for p in (root/'nbs').iterdir() if p.is_dir())
    lost = []
    pages = [(p, c.source) for p in notebooks for c in nbformat.read(p, as_version=4).cells
             if c.cell_type == 'markdown']
    pages += [(root/name, (root/name).read_text(encoding='utf-8'))
              for name in ('README.md', 'CONTRIBUTING.md')]
    for path, text in pages:
        links = re.findall(r'\]\(([^)#\s]+)\)', text)
        lost += [f'{path.name}: {link}' for link in links
                 if '://' not in link and not link.startswith('attachment:')
                 and not (path.parent/link).exists()]
        named = re.findall(rf'\b((?:{wings})/\d\d_\w+)', text)
        lost += [f'{path.name}: {name}' for name in named
                 if not (root/'nbs'/f'{name}.ipynb').exists()]
    assert not lost
