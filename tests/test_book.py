"""The book builds from a clean clone without a network, loads nothing from one, and shows what today's code makes."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import clvq_app
import clvq_core as clvq

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = ROOT / "book" / "executed"
TWINS = sorted(EXECUTED.glob("*.ipynb"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# They take hours, and stay as the code of the commit that they name made them
LONG = ["09_paper_scale.ipynb", "11_nine_cells.ipynb", "12_anatomy.ipynb", "13_yardstick.ipynb", "14_better_codebook.ipynb"]
pytestmark = pytest.mark.book
named = {"argvalues": NOTEBOOKS, "ids": lambda path: path.stem}


# --- what is stored -----------------------------------------------------------------------------------


def cells(path: Path, kind: str = "code") -> list[dict]:
    """A notebook's cells of one kind, without those that papermill put in."""
    every = json.loads(path.read_text("utf8"))["cells"]
    return [c for c in every if c["cell_type"] == kind and "injected-parameters" not in c["metadata"].get("tags", [])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def shown(path: Path) -> Path:
    """What the book shows of a notebook: its executed twin if there is one."""
    twin = EXECUTED / path.name
    return twin if twin.exists() else path


def why_stale(twin: Path, notebook: Path) -> str:
    """Why a twin's outputs are not what its notebook would give today; empty if they are."""
    if not notebook.exists():
        return f"{twin} has no notebook {notebook}: delete it"
    if [source(c) for c in cells(twin)] != [source(c) for c in cells(notebook)]:
        return f"{twin.name} in book/executed has other code than its notebook: run `make paper`"
    made = json.loads(twin.read_text("utf8"))["metadata"].get("clvq", {})
    if notebook.name not in LONG and made.get("key") != clvq_app.notebook_key(notebook):
        return f"{twin.name} in book/executed was made by other code of clvq_core.py than today's: run `make paper`"
    return ""


def test_a_new_step_leaves_twins_fresh_and_a_raised_version_does_not(monkeypatch):
    before, versions = clvq_app.notebook_key(NOTEBOOKS[0]), clvq.step_versions()
    monkeypatch.setattr(clvq, "step_versions", lambda: {**versions, "new": 1})
    assert clvq_app.notebook_key(NOTEBOOKS[0]) == before
    monkeypatch.setattr(clvq, "step_versions", lambda: {**versions, "vqvae": versions["vqvae"] + 1})
    assert clvq_app.notebook_key(NOTEBOOKS[0]) != before


def glued(path: Path) -> dict[str, dict]:
    """What a notebook hands to other pages: key to MIME bundle."""
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    found = [output for output in outputs if "scrapbook" in output.get("metadata", {})]
    return {o["metadata"]["scrapbook"]["name"]: {k.split("record/")[-1]: v for k, v in o["data"].items()} for o in found}


def toc_files(node: object) -> list[str]:
    """Every root and file entry of a table of contents."""
    if isinstance(node, list):
        return [name for item in node for name in toc_files(item)]
    if not isinstance(node, dict):
        return []
    return [value for key, value in node.items() if key in ("root", "file")] + [n for v in node.values() for n in toc_files(v)]


def toc() -> list[str]:
    return toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text("utf8")))


PROSE = {path.stem: path.read_text("utf8") for path in sorted((ROOT / "book").glob("*.md"))}
GLUE = [(page, *found) for page, text in PROSE.items() for found in re.findall(r"\{glue:text\}`([^:`]+)::([^:`]+):([^`]*)`", text)]


def test_every_notebook_is_in_the_contents_and_every_entry_is_a_page():
    assert not {f"notebooks/{path.stem}" for path in NOTEBOOKS} - set(toc())
    assert not [name for name in toc() if not any((ROOT / f"{name}{ending}").exists() for ending in (".md", ".ipynb"))]
    assert not {f"book/{page}" for page in PROSE} - set(toc())


def test_every_claim_says_what_would_hold_and_refute_it_and_stands_on_its_page():
    told = yaml.safe_load((ROOT / "book" / "claims.yml").read_text("utf8"))
    needed = {"id", "whose", "where", "family", "claim", "quantity", "data", "control", "holds_if", "refuted_if", "seen"}
    for claim in told["claims"]:
        assert needed <= set(claim) <= needed | {"before"}, claim["id"]
        assert all(isinstance(value, str) and value.strip() for value in claim.values()), claim["id"]
        assert claim["whose"] in ("paper", "ours") and claim["holds_if"] != claim["refuted_if"]
    assert len({claim["id"] for claim in told["claims"]}) == len(told["claims"])
    linked = re.findall(r"\[[Cc]laims? ([A-Z]\d+)(?: and ([A-Z]\d+))?\]", "".join(PROSE.values()))
    assert linked and {name for pair in linked for name in pair if name} <= {claim["id"] for claim in told["claims"]}


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_an_executed_twin_is_as_new_as_its_notebook_and_the_code_it_uses(twin):
    assert not (reason := why_stale(twin, ROOT / "notebooks" / twin.name)), reason


