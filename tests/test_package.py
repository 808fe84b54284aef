"""What is installed, what is missing and says so, what is handed to other libraries, and what GitHub reads."""
import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement

import stdg
from stdg.datasets.coco import read_own
from stdg.graph import Vocabulary
from stdg.inference.box_formats import read_boxes
from stdg.inference.display import PicturePrediction
from stdg.io.extras import EXTRAS
from stdg.io.files import write_json

ROOT = Path(__file__).parent.parent
# names of the index for what is imported under another name
INDEX = dict(PIL='pillow', yaml='pyyaml', cv2='opencv-python-headless', skimage='scikit-image',
             IPython='ipykernel', traitlets='ipywidgets')
GITHUB = {'github-workflows': ['.github/workflows/test.yml', '.github/workflows/pages.yml'],
          'dependabot': ['.github/dependabot.yml'],
          'github-issue-forms': ['.github/ISSUE_TEMPLATE/error.yml', '.github/ISSUE_TEMPLATE/idea.yml'],
          'github-issue-config': ['.github/ISSUE_TEMPLATE/config.yml'], 'citation-file-format': ['CITATION.cff']}


@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def brought(settings, extra):
    "Names of the packages that an extra brings, with those of the extras that it takes in."
    found = set()
    for one in map(Requirement, settings[f'{extra}_requirements'].split()):
        if one.name != 'stdg': found.add(one.name)
        for inner in one.extras if one.name == 'stdg' else (): found |= brought(settings, inner)
    return found


def test_the_core_alone_predicts_trains_and_evaluates(tmp_path):
    "In a process of its own, in which nothing of an extra can be imported."
    done = subprocess.run([sys.executable, Path(__file__).with_name('core_only.py'), '--block', tmp_path], cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith('the core works, and 11 extras say what they are')


def test_what_is_imported_is_of_the_core(settings):
    "Whatever stands behind `import`, at the top or within a function; extras come by `needed` and `Later`."
    core = {Requirement(one).name.lower().replace('-', '_') for one in settings['requirements'].split()}
    strangers = {}
    for path in (ROOT/'stdg').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom): names = [] if node.level else [node.module]
            else: names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split('.')[0] for name in names} - {'stdg', *sys.stdlib_module_names}:
                if INDEX.get(name, name).lower() not in core: strangers[name] = path.name
    assert not strangers
    assert 'matplotlib' not in core and 'torch' in core


def test_each_extra_brings_what_its_line_promises(settings):
    for module, (extra, _) in EXTRAS.items():
        assert INDEX.get(module, module) in brought(settings, extra), f'{module} does not come with stdg[{extra}]'
    with open(ROOT/'setup.py', encoding='utf-8') as file: made = file.read()
    given = {}
    exec(made.replace('from setuptools import find_packages, setup', 'find_packages = lambda **how: []').replace(
        'setup(\n', 'given.update('), dict(given=given, __file__=str(ROOT/'setup.py')))
    whole, = map(Requirement, given['extras_require']['all'])
    named = {name.removesuffix('_requirements') for name in settings if name.endswith('_requirements')}
    assert whole.name == 'stdg' and whole.extras == named - {'dev', 'site', 'wandb'}
    assert not {'jupyterlab', 'matplotlib', 'trimesh'} & {Requirement(one).name for one in given['install_requires']}


HOSTILE = '<img src=x onerror=alert(1)>'


def prediction(**changed):
    "Three objects of which two are sure, and a third that a triplet brings along."
    names = Vocabulary(['cup', HOSTILE, 'table'], ['on', 'under'])
    boxes = [[10.25, 20, 40, 60], [5, 50, 95.5, 80], [60, 10, 90, 55], [0, 0, 9, 9]]
    given = dict(boxes=boxes, labels=[0, 2, 1, 0], scores=[.75, .9, .25, .1], pairs=[[0, 1], [2, 1]],
                 predicates=[[.8, .1], [.7, .2]], size=(90, 100), picture=torch.zeros(3, 90, 100, dtype=torch.uint8),
                 vocabulary=names, thresholds=dict(objects=.5, triplets=.1), name='desk.jpg')
    return PicturePrediction(**given | changed)


def test_coco_itself_reads_what_was_found(tmp_path):
    "pycocotools takes it for the truth, and its annotations for results; our own reader takes it with relations."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = prediction()
    write_json(tmp_path/'found.json', found.to_coco(image_id=41))
    with redirect_stdout(StringIO()):
        truth = COCO(str(tmp_path/'found.json'))
        results = truth.loadRes(found.to_coco(image_id=41)['annotations'])
        judge = COCOeval(truth, results, 'bbox')
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert judge.stats[0] == pytest.approx(1.)
    assert truth.loadImgs(41) == [dict(id=41, file_name='desk.jpg', height=90, width=100)]
    assert [one['name'] for one in truth.loadCats(truth.getCatIds())] == ['cup', HOSTILE, 'table']
    cup, = truth.loadAnns(truth.getAnnIds(catIds=truth.getCatIds(catNms=['cup'])))
    assert cup['bbox'] == [10.25, 20, 29.75, 40] and cup['area'] == 29.75 * 40
    assert cup['score'] == pytest.approx(.75) and cup['iscrowd'] == 0
    (_, name, graph), = read_own(tmp_path/'found.json', strict=True)
    assert name == 'desk.jpg' and graph.relations.tolist() == found.graph().relations.tolist()
    assert torch.equal(graph.boxes, found.graph().boxes)
    top = found.to_coco(top=1, min_object=.8)
    assert len(top['relations']) == 1 and len(top['annotations']) == 2  # the table, and the cup on it
    nothing = prediction(boxes=[], labels=[], scores=[], pairs=[], predicates=torch.zeros(0, 2)).to_coco()
    assert nothing['annotations'] == nothing['relations'] == [] and len(nothing['images']) == 1


