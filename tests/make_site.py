"""Pages of the notebooks with what they show: `python make_site.py [FOLDER] [-n PROCESSES]`, by default in _site.

Notebooks are kept without outputs, so they are run first, as nbdev_test runs them, each in a process and a folder
for temporary files of its own; what comes out is kept by the hash of the code, of the notebook and of the modules
that it imports. Then Sphinx renders them, and the pages are searched for links that lead nowhere and for anything
that another host would have to send. FOLDER/html opens from the disk, too: nothing needs a server, nor a network."""
import argparse
import ast
import configparser
import hashlib
import json
import multiprocessing.util
import os
import re
import shutil
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml
from site_rendering import CSS, SCRIPT, complaints, formula_font, render

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ['execnb.shell', 'matplotlib.pyplot', 'torch']  # imported once, for all notebooks
NOTE = ('```{note}\nThis runbook is shown without what it prints and draws: it trains or reads a run, for minutes '
        'or hours. Run it as it says below, and look at the notebook that it leaves.\n```')
WIDGET = '(a widget, which a page cannot show: open the notebook in JupyterLab)'
PAGES = {'CONTRIBUTING.md': 'contributing', 'CHANGELOG.md': 'changes'}


# Notebooks as they are kept

def directives(source):
    "{name: value} of the lines `#| name: value` of a cell."
    return dict(re.findall(r'^#\|\s*(\w+):?[ \t]*(.*?)\s*$', source, re.M))


def is_run(cell, skipped=('slow',)):
    "Whether nbdev_test would run this cell."
    named = directives(cell.source)
    return (cell.cell_type == 'code' and named.get('eval', '').lower() != 'false' and 'nbdev_export(' not in cell.source
            and not set(skipped) & set(named))


def is_skipped(nb):
    "Whether the notebook asks not to be run: it needs a run, or hours."
    return any(re.search(r'^- skip_exec: true\s*$', cell.source, re.M) for cell in nb.cells[:1])


def parsed(source):
    "The syntax tree of a cell's Python; its magic commands are left out, and so is what is no Python at all."
    try: return ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))
    except SyntaxError: return ast.Module([], [])


def module_of(nb, library):
    "The module that a notebook writes; None if it writes none."
    named = [name for cell in nb.cells if (name := directives(cell.source).get('default_exp'))]
    return f'{library}.{named[0]}'.removesuffix('.__init__') if named else None


def exports(cell):
    "{name: its kind in Sphinx's Python} of the public names that a cell writes into its module."
    found = {}
    for node in parsed(cell.source).body if 'export' in directives(cell.source) else ():
        kind = {ast.FunctionDef: 'function', ast.ClassDef: 'class'}.get(type(node), 'data')
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        names = [node.name] if kind != 'data' else [one.id for one in targets if isinstance(one, ast.Name)]
        found |= {name: kind for name in names if not name.startswith('_')}
    return found


def imported(nb, library):
    "{name: where it comes from} of what a notebook imports from the package by name."
    return {alias.asname or alias.name: f'{node.module}.{alias.name}'
            for cell in nb.cells if cell.cell_type == 'code' for node in ast.walk(parsed(cell.source))
            if isinstance(node, ast.ImportFrom) and not node.level and f'{node.module}.'.startswith(f'{library}.')
            for alias in node.names}


# Running

def key(nb, name, library, graph):
    "What the outputs of a notebook depend on: its place, its code, and that of the modules that it imports."
    code = [cell.source for cell in nb.cells if cell.cell_type == 'code']
    named = {'.'.join(parts[:i]) for text in [*code, *(f'{library}.{one}' for one in imported(nb, library).values())]
             for parts in [found.split('.') for found in re.findall(rf'\b{library}(?:\.\w+)*', text)]
             for i in range(1, len(parts) + 1)} & graph.modules
    modules = sorted(named | {one for module in named for one in graph.find_upstream_modules(module)})
    above = Path(find_spec(library).origin).parent.parent
    paths = [above.joinpath(*one.split('.')) for one in modules]
    texts = [(path/'__init__.py' if path.is_dir() else path.with_suffix('.py')).read_text(encoding='utf-8')
             for path in paths]
    return hashlib.sha256(json.dumps([name, code, texts]).encode()).hexdigest()


def run(path, target, root):
    "Run a notebook in its folder and write it with its outputs; '' or, if a cell fails, what it says."
    from execnb.shell import CaptureShell

    multiprocessing.set_start_method(None, force=True)  # what this process was started by is not for the notebook
    sys.path.insert(0, str(root))
    os.chdir(path.parent)
    nb = nbformat.read(path, as_version=4)
    own = os.environ['TMPDIR'] = tempfile.tempdir = tempfile.mkdtemp()
    # after what multiprocessing removes of its own within it, at a priority of -100
    multiprocessing.util.Finalize(None, shutil.rmtree, (own, True), exitpriority=-200)
    shell = CaptureShell(path, mpl_format='png')
    for cell in filter(is_run, nb.cells):
        cell.outputs = [nbformat.from_dict(one) for one in shell.run(cell.source)]
        if shell.exc: return ''.join(traceback.format_exception(shell.exc))
    nbformat.write(nb, partial := target.with_suffix('.partial'))
    os.replace(partial, target)
    return ''


