"""A report of a benchmark run: tables in Markdown, and plots.

Usage: python benchmarks/report.py results.json out/
where results.json is what ``pytest benchmarks --benchmark-json results.json`` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

GRID_ROWS, GRID_COLUMNS = (16, 64, 256, 1024, 4096), (64, 256, 1024, 4096, 16384)


class BadResults(ValueError):
    """The file is not what a benchmark run writes; the message says why."""


def read(path: Path) -> dict:
    """The run, if it holds races of the Barlow Twins loss."""
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise BadResults(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadResults(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), list):
        raise BadResults(f"{path} is not the JSON of pytest-benchmark: it has no list of benchmarks")
    if not races(results):
        raise BadResults(
            f"{path} has no races of the Barlow Twins loss: write it by `pytest benchmarks --benchmark-json FILE`"
        )
    return results


def _infos(results: Mapping, kind: str) -> list[dict]:
    return [b["extra_info"] for b in results["benchmarks"] if b.get("extra_info", {}).get("kind") == kind]


def races(results: Mapping, dtype: str = "float32") -> dict[tuple[int, int], dict]:
    """(B, D) -> the race of the loss there, by size."""
    found = [e for e in _infos(results, "race") if e.get("op") == "barlow_twins" and e.get("dtype") == dtype]
    return {
        (e["rows"], e["columns"]): e
        for e in sorted(found, key=lambda e: (e["rows"], e["columns"]))
        if e["best"] is not None
    }


def memories(results: Mapping) -> dict[str, dict[str, int]]:
    """contender -> shape such as 128x8192 -> bytes."""
    return {e["contender"]: e["peaks"] for e in _infos(results, "memory")}


def speedup(race: Mapping) -> float:
    """Over the best peer."""
    return race["speedup"][race["best"]]


def on_grid(race_by_shape: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [shape for shape in race_by_shape if shape[0] in GRID_ROWS and shape[1] in GRID_COLUMNS]


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """The first ``left`` columns are text, the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, marks, *rows))


