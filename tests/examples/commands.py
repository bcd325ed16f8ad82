"""Finds the commands that pages, docstrings and launch files show, as lists of words."""

import ast
import dataclasses
import functools
import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a line or a span of code begins with, if it is a command of ours.
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:\S*/)?python3? (?:-m imagegpt_jax\b|tools/)|imagegpt-jax\b|(?:bash )?launch/\w+\.\w+|"
    r"sbatch |(?:tpu_vm|gke|local)\.sh|docker (?:build|run)|sky (?:jobs )?launch|make [a-z]|"
    r"pip install .*(?:\[|imagegpt))"
)
FRAGMENT = re.compile(r"--[a-z]")
# A page of error messages, which quote flags that are wrong: of it, whole commands are examples.
MESSAGES = ROOT / "docs" / "troubleshooting.md"


@dataclasses.dataclass(frozen=True)
class Example:
    """One command.

    Attributes:
      where: file and line.
      words: as a shell gives them to the program, without what stands before it.
      shown: whether it stands on a line of its own, to be typed; else it is a span of code in a sentence.
    """

    where: str
    words: tuple[str, ...]
    shown: bool

    @property
    def partial(self) -> bool:
        """Whether it leaves something out, and says so."""
        return any("..." in word for word in self.words)

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def pages() -> list[pathlib.Path]:
    """Pages for users."""
    return sorted(
        [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *ROOT.glob("docs/**/*.md")]
    )


def scripts() -> list[pathlib.Path]:
    """What lies in `launch/` beside its page, and the Makefile."""
    return sorted(p for p in [*ROOT.glob("launch/**/*"), ROOT / "Makefile"] if p.is_file() and p.suffix != ".md")


def sources() -> list[pathlib.Path]:
    """Python files with docstrings that a user reads."""
    return sorted(p for folder in ("imagegpt_jax", "configs", "tools") for p in (ROOT / folder).rglob("*.py"))


def examples() -> list[Example]:
    """Every command of the repository."""
    shown = []
    for path in pages():
        shown += _of_text(path, path.read_text(), page=True)
    for path in scripts():
        text = re.sub(r"^[ \t]*#", " ", path.read_text(), flags=re.MULTILINE)
        shown += _of_text(path, text.replace("$(BIN)/python", "python"))
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                line = 1 if isinstance(node, ast.Module) else node.lineno + 1
                shown += _of_text(path, text, first_line=line)
    return shown


@functools.cache
def nodes(path: pathlib.Path) -> list[ast.AST]:
    """What a Python file consists of."""
    return list(ast.walk(ast.parse(path.read_text())))


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of every string of the sources; what is filled in is {}."""
    for path in sources():
        name = path.relative_to(ROOT)
        parts = {id(part) for node in nodes(path) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes(path):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                texts = [str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values]
                yield where, "".join(texts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                yield where, node.value


def _of_text(path: pathlib.Path, text: str, *, page: bool = False, first_line: int = 1) -> Iterator[Example]:
    """The examples of a page, a docstring or a script."""
    if page:
        text = re.sub(r"^```(?!sh|bash)\w+\n.*?^```$", _blank, text, flags=re.MULTILINE | re.DOTALL)  # Python, JSON
    text = re.sub(r"[ \t]*\\\n[ \t]*", lambda m: " " + "\0", text)  # a zero byte for each line that went
    spans = re.sub(r"^```.*?^```$", _blank, text, flags=re.MULTILINE | re.DOTALL)
    fenced, number = False, first_line
    fragments = path != MESSAGES
    for line in text.split("\n"):
        where, code = f"{path.relative_to(ROOT)}:{number}", line.replace("\0", "").strip()
        number += 1 + line.count("\0")
        fenced ^= page and line.startswith("```")
        typed = not page or fenced or line.startswith("    ")
        if typed and (COMMAND.match(code) or (page and fragments and FRAGMENT.match(code))):
            yield from of_line(where, code, shown=True)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", spans):
        code = " ".join(match.group(1).replace("\0", "").replace("\\|", "|").split())
        if COMMAND.match(code) or (fragments and FRAGMENT.match(code)):
            before = spans[: match.start()]
            where = f"{path.relative_to(ROOT)}:{first_line + before.count(chr(10)) + before.count(chr(0))}"
            yield from of_line(where, code, shown=False)


def _blank(match: re.Match[str]) -> str:
    return "\n" * (match.group().count("\n") + match.group().count("\0"))


def of_line(where: str, code: str, *, shown: bool) -> Iterator[Example]:
    """The commands of a line: parts of a list, without loops, environment, brackets of options and remarks."""
    code = re.split(r"\s{3,}(?![-#\[\s])", code)[0]
    code = re.sub(r"\[,([^\]]*)\]", r",\1", code)
    words: list[str] = []
    for word in [*_split(code), ";"]:
        if set(word) <= set(";&|"):
            while words and (words[0] in ("do", "then", "exec") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words.pop(0)
            if words and words[0] not in ("for", "done"):
                yield Example(where, tuple(words), shown)
            words = []
        elif word.startswith("[-"):
            words.append(word[1:].removesuffix("]"))
        elif word != "]":
            words.append(word.removesuffix("]") if "[" not in word else word)


def _split(code: str) -> list[str]:
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quote that does not end: prose
        return []