def test_a_stale_twin_is_found_out(tmp_path):
    notebook, twin = tmp_path / "a.ipynb", tmp_path / "twin.ipynb"
    shutil.copy(NOTEBOOKS[0], notebook)
    fresh = json.loads(notebook.read_text("utf8"))
    fresh["metadata"]["clvq"] = {"key": clvq_app.notebook_key(notebook)}
    injected = {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": "seed = 1", "outputs": []}

    def reason(**changes):
        twin.write_text(json.dumps({**fresh, **changes}), "utf8")
        return why_stale(twin, notebook)

    assert reason() == ""
    assert reason(cells=[*fresh["cells"], injected]) == ""
    assert "other code than its notebook" in reason(cells=fresh["cells"][:-2])
    assert "other code of clvq_core.py" in reason(metadata={"clvq": {"key": "0" * 64}})
    assert "make paper" in reason(metadata={})
    assert "delete it" in why_stale(twin, tmp_path / "gone.ipynb")


@pytest.mark.parametrize("path", **named)
def test_a_notebook_defines_nothing_and_its_stored_outputs_hold_no_error(path):
    for cell in cells(path):
        code = re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M)
        defined = [n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        assert not defined, f"{path.name} defines {', '.join(defined)}: move it to clvq_core.py"
    for stored in {path, shown(path)}:
        outputs = [output for cell in cells(stored) for output in cell["outputs"]]
        assert outputs, f"{stored} has no stored outputs: run `make smoke`"
        assert not [o for o in outputs if o["output_type"] == "error"]
        assert not [o for o in outputs if o["output_type"] == "stream" and o["name"] == "stderr"]
        assert not [o for o in outputs if any("widget" in kind for kind in o.get("data", {}))]


def test_every_glued_number_of_the_prose_exists_and_can_be_formatted():
    from myst_nb.core.variables import format_plain_text

    assert len(GLUE) == sum(text.count("{glue") for text in PROSE.values()), "a {glue} that is not {glue:text}`notebook::key:format`"
    assert GLUE
    for page, relative, key, form in GLUE:
        path = (ROOT / "book" / relative).resolve()
        assert path in NOTEBOOKS, f"{page}.md glues from {relative}"
        for stored in {path, shown(path)}:
            assert key in glued(stored), f"{page}.md uses {key}, which {stored} does not glue"
            text = format_plain_text("".join(glued(stored)[key]["text/plain"]), form)
            assert text and not re.search(r"[<>*`]", text), f"{key} of {stored} is {text!r}: glue a plain number or text"


def test_every_citation_is_in_the_bibliography():
    known = re.findall(r"^@\w+\{(\S+),", (ROOT / "book" / "references.bib").read_text("utf8"), re.M)
    texts = [*PROSE.values(), *(source(cell) for path in NOTEBOOKS for cell in cells(path, "markdown"))]
    cited = {key.strip() for text in texts for keys in re.findall(r"\{cite[:\w]*\}`([^`]+)`", text) for key in keys.split(",")}
    assert len(known) == len(set(known))
    assert cited and not cited - set(known)


def test_the_metrics_page_explains_every_column_of_the_history(tiny_acts, tiny_config):

    history = clvq.train(tiny_acts, tiny_config.replace(epochs=1), (0, 1))[1]
    explained = re.findall(r"^\| `(\w+)` \|", PROSE["metrics"], re.M)
    assert sorted(explained) == sorted(history.columns)


def test_the_api_page_has_exactly_the_public_names():
    named = re.findall(r"^\.\. auto(?:class|function):: clvq_core\.(\w+)", PROSE["api"], re.M)
    assert len(named) == len(set(named)) and set(named) == set(clvq.__all__)


# --- what is built ------------------------------------------------------------------------------------


def build(clone: Path, what: str) -> Path:
    """`jupyter-book build`, with warnings as errors and no way to the network; the folder of its pages."""
    closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    env = {**os.environ, **closed, "NO_PROXY": "", "no_proxy": ""}
    env.pop("CLVQ_BOOK_EXECUTE", None)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", what, "-W", "--keep-going", "--all"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return clone / "_build" / "html"


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """A clean clone of the repository, with what is not committed yet and with a .venv, whose pages are not the book's."""
    git, folder = shutil.which("git"), tmp_path_factory.mktemp("book") / "clone"
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    subprocess.run([git, "clone", "--quiet", str(ROOT), str(folder)], check=True)
    command = [git, "ls-files", "-co", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name) if (ROOT / name).exists() else (folder / name).unlink(missing_ok=True)
    (folder / ".venv" / "lib").mkdir(parents=True)
    (folder / ".venv" / "lib" / "page.md").write_text("# Not the book's\n\n{nothing}`at all`\n")
    return folder


@pytest.fixture(scope="session")
def built(clone) -> Path:
    return build(clone, "book")


class Page(HTMLParser):
    """What a page loads, its images, its text and the text of its scripts."""

    LOADS = ("src", "srcset", "data", "poster", "background")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.images: list[dict] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.inside = tag
        self.loads += [value for name, value in given.items() if name in self.LOADS or (name == "href" and tag in ("link", "use", "image"))]
        self.loads += css_loads(given.get("style", ""))
        if tag == "img":
            self.images.append(given)

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "style":
            self.loads += css_loads(data)
        (self.scripts if self.inside == "script" else self.text).append(data)


def css_loads(text: str) -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return [a or b for a, b in re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text)]