def shown(nb, ran):
    "The notebook with the outputs of the same code, run earlier; its text may be another by now."
    code = [[cell for cell in one.cells if cell.cell_type == 'code'] for one in (nb, nbformat.read(ran, as_version=4))]
    for cell, with_outputs in zip(*code, strict=True): cell.outputs = with_outputs.outputs
    return nb


def run_all(jobs, root, processes, preload):
    "{path: what it says} of the notebooks that fail, of `jobs`, pairs of paths."
    context, failed = multiprocessing.get_context('forkserver'), {}
    context.set_forkserver_preload(preload)
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run, path, target, root): path for path, target in jobs}
        for number, done in enumerate(as_completed(running), 1):
            path = running[done]
            try: message = done.result()
            except Exception as error: message = f'{type(error).__name__}: {error}'  # killed, out of memory
            print(f'{number} of {len(jobs)}: {path.relative_to(root)}' + ' FAILED' * bool(message), flush=True)
            if message: failed[path] = message
    return failed


# Pages

def relinked(text, folder, root, url):
    """Markdown of a file in `folder` for the page of the same name: links to notebooks stay within the pages, to
    pictures go to copies of them, and to all else of the repository to where it is published, `url`."""
    def new(match):
        link, _, part = match[1].partition('#')
        if '://' in link or link.startswith(('mailto:', 'attachment:')): return match[0]
        part = '#' * bool(part) + part.lower()
        if not link: return f']({part})'
        target = Path(os.path.normpath(folder/link))
        if (about := [*target.glob('00_about_*.ipynb')]): target = about[0]  # a wing
        place, notebooks = target.relative_to(root), root/'nbs'
        if target.suffix == '.ipynb': return f'](/{target.relative_to(notebooks).as_posix()}{part})'
        if place.as_posix() in PAGES: return f'](/{PAGES[place.as_posix()]}.md{part})'
        if target.suffix in ('.png', '.jpg', '.svg'): return f'](/{place.as_posix()})'
        return f']({url}/{"tree" if target.is_dir() else "blob"}/main/{place.as_posix()})'
    outside = re.split(r'(^```.*?^```|`[^`\n]*`)', text, flags=re.M | re.S)
    return ''.join(part if i % 2 else re.sub(r'\]\(([^)\s]+)\)', new, part) for i, part in enumerate(outside))


def as_page(nb, path, root, library, url):
    "The notebook as it is shown: no hidden cells and no directives, links of pages, what each cell exports."
    module, skipped, cells = module_of(nb, library), is_skipped(nb), []
    for cell in nb.cells:
        if 'hide' in directives(cell.source): continue
        if cell.cell_type == 'markdown':
            text = re.sub(r'^- skip_exec: true\s*$', '', cell.source, flags=re.M)
            cell.source = relinked(text.strip(), path.parent, root, url)
        else:
            cell.metadata['exports'] = {f'{module}.{name}': kind for name, kind in exports(cell).items()}
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
            for output in cell.get('outputs', ()):  # a page has no kernel: a widget is what it prints
                given = output.get('data', {})
                kept = {kind: data for kind, data in given.items() if not kind.startswith('application/')}
                if 'data' in output: output.data = kept or ({'text/plain': WIDGET} if given else {})
            cell.outputs = [output for output in cell.get('outputs', ()) if output.get('data', True)]
        if cell.source.strip(): cells.append(cell)
    if skipped: cells.insert(1, nbformat.v4.new_markdown_cell(NOTE, id='not-run'))
    nb.cells, nb.metadata = cells, nbformat.from_dict(dict(language_info=dict(name='python')))
    return nb


def chapters(root):
    "[(heading or None, [pages])] of nbs/sidebar.yml, in its order; what has no heading stands by itself."
    found, listed = [(None, [])], yaml.safe_load((root/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))
    for entry in listed['website']['sidebar']['contents']:
        if isinstance(entry, str): found[0][1].append(entry.removesuffix('.ipynb'))
        else: found.append((entry['section'], [one.removesuffix('.ipynb') for one in entry['contents']]))
    return found


def contents(sections):
    "The same as Sphinx reads it."
    return '\n\n'.join('```{toctree}\n:hidden:\n' + f':caption: {heading}\n' * bool(heading) + '\n' + '\n'.join(pages)
                       + '\n```' for heading, pages in sections if pages)


