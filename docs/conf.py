"""The site: `make docs` builds it into docs/_build/html, with warnings as errors and without a network."""

import sys
from pathlib import Path

import ral_gym

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "ral_gym"
author = "The ral_gym authors"
project_copyright = author
version = release = ral_gym.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "environment_pages",
    "links_outside",
    "mathml",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # docstrings have names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
suppress_warnings = ["ref.python"]  # a word in backticks may be the name of several things
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"ral_gym {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"  # Sphinx' own default fetches MathJax from a server
pygments_style = "default"
pygments_dark_style = "monokai"
