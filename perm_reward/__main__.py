"""What the judges of a run said, from its folder: `python -m perm_reward verdicts RUN`.

First, for each role, how many verdicts there are, their scores, what failed and how, and the
tokens; then the newest verdicts, the very newest last. The run may still be going on.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import fmean, pstdev
from typing import NoReturn

from perm_reward.rubrics import ROLES
from perm_reward.verdict import Usage
from perm_reward.verdict_store import KeptVerdict, read_verdicts

_SHOWN = 20
_SHORT = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Bad input ends in one line on stderr, with exit code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack letters that a reply has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        show_verdicts(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain when it flushes again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        parser.error(in_one_line(str(error)))


def show_verdicts(options: argparse.Namespace) -> None:
    """Print what the options ask for. Raises ValueError where there is no such run."""
    if options.json:
        rows = (row for row in read_verdicts(options.run) if _is_wanted(row, options))
        for row in rows if options.last is None else deque(rows, options.last):
            print(json.dumps(_plain(row)))
        return

    counts: dict[str, RoleCounts] = defaultdict(RoleCounts)
    last = _SHOWN if options.last is None else options.last
    newest: deque[KeptVerdict] = deque(maxlen=last)
    found = 0
    for row in read_verdicts(options.run):
        counts[row.verdict.role].add(row)
        if _is_wanted(row, options):
            found += 1
            newest.append(row)
    for role in ROLES:
        if role in counts and options.role in (None, role):
            print(counts[role].summary(role))
    print(f"\n{len(newest):,} of {found:,} verdicts, the newest last (--last N: how many)")
    for row in newest:
        print("\n" + "\n".join(_lines(row, options.full)))


@dataclass
class RoleCounts:
    """What there is of one role."""

    scores: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    usage: Usage = Usage()

    def add(self, row: KeptVerdict) -> None:
        """Count one verdict."""
        self.usage += row.verdict.usage
        if row.verdict.score is None:
            self.failures[row.verdict.failure or ""] += 1
        else:
            self.scores.append(row.verdict.score)

    def summary(self, role: str) -> str:
        """All counts in one line."""
        parts = [f"{len(self.scores):,} scored"]
        if self.scores:
            spread = f"mean {fmean(self.scores):.3f}, standard deviation {pstdev(self.scores):.3f}"
            parts[0] += f" ({spread})"
        causes = ", ".join(f"{in_one_line(name)} {n:,}" for name, n in self.failures.most_common())
        parts.append(f"{self.failures.total():,} failed" + (f" ({causes})" if causes else ""))
        usage = self.usage
        parts.append(
            f"tokens: {usage.prompt_tokens:,} of prompts, {usage.cached_tokens:,} of them cached, "
            f"{usage.completion_tokens:,} of replies"
        )
        return f"{role}: " + "; ".join(parts)


def printable(text: str) -> str:
    """The text with whatever a terminal would obey, or hide, written as an escape.

    Control characters, marks of direction, spaces without width, halves of surrogate pairs. Lines
    stay lines.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def in_one_line(text: str) -> str:
    """As `printable`, line breaks escaped too."""
    return printable(text).replace("\n", r"\n")


# --- one verdict ---------------------------------------------------------------------------------


def _is_wanted(row: KeptVerdict, options: argparse.Namespace) -> bool:
    verdict = row.verdict
    if options.role is not None and verdict.role != options.role:
        return False
    if options.failed and verdict.failure is None:
        return False
    texts = (verdict.reply, verdict.failure or "", row.judged_text)
    wanted = (options.grep or "").casefold()
    return any(wanted in text.casefold() for text in texts)


def _lines(row: KeptVerdict, full: bool) -> Iterator[str]:
    """One verdict. What others wrote stands behind a bar, so that it cannot pass for our lines."""
    verdict = row.verdict
    result = f"failed: {verdict.failure}" if verdict.score is None else f"score {verdict.score:g}"
    sample = f" (sample {row.sample + 1})" if row.sample else ""
    yield in_one_line(f"{row.time}  {verdict.role}{sample}  {result}  {row.label}")
    if full:
        yield "  judged:"
        yield from _quoted(row.judged_text)
        yield "  asked:"
        yield from _quoted(_asked(row))
    else:
        yield f"  judged: {_shortened(row.judged_text)}"
    yield "  reply:"
    yield from _quoted(verdict.reply)


def _asked(row: KeptVerdict) -> str:
    """Everything that was asked, messages as text, the rest as JSON."""
    rest = dict(row.asked)
    messages = rest.pop("messages", [])
    parts = [f"[{message['role']}]\n{message['content']}" for message in messages]
    return "\n".join([*parts, json.dumps(rest, ensure_ascii=False)])


def _quoted(text: str) -> Iterable[str]:
    return (f"    | {line}" for line in printable(text).split("\n"))


def _shortened(text: str) -> str:
    line = in_one_line(" ".join(islice(text.split(), _SHORT)))
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"


def _plain(row: KeptVerdict) -> dict[str, object]:
    """The row without nesting of its verdict, for JSON."""
    plain = asdict(row)
    verdict = plain.pop("verdict")
    return plain | verdict


# --- the command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = _Parser(prog="python -m perm_reward", description=description)
    commands = parser.add_subparsers(required=True, metavar="verdicts")
    verdicts = commands.add_parser("verdicts", help=description, description=details)
    verdicts.add_argument("run", metavar="RUN", help="folder of a run")
    verdicts.add_argument("--role", choices=ROLES, help="only of this role")
    verdicts.add_argument("--failed", action="store_true", help="only those without a score")
    verdicts.add_argument(
        "--last", type=_count, metavar="N", help=f"only the newest N ({_SHOWN}; with --json: all)"
    )
    verdicts.add_argument(
        "--grep", metavar="TEXT", help="only with this text in reply, failure or judged text"
    )
    verdicts.add_argument("--full", action="store_true", help="all that was judged and asked")
    verdicts.add_argument(
        "--json", action="store_true", help="no counts; one line of JSON for each"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of verdicts; give 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
