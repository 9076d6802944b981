"""MkDocs hooks: docstrings keep their wording on the API page."""

import re

from griffe._internal.docstrings import numpy

# "Tensor, shape (m,) or (m, k)" is prose that happens to parse as Python; leave it as written.
numpy.parse_docstring_annotation = lambda annotation, *_, **__: annotation

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Show a Sphinx role in a docstring as the name it refers to."""
    return ROLE.sub(r"<code>\1</code>", html)
