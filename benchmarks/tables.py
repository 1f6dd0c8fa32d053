"""Tables of the documents, written from benchmarks/results/*.json (benchmarks/results/README.md names the keys).

    python benchmarks/tables.py            write every block from `<!-- table: NAME -->` to `<!-- end -->`
    python benchmarks/tables.py --check    exit code 1 if a block differs from what its file gives

`<!-- table: NAME in full -->` takes the rows that are marked as details, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("BENCHMARKS.md", "docs/LOG.md", "docs/plan-accuracy.md")
BLOCK = re.compile(r"<!-- table: ([\w-]+)( in full)? -->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check: bool = parser.parse_args().check
    stale = 0
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = BLOCK.sub(partial(rendered, path.parent), text)
        if wanted == text:
            continue
        stale += 1
        if check:
            print(f"{name} is not in step with benchmarks/results; run: python benchmarks/tables.py")
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if check and stale else 0


def rendered(folder: Path, block: re.Match[str]) -> str:
    """What belongs into a block of a document in `folder`."""
    path = RESULTS / f"{block[1]}.json"
    if not path.exists():
        sys.exit(f"there is no {path.relative_to(ROOT)}; write it, or rename the table")
    result = load(path)
    if not block[2]:
        result["rows"] = [row for row in result["rows"] if not row.get("detail")]
    link = "../" * len(folder.relative_to(ROOT).parts) + path.relative_to(ROOT).as_posix()
    start = block[0].partition("\n")[0]
    return f"{start}\n{table(result)}\n\n{source(result, link)} <!-- end -->"


def load(path: Path) -> dict[str, Any]:
    """A result file; its decimals keep the digits they were written with."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    return found


def table(result: dict[str, Any]) -> str:
    """A GitHub table; columns without text are aligned to the right."""
    columns, rows = result["columns"], result["rows"]
    text = [any(isinstance(row[column["key"]], str) for row in rows) for column in columns]
    lines = [[column["title"] for column in columns], ["---" if left else "---:" for left in text]]
    for row in rows:
        cells = [framed(row[column["key"]], column) for column in columns]
        lines.append([f"{cells[0]} {row['mark']}" if "mark" in row else cells[0], *cells[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def framed(value: Any, column: dict[str, str]) -> str:
    """A cell with its column's prefix and suffix, or nothing for null."""
    return "" if value is None else column.get("prefix", "") + cell(value) + column.get("suffix", "")


def cell(value: Any) -> str:
    """A figure with its digits and its spread."""
    match value:
        case {"median": median, "low": low, "high": high}:
            return f"{cell(median)} ({cell(low)}-{cell(high)})"
        case {"mean": mean, "se": se}:
            return f"{cell(mean)} ± {cell(se)}"
        case {"value": figure, "change": change, "se": se}:
            return f"{cell(figure)} ({change:+} ± {cell(se)})"
        case {"value": figure, "spread_percent": spread}:
            return f"{cell(figure)} (±{cell(spread)} %)"
        case {"value": figure, "ratio": ratio}:
            return f"{cell(figure)} (x{cell(ratio)})"
        case {"value": figure, "unit": unit}:
            return f"{cell(figure)} {unit}"
        case int():
            return f"{value:,}"
        case Decimal() | str():
            return str(value).replace("E-", "e-")
    raise TypeError(f"benchmarks/results/README.md knows no figure like {value!r}")


def source(result: dict[str, Any], link: str) -> str:
    """The line below a table: when, in which commits, where, and the file with the rest."""
    found = {(row.get("date", result["date"]), row.get("commit", result["commit"])) for row in result["rows"]}
    known = sorted((date, commit) for date, commit in found if commit)
    span = " to ".join(dict.fromkeys(date for date, _ in (known[:1] + known[-1:]))) or "date not known"
    commits = ", ".join(commit for _, commit in known) or "commit not known"
    machine = f"; {result['machine']}" if result["machine"] else ""
    return f"<sub>{span}, {commits}{machine}. [Command, notes and data]({link}).</sub>"


if __name__ == "__main__":
    sys.exit(main())
