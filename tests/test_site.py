"""Pages made of two small notebooks: run, rendered, linked, and searched for what should not be there."""
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import yaml
from make_site import ROOT, WIDGET, as_page, chapters, exports, is_run, is_skipped, make, relinked
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from site_rendering import complaints, mathml

missing = [name for name in ('sphinx', 'myst_nb', 'furo', 'latex2mathml', 'ziamath', 'grimp') if not find_spec(name)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{missing} are not installed: pip install 'stdg[site]'")
URL = 'https://example.org/stdg'
HOSTILE = '<script>window.hacked=1</script>'
OWN_PROCESS = '''>>> #| hide
import multiprocessing
def work(): pass
if multiprocessing.get_all_start_methods()[0] == 'fork':  # the usual way: it needs no name to find `work` by
    other = multiprocessing.Process(target=work)
    other.start()
    other.join()
    assert other.exitcode == 0'''
SIDEBAR = """
website:
  sidebar:
    contents:
      - index.ipynb
      - train.ipynb
      - section: A <b>wing</b>
        contents:
          - wing/02_second.ipynb
          - wing/01_first.ipynb
"""


def notebook(path, *cells):
    "Write a notebook of texts, and of code behind `>>>`."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [new_code_cell(text[3:].strip()) if text.startswith('>>>') else new_markdown_cell(text) for text in cells]
    nbformat.write(new_notebook(cells=made), path)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project of a first page, two chapters and a runbook that is not run."
    root = tmp_path_factory.mktemp('project')
    (root/'settings.ini').write_text(f'[DEFAULT]\nlib_name = stdg\ngit_url = {URL}\ntitle = Toys\n')
    (root/'figures').mkdir()
    shutil.copy(ROOT/'figures'/'room.jpg', root/'figures'/'room.jpg')
    (root/'CHANGELOG.md').write_text('# Changes\n\n[the second](nbs/wing/02_second.ipynb)\n')
    (root/'nbs').mkdir()
    (root/'nbs'/'sidebar.yml').write_text(SIDEBAR)
    notebook(root/'nbs'/'index.ipynb', '# Toys\n\n![A room](../figures/room.jpg)\n\n'
             '[first](../nbs/wing/01_first.ipynb), [second](../nbs/wing/02_second.ipynb#A-place), [wing](../nbs/wing), '
             '[licence](../LICENSE), [changes](../CHANGELOG.md)')
    notebook(root/'nbs'/'train.ipynb', '# A long run\n\n- skip_exec: true', '>>> raise RuntimeError("it was run")')
    notebook(root/'nbs'/'wing'/'01_first.ipynb', '# First', '>>> #| default_exp toys', '>>> #| hide\nhidden = 6',
             OWN_PROCESS,
             '>>> #| export\ndef tell_all(x): return x\n\nLIMIT = 3', f'>>> print({HOSTILE!r}, hidden + 1)',
             '>>> %matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()',
             '>>> #| eval: false\n1/0', 'Half: $\\tfrac12$ and $$x \\le \\Big\\lfloor y \\Big\\rfloor$$')
    notebook(root/'nbs'/'wing'/'02_second.ipynb', '# Second', 'Before [it](01_first.ipynb) `tell_all` and '
             '`wing/01_first`; not `[x](y.ipynb)`, nor `LIMIT_` ([here](#A-place)).', '## A place',
             f'>>> from pathlib import Path\nassert Path("01_first.ipynb").exists()\n{HOSTILE!r}')
    return root


@pytest.fixture(scope='module')
def site(project):
    "What was made of it, and how many notebooks were run."
    out = project/'_site'
    return out, make(project, out, preload=[])


def page(site, name): return (site[0]/'html'/f'{name}.html').read_text(encoding='utf-8')


def test_pages_have_what_the_notebooks_show(site):
    assert site[1] == 3
    first = page(site, 'wing/01_first')
    assert 'hidden = 6' not in first and '#|' not in first and 'default_exp' not in first
    assert '&lt;script&gt;window.hacked=1&lt;/script&gt; 7' in first
    assert first.count('<img') == 1 and list((site[0]/'html'/'_images').glob('*.png'))
    assert first.count('<math') == 2 and '⌊' in first and '<mfrac><mn>1</mn><mn>2</mn></mfrac>' in first
    assert '1/0' in re.sub('<[^>]*>', '', first) and 'Traceback' not in first
    run = page(site, 'train')
    assert 'without what it prints and draws' in run and 'skip_exec' not in run and 'without what' not in first


def test_order_and_links(site):
    start = page(site, 'index')
    tree = start[start.index('class="sidebar-tree"'):]
    order = [tree.index(f'href="{name}.html"') for name in ('train', 'wing/02_second', 'wing/01_first', 'genindex')]
    assert order == sorted(order) and 'A &lt;b&gt;wing&lt;/b&gt;' in tree
    body = start[start.index('<article'):start.index('</article')]
    for link in ('wing/01_first.html', 'wing/02_second.html#a-place', f'{URL}/tree/main/nbs/wing',
                 f'{URL}/blob/main/LICENSE', 'changes.html'): assert f'href="{link}"' in body, link
    assert '<img alt="A room"' in body and (site[0]/'html'/'_images'/'room.jpg').stat().st_size == (
        ROOT/'figures'/'room.jpg').stat().st_size
    second = page(site, 'wing/02_second')
    article = second[second.index('<article'):second.index('</article')]
    for link in ('01_first.html', '01_first.html#stdg.toys.tell_all', '#a-place'):
        assert f'href="{link}"' in article, link
    assert '[x](y.ipynb)' in article and 'LIMIT_' in article and article.count('01_first.html') == 3
    assert 'href="wing/01_first.html#stdg.toys.LIMIT"' in page(site, 'genindex')
    assert 'tell_all' in (site[0]/'html'/'searchindex.js').read_text(encoding='utf-8')


def test_nothing_of_another_host_and_no_script_of_strangers(site, tmp_path):
    for path in (site[0]/'html').rglob('*.html'):
        assert HOSTILE not in path.read_text(encoding='utf-8'), path.name
    assert complaints(site[0]/'html') == []
    assert 'url("formulas.ttf")' in (site[0]/'html'/'_static'/'site.css').read_text(encoding='utf-8')
    assert (site[0]/'html'/'_static'/'formulas.ttf').read_bytes()[:4] == b'\0\1\0\0'
    shutil.copytree(site[0]/'html', tmp_path/'html')
    (tmp_path/'html'/'changes.html').unlink()
    with open(tmp_path/'html'/'train.html', 'a') as file:
        file.write('<script src="https://cdn.example.org/x.js"></script><a href="index.html#nowhere">a</a>')
        file.write('<p style="background: url(//example.org/x.png)"></p><a href="../../secret.txt">b</a>')
    (tmp_path/'html'/'_static'/'more.css').write_text('@import "https://example.org/font.css"; a { b: url(lost.png) }')
    found = '\n'.join(complaints(tmp_path/'html'))
    for wrong in ('index.html leads to changes.html', 'train.html loads https://cdn.example.org/x.js',
                  'train.html leads to index.html#nowhere, which', 'train.html loads //example.org/x.png',
                  'train.html leads to ../../secret.txt', 'more.css loads https://example.org/font.css',
                  'more.css leads to lost.png'):
        assert wrong in found, found


def test_what_has_not_changed_is_not_run_again(project, site, capsys):
    "Text may change, code may not; a notebook that fails has its name in the message, and the rest is kept."
    second = project/'nbs'/'wing'/'02_second.ipynb'
    kept = second.read_bytes()
    nb = nbformat.read(second, as_version=4)
    nb.cells[1].source = 'Other words.'
    nbformat.write(nb, second)
    assert make(project, site[0], preload=[]) == 0 and 'Other words.' in page(site, 'wing/02_second')
    nb.cells[-1].source = 'print(1)\nraise KeyError("no such toy")'
    nbformat.write(nb, second)
    with pytest.raises(SystemExit, match=r'These notebooks fail: nbs/wing/02_second\.ipynb$'):
        make(project, site[0], preload=[])
    assert 'no such toy' in capsys.readouterr().err and len(list((site[0]/'executed').iterdir())) == 2
    second.write_bytes(kept)


def test_small_parts():
    cell = new_code_cell('#| export\ndef f(): pass\nclass A: b = 1\nC, _d = 1, 2\nE: int = 3\n_g = 1')
    assert exports(cell) == dict(f='function', A='class', E='data')
    assert exports(new_code_cell('def f(): pass')) == {}
    assert is_run(cell) and not is_run(new_markdown_cell('x')) and not is_run(new_code_cell('#| slow\n1'))
    assert not is_run(new_code_cell('#| eval: false\n1'))
    assert relinked('[a](https://x.org/b.ipynb)\n```\n[c](d.ipynb)\n```', Path('/r/nbs'), Path('/r'), URL) == (
        '[a](https://x.org/b.ipynb)\n```\n[c](d.ipynb)\n```')
    view = {'application/vnd.jupyter.widget-view+json': {}}
    shown = [new_output('display_data', data) for data in (view, view | {'text/plain': 'a slider'}, {})]
    nb = new_notebook(cells=[new_code_cell('show()', outputs=[*shown, new_output('stream', text='said')])])
    slider, stream = as_page(nb, Path('/r/nbs/a.ipynb'), Path('/r'), 'stdg', URL).cells[0].outputs[1:]
    assert nb.cells[0].outputs[0].data == {'text/plain': WIDGET} and slider.data == {'text/plain': 'a slider'}
    assert stream.text == 'said'
    with pytest.raises(ValueError, match='not every command'): mathml(r'\nosuchcommand x')


def test_every_formula_of_the_notebooks_can_be_shown():
    "What takes minutes with all notebooks is seen here without running or rendering one."
    names = [page for _, pages in chapters(ROOT) for page in pages]
    assert names[0] == 'index' and len(names) == len(set(names)) > 100
    number = 0
    for name in names:
        nb = nbformat.read(ROOT/'nbs'/f'{name}.ipynb', as_version=4)
        assert not is_skipped(nb) or '/' not in name, 'only runbooks need a run'
        for cell in (cell for cell in nb.cells if cell.cell_type == 'markdown'):
            text = re.sub(r'```.*?```|`[^`]*`', '', cell.source, flags=re.S)
            for block, line in re.findall(r'\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)\$', text, re.S):
                assert '<math' in mathml(block or line, bool(block)), (name, block or line)
                number += 1
    assert number > 400


def test_the_workflow_publishes_what_is_made():
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'pages.yml').read_text(encoding='utf-8'))['jobs']
    steps = jobs['build']['steps']
    assert 'make site PYTHON=python' in [step.get('run') for step in steps]
    assert steps[-1]['with']['path'] == '_site/html' and '_site' in (ROOT/'.gitignore').read_text(encoding='utf-8')
    assert jobs['publish']['needs'] == 'build'
