"""Writes README.md from nbs/index.ipynb: its markdown, and its code without outputs; hidden cells
are left out."""
import os
import re
from pathlib import Path

import nbformat

here = Path(__file__).parent.parent


def readme(notebook):
    parts = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        source = cell.source.strip()
        if re.search(r'^#\|\s*hide\b', source, re.M) or not source: continue
        if cell.cell_type == 'markdown': parts.append(source)
        elif cell.cell_type == 'code':
            shown = '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
            parts.append(f'```python\n{shown.strip()}\n```')
    text = '\n\n'.join(parts) + '\n'
    return text.replace('](../', '](')  # links of the notebook are relative to nbs/


if __name__ == '__main__':
    partial = here/'.README.md.partial'
    partial.write_text(readme(here/'nbs'/'index.ipynb'), encoding='utf-8')
    os.replace(partial, here/'README.md')
