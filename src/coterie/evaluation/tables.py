"""Results as tables: for the terminal, in Markdown, CSV and JSON, and as one self-contained page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .cells import write_whole
from .metrics import METRICS, Interval

if TYPE_CHECKING:
    from .comparer import Comparison, Result

COMMA = ",\u00a0"  # in an interval: its two ends stay in one line


@dataclass(frozen=True)
class Sheet:
    """A table of text: the first column names the rows.

    Args:
        title, caption: above and below it.
        columns: heads, the first one's too.
        rows: cells; every row as long as `columns`.
        strong: numbers of the rows to stress.
        texts: how many columns, the first ones, hold text; on a narrow page they stand in the first one.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    strong: tuple[int, ...] = ()
    texts: int = 1

    def rich(self) -> Table:
        table = Table(
            title=Text(self.title),
            caption=Text(self.caption) if self.caption else None,
            title_justify="left",
            caption_justify="left",
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for i, row in enumerate(self.rows):
            table.add_row(*map(Text, row), style="bold" if i in self.strong else None)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.caption}\n" if self.caption else "")

    def html(self) -> str:
        """Numbers do not wrap; on a narrow screen the columns of text stand under the first one."""
        kinds = ["", *["also"] * (self.texts - 1), *["n"] * (len(self.columns) - self.texts)]
        head = "".join(f"<th class={k!r}>{escape(column)}</th>" for k, column in zip(kinds, self.columns, strict=True))
        rows = []
        for first, *others in self.rows:
            told = zip(self.columns[1 : self.texts], others, strict=False)
            small = marked("; ".join(f"{column} {cell}" for column, cell in told if cell))
            cells = "".join(_cell(kind, cell) for kind, cell in zip(kinds[1:], others, strict=True))
            rows.append(f"<tr><td>{marked(first)}<small>{small}</small></td>{cells}</tr>")
        caption = f"<p>{marked(self.caption)}</p>" if self.caption else ""
        table = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        return f"<h2>{escape(self.title)}</h2>{table}{caption}"


def _cell(kind: str, cell: str) -> str:
    if kind == "n" and cell[:1] not in "-0123456789":  # why there is no number
        kind = ""
    return f"<td class={kind!r}>{marked(cell if kind != 'n' else cell.replace(', ', COMMA))}</td>"


