"""How large the code is, in logical lines: `python benchmarks/lines.py`.

A logical line ends with tokenize's NEWLINE, however many lines it is wrapped over. Docstrings, comments and weights/demo do not count.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHOD = (
    "guidance.py switching.py samplers.py schedule.py partition.py denoise.py presets.py strategies".split()
)


def logical_lines(source: str) -> int:
    """Of one file."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            docstrings.add(node.body[0].end_lineno)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.NEWLINE and token.start[0] not in docstrings for token in tokens)


def main() -> None:
    counts = {ROOT / "train_free_sample.py": 0}
    for folder in ("hybridiff", "models", "weights"):
        counts |= dict.fromkeys(
            path for path in sorted((ROOT / folder).rglob("*.py")) if "demo" not in path.parts
        )
    for path in counts:
        counts[path] = logical_lines(path.read_text(encoding="utf-8"))
        print(f"{counts[path]:5} {path.relative_to(ROOT)}")
    method = sum(
        count
        for path, count in counts.items()
        if len(parts := path.relative_to(ROOT).parts) > 1 and parts[0] == "hybridiff" and parts[1] in METHOD
    )
    print(f"{method:5} the method\n{sum(counts.values()):5} in all, without weights/demo")


if __name__ == "__main__":
    main()
