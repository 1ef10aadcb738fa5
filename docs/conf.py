"""How Sphinx builds the docs: `make docs`."""

project = "qat_runner"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # links to headings, as on GitHub
html_theme = "furo"
html_title = "qat_runner"
html_copy_source = False
html_show_copyright = False
