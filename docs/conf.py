"""Sphinx: the notebooks with their stored outputs, parts of README, and a page for each public name.

    pip install -e ".[docs]"
    sphinx-build -W --keep-going docs docs/_build/html
    python docs/check_links.py docs/_build/html

A name in a public signature that has no page is a warning: add it to ``OTHERS``.

Sphinx reads only this folder, so each build first copies the notebooks into it and writes the pages of the API to it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import runpy
import shutil
from collections.abc import Iterable
from importlib.metadata import metadata
from operator import methodcaller
from pathlib import Path
from types import ModuleType

import hotswap_lab

DOCS = Path(__file__).parent
REPOSITORY = dict(each.split(", ") for each in metadata("hotswap_lab").get_all("Project-URL"))["Repository"]
#: modules for users, next to the package itself; a test looks here for those that README and the recipes name
MODULES = "bench demo demo.digits demo.smollm2 demo.tasks demo.voices generating serving widgets"
#: the public names of the package by task, as the API's first page lists them; a test compares them
TASKS = {
    "Swap": "hotswap_adapter hotswap_adapter_from_state_dict Adapter save_adapter patch_peft HotswapError",
    "Plan and verify": "plan_hotswap Plan commit verify_hotswap Verification loaded resolve_slot",
    "Compiled models": "prepare_model_for_compiled_hotswap RecompileWatch RecompileError pick_backend",
    "Strength": "set_strength get_strength",
    "Many adapters, threads": "AdapterPool in_use waiting_at_most ModelInUseError",
    "Diffusers' pipelines": "hotswap_pipeline plan_pipeline_hotswap PipelinePlan PipelinePool "
    "prepare_pipeline_for_compiled_hotswap read_pipeline_lora",
    "Ahead of time": "aoti_compile aoti_load",
}
#: other names in the signatures and docstrings of these; Sphinx warns if one is missing here
OTHERS = """
    ahead.AheadModel core.errors.Refusal core.loaded.Loaded core.loaded.LoadedList core.plan.Action core.plan.LayerPlan
    figures.Figure figures.tiles.Tile
    pipelines.patching.Patch threads.Block pools.rows.Row serving.answers.Token
    serving.table.UnknownAdapterError watch.Call watch.Compilation widgets.results.Run
    widgets.text.text_stream
"""
#: parts of core, which notebooks/engine.ipynb explains, and private names
INTERNAL = r"hotswap_lab\.(core\.(change|host|journal|method|settings|slot|tensors)\..*|.*\.(T|P_co|_\w+))"
#: the page in which a model runs: its HTML, and the files that it reads
LIVE = runpy.run_path(str(DOCS / "live" / "make.py"))
SUMMARY = ".. autosummary::\n   :nosignatures:"

project = "hotswap_lab"
release = hotswap_lab.__version__
copyright = "hotswap_lab contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"hotswap_lab {release}"
html_theme_options = {"footer_icons": [{"name": "GitHub", "url": REPOSITORY, "html": "GitHub", "class": ""}]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
#: README's picture, at the address that README has for it, and what the first page reads
html_extra_path = ["_build/extra"]

nb_execution_mode = "off"
myst_heading_anchors = 3
#: links between notebooks have JupyterLab's anchors
myst_heading_slug_func = methodcaller("replace", " ", "-")

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False
napoleon_attr_annotations = False
napoleon_google_docstring = False
napoleon_use_param = False  # which would repeat a text for each of several parameters
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"(?!hotswap_lab).*|{INTERNAL}")]


def public(module: ModuleType) -> list[str]:
    """A module's public functions and classes: those in ``__all__``, or those it defines, or the package imports."""
    given = dir(module) if module is hotswap_lab else vars(module)  # which imports a name when it is first used
    names = getattr(module, "__all__", [name for name in given if name[0] != "_"])
    objects = [(name, getattr(module, name)) for name in names if callable(getattr(module, name))]
    is_api = module is hotswap_lab or hasattr(module, "__all__")
    return [name for name, each in objects if is_api or each.__module__ == module.__name__]


