"""Configuration of Sphinx, which builds the documentation: `make docs`."""

from typing import Any

import torch

from qat_runner import policy
from qat_runner.quant import Quantizer, formats, method, methods
from qat_runner.quant.kernels.cost import Cost
from qat_runner.quant.pool import Pool

project = "qat_runner"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # anchors of headings, as on GitHub
html_theme = "furo"
html_title = "qat_runner"
html_copy_source = False
html_show_copyright = False

# The API reference. Docstrings follow Google's style; in them, `x` is code and |x| is a magnitude.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|importlib|pathlib|abc|os)\..*"),  # documented outside of this project
    ("py:class", "Tensor"),  # from a type variable, which refers to it by a string
    ("py:.*", r".*\b(Pool|Cost|Scalar|ConfigError|RunError|plugins\.T)"),
]


def setup(app: Any) -> None:
    """Make the names in annotations resolvable, and make docstrings valid reStructuredText."""
    for module in (formats, method, methods, policy):  # they import these names only for type checkers
        vars(module).update(Tensor=torch.Tensor, nn=torch.nn, Quantizer=Quantizer, Pool=Pool, Cost=Cost)
    app.connect("autodoc-process-docstring", _no_type, priority=100)  # before napoleon parses the sections
    app.connect("autodoc-process-docstring", _bars, priority=900)


def _no_type(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading the text before a colon in the first line about an attribute as its type."""
    if what in ("attribute", "property", "data"):
        lines.insert(0, "\\")


def _bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape bars, which would start substitutions."""
    lines[:] = [line.replace("|", r"\|") for line in lines]
