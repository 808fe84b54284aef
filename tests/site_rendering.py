"""How Sphinx makes the pages of `make_site.py`, what it is taught for them (this file is an extension of it, too), and
what is wrong with pages that are made."""
import io
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

SPHINX = dict(
    extensions=['myst_nb', 'site_rendering'], nb_execution_mode='off', nb_output_stderr='remove', nb_ipywidgets_js={},
    nb_merge_streams=True, myst_enable_extensions=['dollarmath'], myst_dmath_allow_digits=False,
    myst_heading_anchors=4, html_math_renderer='mathml', suppress_warnings=['myst.header'], html_theme='furo',
    html_copy_source=False, html_static_path=['_static'], html_css_files=['site.css'],
    html_js_files=['site.js'], html_show_copyright=False, templates_path=[], exclude_patterns=[],
    root_doc='index', language='en')
CSS = """
/* What is wider than the page moves by itself, not the page. */
div.cell_output, div.cell_output .output { overflow-x: auto; }
div.cell_output pre { max-height: 32em; overflow: auto; }
div.cell_output img, div.cell_output svg { max-width: 100%; height: auto; }
div.cell_output table { font-size: var(--font-size--small); border-collapse: collapse; }
div.cell_output th, div.cell_output td { padding: .2em .6em; }
div.math { overflow-x: auto; overflow-y: hidden; padding: .3em 0; }
@media (max-width: 46em) { table.genindextable td { display: block; width: 100% !important; } }
/* A hundred columns of code fit beside the contents. */
:root { --code-font-size: 78%; }
@media (min-width: 82em) { .content { width: 50em; } }
/* Where no font for formulas is installed, browsers set them badly: one comes along. */
@font-face { font-family: formulas; src: url("formulas.ttf"); }
math { font-family: formulas, math; font-size: 1.05em; }
code.literal { overflow-wrap: anywhere; }
"""
SCRIPT = "// A page from the disk may not read another one, of which search shows the beginning.\n" \
         "DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== 'file:';\n"


def formula_font():
    "STIX Two Math (SIL Open Font License), as `ziamath` brings it; of that package nothing else is used."
    return Path(find_spec('ziamath').origin).parent/'fonts'/'STIXTwoMath-Regular.ttf'


def render(source, html, cache, title, names):
    "Let Sphinx make the pages; a warning is an error."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    said = io.StringIO()
    with patch_docutils(), docutils_namespace():
        given = SPHINX | dict(project=title, html_title=title, site_names=names)
        app = Sphinx(source, None, html, cache, 'html', given, status=None, warning=said)
        app.build()
    if said.getvalue(): raise SystemExit(f'Sphinx has something against the pages:\n{said.getvalue()}')


# What Sphinx is taught

def setup(app):
    from docutils import nodes

    app.add_config_value('site_names', {}, 'env', [dict])
    app.connect('doctree-read', lambda app, doctree: (place_names(app, doctree), link_names(app, doctree)))
    def formula(block):
        def visit(self, node):
            made = mathml(node.astext(), block)
            self.body.append(f'<div class="math">{made}</div>' if block else made)
            raise nodes.SkipNode
        return visit
    app.add_html_math_renderer('mathml', (formula(False), None), (formula(True), None))
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)


def mathml(formula, block=False):
    "A formula as browsers read it by themselves. Raises `ValueError` for a command that is not known."
    from latex2mathml.converter import convert

    made = convert(formula.replace(r'\lfloor', '⌊').replace(r'\rfloor', '⌋'), display='block' if block else 'inline')
    if '\\' in made: raise ValueError(f'{formula}: not every command is known to latex2mathml. Write it otherwise')
    return made


def place_names(app, doctree):
    "What a cell exports is found by search and index, at the cell."
    from docutils import nodes

    page = app.env.docname
    python, index = app.env.get_domain('py'), app.env.get_domain('index').entries.setdefault(page, [])
    for cell in list(doctree.findall(nodes.container)):
        for full, kind in cell.get('cell_metadata', {}).get('exports', {}).items():
            cell['ids'].append(full)
            python.note_object(full, kind, full, location=cell)
            module, name = full.rsplit('.', 1)
            index.append(('single', f'{name} ({module})', full, '', None))


def link_names(app, doctree):
    "`name` and `wing/01_chapter` in text lead there."
    from docutils import nodes
    from sphinx import addnodes

    names, page = app.config.site_names, app.env.docname
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext().removesuffix('()')
        above, within = literal.parent, (nodes.reference, nodes.title, addnodes.pending_xref)
        while above and not isinstance(above, within): above = above.parent
        if above or not names: continue
        full = names['own'].get(page, {}).get(text) or names['known'].get(text)
        if full: kind = dict(refdomain='py', reftype='obj', reftarget=full)
        elif text in names['pages']: kind = dict(refdomain='std', reftype='doc', reftarget=f'/{text}')
        else: continue
        literal.replace_self(addnodes.pending_xref('', literal.deepcopy(), refdoc=page, refexplicit=True, refwarn=True,
                                                   **kind))


# Checking

class Links(HTMLParser):
    "What one page refers to, and where it can be referred to."
    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.places = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs.get('id'), attrs.get('name') if tag == 'a' else None} - {None}
        if tag == 'a': self.links += filter(None, [attrs.get('href')])
        elif tag == 'link' or tag in ('image', 'use'): self.loaded += filter(None, [attrs.get('href')])
        self.loaded += filter(None, [attrs.get('src'), attrs.get('poster'), attrs.get('data')])
        self.loaded += [one.split()[0] for one in (attrs.get('srcset') or '').split(',') if one.strip()]
        self.loaded += re.findall(r'url\(["\']?([^"\')]+)', attrs.get('style') or '')


def complaints(html):
    "What is wrong with the pages in folder `html`: links that lead nowhere, and what another host would have to send."
    pages = {path: Links(path.read_text(encoding='utf-8')) for path in sorted(html.rglob('*.html'))}
    found = []
    for path in html.rglob('*.css'):
        text = re.sub(r'/\*.*?\*/', '', path.read_text(encoding='utf-8'), flags=re.S)
        for link in re.findall(r'(?:url\(|@import )["\']?(?!data:)([^"\') ]+)', text):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: found.append(f'{path.relative_to(html)} loads {link}')
            elif parts.path and not (path.parent/parts.path).exists():
                found.append(f'{path.relative_to(html)} leads to {link}')
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts, place = urlsplit(link), path.relative_to(html)
            if parts.scheme in ('data', 'blob'): continue
            if parts.scheme or parts.netloc:
                if link in page.loaded: found.append(f'{place} loads {link}')
                continue
            target = path if not parts.path else (path.parent/unquote(parts.path)).resolve()
            if target.is_dir(): target = target/'index.html'
            if not (target.exists() and target.is_relative_to(html.resolve())):
                found.append(f'{place} leads to {link}')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                found.append(f'{place} leads to {link}, which has no such place')
    return found