def described(module: str, name: str) -> str:
    """The directive that documents a function or class."""
    described = getattr(importlib.import_module(module), name)
    if not inspect.isclass(described):
        return f".. autofunction:: {module}.{name}\n\n"
    kind = "exception" if issubclass(described, Exception) else "class"
    inherited = "list, tuple, Module, BaseException, Exception, ValueError, RuntimeError, AssertionError"
    members = f"   :members:\n   :inherited-members: {inherited}\n"
    return f".. auto{kind}:: {module}.{name}\n{members}\n"


def titled(title: str, *parts: str) -> str:
    return "\n\n".join([f"{title}\n{'=' * len(title)}", *parts])


def listing(head: str, names: Iterable[str]) -> str:
    return f"{head}\n\n" + "".join(f"   {name}\n" for name in names)


def limits_of(schema: dict) -> str:
    """A JSON schema in words: ``number, minimum 0, maximum 2``."""
    kinds = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    words = []
    for kind in kinds:
        inner = kind.get("items") or kind.get("additionalProperties")
        name = kind.get("$ref", kind.get("type", "")).rpartition("/")[2]
        limits = [f"{key} {value:g}" for key, value in kind.items() if re.match("(exclusive)?(min|max)", key, re.I)]
        of = f" of {limits_of(inner)}" if isinstance(inner, dict) else ""
        words.append(", ".join([name + of, *limits]))
    return " or ".join(words)


def fields() -> str:
    """The fields of a request, as the models of the server's API have them."""
    from hotswap_lab.serving import api

    parts, known = ["POST /v1/completions and POST /v1/chat/completions"], set()
    for model in (api.Asked, api.AskedText, api.AskedChat):
        own = {name: each for name, each in model.model_json_schema()["properties"].items() if name not in known}
        known |= {*own} if model is api.Asked else set()
        table = [f'"``{name}``", "{limits_of(schema)}"' for name, schema in own.items()]
        parts += [inspect.getdoc(model), listing(".. csv-table::\n   :header: field, type", table)]
    ignored = ", ".join(f"``{name}``" for name in sorted(api.IGNORED))
    parts.append(f"These change no answer and are ignored: {ignored}.")
    own = "``add_special_tokens`` may be true in a completion and false in a chat"
    parts.append(f"All others are refused, unless their value is null, or changes nothing; {own}, and the others are:")
    table = [f"``{name}``; ``{' or '.join(map(json.dumps, values))}``" for name, values in sorted(api.NOTHING.items())]
    parts.append(listing(".. csv-table::\n   :header: field; value\n   :delim: ;\n   :quote: '", table))
    return titled("The fields of a request", *parts)


def commands() -> str:
    """What each command prints with ``--json``."""
    text = (
        "``hotswap-lab COMMAND --json`` prints one JSON document, whatever happens: one of those below. ``ok`` is true "
    )
    text += (
        "with the exit code 0, false with 1 (refused or different) and 2 (wrong use), and null with 3 (not decided)."
    )
    parts = []
    for name, schema in runpy.run_path(str(DOCS / "commands.py"))["schemas"]().items():
        lines = json.dumps(schema, indent=1).splitlines()
        parts.append(f".. rubric:: {name}\n\n{listing('.. code-block:: json', lines)}")
    return titled("The JSON of the commands", text, *parts)


def pages() -> dict[str, str]:
    """The pages of the API by the names of their files: one for each public name, for each module, and a list."""
    names = sorted(public(hotswap_lab), key=str.lower)
    found = {name: titled(name, described("hotswap_lab", name)) for name in names}
    for path in MODULES.split():
        module = importlib.import_module(f"hotswap_lab.{path}")
        head = f".. automodule:: {module.__name__}"
        found[path] = titled(module.__name__, head, *(described(module.__name__, name) for name in public(module)))
    others = [f"hotswap_lab.{each}".rpartition(".") for each in OTHERS.split()]
    found["fields"] = fields()
    found["commands"] = commands()
    found["others"] = titled("Other names", *(described(module, name) for module, _, name in others))
    tables = []
    for task, those in TASKS.items():
        tables += [f".. rubric:: {task}", listing(SUMMARY, [f"~hotswap_lab.{name}" for name in those.split()])]
    tables += [
        ".. rubric:: Modules",
        listing(SUMMARY, [f"hotswap_lab.{path}" for path in MODULES.split()]),
        "The fields of a request to a server are on a :doc:`page of their own <fields>`.",
        "The JSON that commands print is on a :doc:`page of its own <commands>`.",
        "The classes that these return or take are on a :doc:`page of their own <others>`.",
    ]
    return {**found, "index": titled("API", listing(".. toctree::\n   :hidden:", found), *tables)}


