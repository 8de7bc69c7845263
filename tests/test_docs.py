"""The documents are right: links resolve, commands compose, settings and defaults are those of the schema."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import tools.prepare
import tools.shards
import tools.tokenizer
from sleeptrain.cli import COMMANDS, OTHER_COMMANDS, _parse_command_flags
from sleeptrain.commands.convert import parser as convert_parser
from sleeptrain.commands.data import parser as data_parser
from sleeptrain.commands.doctor import parser as doctor_parser
from sleeptrain.commands.evaluate import parser as evaluate_parser
from sleeptrain.commands.generate import parser as generate_parser
from sleeptrain.commands.report import parser as report_parser
from sleeptrain.config.compose import compose, validate_sweep
from sleeptrain.config.reference import with_tables
from sleeptrain.config.schema import Config
from sleeptrain.config.setting import declared_settings
from sleeptrain.doctor.checks import CHECKS
from sleeptrain.errors import ConfigError
from tests.locks import project
from tools.commands_reference import FOREIGN, parsers, with_commands

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *DOCS.rglob("*.md")])
FLAGS_WITH_VALUE = ("--cfg",)
# Settings that are lists of dataclasses.
LISTS = {"sleep.curriculum", "optim.curriculum", "optim.rates", "data.shards.sources", "data.shards.curriculum"}

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)  # also in lists
PARSERS = {"prepare": tools.prepare._parser, "tokenizer": tools.tokenizer._parser, "shards": tools.shards._parser}
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def names(documents: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in documents]


def links(text: str) -> list[str]:
    """The targets of links within the repository, outside code."""
    found = LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The fragments of a Markdown page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def code_lines(text: str) -> list[str]:
    """The lines of code blocks. Continued lines are joined."""
    blocks = [block.replace("\\\n", " ").splitlines()[1:-1] for block in FENCE.findall(text)]
    return [line.strip() for block in blocks for line in block if line.strip()]


def commands(text: str) -> list[list[str]]:
    """The lines of code blocks that call `sleeptrain` or `make`, split into words, without a launcher."""
    lines = [re.sub(r"^torchrun .*? -m sleeptrain ", "sleeptrain ", line) for line in code_lines(text)]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(\S*/)?(sleeptrain|make)\s", line)]


def job(words: list[str]) -> tuple[list[str], bool]:
    """The overrides of a command line after `sleeptrain <command>`, and whether it is a sweep."""
    overrides = [word for word in words if not word.startswith("-")]
    for flag in FLAGS_WITH_VALUE:
        if flag in words:
            overrides.remove(words[words.index(flag) + 1])
    return overrides, "-m" in words


def all_commands(program: str) -> list[tuple[str, list[str]]]:
    found = [(path.name, words) for path in DOCUMENTS for words in commands(path.read_text())]
    return [(name, words[1:]) for name, words in found if Path(words[0]).name == program]


@pytest.mark.parametrize("name", names(DOCUMENTS))
def test_every_link_resolves(name: str) -> None:
    page = ROOT / name
    for target in links(page.read_text()):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), f"{name} links to {target}"
        if fragment:
            assert fragment in anchors(linked.read_text()), f"{name} links to {target}, which is no heading there"


def test_the_index_and_the_readme_lead_to_every_page() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"index.md"}
    assert set(links((ROOT / "docs/index.md").read_text())) >= pages
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_every_command_line_composes() -> None:
    found = [(name, words) for name, words in all_commands("sleeptrain") if words[0] not in OTHER_COMMANDS]
    assert {words[0] for _, words in found} == set(COMMANDS)
    seen = set[tuple[bool, str]]()
    for name, (command, *words) in found:
        overrides, sweeps = job(_parse_command_flags(command, words)[1])
        if (not overrides and "--help" in words) or (sweeps, " ".join(overrides)) in seen:
            continue
        seen.add((sweeps, " ".join(overrides)))
        try:
            validate_sweep(overrides) if sweeps else compose(overrides)
        except ConfigError as error:
            pytest.fail(f"{name}: sleeptrain {command} {' '.join(words)}: {error}")


def test_every_report_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "report"]
    assert found
    for _, *words in found:
        report_parser().parse_args(words)


def test_every_evaluation_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "evaluate"]
    assert found
    for _, *words in found:
        evaluate_parser().parse_args(words)


def test_every_question_about_data_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "data"]
    assert {words[1] for words in found} == {"which", "describe"}
    for _, *words in found:
        data_parser().parse_args(words)


def test_every_question_to_the_doctor_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "doctor"]
    assert found
    for _, *words in found:
        options = doctor_parser().parse_intermixed_args(words)
        assert set(options.skip) <= set(CHECKS)
        if options.overrides:
            compose(options.overrides)


def test_every_check_of_the_doctor_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/doctor.md").read_text(), re.MULTILINE)
    assert [name for name in rows if not name.startswith("-")] == list(CHECKS)


def test_every_conversion_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "convert"]
    assert {words[1] for words in found} == {"export", "import"}
    for _, *words in found:
        convert_parser().parse_args(words)


def test_every_generation_is_understood() -> None:
    found = [words for _, words in all_commands("sleeptrain") if words[0] == "generate"]
    assert found
    for _, *words in found:
        generate_parser().parse_args(words)


def test_every_call_of_a_tool_is_understood() -> None:
    found = [line for path in DOCUMENTS for line in code_lines(path.read_text()) if re.match(r"\S*python tools/", line)]
    assert {name for line in found for name in PARSERS if f"tools/{name}.py" in line} == set(PARSERS)
    for line in found:
        _, tool, *words = shlex.split(line, comments=True)
        assert (ROOT / tool).is_file(), line
        if (parser := PARSERS.get(Path(tool).stem)) is not None:
            parser().parse_args(words)


def test_every_batch_script_exists() -> None:
    found = {word for path in DOCUMENTS for line in code_lines(path.read_text()) for word in line.split()}
    scripts = {word for word in found if re.fullmatch(r"slurm/\w+\.sh", word)}
    assert "slurm/pretrain_2b.sh" in scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_no_command_for_a_beginner_goes_unchecked(name: str) -> None:
    """Each line is of a kind that a test above reads."""
    known = re.compile(r"(\S*/)?(sleeptrain|make) |\S*python tools/\w+\.py |sbatch .*slurm/\w+\.sh$")
    lines = code_lines((ROOT / name).read_text())
    assert lines and not [line for line in lines if not known.match(line)]


def test_the_citation_is_of_this_version() -> None:
    citation, declared = yaml.safe_load((ROOT / "CITATION.cff").read_text()), project()["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert [citation[key] for key in ("title", "version", "license")] == [
        declared["name"],
        declared["version"],
        declared["license"],
    ]


def test_commits_are_checked_as_a_merge_is() -> None:
    """By programs of this checkout's environments, in no version of their own."""
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert [hook["entry"] for hook in repository["hooks"]] == ["make check", "make docs"]


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = {word for _, words in all_commands("make") for word in words if "=" not in word}
    assert found >= {"train", "rule110", "test"}
    assert found <= targets