def remote(address: str) -> bool:
    return bool(re.match(r"(https?|wss?|ftp):|//", address.strip(), re.I))


def pages(built: Path) -> list[Path]:
    return [path for path in sorted(built.rglob("*.html")) if "_static" not in path.parts]


def test_the_check_for_loads_finds_them(tmp_path):
    bad = ["https://a.b/c.js", "//a.b/c.css", "http://a.b/c.png", "https://a.b/d.woff", "https://a.b/e.png", "HTTPS://a.b/f.css"]
    (tmp_path / "a.html").write_text(
        f'<script src="{bad[0]}"></script><link rel="stylesheet" href="{bad[1]}"><img src="{bad[2]}"><a href="https://fine.org">x</a>'
        f'<style>@font-face {{src: url("{bad[3]}")}} @import "{bad[5]}";</style><p style="background: url({bad[4]})">x</p>'
        '<img src="local.png">'
    )
    assert sorted(filter(remote, Page(tmp_path / "a.html").loads)) == sorted(bad)


def test_the_book_builds_from_a_clean_clone_without_a_warning(built):
    expected = ["index", *toc()]
    assert [name for name in expected if not (built / f"{name}.html").is_file()] == []
    others = {str(path.relative_to(built).with_suffix("")) for path in pages(built)} - set(expected)
    assert others == {"genindex", "search", "_modules/clvq_core", "_modules/index"}


def test_no_page_loads_anything_from_the_network(built):
    assert len(pages(built)) >= len(toc())
    for path in pages(built):
        page = Page(path)
        assert not list(filter(remote, page.loads)), path
        own = [script for script in page.scripts if "plotly.js v" not in script[:200]]  # it names maps that it is never asked for
        assert not [s for s in own if re.search(r"""["'](https?:)?//\w""", s)], f"{path}: a script names an address"
        if any("mathjax" in address for address in page.loads):
            assert '"enableMenu": false' in "".join(page.scripts), f"{path}: MathJax's menu can load its speech engine from a CDN"
        for address in page.loads:
            if address.startswith(("data:", "#")):
                continue
            file = (path.parent / re.sub(r"[?#].*", "", address)).resolve()
            assert file.is_file(), f"{path} loads {address}, which is not there"
            if file.suffix == ".css":
                assert not list(filter(remote, css_loads(file.read_text("utf8")))), file
            if file.suffix == ".js" and "mathjax" not in file.parts:
                assert not re.search(r"(cdn|unpkg|jsdelivr|googleapis|gstatic)[\w.-]*/", file.read_text("utf8")), file


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_pages_ask_for_nothing_but_files_and_tables_sort_and_concepts_open_in_a_browser(built):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        asked, errors = [], []
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(f"{tab.url}: {error}"))
        for path in pages(built):
            if path.name != "index.html":  # which sends on to the first page
                tab.goto(path.as_uri())
        tab.goto((built / "notebooks" / "05_qualitative.html").as_uri())
        head = tab.locator("#table-specific th", has_text="times")
        for direction, order in (("ascending", sorted), ("descending", lambda numbers: sorted(numbers, reverse=True))):
            tab.locator("#table-specific.dataTable").wait_for()
            head.click()
            tab.locator(f"#table-specific th[aria-sort={direction}]", has_text="times").wait_for()
            found = [int(text) for text in tab.locator("#table-specific tbody td:nth-child(3)").all_inner_texts()]
            assert found == order(found) and len(set(found)) > 3
        tab.goto((built / "book" / "explorer.html").as_uri())
        tab.locator("#concepts tbody tr").first.click()
        tab.get_by_role("heading", name="Concept #").wait_for()
        assert not [address for address in asked if not address.startswith(("file:", "data:", "blob:"))] and not errors
        browser.close()


