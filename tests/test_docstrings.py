"""What a docstring owes its reader, by rule: shapes of tensors, units of numbers, errors.

Public is a function without a leading underscore, at the top of a module of the book or of a folder
or in a public class there; not what is defined inside another function. A function of five lines or
fewer may be its own description, unless a tensor goes through it or it raises.
"""

import ast
import re

import pytest
from test_docs import MODULES, ROOT

SHORT = 5
# Named tensors (dict[str, Tensor]) are weights: their shapes are the model's
SHAPED = r"(?<!dict\[str, )\b(Tensor|np\.ndarray)\b"
SHAPE = r"\[[^\]]*[\w.][^\]]*\]|\[\]|any shape"  # []: a scalar
UNIT = (
    r"\b(seconds|ms|bytes|GiB|bits|nats|tokens?|ids|blocks?|steps?|items|layers|processes|samples"
    r"|numbers?|pairs|flop/s|share|percent|mode|exit code|label|learning rate|scale|0 \.\. 1"
    r"|0 \.\. 100)\b"
)


def public_functions(path):
    """(name, node), methods as Class.method."""
    for node in ast.parse(path.read_text()).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        if before.startswith("_"):
            continue
        for function in inside:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                yield before + function.name, function


def own_statements(function):
    """Every node of a function, but not of functions in it, nor where it catches ValueError."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        yield node
        inside = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Try) and any(_catches(h) for h in node.handlers):
            inside = [n for n in inside if n not in node.body]
        waiting += inside


def _catches(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and bool(re.search(r"\bValueError", ast.unparse(handler.type)))


def raises_value_error(function) -> bool:
    return any(
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == "ValueError"
        for node in own_statements(function)
    )


def owes(function) -> list[str]:
    """What the docstring of a function lacks."""
    text = ast.get_docstring(function) or ""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [ast.unparse(p.annotation) for p in parameters if p.annotation]
    result = ast.unparse(function.returns) if function.returns else ""
    shaped = any(re.search(SHAPED, a) for a in [*annotations, result])
    refuses = raises_value_error(function)
    long = len({n.lineno for n in own_statements(function) if hasattr(n, "lineno")}) > SHORT
    if not text:
        return ["a docstring"] if shaped or refuses or long else []
    lacks = []
    if shaped and not re.search(SHAPE, text):
        lacks.append("the shapes of its tensors, such as [B, T, C]")
    if refuses and "ValueError" not in text:
        lacks.append("when it raises ValueError")
    if result in ("int", "float") and not re.search(UNIT, text, re.I):
        lacks.append("the unit of the number it returns, such as seconds or bytes")
    return lacks


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_give_shapes_units_and_errors(path):
    lacking = {name: owes(f) for name, f in public_functions(path) if owes(f)}
    assert not lacking, "\n".join(f"{name} owes {', '.join(x)}" for name, x in lacking.items())


def test_the_rule_finds_what_is_missing():
    def of(source: str) -> list[str]:
        return owes(ast.parse(source).body[0])

    assert of("def f(x: Tensor): return x") == ["a docstring"]
    assert of("def f(x: Tensor): '''Twice x.'''") and not of("def f(x: Tensor): '''x [B, T].'''")
    assert not of("def f(x: dict[str, Tensor]): return x")
    assert of("def f():\n  '''Loads.'''\n  raise ValueError('no')")
    assert not of("def f():\n  '''Asks.'''\n  def g(): raise ValueError('no')")
    assert of("def f() -> float: '''How long.'''") and not of("def f() -> float: '''Seconds.'''")
    assert of("def f():\n" + "  g()\n" * 6) == ["a docstring"] and not of("def f(): g()")
