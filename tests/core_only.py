"""What the core does without any extra, and the line that each extra's absence gives: `python
core_only.py FOLDER`, in an environment that has the core alone. With `--block` before it, in any
environment: what is not of the core cannot be imported then."""
import configparser
import contextlib
import importlib
import importlib.metadata
import io
import pkgutil
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

EXPLORER = {'stdg.explore'}  # its classes are those of anywidget, so that it says what is missing when it is imported


def core():
    "Names of the distributions that `pip install stdg` brings, by the settings beside this folder."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    found, todo = {'stdg'}, [Requirement(text).name for text in settings['DEFAULT']['requirements'].split()]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found: continue
        found.add(name)
        try: needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: needs = []
        rules = map(Requirement, needs)
        todo += [rule.name for rule in rules if rule.marker is None or rule.marker.evaluate({'extra': ''})]
    return found


class Without:
    "A `finder` of modules that finds none of the packages `names`, as if they were not installed."
    def __init__(self, finder, names): self.finder, self.names = finder, names
    def __getattr__(self, name): return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in self.names: return self.finder.find_spec(name, path, target)


def block(allowed):
    "From now on no module of a distribution is found that is not among those `allowed`."
    from packaging.utils import canonicalize_name

    owners = importlib.metadata.packages_distributions().items()
    names = {module for module, here in owners if not allowed & {canonicalize_name(name) for name in here}}
    sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]


def said(call):
    "What `call()` says when it is refused: the one line of a program, or of its error."
    code, text = None, ''
    with tempfile.TemporaryFile('w+') as out:
        try:
            with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out): code = call()
        except ImportError as error: text = str(error)
        except SystemExit as ended: code = ended.code
        out.seek(0)
        text += out.read()
    lines = text.strip().splitlines()
    assert len(lines) == 1 and 'Traceback' not in text and code in (None, 1, 2), (code, text)
    return lines[0]


def imported():
    "Import each module of the package; returns those that could not be."
    import stdg

    odd = {}
    for module in pkgutil.walk_packages(stdg.__path__, 'stdg.', onerror=lambda name: None):
        try: importlib.import_module(module.name)
        except ImportError as error: odd[module.name] = str(error)
    return odd


def trained(folder):
    "Train teacher and student for two steps each, validate and evaluate; returns the student and its file."
    import torch

    from stdg import checkpoint, evaluation, train
    from stdg.testing import loud, toy_database

    torch.set_num_threads(1)
    database = toy_database(folder/'data'/'toy')
    settings = train.Settings(name='core', data='toy', size=64, epochs=1, teacher_share=1., batch_size=2,
                              device='cpu')
    (folder/'settings.ini').touch()
    train.write_settings(folder/'run.yaml', settings)
    train.main(['--config', 'run.yaml'])
    log = (folder/'runs'/'core'/'log.jsonl').read_text().splitlines()
    assert len(log) >= 4, log
    model, facts = checkpoint.load_with_facts(folder/'runs'/'core'/'student.safetensors')
    figures = evaluation.evaluate(model, train.judged_set(settings, database, 'test', 'rgb'), progress=False)
    assert 0 <= figures['AP50'] <= 1 and set(figures) >= {'sgdet', 'sgcls', 'predcls'}
    loud(model).save(folder/'loud.safetensors', vocabulary=database.vocabulary.to_json(), size=64,
                     thresholds=dict(objects=.1, triplets=.01))
    return database, model