def marked(text: str) -> str:
    """As HTML, with what stands in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "-"
    return f"{round(100 * share, 1) + 0.0:.1f}"  # + 0.0: no minus sign before a zero


def span(interval: Interval | None) -> str:
    """A value with its interval."""
    if interval is None or not math.isfinite(interval.value):
        return "-"
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def shown(skill: float | None, metric: str) -> str:
    """A skill as the metric shows it."""
    if skill is None or not math.isfinite(skill):
        return "-"
    value = METRICS[metric].shown(skill)
    return percent(value) if METRICS[metric].percent else f"{value:.3f}"


def parameters(given: dict[str, Any]) -> str:
    words = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in given.items())
    return ", ".join(f"{name} {value}" for name, value in words)


def heads(comparison: Comparison) -> list[str]:
    """The tasks, with what is shown of each."""
    return [
        task if metric == "accuracy" else f"{task} ({metric.replace('_', ' ')})"
        for task, metric in zip(comparison.tasks, comparison.metrics, strict=True)
    ]


def name(result: Result) -> str:
    """What tells a result from the others."""
    others = f"others {result.others}" if result.others else ""
    return ", ".join(part for part in (result.method, result.setting, others, f"task {result.task}") if part)


def sheets(comparison: Comparison) -> Iterator[Sheet]:
    """Everything that a comparison found."""
    results = comparison.results
    seed = "" if comparison.seed is None else f", seed {comparison.seed}"
    title = f"{comparison.experts}{seed}"
    valued = [each for each in results if each.normalised]
    without = [task for task, skill in zip(comparison.tasks, comparison.ladder["expert"], strict=True) if not skill]
    yield Sheet(
        f"{title}: what one model keeps of the experts' skill, %",
        ["method", "setting", "parameters", "others", "task", "normalised", "recovered gap", "size", "made in, s"],
        [
            [
                each.method, each.setting, parameters(each.parameters), each.others or "", each.task,
                span(each.normalised) if not each.note else each.note, span(each.recovered_gap), f"{each.ratio:.2f}x",
                "" if each.seconds is None else f"{each.seconds:.1f}",
            ]
            for each in results
        ],
        "normalised: mean over tasks of skill / the expert's; recovered gap: share of the way from the base to the "
        "experts; in brackets 95% paired bootstrap intervals over rows and tasks. Settings were chosen on validation "
        "rows. The label set of a row is known to every method; `task known` means that its expert is, too."
        + (f" Nothing can be normalised: the expert of {' and of '.join(without)} has no skill." if without else ""),
        texts=5,
    )  # fmt: skip
    yield Sheet(
        f"{title}: every task",
        ["", *heads(comparison)],
        [[name(each), *_skills(each.skill or [], comparison)] for each in valued],
        f"test rows: {', '.join(f'{t} {n:,}' for t, n in zip(comparison.tasks, comparison.rows, strict=True))}",
    )
    yield ladder(comparison, title)
    if comparison.matrix:
        yield Sheet(
            f"{title}: every expert on every task",
            ["expert", *heads(comparison)],
            [[expert, *_skills(row, comparison)] for expert, row in comparison.matrix.items()],
        )


def brief(comparison: Comparison) -> Sheet:
    """The first of `sheets`, narrow enough for a terminal: what tells a result from the others in one column."""
    whole = next(sheets(comparison))
    rows, notes = [], []
    for each, (_, setting, given, others, _, *cells) in zip(comparison.results, whole.rows, strict=True):
        setting = setting.replace(" and ", " = ").removesuffix(" on validation")
        known = "task known" if each.task == "known" else ""
        rows.append([", ".join(filter(None, (each.method, setting, others, known))), given, *cells])
        if each.note:
            rows[-1][2] = "-"
            notes.append(f"{name(each)}: {each.note}")
    return Sheet(
        whole.title, ["method, setting, others", "parameters", *whole.columns[5:]], rows,
        "\n".join([whole.caption, *notes]),
    )  # fmt: skip


def ladder(comparison: Comparison, title: str) -> Sheet:
    """From the expert to the mixtures, one thing taken away at a time; and how often the routing is right."""
    rungs, routed = comparison.ladder, comparison.routing
    one = len(routed) == 1
    columns = [*rungs, *("token-layers to the expert" if one else f"{n}: token-layers to the expert" for n in routed)]
    rows = [
        [
            head,
            *(shown(each[i], comparison.metrics[i]) for each in rungs.values()),
            *(percent(s[i]) for s in routed.values()),
        ]
        for i, head in enumerate(heads(comparison))
    ]
    if len(set(comparison.metrics)) == 1:
        metric = comparison.metrics[0]
        means = [shown(float(np.mean(each)), metric) for each in rungs.values()]
        rows.append(["mean", *means, *(percent(float(np.mean(each))) for each in routed.values())])
    caption = f"chance of the expert: {percent(1 / len(comparison.tasks))}" if routed else ""
    if comparison.overlap:
        overlap, chance = comparison.overlap
        caption += f"; overlap of the experts' gate subspaces: {overlap:.3f} (chance {chance:.3f})"
    return Sheet(f"{title}: from expert to mixture, %", ["", *columns], rows, caption, (len(comparison.tasks),))


def summary(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Mean and standard deviation over sets of experts, for each way; a default that was also best counts as both."""
    found: dict[tuple[str, str, str, str], list[Result]] = {}
    for comparison in comparisons:
        for each in comparison.results:
            for setting in each.setting.split(" and ") if each.normalised else ():
                found.setdefault((each.method, setting, each.others or "", each.task), []).append(each)
    return [
        {
            "method": method, "setting": setting, "others": others or None, "task": task, "sets": len(results),
            **{
                measure: _spread([getattr(each, measure).value for each in results])
                for measure in ("normalised", "recovered_gap")
            },
            "ratio": float(np.mean([each.ratio for each in results])),
        }
        for (method, setting, others, task), results in found.items()
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def summary_sheet(comparisons: Sequence[Comparison]) -> Sheet:
    rows = [
        [
            each["method"], each["setting"], each["others"] or "", each["task"],
            *(f"{percent(each[m]['mean'])} ± {percent(each[m]['spread'])}" for m in ("normalised", "recovered_gap")),
            f"{each['ratio']:.2f}x", str(each["sets"]),
        ]
        for each in summary(comparisons)
    ]  # fmt: skip
    columns = ["method", "setting", "others", "task", "normalised", "recovered gap", "size", "sets"]
    return Sheet("Over sets of experts: mean ± standard deviation, %", columns, rows, texts=4)


def _skills(skills: Sequence[float], comparison: Comparison) -> list[str]:
    return [shown(skill, metric) for skill, metric in zip(skills, comparison.metrics, strict=True)]


def write(
    out: Path, suite: str, comparisons: Sequence[Comparison], found: Sequence[Sheet] | None = None
) -> dict[str, Any]:
    """Write `results.json`, `results.csv`, `results.md` and `report.html`, each whole or not at all.

    Args:
        out: directory; made where it is missing.
        suite: its name.
        comparisons: one for each set of experts.
        found: the tables to write; default: everything.

    Returns:
        What the JSON holds.
    """
    from ..building.finish import versions

    compared = {"comparisons": list(map(asdict, comparisons)), "summary": summary(comparisons)}
    results = plain({"suite": suite, **compared, "versions": versions()})
    if found is None:
        found = [summary_sheet(comparisons)] if len(comparisons) > 1 else []
        found += [sheet for comparison in comparisons for sheet in sheets(comparison)]
    notes = [f"- {note}" for comparison in comparisons for note in comparison.notes]
    text = "\n".join([f"# {suite}\n", *(sheet.markdown() for sheet in found), *notes])
    files = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "results.csv": comma_separated(comparisons),
        "results.md": text.rstrip() + "\n",
        "report.html": page(suite, comparisons, found),
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_whole(out / file, content)
    return results


def plain(value: Any) -> Any:
    """JSON values: numbers that are none become null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comma_separated(comparisons: Sequence[Comparison]) -> str:
    """One line for each set of experts, result and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["experts", "seed", "method", "setting", "parameters", "others", "task_known", "task", "metric", "rows",
         "value", "normalised", "recovered_gap", "parameter_ratio", "seconds", "note"]
    )  # fmt: skip
    for comparison in comparisons:
        for each in comparison.results:
            measures = [plain(m.value) if m else None for m in (each.normalised, each.recovered_gap)]
            for i, task in enumerate(comparison.tasks):
                value = METRICS[comparison.metrics[i]].shown(each.skill[i]) if each.skill else None
                writer.writerow(
                    [comparison.experts, comparison.seed, each.method, each.setting, json.dumps(each.parameters),
                     each.others, each.task, task, comparison.metrics[i], comparison.rows[i], value, *measures,
                     each.ratio, each.seconds, each.note]
                )  # fmt: skip
    return text.getvalue()


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem;color:#1b1f24}
*{overflow-wrap:anywhere}.scroll{overflow-x:auto}table{border-spacing:0;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #d8dee4;text-align:left;vertical-align:top;max-width:20rem}
th,td{overflow-wrap:break-word}th{vertical-align:bottom}.n{text-align:right;max-width:none}td.n{white-space:nowrap}
tr>:first-child{position:sticky;left:0;background:#fff;min-width:8.5rem;overflow-wrap:anywhere}
small{display:none;color:#57606a;font-size:12px}p,figcaption{color:#57606a;max-width:60rem}
figure,ol{margin:0;padding:0}.result,.axis{display:grid;grid-template:"name track value"/22rem 1fr 10rem;gap:0 2rem}
.result{align-items:center;border-bottom:1px solid #eef1f4;break-inside:avoid;font-size:14px}
.name{grid-area:name;padding:.2rem 0}.value{grid-area:value;font-variant-numeric:tabular-nums;white-space:nowrap}
.track{grid-area:track;position:relative;align-self:stretch;min-height:1.4rem}.note{grid-area:track;padding:.2rem 0}
.track svg{position:absolute;width:100%;height:100%;overflow:visible}.grid{stroke:#d8dee4}
.known{stroke:#bf8700;fill:#bf8700}.unknown{stroke:#0969da;fill:#0969da}
.axis span{position:absolute;transform:translateX(-50%);white-space:nowrap;font-size:12px;color:#57606a}
figcaption svg{width:10px;height:10px}
@media(max-width:52rem){.result,.axis{display:block;padding:.2rem 0}.track,.note{margin:0 1.2rem}
.value{padding-left:.5rem;font-weight:600}}
@media(max-width:64rem){.also{display:none}small{display:block}}
@media(max-width:40rem){table{font-size:13px;line-height:1.35}th,td{padding:.25rem .35rem;max-width:9rem}
tr>:first-child{min-width:7rem}td.n{white-space:normal}}
@media print{.scroll{overflow:visible}th,td{white-space:normal;padding:.15rem .3rem;font-size:11px}}"""


def page(suite: str, comparisons: Sequence[Comparison], found: Sequence[Sheet]) -> str:
    """One page with a picture of size against skill, and every table; nothing is loaded from elsewhere."""
    pictures = "".join(
        f"<h2>{escape(c.experts)}{'' if c.seed is None else f', seed {c.seed}'}: size and skill</h2>{figure(c)}"
        for c in comparisons
    )
    notes = "".join(f"<li>{marked(note)}</li>" for comparison in comparisons for note in comparison.notes)
    body = f"<h1>{escape(suite)}</h1>{pictures}{''.join(sheet.html() for sheet in found)}<ul>{notes}</ul>"
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>coterie compare {escape(suite)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def figure(comparison: Comparison) -> str:
    """Normalised skill of every result, with its interval: a row of text around a drawn line, in HTML."""
    highs = [r.normalised.high for r in comparison.results if r.normalised and math.isfinite(r.normalised.high)]
    top = max([1.0, *highs])
    step = next(step for step in (0.2, 0.5, *(10.0**i for i in range(99))) if top / step < 6.5)
    marks = [f"{100 * share / top:.2f}%" for share in np.arange(0, top + 1e-9, step)]
    grid = "".join(f"<line x1={x} x2={x} y1=0 y2=100% class=grid />" for x in marks)
    shares = "".join(f'<span style="left:{x}">{100 * i * step:.0f}%</span>' for i, x in enumerate(marks))
    axis = f"<div class=axis aria-hidden=true><div class=track>{shares}</div></div>"
    rows = "".join(_row(each, top, grid) for each in comparison.results)
    dots = {kind: f"<svg aria-hidden=true class={kind}><circle cx=5 cy=5 r=5 /></svg>" for kind in ("unknown", "known")}
    return (
        f'<figure aria-label="normalised skill of every method">{axis}<ol>{rows}</ol>{axis}'
        f"<figcaption>Normalised skill, %, with 95% intervals; {dots['unknown']} blue: the task is not known, "
        f"{dots['known']} amber: it is. Size in brackets.</figcaption></figure>"
    )


def _row(result: Result, top: float, grid: str) -> str:
    """A result in the figure, whose right edge is `top`; `grid` is drawn behind it."""
    found, kind = result.normalised, "known" if result.task == "known" else "unknown"
    if found and math.isfinite(found.value):
        value, low, high = (
            f"{100 * min(max(share, 0.0), top) / top:.2f}%" for share in (found.value, found.low, found.high)
        )
        whisker = f"<line x1={low} x2={high} y1=50% y2=50% stroke-width=2 />" if math.isfinite(found.low) else ""
        dot = f"<circle cx={value} cy=50% r=5 />"
        drawn = f"<div class=track><svg aria-hidden=true>{grid}<g class={kind}>{whisker}{dot}</g></svg></div>"
    else:
        drawn = f"<div class=note>{marked(result.note or 'no value')}</div>"
    tip = escape("; ".join(filter(None, (name(result), parameters(result.parameters), span(found)))))
    return (
        f'<li class=result title="{tip}"><span class=name>{escape(name(result))} ({result.ratio:.2f}x)</span>'
        f"<span class=value>{escape(span(found))}</span>{drawn}</li>"
    )