def names_of(notebooks, library):
    """What text may name: `known`, {name with or without its module: full name}; `own`, the same for what a page
    exports or imports by name; `pages`, the names of chapters."""
    known, own, short, faces = {}, {}, {}, {}
    for page, nb in notebooks.items():
        module = module_of(nb, library)
        mine = {name: f'{module}.{name}' for cell in nb.cells for name in exports(cell)}
        own[page] = imported(nb, library) | mine
        if '/00_about_' in page: faces |= {f'{module}.{name}': full for name, full in own[page].items()}
        known |= {full: full for full in mine.values()}
        for name, full in mine.items(): short.setdefault(name, []).append(full)
    resolved = lambda full: known.get(faces.get(full, full))
    own = {page: {name: resolved(full) for name, full in given.items() if resolved(full)}
           for page, given in own.items()}
    known |= {face: known[full] for face, full in faces.items() if full in known}
    known |= {full.removeprefix(f'{library}.'): known[full] for full in list(known)}
    known |= {name: given[0] for name, given in short.items()  # a plain word may mean a parameter
              if len(given) == 1 and re.search('[_A-Z]', name)}
    return dict(known=known, own=own, pages=sorted(notebooks))


def write_changed(path, text):
    "Sphinx reads again what is newer than its page."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding='utf-8') != text: path.write_text(text, encoding='utf-8')


# All of it

def make(root, out, processes=1, preload=PRELOAD):
    "Run, render, check; how many notebooks had to be run. Raises `SystemExit` with the names of those that fail."
    import grimp

    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    library, url, executed, source = settings['lib_name'], settings['git_url'], out/'executed', out/'source'
    executed.mkdir(parents=True, exist_ok=True)
    sections = chapters(root)
    paths = {page: root/'nbs'/f'{page}.ipynb' for _, pages in sections for page in pages}
    kept = {page: nbformat.read(path, as_version=4) for page, path in paths.items()}
    graph = grimp.build_graph(library, cache_dir=None)
    ran = {page: executed/f'{key(nb, page, library, graph)}.ipynb' for page, nb in kept.items() if not is_skipped(nb)}
    for old in set(executed.iterdir()) - set(ran.values()): old.unlink()
    jobs = [(paths[page], target) for page, target in ran.items() if not target.exists()]
    failed = run_all(jobs, root, processes, preload) if jobs else {}
    for path, message in failed.items(): print(f'== {path.relative_to(root)}\n{message}', file=sys.stderr)
    if failed: raise SystemExit('These notebooks fail: ' + ', '.join(str(path.relative_to(root)) for path in failed))
    names = names_of(kept, library)
    wanted = {source/'_static'/'site.css': CSS, source/'_static'/'site.js': SCRIPT}
    for page, path in paths.items():
        nb = shown(kept[page], ran[page]) if page in ran else kept[page]
        nb = as_page(nb, path, root, library, url)
        if page == 'index':
            others = [('About', [*(page for name, page in PAGES.items() if (root/name).exists()), 'genindex'])]
            listed = [(heading, [one for one in pages if one != 'index']) for heading, pages in sections] + others
            nb.cells.append(nbformat.v4.new_markdown_cell(contents(listed), id='contents'))
        wanted[source/f'{page}.ipynb'] = nbformat.writes(nb)
    for name, page in PAGES.items():
        if (root/name).exists():
            wanted[source/f'{page}.md'] = relinked((root/name).read_text(encoding='utf-8'), root, root, url)
    for path, text in wanted.items(): write_changed(path, text)
    for path in source.rglob('*'):
        if path.is_file() and path not in wanted and source/'figures' not in path.parents: path.unlink()
    shutil.copy(formula_font(), source/'_static'/'formulas.ttf')
    if (root/'figures').is_dir(): shutil.copytree(root/'figures', source/'figures', dirs_exist_ok=True)
    shutil.rmtree(out/'html', ignore_errors=True)
    render(source, out/'html', out/'doctrees', settings['title'], names)
    if found := complaints(out/'html'): raise SystemExit('\n'.join(['These pages lead nowhere:', *found]))
    return len(jobs)


def main():
    parser = argparse.ArgumentParser(description='Pages of the notebooks, with what they show.')
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT/'_site')
    parser.add_argument('-n', '--processes', type=int, default=2, help='notebooks that run at a time (2)')
    given = parser.parse_args()
    out = given.folder.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['TMPDIR'] = tempfile.tempdir = folder
        number = make(ROOT, out, given.processes)
    files = [path for path in (out/'html').rglob('*') if path.is_file()]
    print(f'{out/"html"/"index.html"}: {len([one for one in files if one.suffix == ".html"])} pages, '
          f'{sum(path.stat().st_size for path in files) / 1e6:.0f} MB; {number} notebooks were run')


if __name__ == '__main__': main()