def write_sources() -> None:
    pictures = DOCS / "_build" / "extra" / "notebooks" / "pictures"
    drawings = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(DOCS.parent / "notebooks" / "pictures", pictures, ignore=drawings, dirs_exist_ok=True)
    for folder in ("api", "notebooks"):
        shutil.rmtree(DOCS / folder, ignore_errors=True)
    shutil.copytree(
        DOCS.parent / "notebooks",
        DOCS / "notebooks",
        ignore=shutil.ignore_patterns("refresh.py", "conftest.py", ".*", "__*"),
    )
    LIVE["write"](DOCS / "_build" / "extra" / "live")
    (DOCS / "_build" / "live.html").write_text(LIVE["fragment"](), encoding="utf-8")
    (DOCS / "api").mkdir()
    for name, text in pages().items():
        (DOCS / "api" / f"{name}.rst").write_text(text, encoding="utf-8")


def adapt(app, docname: str, source: list[str]) -> None:
    """Name the language of cells, which have magics; link to GitHub where the site lacks a file."""
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace('"name": "python"\n', '"name": "python",\n"pygments_lexer": "ipython3"\n')
        source[0] = source[0].replace("](../hotswap_lab/", f"]({REPOSITORY}/blob/HEAD/hotswap_lab/")


def resolve(app, env, node, content):
    """Link a public class where a signature has the base class that it has in the package."""
    name = "hotswap_lab." + node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") == "py":
        return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, content)


def keep_colon(app, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Begin a property's text with an empty comment, since napoleon takes what is before a colon for its type."""
    if what in ("property", "attribute"):
        lines[:0] = ["..", ""]


def describe_pictures(app, doctree) -> None:
    """Give each picture of a notebook its text form as alternative text."""
    for bundle in doctree.findall(lambda node: getattr(node, "attributes", {}).get("nb_element") == "mime_bundle"):
        texts = {each["mime_type"]: each.astext() for each in bundle.children}
        for image in bundle.findall(lambda node: node.tagname == "image"):
            image["alt"] = texts.get("text/plain", "")


def follow_the_page(app, path: str, docname: str, content: list[str]) -> None:
    """Have README's picture follow the page's theme, which a button changes, in place of the system's."""
    if picture := re.search("<picture>(.*)(<img .*>)</picture>", content[0]):
        sources, image = re.findall("<source .*?>", picture[1]), picture[2]
        dark = [re.sub(r"( and )?\(prefers-color-scheme: dark\)", "", each) for each in sources if "dark)" in each]
        light = [each for each in sources if "dark)" not in each]
        both = {"only-light": "".join(light) + image, "only-dark": "".join(dark).replace('media="" ', "") + image}
        content[0] = content[0].replace(
            picture[0], "".join(f'<picture class="{name}">{inside}</picture>' for name, inside in both.items())
        )


def leave_out_of_search(app, doctree) -> None:
    """A search finds chapters, not their solutions."""
    if app.env.docname.startswith("notebooks/solutions/"):
        app.env.metadata[app.env.docname]["no-search"] = True


def begin_at_the_first_chapter(app, pagename: str, template: str, context: dict, doctree) -> None:
    if pagename == "notebooks/00_start_here":
        context["prev"] = None


def setup(app) -> None:
    write_sources()
    app.connect("source-read", adapt)
    app.connect("include-read", follow_the_page)
    app.connect("doctree-read", describe_pictures)
    app.connect("doctree-read", leave_out_of_search)
    app.connect("html-page-context", begin_at_the_first_chapter)
    app.connect("autodoc-process-docstring", keep_colon, priority=400)
    app.connect("missing-reference", resolve)