def predicted(folder):
    "`stdg predict` for one picture and for a folder; returns a prediction."
    import numpy as np
    from PIL import Image

    import stdg
    from stdg import cli
    from stdg.io.files import read_json
    from stdg.testing import toy_scene

    (folder/'album').mkdir()
    for i in range(2): Image.fromarray(toy_scene(i)[1]['image']).save(folder/'album'/f'{i}.png')
    own, shown = ['-c', 'loud.safetensors'], io.StringIO()
    assert cli.main(['predict', 'album/0.png', *own, '-o', 'graph.json']) == 0
    assert cli.main(['predict', 'album', *own, '--jsonl', 'graphs.jsonl']) == 0
    with contextlib.redirect_stdout(shown): assert cli.main(['predict', 'album/0.png', *own, '--top', '3']) == 0
    assert len(shown.getvalue().splitlines()) == 3 and len(read_json('graph.json')['relations'])
    assert len(Path('graphs.jsonl').read_text().splitlines()) == 2
    found = stdg.predict(np.array(Image.open('album/0.png')), 'loud.safetensors')
    assert found.graph(top=3).sentences() == [re.sub(r'^\S+ ', '', line) for line in shown.getvalue().splitlines()]
    assert found.to_networkx().number_of_nodes() and found.to_coco()['annotations']
    return found


def missing(folder, database, model, found):
    "{extra: [lines]} of everything that asks for an extra."
    from stdg import cli, prepare, train
    from stdg.depth import estimate_depth, stereo_motorcycle
    from stdg.draw import depth_map, loss_curves
    from stdg.inference import Model, demo, export_onnx, watch
    from stdg.training.log import tracker

    train.write_settings(folder/'rooms.yaml', train.Settings(name='rooms', n_train=8, n_val=4, n_test=4))
    own = ['-c', 'loud.safetensors']
    predict = ['predict', 'album/0.png', *own, '--draw']
    (folder/'clip.mp4').write_bytes(b'\0\0\0\x18ftypmp42')
    (folder/'of_hub').mkdir()
    return dict(
        draw=[said(lambda: demo.main(own)), said(lambda: cli.main([*predict, 'graph.svg'])),
              said(lambda: cli.main([*predict, 'graph.png'])),
              said(lambda: found.svg()), said(lambda: found.graph().drawing.source), said(lambda: found._repr_html_()),
              said(lambda: depth_map(database.depth(0))), said(lambda: loss_curves('runs/core/log.jsonl'))],
        rooms=[said(lambda: train.main(['--config', 'rooms.yaml']))],
        depth=[said(lambda: estimate_depth(database, 'nobody/nothing', progress=False))],
        hub=[said(lambda: prepare.main(['fetch', '--raw', 'hub:of_hub', '--folder', 'data/hub']))],
        video=[said(lambda: cli.main(['video', 'clip.mp4', *own, '--jsonl', 'clip.jsonl'])),
               said(lambda: watch('clip.mp4', 'loud.safetensors'))],
        onnx=[said(lambda: export_onnx(Model(model, dict(size=64)), 'a.onnx'))],
        supervision=[said(found.to_supervision)],
        tensorboard=[said(lambda: tracker('tensorboard', folder))], wandb=[said(lambda: tracker('wandb', folder))],
        notebooks=[said(stereo_motorcycle)])


def main(folder):
    import stdg

    assert not set(sys.modules) & {'torch', 'stdg.inference'}, 'import stdg alone is quick'
    odd = imported()
    assert set(odd) == EXPLORER and all("'stdg[explore]'" in line for line in odd.values()), odd
    from stdg.io.extras import EXTRAS

    lines = missing(folder, *trained(folder), predicted(folder)) | dict(explore=list(odd.values()))
    assert set(lines) == {extra for extra, _ in EXTRAS.values()}
    for extra, texts in lines.items():
        for text in texts:
            line = rf" needs \S+, which is not installed; it comes with pip install 'stdg\[{extra}\]'$"
            assert re.search(line, text), text
    assert not {'matplotlib', 'IPython', 'trimesh', 'cv2', 'transformers'} & set(sys.modules)
    left = {path.name for path in folder.iterdir()}
    assert not left & {'graph.svg', 'graph.png', 'clip.jsonl', 'a.onnx'}, left
    print(f'stdg {stdg.__version__}: the core works, and {len(lines)} extras say what they are')


if __name__ == '__main__':
    *options, folder = sys.argv[1:]
    if '--block' in options: block(core())
    with contextlib.chdir(folder), patch('sys.argv', ['stdg']): main(Path(folder).resolve())
