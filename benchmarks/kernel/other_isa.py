"""The kernel's AVX-512, VNNI and AVX2 paths on a machine that has them: correctness, with nothing installed there.

    python benchmarks/kernel/other_isa.py pack kernel-isa          here: builds, problems and what NumPy says to them
    tar czf - kernel-isa | ssh MACHINE 'tar xz && python3 kernel-isa/other_isa.py run'

`run` needs Python 3 alone. It runs every build whose instructions the CPU has, on 1 and 3 threads, and exits with 1 if
one is further than 1e-5 from NumPy's float64 (6e-3 where it multiplies in bfloat16), or if no build ran.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-5, 6e-3
EIGHT_BITS, BFLOAT16 = 1, 2  # bits of how a build rounds
BUILDS = {  # flags of the compiler, flags of /proc/cpuinfo
    "avx2": (["-march=x86-64-v3"], ["avx2", "fma", "f16c"]),
    "avx-vnni": (["-march=x86-64-v3", "-mavxvnni"], ["avx2", "fma", "f16c", "avx_vnni"]),
    "avx512": (["-march=x86-64-v4"], ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"]),
    "avx512-vnni": (["-march=x86-64-v4", "-mavx512vnni"], ["avx512f", "avx512bw", "avx512vl", "avx512_vnni"]),
    "avx512-bf16": (
        ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
        ["avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"],
    ),
}
MOST_NBYTES = 800_000  # of a problem: all of them are to fit in a few MB


def pack(folder: Path, per_type: int) -> None:
    """Static builds of the tests' driver, and problems of every type with NumPy's answers."""
    sys.path.insert(0, str(HERE.parents[1] / "tests" / "backends"))
    import numpy as np
    from gguf import GGMLQuantizationType as GGMLType
    from test_kernel import KINDS, compiled_program, problem, random_node, wanted

    from edgekv.backends.llama_cpp.kernel.build import _compiler

    folder.mkdir(parents=True)
    for name, (flags, _) in BUILDS.items():
        compiled_program(folder, _compiler(), *flags, "-static").rename(folder / name)
    rng = np.random.default_rng(8)
    for kind in KINDS:
        made = 0
        while made < per_type:
            node = random_node(GGMLType[kind], rng)
            if len(problem(node, 1)) > MOST_NBYTES:
                continue
            stem = f"{kind.lower()}-{made}"
            for threads in (1, 3):
                (folder / f"{stem}-{threads}.in").write_bytes(problem(node, threads))
            for rounds in (False, True):
                answer = np.concatenate([x.ravel() for x in wanted(node, rounds)]).astype(np.float32)
                (folder / f"{stem}-{int(rounds)}.out").write_bytes(answer.tobytes())
            made += 1
    shutil.copy(__file__, folder)


def run(folder: Path) -> int:
    """Every build that this CPU can run; the exit code."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    features = set(cpuinfo.partition("flags")[2].partition("\n")[0].split())
    print("machine:", cpuinfo.partition("model name")[2].partition("\n")[0].strip(" \t:"))
    worst, ran = 0.0, 0
    for name, (_, needed) in BUILDS.items():
        missing = sorted(set(needed) - features)
        if missing:
            print(f"{name}: not run, the CPU has no {', '.join(missing)}")
            continue
        ran += 1
        errors = errors_of_build(folder, name)
        worst = max(worst, *errors.values())
        print(f"{name}:", json.dumps({kind: float(f"{error:.1e}") for kind, error in errors.items()}))
    good = ran > 0 and worst <= 1
    print(
        "correct" if good else "NOT correct",
        f"({ran} builds, largest error {worst:.1e} of what is tolerable)",
    )
    return 0 if good else 1


def errors_of_build(folder: Path, name: str) -> dict[str, float]:
    """The largest relative error by cache type, of what is tolerable; infinite where the program died."""
    errors: dict[str, float] = {}
    for path in sorted(folder.glob("*.in")):
        stem = path.stem.rpartition("-")[0]
        kind = stem.partition("-")[0]
        done = subprocess.run([str(folder / name)], input=path.read_bytes(), stdout=subprocess.PIPE)
        error = math.inf
        if done.returncode == 0:
            rounds = done.stdout[0]
            answer = floats((folder / f"{stem}-{rounds & EIGHT_BITS}.out").read_bytes())
            error = relative(floats(done.stdout[1:]), answer, n_output(path.read_bytes()))
            error /= TOLERANCE_BFLOAT16 if rounds & BFLOAT16 else TOLERANCE
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors


def n_output(problem: bytes) -> int:
    """Values of the output; behind them lies the mass of each row."""
    n_seq, n_heads, _, n_tokens, _, _, width_v = struct.unpack_from("7q", problem)
    return int(n_seq * n_heads * n_tokens * width_v)


def relative(found: array.array[float], wanted: array.array[float], n_output: int) -> float:
    """The larger of the output's and the mass's relative error; not a number counts as infinite."""
    if len(found) != len(wanted):
        return math.inf
    parts = (slice(0, n_output), slice(n_output, None))
    worst = max(distance(found[part], wanted[part]) for part in parts)
    return worst if math.isfinite(worst) else math.inf


def distance(found: array.array[float], wanted: array.array[float]) -> float:
    off = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, wanted)))  # noqa: B905  Python 3.9 has no `strict`
    return off / math.sqrt(sum(b * b for b in wanted)) if math.isfinite(off) else math.inf


def floats(data: bytes) -> array.array[float]:
    values = array.array("f")
    values.frombytes(data)
    return values


def main() -> int:
    """Pack or run; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("pack", "run"))
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    parser.add_argument("--per-type", type=int, default=4, help="problems per cache type")
    options = parser.parse_args()
    if options.action == "run":
        return run(options.folder)
    pack(options.folder, options.per_type)
    return 0


if __name__ == "__main__":
    sys.exit(main())
