"""A new fit of devices/predict/speed.json on public_rows.csv, and its errors: run it by hand.

python benchmarks/plan/refit.py && python benchmarks/tables.py

writes speed.json, benchmarks/results/plan-accuracy.csv (a line per row) and the rows of plan-accuracy.json
(a line per kind of machine), from which tables.py makes the table of docs/plan-accuracy.md.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

from fit import FREE, ROWS, Error, decode_errors, fit, load_rows, prefill_errors, summary

from edgekv.devices.predict.speed import COEFFICIENTS
from edgekv.documents import dumps

RESULT = Path(__file__).parents[1] / "results/plan-accuracy.json"


def main() -> None:
    rows = load_rows(ROWS)
    coefficients = fit(rows)
    COEFFICIENTS.write_text(dumps(coefficients, indent=1) + "\n", encoding="utf-8")
    found = {"decode": decode_errors(rows, coefficients), "prefill": prefill_errors(rows, coefficients)}
    with RESULT.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        lines = [single(what, error) for what, errors in found.items() for error in errors]
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    chosen = {
        (what, kind or "all"): [error for error in errors if kind in (None, error.row.board.kind)]
        for what, errors in found.items()
        for kind in (None, *FREE)
    }
    replace_rows([grouped(*key, errors) for key, errors in chosen.items() if errors])


def single(what: str, error: Error) -> dict[str, Any]:
    """One measurement beside its projection."""
    row = error.row
    return {
        "what": what,
        "board": row.board.name,
        "threads": "" if row.board.is_gpu else row.threads,
        "model": row.model,
        "weights": row.work.weights,
        "depth": f"{row.mean_depth if what == 'decode' else row.n_prompt / 2:.0f}",
        "measured_tps": f"{error.measured_tps:.4g}",
        "projected_tps": f"{error.predicted_tps:.4g}",
        "error_percent": f"{error.error * 100:+.1f}",
        "split": "train" if row.train else "test",
        "source": row.source,
    }


def grouped(what: str, machines: str, errors: list[Error]) -> dict[str, Any]:
    """Median and worst error in percent, of the rows that were fitted on and of those that were held out."""
    line: dict[str, Any] = {"what": what, "machines": machines}
    for name, train in (("fitted", True), ("held_out", False)):
        chosen = [error for error in errors if error.row.train == train]
        median, worst = (round(size * 100, 1) for size in summary(chosen)) if chosen else (None, None)
        line |= {
            f"{name}_rows": len(chosen),
            f"{name}_median_percent": median,
            f"{name}_worst_percent": worst,
        }
    return line


def replace_rows(rows: list[dict[str, Any]]) -> None:
    """Put `rows` into the result file, one per line; all else in it (columns, notes, commit) stays as it is."""
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    text = RESULT.read_text(encoding="utf-8")
    text = re.sub(r'"rows": \[.*?\n  \]', lambda _: f'"rows": [\n    {lines}\n  ]', text, flags=re.DOTALL)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
