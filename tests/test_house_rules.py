"""What the house asks of its code and no linter checks."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

import pytest

from common.config import PROJECT_ROOT

MOST_LINES = 60
"""Lines of code of a function."""
PLACES = (
    *("common", "shards", "stage1_teacher", "stage2_student", "both_stages", "cluster", "bench"),
    "pipeline.py",
)
BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def count_lines(function: Function, code: set[int]) -> int:
    """Count a function's lines of code: without docstring, comments, blanks; of a click command only its body."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    first = body[0].lineno if is_command(function) else function.lineno
    docstring = function.body[0] if len(body) < len(function.body) else None
    skipped = set() if docstring is None else set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(code & set(range(first, (function.end_lineno or 0) + 1)) - skipped)


def is_command(function: Function) -> bool:
    """Tell whether a decorator is that of a click command: `@group.command()`, `@click.command(...)`."""
    return any(
        isinstance(part, ast.Attribute) and part.attr in ("command", "group")
        for decorator in function.decorator_list
        for part in ast.walk(decorator)
    )


def lines_of_code(source: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        line for token in tokens if token.type not in BLANK for line in range(token.start[0], token.end[0] + 1)
    }


def long_functions(source: str) -> list[tuple[str, int]]:
    code = lines_of_code(source)
    counts = [(function.name, count_lines(function, code)) for function in functions(ast.parse(source))]
    return [(name, count) for name, count in counts if count > MOST_LINES]


@pytest.mark.parametrize("place", PLACES)
def test_no_function_is_longer_than_it_can_be_read(place: str) -> None:
    path = PROJECT_ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    found = {
        str(file.relative_to(PROJECT_ROOT)): long for file in files if (long := long_functions(file.read_text()))
    }
    assert not found, f"longer than {MOST_LINES} lines of code; split them: {found}"


def test_what_counts_is_code_alone() -> None:
    line = "    a = 1\n"
    code, rest = line * (MOST_LINES - 1), '    """Says\n\n    more."""\n    # why\n\n'
    assert not long_functions(f"def f():\n{rest}{code}")
    assert long_functions(f"def f():\n{rest}{code}{line}") == [("f", MOST_LINES + 1)]
    command = f'@cli.command()\n@click.option("--a")\ndef f(\n    a: int,\n) -> None:\n{rest}{code}{line}'
    assert not long_functions(command)
    assert long_functions(f"{command}{line}") == [("f", MOST_LINES + 1)]
