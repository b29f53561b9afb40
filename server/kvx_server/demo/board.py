"""The live table of the demo, and the judgement on what it shows."""

from __future__ import annotations

from rich import box
from rich.table import Table

from kvx_server.demo.child import NUM_CONVERSATIONS, NUM_TURNS, SCRAMBLED, Report

_WAYS = {
    "cold": "recomp.",
    "first": "growing",
    "dram": "DRAM",
    "nvme": "NVMe",
    "restart": "kill -9",
    "damaged": "damaged",
}
# What must serve the turns of a way: the tiers, of which at least one has to appear.
_SERVED_BY = {"dram": {"DRAM"}, "nvme": {"NVME", "DRAM"}, "restart": {"NVME", "DRAM"}}


class Board:
    """Collects reports by turn and way."""

    def __init__(self) -> None:
        """Start empty."""
        self._reports: dict[tuple[str, int], dict[str, Report]] = {}
        self._repeated: list[Report] = []
        self._scrambled = ""

    def add(self, report: Report) -> None:
        """Take a report in; the cold runs of later processes are only compared."""
        if report.way == SCRAMBLED:
            self._scrambled = report.text
            return
        turn = self._reports.setdefault((report.title, report.turn), {})
        if report.way in turn:
            self._repeated.append(report)
        else:
            turn[report.way] = report

    def render(self) -> Table:
        """Return the table as it stands."""
        table = Table(
            title="Time to first token, ms; below it the tokens reused from DRAM (D) and NVMe (N)",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
            pad_edge=False,
        )
        table.add_column("topic, turn", no_wrap=True)
        table.add_column("prompt", justify="right", no_wrap=True)
        for heading in _WAYS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("tokens", no_wrap=True)
        for (title, number), turn in self._reports.items():
            cold = turn["cold"]
            cells = [_cell(turn.get(way)) for way in _WAYS]
            same = all(report.tokens == cold.tokens for report in turn.values())
            verdict = "[green]same[/]" if same else "[red]DIFFER[/]"
            table.add_row(f"{title[:10]} {number}", str(cold.prompt_tokens), *cells, verdict)
        return table

    def problems(self) -> list[str]:
        """Return what is not as it must be, one sentence each."""
        found = []
        expected = NUM_CONVERSATIONS * NUM_TURNS
        for way, heading in _WAYS.items():
            count = sum(way in turn for turn in self._reports.values())
            if count != expected:
                found.append(f"{heading}: {count} of {expected} turns were run")
        for (title, number), turn in self._reports.items():
            for way, report in turn.items():
                if report.tokens != turn["cold"].tokens:
                    found.append(f"{title} turn {number}, {_WAYS[way]}: other tokens than cold")
                if way in _SERVED_BY and not _SERVED_BY[way] & set(report.reused):
                    found.append(
                        f"{title} turn {number}, {_WAYS[way]}: nothing reused ({report.reason})"
                    )
            damaged = turn.get("damaged")
            if damaged is not None and number == 1 and damaged.reused:
                found.append(f"{title} turn {number}: damaged blocks were served")
        found += [
            f"{report.title} turn {report.turn}: another process computed other tokens"
            for report in self._repeated
            if report.tokens != self._reports[report.title, report.turn]["cold"].tokens
        ]
        return found

    def samples(self) -> tuple[str, str]:
        """Return what the model answered in the last turn: from verified and from damaged KV."""
        last = list(self._reports.values())[-1]
        return next(iter(last.values())).text, self._scrambled

    def verdict(self, *, is_good: bool) -> str:
        """Return the one line that says what was shown."""
        if not is_good:
            return "[red]The demo failed: see the lines above.[/]"
        last_turns = [turn for (_, n), turn in self._reports.items() if n == NUM_TURNS]

        def mean_ms(way: str) -> float:
            return sum(turn[way].ttft_s for turn in last_turns) / len(last_turns) * 1e3

        return (
            f"[green]Shown:[/] {len(self._reports)} prompts, 6 ways each, identical tokens every "
            f"time; first token of the longest after {mean_ms('cold'):.0f} ms recomputed, "
            f"{mean_ms('dram'):.0f} ms from DRAM, {mean_ms('nvme'):.0f} ms from NVMe, "
            f"{mean_ms('restart'):.0f} ms after kill -9; every damaged block was found out."
        )


def _cell(report: Report | None) -> str:
    if report is None:
        return ""
    lines = [f"{report.ttft_s * 1e3:.0f}"]
    lines += [f"[dim]{count} {tier[0]}[/]" for tier, count in report.reused.items()]
    if not report.reused and report.way == "damaged":
        lines.append(f"[dim]{report.reason}[/]")
    return "\n".join(lines)