def test_the_page_of_claims_shows_every_claim_and_rule(built):
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", (built / "book" / "claims.html").read_text("utf8")))
    told = yaml.safe_load((ROOT / "book" / "claims.yml").read_text("utf8"))
    for claim in told["claims"]:
        assert f"{claim['id']}. {claim['claim']}" in html.unescape(page).replace("’", "'"), claim["id"]
    assert page.count("Refuted if") == len(told["claims"])
    assert all(f"{name.capitalize()}." in page for name in told["rules"])


def test_the_page_of_claims_shows_the_verdicts_that_stored_chapters_reached(built):
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", (built / "book" / "claims.html").read_text("utf8")))
    found = {}
    for notebook in NOTEBOOKS:
        for cell in cells(shown(notebook)):
            for output in cell.get("outputs", []):
                found |= {row["claim"]: row for row in output.get("data", {}).get("application/vnd.clvq.verdicts+json", [])}
    assert set(found) == {*clvq.RULES, "Y1", "Y2", "Y5", "Y6"} - {"B5", "P6", "P8"}  # not asked yet: human edits, starts, encoders
    page = html.unescape(page).replace("’", "'")
    for name, row in found.items():
        told = f"{row['verdict']} ({row['counted']} of {row['of']} {row.get('unit', 'cells')} counted"
        assert re.search(rf"{name}\. [^(]*{re.escape(told)}", page), name


def test_every_image_has_alt_text(built):
    images = [(path, image) for path in pages(built) for image in Page(path).images]
    assert len(images) > len(NOTEBOOKS)
    for path, image in images:
        assert len(image.get("alt", "")) > 20 and image["alt"] != image["src"], f"{path}: {image}"


def test_every_output_is_rendered_as_it_is_meant(built):
    for name in toc():
        text = "".join(Page(built / f"{name}.html").text)
        for leftover in ("IPython.core.display", "```", ":::", "{table}", "{glue", "Traceback", "object at 0x", "it/s]"):
            assert leftover not in re.sub(r"clvq\.show_table\(.*", "", text), f"{name} shows {leftover}"


def test_tables_are_numbered_and_captioned(built):
    for path in NOTEBOOKS:
        outputs = [output.get("data", {}) for cell in cells(shown(path)) for output in cell["outputs"]]
        count = sum(bool(re.match(r"(```+|~~~+|:::+)\{table\}", "".join(data.get("text/markdown", "")))) for data in outputs)
        html = (built / "notebooks" / f"{path.stem}.html").read_text("utf8")
        assert count
        assert len(re.findall(r'<caption><span class="caption-number">', html)) == count, f"{path.stem}: a table lost its caption"


def test_the_book_builds_from_the_root_too_and_shows_an_executed_twin(built, clone):
    before = {str(path.relative_to(built)) for path in pages(built)}
    twin = clone / "book" / "executed" / NOTEBOOKS[0].name
    twin.parent.mkdir(exist_ok=True)
    text = shown(NOTEBOOKS[0]).read_text("utf8")
    notebook = json.loads(text)
    notebook["cells"][0]["source"] = "# Of the twin"
    twin.write_text(json.dumps(notebook), "utf8")
    root = build(clone, ".")
    assert {str(path.relative_to(root)) for path in pages(root)} == before
    assert "Of the twin" in (root / "notebooks" / f"{NOTEBOOKS[0].stem}.html").read_text("utf8")


def test_the_readme_is_short_and_what_it_links_to_exists():
    text = (ROOT / "README.md").read_text("utf8")
    assert len(text.splitlines()) <= 60
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not remote(link)]
    assert links and not [link for link in links if not (ROOT / link).exists()]
    assert all(command in text for command in ("make paper", "make test"))
