"""What the book needs and jupyter-book 1.x does not offer.

* One source folder: `jupyter-book build book` and `jupyter-book build .` both use the repository's root, so that a page
  has one name and notebooks/ needs no copy or link.
* Stored outputs first: a notebook that comes with outputs, or has an executed twin in book/executed/, is rendered as it
  is; only the others are executed. CLVQ_BOOK_EXECUTE=cache|force|off overrules that for every notebook.
* ``{notebook-figure}``: a figure of one page on another. ``{glue}`` can do it for text alone: it loses alt text and file.
* ``{concept-explorer}``: the page to look around in, made at build from the table that a notebook stores, so that its
  libraries are in the built book alone.
* The page of claims is made of book/claims.yml, so that a criterion stands in one place.
* Tables of the class ``sortable`` can be sorted, by DataTables, whose script stands in the page: nothing is loaded.
"""
import base64
import json
import os
import re
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = ROOT / "book" / "executed"
CLAIMS = ROOT / "book" / "claims.yml"
EXPLORER = "application/vnd.clvq.explorer+json"
VERDICTS = "application/vnd.clvq.verdicts+json"


def stored(docname):
    """The notebook a page is made of: the executed twin if there is one."""
    twin = EXECUTED / f"{Path(docname).name}.ipynb"
    return twin if twin.exists() else ROOT / f"{docname}.ipynb"


def cells(path):
    return json.loads(path.read_text("utf8"))["cells"]


def choose_what_runs(app, config):
    mode = os.environ.get("CLVQ_BOOK_EXECUTE")
    if mode:
        config.nb_execution_mode = mode
        return
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    config.nb_execution_excludepatterns = list(config.nb_execution_excludepatterns) + [
        f"notebooks/{name}.ipynb" for name in names if any(cell.get("outputs") for cell in cells(stored(f"notebooks/{name}")))
    ]


ASKED = {"quantity": "Measured", "data": "On", "control": "Beside it", "holds_if": "Holds if", "refuted_if": "Refuted if",
         "seen": "Seen before this was written", "before": "As it was written first"}


def verdicts_of(paths):
    """What stored notebooks say of claims, by claim: a sentence, and the notebook that says it."""
    found = {}
    for path in paths:
        outputs = [output.get("data", {}) for cell in cells(path) for output in cell.get("outputs", [])]
        for row in (row for data in outputs for row in data.get(VERDICTS, [])):
            counts = f"{row['counted']} of {row['of']} {row.get('unit', 'cells')} counted, {row['met']} for it, {row['against']} against it"
            found[row["claim"]] = f"**{row['verdict']}** ({counts}; [how](../notebooks/{path.name}))"
    return found


def claim_text(path, verdicts):
    """The rules and claims of a file as MyST: a table of verdicts, then each claim a heading and a line for each thing that is
    said of it."""
    told = yaml.safe_load(path.read_text("utf8"))
    lines = ["| claim | whose | verdict |", "| --- | --- | --- |"]
    for claim in told["claims"]:
        verdict = verdicts.get(claim["id"], "not run yet" if "Not testable" not in claim["holds_if"] else "not testable here")
        lines.append(f"| {claim['id']}. {claim['claim']} | {claim['whose']} | {verdict} |")
    lines += ["", f"The criteria were written {told['written']}.", "", "## Rules for all", ""]
    lines += [f"- **{name.capitalize()}.** {rule}" for name, rule in told["rules"].items()]
    for whose, title in (("paper", "Claims of the paper"), ("ours", "Claims of this book")):
        lines += ["", f"## {title}", ""]
        for claim in (claim for claim in told["claims"] if claim["whose"] == whose):
            lines += [f"({claim['id'].lower()}-claim)=", f"### {claim['id']}. {claim['claim']}", "",
                      f"*{claim['where'][0].upper()}{claim['where'][1:]}; family: {claim['family']}.*", ""]
            lines += [f"- **{title}**: {claim[name]}" for name, title in ASKED.items() if name in claim] + [""]
    return "\n".join(lines)