def figure(x: float) -> str:
    """Three digits."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def times(x: float) -> str:
    """A factor; two digits after the point below 10 tell a loss from a draw."""
    return f"{x:.0f}x" if x >= 100 else f"{x:.1f}x" if x >= 10 else f"{x:.2f}x"


def share(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.2g} %"


def mebibytes(x: float) -> str:
    return figure(x / 2**20)


def shape_name(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def environment(results: Mapping) -> str:
    machine = results.get("machine_info", {})
    ours = machine.get("mmfast", {})
    commit = results.get("commit_info", {}).get("id") or "unknown"
    items = [
        ("date", str(results.get("datetime", "unknown"))[:10]),
        ("processor", f"{ours.get('cpu', 'unknown')}, {ours.get('cores', '?')} cores"),
        ("threads", ours.get("threads", "unknown")),
        ("instruction set of mmfast", ours.get("instruction set", "unknown")),
        ("torch", ours.get("torch", "unknown")),
        ("Python", machine.get("python_version", "unknown")),
        ("system", f"{machine.get('system', 'unknown')} {machine.get('release', '')}".strip()),
        ("mmfast", f"{ours.get('mmfast', 'unknown')}, commit {commit[:12]}"),
    ]
    return table(("", ""), items, left=2)


def who(results: Mapping) -> str:
    sources = {}
    for e in _infos(results, "race"):
        sources |= e.get("peers", {})
    return table(
        ("peer", "definition", "code"), [(n, s["variant"], s["source"]) for n, s in sources.items()], left=3
    )


def race_table(race_by_shape: Mapping[tuple[int, int], Mapping], shapes) -> str:
    rows = []
    for shape in shapes:
        e = race_by_shape[shape]
        others = [
            f"{name} {figure(1e3 * seconds)}"
            for name, seconds in sorted(e["medians"].items(), key=lambda item: item[1])
            if name not in ("mmfast", e["best"])
        ]
        low, _, high = e["quartiles"]["mmfast"]
        rows.append(
            (
                shape_name(shape),
                figure(1e3 * e["medians"]["mmfast"]),
                f"{figure(1e3 * low)} to {figure(1e3 * high)}",
                f"{e['best']} {figure(1e3 * e['medians'][e['best']])}",
                times(speedup(e)),
                share(e["share_of_floor"]),
                e["rounds"],
                ", ".join(others) or "-",
            )
        )
    header = (
        "B x D", "mmfast, ms", "its quartiles", "best peer, ms", "faster", "of the floor's speed", "rounds",
        "others in the final, ms",
    )  # fmt: skip
    return table(header, rows)


def grid_table(race_by_shape: Mapping[tuple[int, int], Mapping], cell) -> str:
    shapes = on_grid(race_by_shape)
    columns = sorted({d for _, d in shapes})
    rows = [
        (b, *(cell(race_by_shape[b, d]) if (b, d) in race_by_shape else "-" for d in columns))
        for b in sorted({b for b, _ in shapes})
    ]
    return table(("B \\ D", *columns), rows)


def lost(race_by_shape: Mapping[tuple[int, int], Mapping]) -> str:
    rows = [
        f"- {shape_name(shape)}: {times(speedup(e))}, {e['best']} takes "
        f"{figure(1e3 * e['medians'][e['best']])} ms, mmfast {figure(1e3 * e['medians']['mmfast'])} ms"
        for shape, e in race_by_shape.items()
        if speedup(e) < 1
    ]
    return "\n".join(rows) or f"None of the {len(race_by_shape)} races."


def half_table(races_by_shape: Mapping[tuple[int, int], Mapping]) -> str:
    rows = []
    for shape, e in races_by_shape.items():
        ranked = sorted(
            e["medians"], key=lambda n: (n != "mmfast", n not in e["yardsticks"], e["medians"][n])
        )
        for name in ranked:
            seconds, errors = e["medians"][name], e["errors"].get(name)
            rows.append(
                (
                    shape_name(shape),
                    name,
                    figure(1e3 * seconds),
                    times(e["speedup"][name]) if name != "mmfast" else "",
                    f"{errors[0]:.0e}" if errors else "",
                    f"{max(errors[1:]):.0e}" if errors and len(errors) > 1 else "",
                )
            )
    header = ("B x D", "contender", "ms", "mmfast is faster", "error of the loss", "of the gradient")
    return table(header, rows, left=2)


def memory_table(peaks: Mapping[str, Mapping[str, int]]) -> str:
    shapes = list(next(iter(peaks.values())))
    ours = peaks.get("mmfast", {})
    rows = []
    for name, by_shape in sorted(peaks.items(), key=lambda item: item[1][shapes[-1]]):
        cells = []
        for shape in shapes:
            ratio = f" ({by_shape[shape] / ours[shape]:.0f}x)" if name != "mmfast" and ours.get(shape) else ""
            cells.append(mebibytes(by_shape[shape]) + ratio)
        rows.append((name, *cells))
    return table(("peak, MiB", *(s.replace("x", " x ") for s in shapes)), rows)


def qualifying_table(race_by_shape: Mapping[tuple[int, int], Mapping]) -> str:
    names = sorted({n for e in race_by_shape.values() for n in (*e["qualifying"], *e["skipped"])})
    rows = []
    for shape, e in race_by_shape.items():
        cells = [figure(1e3 * e["qualifying"][n]) if n in e["qualifying"] else "-" for n in names]
        rows.append((shape_name(shape), *cells))
    skipped = [
        f"- {shape_name(shape)}: {name} {reason}"
        for shape, e in race_by_shape.items()
        for name, reason in e["skipped"].items()
    ]
    return "\n".join([table(("B x D", *names), rows), "", *skipped])


def step_table(steps: Sequence[Mapping]) -> str:
    rows = []
    for e in steps:
        m = e["medians"]
        rows.append(
            (
                e["configuration"],
                shape_name((e["rows"], e["columns"])),
                figure(1e3 * m["step, mmfast"]),
                figure(1e3 * m["step, lightly"]),
                times(e["ratio"]),
                share(e["share_of_loss"]["mmfast"]),
                share(e["share_of_loss"]["lightly"]),
                share(e["share_of_views"]),
            )
        )
    header = (
        "configuration", "B x D", "step, ms", "with lightly's loss, ms", "ratio", "the loss, share of the step",
        "lightly's, share of its step", "augmentation, share",
    )  # fmt: skip
    return table(header, rows)


def other_table(results: Mapping) -> str:
    rows = []
    for b in results["benchmarks"]:
        e = b.get("extra_info", {})
        if e.get("kind") == "race" and "op" not in e:
            others = [f"{n} {figure(1e3 * s)} ({times(e['speedup'][n])})"
                      for n, s in e["medians"].items() if n != "mmfast"]  # fmt: skip
            rows.append(
                (
                    b["name"],
                    figure(1e3 * e["medians"]["mmfast"]),
                    share(e["share_of_floor"]),
                    ", ".join(others),
                )
            )
    return (
        table(("benchmark", "mmfast, ms", "of the floor's speed", "others, ms (mmfast is faster by)"), rows)
        if rows
        else ""
    )


def markdown(results: Mapping, plots: Sequence[str]) -> str:
    fp32, bf16 = races(results), races(results, "bfloat16")
    shapes = on_grid(fp32)
    named = [shape for shape in fp32 if shape not in shapes]
    peaks, steps = memories(results), _infos(results, "step")

    def image(name: str) -> str:
        return f"![]({name})" if name in plots else ""

    sections = [("Machine", [environment(results)])]
    sections += [("Where mmfast is slower than the best peer", ["Ratios below 1, fp32.", lost(fp32)])]
    if named:
        sections += [("Named shapes", ["Forward and backward, fp32, medians.", race_table(fp32, named)])]
    if shapes:
        best = grid_table(fp32, lambda e: f"{times(speedup(e))} {e['best']}")
        floor = grid_table(fp32, lambda e: share(e["share_of_floor"]))
        sections += [
            (
                "Grid",
                [
                    "How many times faster than the best peer, and which that was; forward and backward, fp32.",
                    image("speedup.png"),
                    best,
                    race_table(fp32, shapes),
                ],
            ),
            (
                "Share of the floor's speed",
                [
                    "The floor is the time in which this machine copies the embeddings once and multiplies "
                    "6 B D min(B, D) operations' worth of matrices, at rates measured in the same run. Where that "
                    "takes microseconds, calls are what costs.",
                    image("floor.png"),
                    floor,
                ],
            ),
        ]
    if bf16:
        text = "bf16 embeddings, each peer in the type it is given; errors against fp64 on the same rounded inputs."
        sections += [("bf16", [text, half_table(bf16)])]
    if peaks:
        text = "Peak of resident memory above the inputs, forward and backward, and how many times mmfast's it is."
        sections += [("Memory", [text, image("memory.png"), memory_table(peaks)])]
    if steps:
        text = (
            "Forward of two views, backward, Adam; medians. The ratio is that of the step with lightly's loss to the "
            "step with mmfast's, the median over rounds, each on a batch of its own: where it is near 1, the choice "
            "of the loss does not matter for time."
        )
        sections += [("Share of a pre-training step", [text, step_table(steps)])]
    if others := other_table(results):
        sections += [("Augmentation", [others])]
    text = (
        "Milliseconds of the qualifying call of every contender: one or a few calls, not a median over rounds. "
        "The three fastest went into the final, fewer where that would take minutes."
    )
    sections += [("Qualifying", [text, qualifying_table(fp32)]), ("Peers", [who(results)])]
    body = ["# Benchmarks of mmfast"]
    for title, parts in sections:
        body += [f"## {title}", *filter(None, parts)]
    return "\n\n".join(body) + "\n"


def write(results: Mapping, folder: Path) -> None:
    from plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    fp32 = races(results)
    plots = draw({shape: fp32[shape] for shape in on_grid(fp32)}, memories(results))
    for name, data in plots.items():
        (folder / name).write_bytes(data)
    (folder / "report.md").write_text(markdown(results, list(plots)))


def main(arguments: Sequence[str]) -> int:
    try:
        if len(arguments) != 2:
            raise BadResults("a results file and a folder for the report are wanted: results.json out/")
        write(read(Path(arguments[0])), Path(arguments[1]))
    except (BadResults, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(Path(arguments[1]) / "report.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
