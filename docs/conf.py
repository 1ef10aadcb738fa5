"""How Sphinx builds the docs: `make docs`."""

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
myst_heading_anchors = 4  # links to headings, as on GitHub
html_theme = "furo"
html_title = "qat_runner"
html_copy_source = False
html_show_copyright = False

# The API reference. Docstrings are in Google's style; in them `x` is code, and |x| a magnitude.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|importlib|pathlib|abc|os)\..*"),  # documented elsewhere
    ("py:class", "Tensor"),  # of a type variable, which names it in text
    ("py:.*", r".*\b(Pool|Cost|Scalar|ConfigError|RunError|plugins\.T)"),
]


def setup(app: Any) -> None:
    """Have docstrings mean in reStructuredText what they say, and annotations what they name."""
    for module in (formats, method, methods, policy):  # which import this for a type checker alone
        vars(module).update(Tensor=torch.Tensor, nn=torch.nn, Quantizer=Quantizer, Pool=Pool, Cost=Cost)
    app.connect("autodoc-process-docstring", _no_type, priority=100)  # before the sections are made out
    app.connect("autodoc-process-docstring", _bars, priority=900)


def _no_type(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """What stands before a colon in the first line about an attribute would be taken for its type."""
    if what in ("attribute", "property", "data"):
        lines.insert(0, "\\")


def _bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Bars would be substitutions."""
    lines[:] = [line.replace("|", r"\|") for line in lines]
