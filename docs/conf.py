"""How Sphinx builds the site: `make docs`, offline, warnings as errors. Pages of the reference are made of the code meanwhile."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_site")]

import reference  # noqa: E402  (beside this file)

from runtime.settings.table import BEGIN, END  # noqa: E402

project = "moeconv"
release = version_of("moeconv")
copyright = "the moeconv authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_site"]
html_theme = "furo"
html_title = f"moeconv {release}"
html_show_sphinx = False
html_copy_source = False
html_css_files = ["site.css"]
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}
highlight_language = "text"  # of a block without a language: a command
smartquotes = False  # they make a dash of the two of a flag
toc_object_entries = False
pygments_style, pygments_dark_style = "friendly", "github-dark"
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__init__"}
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_custom_sections = ["Source"]

MADE = {
    "reference/commands": reference.commands,
    "reference/trainer-flags": reference.trainer_flags,
    "reference/python": reference.python,
}
FLAGS = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Put what is made of the code where a page's file has a line alone; leave the table of flags to a page of its own.

    A page that the contents don't list yet is put into the reference, before the format.
    """
    if name == "index":
        listed = set(re.findall(r"^[\w/-]+$", source[0], re.MULTILINE))
        new = sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - listed - {"index"})
        source[0] = re.sub(r"^format$", "\n".join([*new, "format"]), source[0], flags=re.MULTILINE)
    if name in MADE:
        source[0] = MADE[name]()
    if name == "trainer":
        source[0] = FLAGS.sub("All flags, with their defaults: [Trainer flags](reference/trainer-flags.md).", source[0])


def dash(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Put a colon where autodoc has two hyphens between a parameter and what it is."""
    for text in list(tree.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(": "))


def setup(app: Sphinx) -> None:
    """Register."""
    app.connect("source-read", read)
    app.connect("doctree-resolved", dash)