def test_supervision_itself_takes_what_was_found():
    supervision = pytest.importorskip('supervision', reason='supervision is not installed')
    found = prediction()
    made = found.to_supervision()
    assert isinstance(made, supervision.Detections) and len(made) == 3
    assert made.xyxy.tolist() == found.graph().boxes.tolist() and made.class_id.tolist() == [2, 0, 1]
    assert made.confidence == pytest.approx([.9, .75, .25])
    assert made['class_name'].tolist() == ['table', 'cup', HOSTILE]
    sure = made[made.confidence > .5]
    names = dict(zip(made['object'].tolist(), made['class_name'].tolist()))
    there = set(sure['object'].tolist())
    relations = [one for one in sure.metadata['relations'] if {one['subject'], one['object']} <= there]
    assert [(names[one['subject']], one['predicate'], names[one['object']]) for one in relations] == [
        ('cup', 'on', 'table')]
    again = read_boxes(made)
    assert again.labels == ['table', 'cup', HOSTILE] and np.array_equal(again.boxes, made.xyxy)
    drawn = supervision.BoxAnnotator().annotate(np.zeros((90, 100, 3), np.uint8), made)
    assert drawn.any()
    nothing = prediction().to_supervision(min_score=1., min_object=2.)
    assert nothing.is_empty() and not supervision.Detections.merge([nothing, nothing]).metadata.get('relations')


def test_one_number_of_the_version(settings):
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == settings['version'] == stdg.__version__
    changes = re.findall(r'^## (\S+)', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert settings['version'] in changes


def test_the_workflow_tests_what_the_package_promises(settings):
    workflow = yaml.safe_load((ROOT/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8'))
    job = workflow['jobs']['test']
    pythons = job['strategy']['matrix']['python']
    assert pythons == ['3.11', '3.12', '3.13'] and pythons[0] == settings['min_python']
    assert 'make test PYTHON=python' in [step.get('run') for step in job['steps']]


def complaints(kind, *paths):
    "What check-jsonschema has against files of a `kind`."
    checker, out = pytest.importorskip('check_jsonschema', reason='check-jsonschema is not installed'), StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as ended:
        checker.main(['--builtin-schema', f'vendor.{kind}', *map(str, paths)])
    assert bool(ended.value.code) == ('ok --' not in out.getvalue())
    return out.getvalue() if ended.value.code else ''


def test_github_can_read_its_files(tmp_path):
    listed = {name for names in GITHUB.values() for name in names}
    assert {str(path.relative_to(ROOT)) for path in (ROOT/'.github').rglob('*.yml')} <= listed
    for kind, names in GITHUB.items(): assert not complaints(kind, *(ROOT/name for name in names))
    text = (ROOT/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8')
    (tmp_path/'wrong.yml').write_text(text.replace('runs-on', 'run-on', 1))
    assert 'runs-on' in complaints('github-workflows', tmp_path/'wrong.yml')
    form = yaml.safe_load((ROOT/'.github'/'ISSUE_TEMPLATE'/'error.yml').read_text(encoding='utf-8'))
    asked = {field['id'] for field in form['body'] if field.get('validations', {}).get('required')}
    assert asked == {'command', 'message', 'versions'}


def test_a_linter_has_nothing_against_the_workflow(tmp_path):
    "zizmor, offline: what strangers may do by it, and whether the actions are the ones that were looked at."
    linter = shutil.which('zizmor', path=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
    if not linter: pytest.skip('zizmor is not installed')
    def found(folder):
        return subprocess.run([linter, '--offline', '--no-progress', '--quiet', folder], cwd=tmp_path, text=True,
                              capture_output=True, timeout=60)
    assert found(ROOT/'.github').returncode == 0, found(ROOT/'.github').stdout
    text = (ROOT/'.github'/'workflows'/'test.yml').read_text(encoding='utf-8')
    (tmp_path/'.github'/'workflows').mkdir(parents=True)
    (tmp_path/'.github'/'workflows'/'loose.yml').write_text(re.sub('@[0-9a-f]{40}', '@v5', text))
    assert 'unpinned-uses' in found(tmp_path/'.github').stdout


@pytest.mark.skipif(not os.environ.get('STDG_INSTALL'),
                    reason='with STDG_INSTALL=1 the package is built and installed, see CONTRIBUTING.md')
def test_wheel_and_source_distribution_in_an_empty_environment(tmp_path):
    pip = [sys.executable, '-m', 'pip', 'index', 'versions', 'tqdm', '--disable-pip-version-check']
    if subprocess.run(pip, capture_output=True).returncode: pytest.skip('the package index cannot be reached')
    done = subprocess.run([sys.executable, Path(__file__).with_name('installed.py'), tmp_path], text=True,
                          capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'the core works' in done.stdout
