"""The documentation's build: `scripts/docs`."""

import spartan_ray

project = "Spartan Ray"
author = "the Spartan Ray authors"
copyright = "2026, the Spartan Ray authors"
version = release = spartan_ray.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "code"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autoclass_content = "both"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"Spartan Ray {release}"
html_static_path: list[str] = []
html_show_sphinx = False
copybutton_prompt_text = "$ "
