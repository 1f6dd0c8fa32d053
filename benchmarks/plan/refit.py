"""Fit devices/predict/speed.json anew on public_rows.csv and print the error of every row: run it by hand.

python benchmarks/plan/refit.py > table.md
"""

from fit import FREE, ROWS, Error, decode_errors, fit, load_rows, prefill_errors, summary

from edgekv.devices.predict.speed import COEFFICIENTS
from edgekv.documents import dumps


def main() -> None:
    rows = load_rows(ROWS)
    coefficients = fit(rows)
    COEFFICIENTS.write_text(dumps(coefficients, indent=1) + "\n", encoding="utf-8")
    found = {"decode": decode_errors(rows, coefficients), "prefill": prefill_errors(rows, coefficients)}
    print("| what | rows | fitted on: n | median error | worst | held out: n | median error | worst |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for what, errors in found.items():
        for kind in (None, *FREE):
            chosen = [e for e in errors if kind in (None, e.row.board.kind)]
            if chosen:
                print(f"| {what} | {kind or 'all'} | {cells(chosen, True)} | {cells(chosen, False)} |")
    for what, errors in found.items():
        print(f"\n#### {what}, row by row\n")
        print(
            "| board | threads | model | weights | depth | measured t/s | projected t/s | error | split | source |"
        )
        print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- | --- |")
        for e in errors:
            depth = e.row.mean_depth if what == "decode" else e.row.n_prompt / 2
            print(
                f"| {e.row.board.name} | {'' if e.row.board.is_gpu else e.row.threads} | {e.row.model} "
                f"| {e.row.work.weights} | {depth:.0f} | {e.measured_tps:.4g} | {e.predicted_tps:.4g} "
                f"| {e.error:+.1%} | {'train' if e.row.train else 'test'} | {e.row.source} |"
            )


def cells(errors: list[Error], train: bool) -> str:
    chosen = [e for e in errors if e.row.train == train]
    if not chosen:
        return "0 | – | –"
    median, worst = summary(chosen)
    return f"{len(chosen)} | {median:.1%} | {worst:.1%}"


if __name__ == "__main__":
    main()
