"""The variables of a chat template: the names that it reads and does not assign itself.

Jinja's own `meta.find_undeclared_variables` also names what every branch assigns before it is read, as
Gemma's template does with `role`. Here a name is the template's own where it is assigned for certain.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes


def free_names(template: nodes.Template) -> frozenset[str]:
    """The names that a parsed template reads, at some place before it has assigned them for certain.

    What Jinja and the renderer bring, such as `namespace`, is none of them, and neither are macros: one may
    call another that stands below it.
    """
    brought = template.environment.globals if template.environment else {}
    reader = _Reader()
    reader.read_all(template.body, frozenset((*brought, *(m.name for m in template.find_all(nodes.Macro)))))
    return frozenset(reader.free)


class _Reader:
    """Reads statements in their order; `owned` are the names that are assigned for certain before them."""

    def __init__(self) -> None:
        self.free: set[str] = set()

    def read_all(self, found: Iterable[nodes.Node], owned: frozenset[str]) -> frozenset[str]:
        """Read some statements or expressions; returns the names that are assigned after them."""
        for node in found:
            owned = self.read(node, owned)
        return owned

    def read(self, node: nodes.Node, owned: frozenset[str]) -> frozenset[str]:
        """The same of one. What a loop, a macro or another block assigns ends with it, as Jinja has it."""
        match node:
            case nodes.Name(ctx="load") if node.name not in owned:
                self.free.add(node.name)
            case nodes.Assign():
                self.read(node.node, owned)
                return owned | _names(node.target)
            case nodes.AssignBlock():
                self.read_all(node.body, owned)
                return owned | _names(node.target)
            case nodes.If():
                return self._read_branches(node, owned)
            case nodes.For():
                self.read(node.iter, owned)
                inside = owned | _names(node.target) | {"loop"}
                self.read_all([*([node.test] if node.test else []), *node.body], inside)
                self.read_all(node.else_, owned)
            case nodes.Macro() | nodes.CallBlock():
                called = [node.call] if isinstance(node, nodes.CallBlock) else []
                self.read_all([*called, *node.defaults], owned)
                self.read_all(
                    node.body, owned.union({"caller", "varargs", "kwargs"}, *map(_names, node.args))
                )
            case nodes.With():
                self.read_all(node.values, owned)
                self.read_all(node.body, owned.union(*map(_names, node.targets)))
            case _:
                self.read_all(node.iter_child_nodes(), owned)
        return owned

    def _read_branches(self, node: nodes.If, owned: frozenset[str]) -> frozenset[str]:
        """What every branch assigns, but for those that end the rendering; a missing one assigns nothing."""
        ends = []
        for branch in (node, *node.elif_):
            self.read(branch.test, owned)
            ends.append((branch.body, self.read_all(branch.body, owned)))
        ends.append((node.else_, self.read_all(node.else_, owned)))
        lasting = [assigned for body, assigned in ends if not any(map(_ends_rendering, body))]
        return frozenset.intersection(*lasting) if lasting else owned


def _names(target: nodes.Node) -> frozenset[str]:
    """The names that an assignment to a target gives a value: none for the attribute of a namespace."""
    found = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return frozenset(name.name for name in found)


def _ends_rendering(statement: nodes.Node) -> bool:
    """Whether a statement writes what `raise_exception` returns, which returns nothing."""
    return isinstance(statement, nodes.Output) and any(
        isinstance(call.node, nodes.Name) and call.node.name == "raise_exception"
        for call in statement.find_all(nodes.Call)
    )
