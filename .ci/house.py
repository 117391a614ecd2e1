"""Size bars and house rules that no linter knows, printed as a table; exits 1 when one is broken.

A file's length is its physical lines. The whole is counted in lines of code: no blank lines, comments or docstrings,
so that explaining a kernel costs nothing. A function's length is from ``def`` to its last line, docstring excluded.
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "stages", "bench")
MAX_FILE_LINES, MAX_TOTAL_LINES = 400, 12_000
MAX_FUNCTION_MEAN, MAX_KERNEL_FUNCTION_MEAN = 16, 40
SCORERS = Path("engine/rewards/scoring.py")  # runs other people's scorers, whose every failure is a missing score
SETTINGS, COMMAND_LINE = Path("engine/core/settings.py"), Path("stages/console.py")


@dataclass(frozen=True)
class Bar:
    rule: str
    value: str
    limit: str
    broken: bool


def sources(*folders: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "--", *(f"{folder}/*.py" for folder in folders)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in sorted(set(listed.stdout.split("\n"))) if name and (ROOT / name).exists()]


def function_lengths(path: Path) -> list[int]:
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [_length(node) for node in functions]


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def code_lines(path: Path) -> int:
    """Lines that hold a token other than a comment or a docstring."""
    source = path.read_text()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = (token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent)
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstring_lines(ast.parse(source)))


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node) is not None:
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def offenders(pattern: str, allowed: Path | None = None) -> list[str]:
    found = re.compile(pattern, re.MULTILINE)
    names = [path.relative_to(ROOT) for path in sources(*FOLDERS) if found.search(path.read_text())]
    return [str(name) for name in names if name != allowed]


def size_bars() -> list[Bar]:
    lines = {path: len(path.read_text().splitlines()) for path in sources(*FOLDERS)}
    longest = max(lines, key=lambda path: lines[path])
    total = sum(code_lines(path) for path in sources("engine", "kernels", "stages"))
    physical = sum(lines[path] for path in sources("engine", "kernels", "stages"))
    means = {folder: _mean_length(folder) for folder in FOLDERS}
    bars = [
        Bar("longest file", f"{lines[longest]} ({longest.relative_to(ROOT)})", str(MAX_FILE_LINES),
            lines[longest] > MAX_FILE_LINES),
        Bar("lines of code, engine + kernels + stages", f"{total} (physical {physical})", str(MAX_TOTAL_LINES),
            total > MAX_TOTAL_LINES),
    ]  # fmt: skip
    for folder, mean in means.items():
        limit = MAX_KERNEL_FUNCTION_MEAN if folder == "kernels" else MAX_FUNCTION_MEAN
        bars.append(Bar(f"mean function length, {folder}", f"{mean:.1f}", str(limit), mean > limit))
    return bars


def _mean_length(folder: str) -> float:
    lengths = [length for path in sources(folder) for length in function_lengths(path)]
    return statistics.fmean(lengths) if lengths else 0.0


def rule_bars() -> list[Bar]:
    rules = {
        "pickle, torch.load or torch.save": offenders(
            r"^\s*(import|from)\s+(pickle|dill|cloudpickle|marshal|shelve)\b|\btorch\.(load|save)\(|(gather|scatter|broadcast|send|recv)_object(_list)?\("
        ),
        "except without a named error": offenders(r"^\s*except(\s+(Base)?Exception\b.*)?:", SCORERS),
        "print outside the command line": offenders(r"^\s*print\(", COMMAND_LINE),
        "environment outside settings.py": offenders(r"\bos\.(environ|getenv)\b", SETTINGS),
        "trust_remote_code": offenders(r"trust_remote_code"),
        "kernels/__init__.py": ["kernels/__init__.py"] if (ROOT / "kernels/__init__.py").exists() else [],
    }
    return [Bar(rule, ", ".join(names) or "none", "none", bool(names)) for rule, names in rules.items()]


def main() -> int:
    bars = size_bars() + rule_bars()
    rule_width, value_width = (max(len(text) for text in column) for column in
                               ([bar.rule for bar in bars], [bar.value for bar in bars]))  # fmt: skip
    for bar in bars:
        mark = "BROKEN" if bar.broken else "ok"
        sys.stdout.write(f"{bar.rule:<{rule_width}}  {bar.value:<{value_width}}  limit {bar.limit:<6} {mark}\n")
    return int(any(bar.broken for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
