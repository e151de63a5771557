"""`python -m flows.from_swift.page`: writes docs/megatron_swift.md, what becomes of each argument of Megatron-SWIFT."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from flows.from_swift import table
from flows.from_swift.draft import shown
from flows.from_swift.table import EFFECTS, Argument

PAGE = Path(__file__).parents[2] / "docs" / "megatron_swift.md"

HEAD = f"""# Arguments of Megatron-SWIFT

<!-- Made by `python -m flows.from_swift.page` of configs/swift/arguments.yaml; edit that. -->

`mcore-flows from-swift '<megatron pt|sft …>'` makes a run file of a command by this table, which has the names and
defaults of Megatron-SWIFT {table.RELEASE}; names of earlier releases are taken, too. Where a default of theirs is not
ours, the run file says it, so that the run means the same. It is the same run, not the same random numbers: rows are
drawn and ordered by another generator.

* **Here**: the field of the run; *always* and a value, where a run always does so; or nothing, where there is nothing
  like it. In *italics*: the field has another name or meaning.
* **Default**: theirs, and ours behind it where the two differ.
* **If it can't be had**: what is other than there if the argument is given and can't be carried over, or with another
  value than a run has. Only *{EFFECTS["results"]}* makes `from-swift` leave with status 4.

Commands other than `megatron pt` and `megatron sft` have no run file. For `swift export --to_mcore` and `--to_hf` there
are `mcore-flows convert`, `export` and `verify`.
"""


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for group, rows in groupby(table.arguments(), lambda row: row.group):
        lines += [f"## {group}", "", "| Argument | Here | Default | If it can't be had | |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Argument) -> Iterator[str]:
    old = f" (earlier {', '.join(f'`{name}`' for name in row.old_names)})" if row.old_names else ""
    yield f"`{row.name}`{old}"
    yield _here(row)
    yield _default(row)
    yield EFFECTS[row.effect] if row.effect != "nothing" else ""
    needs = f"needs `{row.needs}`" if row.needs else ""
    yield "; ".join(filter(None, [needs, " ".join(row.note.split())]))


def _here(row: Argument) -> str:
    if row.kind == "always":
        return f"always `{shown(row.always)}`"
    return {"same": f"`{row.target}`", "other": f"*`{row.target}`*", "none": ""}[row.kind]


def _default(row: Argument) -> str:
    if row.default is None:
        return ""
    theirs = f"`{shown(row.default)}`"
    if row.lora_default is not None:
        theirs += f", LoRA `{shown(row.lora_default)}`"
    if row.kind != "same" or row.target is None:
        return theirs
    target = table.field(row.target)
    is_ours = target.read(row.here(row.default)) == target.default
    return theirs if is_ours else f"{theirs}; here `{shown(target.default)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
