"""Every import of every file, wherever it stands: at the top, in a function, or through importlib."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("engines", "exporter", "glyphs", "graphs", "plugins")


@dataclass(frozen=True)
class Import:
    """``name`` (dotted, the attribute included) is imported by ``file`` in ``line``, perhaps ``lazily``."""

    file: str
    line: int
    name: str
    lazily: bool
    for_types_only: bool = False

    @property
    def top(self) -> str:
        """The first part of the dotted name."""
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """The folder, or the module, the file belongs to."""
        return self.file.partition("/")[0].removesuffix(".py")

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def shipped_files(root: Path = ROOT) -> list[Path]:
    """Return every Python file we ship."""
    return [root / "saccade.py", *sorted(f for room in ROOMS for f in (root / room).rglob("*.py"))]


def imports_of_tree(root: Path = ROOT) -> list[Import]:
    """Return every import of every shipped file."""
    return [found for path in shipped_files(root) for found in imports_of(path, root)]


def imports_of(path: Path, root: Path = ROOT) -> list[Import]:
    """Return every import of one file."""
    file = path.relative_to(root).as_posix()
    return imports_of_source(path.read_text(encoding="utf-8"), file)


def imports_of_source(source: str, file: str) -> list[Import]:
    """Return every import of a source text, as if it stood in ``file``."""
    found: list[Import] = []

    def walk(node: ast.AST, lazily: bool, for_types_only: bool) -> None:
        found.extend(Import(file, node.lineno, name, lazily, for_types_only) for name in names_of(node, file))
        inside = lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            typed = guarded and isinstance(node, ast.If) and child in node.body
            walk(child, inside, for_types_only or typed)

    walk(ast.parse(source, filename=file), lazily=False, for_types_only=False)
    return found


def names_of(node: ast.AST, file: str) -> Iterator[str]:
    """Yield the dotted names one syntax node imports; ``module.attribute`` of a plain import included."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = file.removesuffix(".py").split("/")[: -node.level] if node.level else []
        module = ".".join([*package, *filter(None, [node.module])])
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "importlib.import_module",
        "import_module",
        "__import__",
    }:
        if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            yield node.args[0].value
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers":
        yield f"transformers.{node.attr}"
