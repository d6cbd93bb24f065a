"""The site builds without a network and without a warning; its links and anchors are there; what it says of the code is true."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# A process that can reach no other machine.
_BUILD = """
import socket, sys
def refuse(*args, **options):
    raise OSError("the site is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


class Page(HTMLParser):
    """The addresses that a page refers to, the places that it has, and what a browser would fetch with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in ("link", "script", "img", "iframe") and (address := found.get("href") or found.get("src")):
            self.fetched.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    words = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees"), str(DOCS), str(out / "html")]
    done = subprocess.run([sys.executable, "-c", _BUILD, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf8")) for path in site.rglob("*.html")}


def test_every_page_is_in_the_site(built: dict[str, Page]) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    assert len(pages) > 20
    assert pages <= built.keys()


def test_links_and_anchors_lead_somewhere(site: Path, built: dict[str, Page]) -> None:
    wrong, count = [], 0
    for name, page in built.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            count += 1
            path, _, anchor = link.partition("#")
            target = ((site / name).parent / path).resolve() if path else site / name
            where = target.relative_to(site.resolve()).as_posix() if path else name
            if not target.is_file() or (anchor and where in built and anchor not in built[where].places):
                wrong.append(f"{name}: {link}")
    assert count > 1000
    assert not wrong


def test_nothing_is_fetched_from_elsewhere(site: Path, built: dict[str, Page]) -> None:
    outside = {address for page in built.values() for address in page.fetched if re.match(r"(?i)(https?:)?//", address)}
    assert not outside
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf8")), path


def test_the_reference_has_every_command_flag_and_name(site: Path, built: dict[str, Page]) -> None:
    import click

    import moeconv
    from cli.main import main
    from runtime.settings.fields import settings

    commands = (site / "reference" / "commands.html").read_text(encoding="utf8")
    for name in main.list_commands(click.Context(main)):
        found = main.get_command(click.Context(main), name)
        assert found is not None
        assert name in built["reference/commands.html"].places
        for option in (o for p in found.params if isinstance(p, click.Option) and not p.hidden for o in p.opts):
            assert option in commands, (name, option)
    flags = (site / "reference" / "trainer-flags.html").read_text(encoding="utf8")
    assert all(setting.name in flags for setting in settings())
    assert {f"moeconv.{name}" for name in moeconv.__all__} - {"moeconv.__version__"} <= built[
        "reference/python.html"
    ].places


def test_the_readme_links_to_files_and_headings() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            assert (ROOT / path).exists(), link
            headings = (
                re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf8"), re.MULTILINE) if anchor else []
            )
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def test_each_named_proof_is_a_test() -> None:
    text = (DOCS / "explanation" / "guarantees.md").read_text(encoding="utf8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), (path, function)
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| promise"))
    ]
    assert all("tests/" in line for line in promises)


def test_files_that_pages_name_are_there() -> None:
    """Files of the repository, by their paths."""
    missing = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS.rglob("*.md")):
        for name in re.findall(
            r"\b((?:tests|runtime|moeconv|cli|benchmarks)/[\w/]+\.py)\b", page.read_text(encoding="utf8")
        ):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    assert not missing


def test_the_picture_is_what_the_planner_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python docs/_site/rectangles.py` draws it anew."""
    monkeypatch.syspath_prepend(str(DOCS / "_site"))
    import rectangles

    assert rectangles.OUT.read_text(encoding="utf8") == rectangles.draw()


def test_a_quoted_refusal_is_still_in_the_version_that_is_named() -> None:
    page = (DOCS / "comparison.md").read_text(encoding="utf8")
    version = importlib.metadata.version("transformers")
    if f"transformers {version}" not in page:
        pytest.skip(f"the page speaks of another version than {version}")
    import transformers

    code = (Path(transformers.__file__).parent / "trainer.py").read_text(encoding="utf8")
    words = "Resuming is not supported for models sharded at load time (`DistributedConfig`), so their"
    assert words in code
    assert words in page
