"""What documents say is run: Python by Python, shell commands by the parser of the command line, links by looking.

The Python blocks of a page run in order, in one namespace and in an empty folder; a ``text`` block right after one is
what it prints. What a page takes for granted, such as a model, is made by the file of its name in ``tests/documents``.
"""

import ast
import contextlib
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPS = Path(__file__).parent / "documents"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Block:
    """A block of code: the language that it states, its text, and the line of the page at which the text begins."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """All blocks, fenced ones and indented ones, whose language is "indented"."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    at = 0
    while at < len(lines):
        start = at
        if fence := re.match(r"(```+)\s*(\w*)", lines[at]):
            at += 1
            while lines[at] != fence[1]:
                at += 1
            found.append(Block(fence[2], "\n".join(lines[start + 1 : at]), start + 2))
        elif lines[at].startswith("    ") and (start == 0 or not lines[start - 1]):
            while at < len(lines) and (not lines[at] or lines[at].startswith("    ")):
                at += 1
            found.append(Block("indented", "\n".join(line[4:] for line in lines[start:at]).rstrip(), start + 1))
        at += 1
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def outputs(blocks: list[Block]) -> Iterator[tuple[Block, str | None]]:
    """Every block of Python, with what it is said to print."""
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "python":
            end = block.line + block.text.count("\n") + 1
            shown = after is not None and after.language == "text" and after.line == end + 3
            yield block, after.text if shown else None


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks_of(p))], ids=name)
def test_the_python_of_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = SETUPS / page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT).with_suffix(".py")
    namespace = runpy.run_path(str(setup)) if setup.is_file() else {}
    namespace["__name__"] = "__main__"
    replaced = namespace.pop("REPLACED", {})
    with contextlib.ExitStack() as stack:
        stack.callback(namespace.pop("clean_up", lambda: None))
        for block, shown in outputs(blocks_of(page)):
            text = block.text
            for before, after in replaced.items():
                text = text.replace(before, after)
            code = compile("\n" * (block.line - 1) + text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            if shown is not None:
                assert printed.getvalue().rstrip().splitlines() == shown.rstrip().splitlines()


def test_pages_have_setups_only_where_they_have_python():
    for setup in SETUPS.rglob("*.py"):
        page = setup.relative_to(SETUPS).with_suffix(".md")
        found = [path for path in (ROOT / "docs" / page, ROOT / page) if path.is_file()]
        assert found, f"{setup.name} belongs to no page"
        assert any(block.language == "python" for block in blocks_of(found[0])), f"{setup.name} is not needed"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_is_fenced_so_that_it_is_run(page):
    for block in blocks_of(page):
        if block.language not in ("indented", ""):
            continue
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(block.text)
            code = any(
                isinstance(node, ast.Import | ast.ImportFrom | ast.Call | ast.FunctionDef) for node in ast.walk(tree)
            )
            assert not code, f"{name(page)}:{block.line} is Python: begin it with ```python"


# --- commands

LANGUAGES_OF_SHELLS = ("indented", "", "sh", "bash", "console")


def commands_of(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every command of the page that calls spectrim: the words after it, and the line."""
    for block in blocks_of(page):
        if block.language not in LANGUAGES_OF_SHELLS:
            continue
        for offset, line in enumerate(re.sub(r"\\\n\s*", " ", block.text).splitlines()):
            if not re.search(r"(^|\s)spectrim(\s|$)", line):
                continue
            words: list[str] | None = None
            with contextlib.suppress(ValueError):  # an apostrophe of a sentence
                for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
                    if word in (";", "&&", "||", "|", ">"):
                        if words is not None:
                            yield block.line + offset, words
                        words = None
                    elif words is not None:
                        words.append(word)
                    elif word == "spectrim":
                        words = []


def parse(words: list[str]) -> None:
    """Parse one command line as the program would, and run nothing."""
    from typer.main import get_command

    from spectrim.lab.cli.app import app

    group = get_command(app)
    context = group.make_context("spectrim", list(words))
    while words and hasattr(group, "get_command"):
        command = group.get_command(context, words[0])
        assert command is not None, f"there is no command {words[0]!r}"
        if words[0] == "bench" and not hasattr(command, "get_command"):
            from spectrim.lab.cli.bench_command import bench_app

            command = get_command(bench_app)
        words, group = words[1:], command
        context = group.make_context(words[0] if words else "spectrim", list(words), parent=context)


def flags_of(command: list[str]) -> set[str]:
    """The flags that a command knows."""
    from typer.main import get_command

    from spectrim.lab.cli.app import app

    group = get_command(app)
    context = group.make_context("spectrim", command[:1])
    found = group.get_command(context, command[0])
    assert found is not None, f"there is no command {command[0]!r}"
    return {"--help"} | {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands_of(page))], ids=name)
def test_commands_are_ones_that_the_command_line_takes(page):
    for line, words in commands_of(page):
        if words in ([], ["--help"]) or "..." in words:
            continue
        try:
            parse(words)
        except Exception as error:
            message = getattr(error, "format_message", lambda error=error: str(error))()
            pytest.fail(f"{name(page)}:{line}: spectrim {' '.join(words)}: {type(error).__name__}: {message}")


INLINE = re.compile(r"`spectrim ([a-z]+)([^`]*)`")


@pytest.mark.parametrize("page", [p for p in PAGES if INLINE.search(p.read_text(encoding="utf-8"))], ids=name)
def test_commands_in_sentences_exist_with_their_flags(page):
    for command, rest in INLINE.findall(page.read_text(encoding="utf-8")):
        known = flags_of([command])
        if command == "bench":
            continue
        for flag in re.findall(r"--[a-z][a-z-]*", rest):
            assert flag in known, f"{name(page)}: spectrim {command} has no {flag}"


# --- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as sites and GitHub make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            inside = re.match(r"https://github\.com/spectrim/spectrim/(?:blob|tree)/main/([^#]+)", target)
            assert inside is None or (ROOT / inside[1]).exists(), f"{name(page)}: {target}"
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)}: {target}"
        if "docs" in page.parts:
            assert (ROOT / "docs") in found.parents, f"{name(page)}: {target} is not on the site: link to GitHub"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name(page)}: {target}"


# --- figures


def quotes_of(page: Path) -> list[str]:
    """The lines of a page's quotations."""
    return [line[2:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("> ")]


@pytest.mark.parametrize("page", [page for page in PAGES if quotes_of(page)], ids=name)
def test_quoted_figures_stand_in_the_page_that_a_command_wrote(page):
    sources = [other for other in PAGES if other != page and not quotes_of(other)]
    sources += (ROOT / "benchmarks" / "results").rglob("*.md")
    written = {line for source in sources for line in source.read_text(encoding="utf-8").splitlines()}
    for line in quotes_of(page):
        assert line in written, f"{name(page)} quotes what no page says any more: {line}"
