"""No command line is put together as text: what is started gets its words as a list, whatever is in them."""

from __future__ import annotations

import ast
import re

from tests.unit.source_calls import ROOT, calls, keyword, trees

STARTS_A_SHELL = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "pty.spawn", "eval", "exec",
}  # fmt: skip
STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.check_call", "subprocess.call"}
SHELLS = {"sh", "bash", "zsh", "dash", "/bin/sh", "/bin/bash", "/usr/bin/env"}


def script_of(node: ast.AST) -> ast.expr | None:
    """What a list or tuple of words hands to a shell to read, if it does."""
    if not isinstance(node, ast.List | ast.Tuple) or not node.elts:
        return None
    given = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
    return node.elts[given.index("-c") + 1] if given[0] in SHELLS and "-c" in given[:-1] else None


def test_nothing_starts_a_shell() -> None:
    found = list(calls())
    assert len(found) > 3000 and sum(name in STARTS for _, _, name in found) >= 5
    assert [place for place, _, name in found if name in STARTS_A_SHELL] == []
    assert [place for place, call, _ in found if keyword(call, "shell") not in (None, False)] == []


def test_no_command_is_one_text() -> None:
    started = [(place, call.args[0]) for place, call, name in calls() if name in STARTS and call.args]
    texts = (ast.JoinedStr, ast.Constant, ast.BinOp)
    assert [place for place, command in started if isinstance(command, texts)] == []


def test_what_a_shell_is_handed_is_a_constant() -> None:
    scripts = [(path, script_of(node)) for path, tree in trees().items() for node in ast.walk(tree)]
    assert [
        path
        for path, script in scripts
        if script is not None
        and not isinstance(script, ast.Constant)
        and not (isinstance(script, ast.Name) and script.id.isupper())
    ] == []


def test_a_script_that_a_shell_will_read_is_a_template_that_quotes() -> None:
    """Values on its lines of commands are quoted; those on lines of comments are checked before (see its own tests)."""
    inserted = []
    for path in sorted(ROOT.glob("mcore/**/*.j2")):
        for line in path.read_text().splitlines():
            if not line.startswith(("#", "{%")):
                inserted += re.findall(r"\{\{(.*?)\}\}", line)
    assert [text for text in inserted if not text.strip().endswith("| quoted") and '=%d" %' not in text] == []
    scripts = [
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("#!")
    ]
    assert scripts == []
