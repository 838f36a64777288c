"""The documentation names only what exists: files, headings, make targets, commands, options. Every page is found."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import generate_matrix
import generate_tables
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pages import with_section

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
CONFIGS = REPOSITORY / "verl_m2po" / "config"
PAGES = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
        *(REPOSITORY / "recipes").rglob("*.md"),
    ]
)
GROUPS = sorted(folder.name for folder in CONFIGS.iterdir() if any(folder.glob("*.yaml")))

EXPLICIT_ANCHOR = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)
MAKE = re.compile(r"^(?:[A-Z_]+=\S+ +)*make((?: +[\w.=/-]+)+)", re.MULTILINE)
COMMAND = re.compile(r"^(?:\S*/)?verl-m2po ([a-z][\w-]*)", re.MULTILINE)
# A name of the package in code, and a file of the repository; not as part of a longer name.
DOTTED = re.compile(r"(?<![\w./-])verl_m2po(?:\.\w+)+(?![\w/])")
FILE = re.compile(r"(?<![\w./-])(?:verl_m2po|tests|recipes|docs)/[\w./*-]*\w(?:\.\w+)?")
MODULE = re.compile(r"python -m (verl_m2po(?:\.\w+)*)")
# Not after a dot or a letter: `data.task=` is another key. Values in capitals, <...> or $... are placeholders.
OPTION = re.compile(rf"(?<![\w.$/-])({'|'.join(GROUPS)})=([a-z0-9_]+(?:,[a-z0-9_]+)*)(?![\w.(])")


class Page(NamedTuple):
    """What one Markdown file says."""

    links: list[str]
    anchors: set[str]
    code: list[str]
    included: list[str]


def read(path: Path) -> Page:
    text = path.read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    links = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in inline if token.attrs]
    fences = [token for token in tokens if token.type == "fence"]
    return Page(
        links=[link for link in links if link],
        anchors={*heading_anchors(tokens), *EXPLICIT_ANCHOR.findall(text)},
        code=[token.content for token in (*inline, *fences) if token.type == "code_inline" or is_command(token)],
        included=[document for fence in fences for document in named_by_directive(fence, path)],
    )


def is_command(token: Token) -> bool:
    """Whether this is a block to be typed; output is marked as text."""
    return token.type == "fence" and token.info != "text"


def heading_anchors(tokens: list[Token]) -> Iterator[str]:
    """GitHub's anchors, which are also MyST's."""
    seen: dict[str, int] = {}
    for opening, content in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        shown = "".join(child.content for child in content.children or () if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if slug in seen else slug
        seen[slug] = seen.get(slug, 0) + 1


def named_by_directive(fence: Token, page: Path) -> Iterator[str]:
    """Files that a MyST directive puts under `page`, or into it, relative to it."""
    directive, _, argument = fence.info.partition(" ")
    if directive == "{include}":
        yield argument
    if directive == "{toctree}":
        entries = [line.strip() for line in fence.content.splitlines()]
        yield from (f"{entry}.md" for entry in entries if entry and not entry.startswith(":"))


def is_external(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def targets(page: Path) -> Iterator[Path]:
    """Files and folders that `page` links to, shows or includes."""
    content = read(page)
    for link in (*content.links, *content.included):
        path = unquote(link.partition("#")[0])
        if path and not is_external(link):
            yield (page.parent / path).resolve()


def broken_links(page: Path) -> Iterator[str]:
    for link in read(page).links:
        if is_external(link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / unquote(file)).resolve() if file else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in read(target).anchors):
            yield f"{link}: no such heading"
    yield from (f"{file}: no such file" for file in read(page).included if not (page.parent / file).exists())


def unknown_names(page: Path) -> Iterator[str]:
    """Make targets, commands, modules and options that are shown as code and do not exist."""
    code = read(page).code
    for words in (match.split() for piece in code for match in MAKE.findall(piece)):
        yield from (f"make {word}" for word in words if "=" not in word and word not in make_targets())
    for piece in code:
        yield from (f"verl-m2po {name}" for name in COMMAND.findall(piece) if name not in commands())
        yield from (f"python -m {name}" for name in MODULE.findall(piece) if not is_runnable(name))
        for group, values in OPTION.findall(piece):
            known = {option.stem for option in (CONFIGS / group).glob("*.yaml")} | {"null"}
            yield from (f"{group}={value}" for value in values.split(",") if value not in known)

    yield from (name for piece in code for name in DOTTED.findall(piece) if not is_there(name))
    yield from (path for piece in code for path in FILE.findall(piece) if not list(REPOSITORY.glob(path)))


def is_there(name: str) -> bool:
    """Whether a dotted name of the package is a module, or stands in one."""
    folder, parts = REPOSITORY, name.split(".")
    for index, part in enumerate(parts):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        module = (folder / part).with_suffix(".py")
        names = parts[index + 1 :] if module.is_file() else parts[index:]
        return not names or names[0] in names_in(module if module.is_file() else folder / "__init__.py")
    return True


@cache
def names_in(module: Path) -> set[str]:
    """What a module defines or imports at its top level."""
    found = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def commands() -> set[str]:
    from verl_m2po.cli.main import app

    return {info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands}


def is_runnable(module: str) -> bool:
    path = REPOSITORY.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_points_to_a_file_and_a_heading(page):
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_option_exists(page):
    assert not list(unknown_names(page))


def test_every_file_is_reached_from_the_index():
    """By the table of contents, by a link, as an image, or by a link to its folder; from the README, too."""
    reached, waiting = set(), [DOCS / "index.md", REPOSITORY / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or not path.exists() or REPOSITORY not in path.parents:
            continue
        reached.add(path)
        if path.is_dir():
            waiting += path.rglob("*") if DOCS in path.parents else ()
        elif path.suffix == ".md" and (DOCS in path.parents or path.name == "README.md"):
            waiting += targets(path)
    files = {path for path in DOCS.rglob("*") if path.is_file() and not {"_build", "__pycache__"} & set(path.parts)}
    built_with = {path for path in files if path.suffix == ".py"}
    assert not sorted(map(name_of, files - built_with - reached))


def test_every_page_is_in_the_table_of_contents():
    """Pages of docs/ itself; what lies in folders may be reached by a link."""
    listed = {(DOCS / page).resolve() for page in read(DOCS / "index.md").included}
    assert {page for page in DOCS.glob("*.md")} - {DOCS / "index.md"} <= listed


@pytest.mark.parametrize(("page", "section"), generate_tables.SECTIONS)
def test_every_generated_table_is_that_of_the_code(page, section):
    text = (REPOSITORY / page).read_text()
    lines = generate_tables.SECTIONS[page, section]()
    assert with_section(text, section, "\n".join(lines)) == text, "run: make docs-tables"


def test_what_tests_show_is_in_the_table_of_features():
    """A misspelt mark would be shown nowhere."""
    runs = generate_matrix.marked()
    assert len(runs) > 10
    assert {(run.feature, run.mode) for run in runs} <= set(product(generate_matrix.FEATURES, generate_matrix.MODES))
    elsewhere = set((REPOSITORY / "tests").rglob("*.py")) - {
        path for folder in generate_matrix.RUNNING for path in folder.rglob("*.py")
    }
    assert not [path for path in elsewhere if "mark.feature(" in path.read_text() and path != Path(__file__)]


def test_every_quoted_refusal_is_still_said():
    """First column of the table, between the dots that stand for values, in a string of the package."""
    section = (DOCS / "troubleshooting.md").read_text().partition("## Refused")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    quoted = [part.strip() for row in rows for text in re.findall("`(.+?)`", row) for part in text.split("...")]
    said = "\0".join(strings_of_the_package())
    assert len(quoted) > 20
    assert not [part for part in quoted if part not in said]


def strings_of_the_package() -> Iterator[str]:
    for path in (REPOSITORY / "verl_m2po").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_checks_can_fail(tmp_path):
    """A page with one mistake of each kind; each is named, and what is right beside it is not."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `code` heading: (1)\n# Twice\n# Twice\n"
        "[a](#a-code-heading-1) [b](#twice-1) [c](none.md) [d](#nowhere) ![e](none.svg) [f](https://x.org/none)\n\n"
        "| a |\n| - |\n| [in a table](gone.md) |\n\n"
        "`make test` `LOSS=grpo make nonsense STEPS=3` `verl-m2po doctor` `verl-m2po surgeon`\n"
        "`python -m verl_m2po.tasks` `python -m verl_m2po.none` to make sense\n\n"
        "`verl_m2po.second_moment.keep_mask` `verl_m2po.second_moment.drop_mask`\n\n"
        "`tests/test_docs.py` `tests/none.py`\n\n"
        "```bash\npython -m verl.trainer.main_ppo x.loss=none loss=m2po,typo staleness=s64 task=none hardware=$HW\n"
        "verl-m2po report\n```\n```text\nverl-m2po refuses this run\n```\n"
        "```{toctree}\n:hidden:\n\nabsent\n```\n"
    )
    assert list(broken_links(page)) == [
        "none.md: no such file",
        "#nowhere: no such heading",
        "none.svg: no such file",
        "gone.md: no such file",
        "absent.md: no such file",
    ]
    assert sorted(unknown_names(page)) == [
        "loss=typo",
        "make nonsense",
        "python -m verl_m2po.none",
        "task=none",
        "tests/none.py",
        "verl-m2po surgeon",
        "verl_m2po.none",
        "verl_m2po.second_moment.drop_mask",
    ]


def test_the_groups_are_those_of_the_package():
    """The option check would pass for lack of groups."""
    assert {"hardware", "loss", "staleness", "task", "model"} <= set(GROUPS)