def read_twin(app, docname, source):
    if docname == "book/claims":
        app.env.note_dependency(str(CLAIMS))
        notebooks = [stored(f"notebooks/{path.stem}") for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
        for path in notebooks:
            app.env.note_dependency(str(path))
        source[0] += "\n" + claim_text(CLAIMS, verdicts_of(notebooks))
    path = stored(docname)
    if docname.startswith("notebooks/") and path.parent == EXECUTED:
        app.env.note_dependency(str(path))
        source[0] = path.read_text("utf8")
    if EXPLORER in source[0] or VERDICTS in source[0]:  # data of another page
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                for kind in (EXPLORER, VERDICTS):
                    output.get("data", {}).pop(kind, None)
        source[0] = json.dumps(notebook)


class NotebookFigure(SphinxDirective):
    """``{notebook-figure} notebooks/02_faithfulness removal``: image, alt text and caption of the cell with this figure name."""

    required_arguments = 2

    def run(self):
        page, name = self.arguments
        path = stored(page)
        self.env.note_dependency(str(path))
        for cell in cells(path):
            options = cell["metadata"].get("mystnb", {})
            if options.get("figure", {}).get("name") == name:
                break
        else:
            raise self.error(f"{page} has no figure {name!r}")
        image = next((output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})), None)
        if image is None:
            raise self.error(f"figure {name!r} of {page} has no stored image")
        file = Path(self.env.app.outdir).parent / "jupyter_execute" / f"{page}-{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode("".join(image)))
        uri = "/" + Path(os.path.relpath(file, self.env.srcdir)).as_posix()
        caption, messages = self.state.inline_text(options["figure"]["caption"], self.lineno)
        figure = nodes.figure("", nodes.image(uri=uri, **options["image"]), nodes.caption("", "", *caption), classes=["from-notebook"])
        return [figure, *messages]


class ConceptExplorer(SphinxDirective):
    """``{concept-explorer} notebooks/05_qualitative``: all concepts, from the output of type EXPLORER of that notebook."""

    required_arguments = 1

    def run(self):
        import pandas as pd

        import clvq_app

        path = stored(self.arguments[0])
        self.env.note_dependency(str(path))
        outputs = [output.get("data", {}) for cell in cells(path) for output in cell.get("outputs", [])]
        found = [data[EXPLORER] for data in outputs if EXPLORER in data]
        if not found:
            raise self.error(f"{path.name} has no stored output of type {EXPLORER}")
        page = clvq_app.explorer_html(pd.DataFrame(found[0]["concepts"]), found[0]["about"])
        return [nodes.raw("", f'<div class="explorer">{page}</div>', format="html")]


SORTABLE = """<script type="module">
const {jQuery} = await window.%s;
const root = document.documentElement, dark = () => root.classList.toggle("dark", root.dataset.theme === "dark");
new MutationObserver(dark).observe(root, {attributeFilter: ["data-theme"]});
dark();
for (const table of document.querySelectorAll("table.sortable")) {
    for (const cell of table.querySelectorAll("tbody td")) {
        const number = parseFloat(cell.textContent.replace("\u2212", "-").replaceAll(",", ""));
        if (!isNaN(number)) cell.dataset.order = number;
    }
    jQuery(table).DataTable({paging: false, info: false, searching: false, order: [], autoWidth: false});
}
</script>"""


def make_sortable(app, pagename, templatename, context, doctree):
    if not re.search(r'<table[^>]* class="[^"]*\bsortable\b', context.get("body", "")):
        return
    import itables
    from itables.javascript import generate_init_offline_itables_html

    library = generate_init_offline_itables_html(itables.options.dt_bundle)
    name = library.split("if (!window.")[1].split(")")[0]
    context["body"] += library[:library.index("<div")] + SORTABLE % name


def setup(app):
    if Path(app.srcdir) in (ROOT, ROOT / "book"):       # a book, not a single page
        app.srcdir = app.confdir = type(app.srcdir)(ROOT)
        app.config.external_toc_path = str(ROOT / "_toc.yml")
        app.config.include_patterns = ["book/**", "notebooks/**"]   # not .venv, runs/, README
    app.connect("config-inited", choose_what_runs, priority=400)
    app.connect("source-read", read_twin)
    app.connect("html-page-context", make_sortable)
    app.add_directive("notebook-figure", NotebookFigure)
    app.add_directive("concept-explorer", ConceptExplorer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