def test_the_settings_are_those_declared() -> None:
    """`python tools/settings_reference.py` writes the tables anew."""
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == with_tables(page)
    documented = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    sections = {name for name, _, _ in declared_settings(Config)}
    assert sections <= set(documented)
    lists = {name for name in documented if "[]" in name}
    assert {name.partition("[]")[0] for name in lists} == LISTS


def test_the_commands_are_those_of_the_parsers() -> None:
    """`python tools/commands_reference.py` writes the tables anew."""
    page = (ROOT / "docs/commands.md").read_text()
    assert page == with_commands(page)
    marked = set(re.findall(r"^<!-- command: (.+) -->$", page, re.MULTILINE))
    assert marked == {name for name, _ in parsers()}
    assert {name.split()[0] for name in marked} | FOREIGN == {*COMMANDS, *OTHER_COMMANDS}


def test_another_default_is_another_page() -> None:
    page = "<!-- settings: sleep.curriculum[] -->\n| old |\n\nprose\n"
    written = with_tables(page)
    assert "| `sleep.curriculum[].passes` | `null` | >= 1 | N; null keeps the value before |\n" in written
    assert "| old |" not in written and written.endswith("\n\nprose\n")
    with pytest.raises(KeyError, match="no section 'slep'"):
        with_tables("<!-- settings: slep -->\n")
