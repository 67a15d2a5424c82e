"""Settings of the documentation: `sphinx-build -W docs docs/_build` writes it as HTML that needs no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from onebase import __version__

project, author, release = "onebase", "the onebase authors", __version__
copyright = "the onebase authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "onebase_docs"]
exclude_patterns = ["_build", "onebase_docs"]

html_theme = "furo"
html_title = f"onebase {release}"
templates_path = ["_templates"]
html_copy_source = False
html_show_sphinx = False
html_static_path, html_css_files = ["_static"], ["onebase.css"]
smartquotes = False  # a quoted setting must stay what can be typed

myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # JSON with an ellipsis in it

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style"), ("Source", "notes")]
