"""Every command in README.md and docs/: its flags exist, and it runs, at tiny sizes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import click
import pytest
import torch.distributed as dist

from cli.main import main
from moeconv.errors import MoeconvError
from runtime.settings.flags import parse_flags
from runtime.settings.parser import make_parser
from tests.docs import world
from tests.docs.commands import ROOT, Command, blocks, inline, pages

BLOCKS = [(page, block) for page in pages() for block in blocks(page) if page.name != "tutorial.md"]
COMMANDS = [command for _, block in BLOCKS for command in block]
# Why a command of a fenced block is not run; its flags are checked all the same.
NOT_RUN = {
    r"^make |^pip ": "sets up or tests everything",
    r"^python -m (benchmarks|tests)\.": "takes minutes, or a GPU",
    r"hf://": "needs the hub",
    r"--push-to-hub": "uploads",
    r"--calibrate|mine\.yaml": "measures the machine; tests/runtime/estimate/test_calibrate.py runs it",
    r"--live": "serves until it is stopped; tests/runtime/report/test_page.py runs it",
    r"--data-order megatron": "needs token files of one of Megatron's runs; tests/megatron/test_training.py runs it",
}


def reason(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def trainers_flags(command: Command) -> list[str] | None:
    """Give the flags of a command that is the trainer's; None for others."""
    words = list(command.words)
    if words[0] == "torchrun" and "runtime.train" in words:
        return words[words.index("runtime.train") + 1 :]
    if words[:2] == ["moeconv", "train"] and "--example" not in words:
        return words[4:] if words[2] == "--nproc-per-node" else words[2:]
    return None


def test_every_flag_exists() -> None:
    """In a fenced block a command is whole: it is parsed as the program itself would; in a line of text, only its flags are looked up."""
    wrong = [found for command in COMMANDS if (found := fault(command, check))]
    wrong += [found for page in pages() for command in inline(page) if (found := fault(command, look_up))]
    assert len(COMMANDS) > 50
    assert not wrong, "\n".join(wrong)


def fault(command: Command, checked: Callable[[Command], object]) -> str | None:
    try:
        checked(command)
    except (MoeconvError, click.ClickException, AssertionError) as error:
        return f"{command}: {error}"
    return None


def check(command: Command) -> None:
    words, flags = list(command.words), trainers_flags(command)
    if flags is not None:
        parse_flags(flags)
    elif words[0] == "moeconv":
        found = main.get_command(click.Context(main), words[1])
        assert found is not None, f"no command {words[1]}"
        found.make_context(words[1], words[2:])
    else:
        look_up(command)


def look_up(command: Command) -> None:
    words = list(command.words)
    if words[0] == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in words[1:])
    elif words[0] == "pip":
        check_extras(words)
    elif words[0] != "moeconv":
        check_module(words)
    elif not words[1].isupper() and not words[1].startswith("-"):  # moeconv COMMAND --help
        found = main.get_command(click.Context(main), words[1])
        assert found is not None, f"no command {words[1]}"
        known = {name for p in found.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        if found.context_settings.get("ignore_unknown_options"):
            known |= trainers_names()
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


@cache
def trainers_names() -> set[str]:
    return set(make_parser()._option_string_actions)


def check_extras(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\[(.+)\]", " ".join(words))
    assert {extra for group in named for extra in group.split(",")} <= extras.keys()


def check_module(words: Sequence[str]) -> None:
    """Check that a module exists, and that its files say each flag."""
    if "-m" not in words:
        assert "moeconv" in words, words  # torchrun --no-python moeconv ...
        return
    at = words.index("-m") + 1
    path = ROOT / words[at].replace(".", "/")
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    if not files or not files[0].exists():
        assert words[at] in sys.stdlib_module_names, f"no module {words[at]}"
        return
    text = "\n".join(file.read_text() for file in files)
    for word in words[at + 1 :]:
        if (flag := word.strip("[]")).startswith("--"):
            assert f'"{flag}"' in text or flag in trainers_names(), f"{words[at]} has no {flag}"


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        world.build(folder)
        yield folder


_RUN: set[tuple[tuple[str, ...], ...]] = set()
_TRAINED: set[str] = set()
_DAYS: dict[Path, Path] = {}


@pytest.fixture(autouse=True)
def no_group_stays() -> Iterator[None]:
    """A command that fails takes no other with it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=lambda value: getattr(value, "name", None))
def test_a_block_runs(page: Path, block: tuple[Command, ...], tiny_world: Path, tmp_path: Path) -> None:
    """The commands of a block follow each other; what they need besides is the world's."""
    todo = [command for command in block if reason(command) is None]
    key = tuple(command.words for command in todo)
    if key in _RUN:
        return
    _RUN.add(key)
    transcript = page == ROOT / "docs" / "quantised.md"
    folder = _DAYS.get(page) or world.copy_of(tiny_world, tmp_path / "here")
    if transcript:  # its blocks follow each other, too
        _DAYS[page] = folder
    with contextlib.chdir(folder):
        made: set[str] = set()
        for number, command in enumerate(todo, 1):
            if command.refused:
                said = re.escape(command.refused).replace("\\ ", " ")
                with pytest.raises((MoeconvError, AssertionError), match=re.sub(r"[0-9]+", "[0-9]+", said)):
                    run(command, needed=True)
                continue
            clear(command, made)
            run(command, needed=transcript or number < len(todo))


def test_pages_with_python_are_those_that_tests_run() -> None:
    """tests/docs/test_tutorial.py runs the one, tests/moeconv/api/test_examples.py the other."""
    found = {page.relative_to(ROOT).as_posix() for page in pages() if "```python" in page.read_text(encoding="utf8")}
    assert found == {"docs/tutorial.md", "docs/howto/python.md"}


def clear(command: Command, made: set[str]) -> None:
    """Make room for what a command makes, unless an earlier one of the block has made it: then they belong together."""
    words = list(command.words)
    outs = [words[at + 1] for at, word in enumerate(words) if word == "--save"]
    if words[0] == "moeconv" and words[1] != "train":
        found = main.get_command(click.Context(main), words[1])
        assert found is not None
        outs += (
            [str(found.make_context(words[1], words[2:]).params["out"])]
            if "out" in {p.name for p in found.params}
            else []
        )
    for out in outs:
        if out in made:
            continue
        made.add(out)
        for path in (Path(out), Path(out + ".bin"), Path(out + ".idx")):
            if path.is_dir():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()


def run(command: Command, *, needed: bool) -> None:
    """Run a command; training only if the next command needs it, or one of its flags has not been trained with yet."""
    words = list(command.words)
    flags = trainers_flags(command)
    if flags is None:
        shown = words[1:]
        if words[1] in ("eval", "generate"):
            few = ["--eval-iters", "1", "--seq-length", "64"] if words[1] == "eval" else ["--max-new-tokens", "2"]
            shown = [*shown[:2], *few, *world.without_degrees(shown[2:])]
        world.moeconv(*shown)
        return
    if "--config" in flags:
        parse_flags(flags)
        return
    size = words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else "1"
    world.judge(flags, int(size))
    named = {flag for flag in flags if flag.startswith("--")}
    if needed or not named <= _TRAINED:
        _TRAINED.update(named)
        world.train(flags)
