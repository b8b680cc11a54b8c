"""Whether a chat template writes what messages say as it is: then it need not run for each of them.

Read off the template's program: every value that comes out of a `content` must only be written out, added to other
text, asked whether it is empty or of what type it is. Then two conversations with the same roles differ in their
contents alone. Anything that is not known to be harmless counts as harmful.
"""

from typing import Literal

from jinja2 import Environment, nodes

Kind = Literal["plain", "content", "text", "message", "messages"]  # text: content with something before or behind it
TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"}
FILTERS = {"trim", "length", "count", "lower", "upper", "capitalize", "title", "first", "last", "list", "int", "join"}
FILTERS |= {"default", "d", "string", "replace", "tojson"}  # on values without content; others escape or throw dice
CALLS = {"raise_exception", "namespace", "strftime_now", "range", "dict"}
PASSES = 16  # over a template; names that hand a value on more often are not followed
LOOP = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}  # the others show neighbours


class _NotVerbatim(Exception):
    """A value of a message is put to another use than being written."""


def writes_contents(source: str, environment: Environment) -> Literal["whole", "stripped"] | None:
    """How the template writes contents that are texts and not empty, of messages that have a role and a content only,
    where there are no tools: whole, without the blanks around them, or None: nothing is known.

    Raises jinja2.TemplateSyntaxError."""
    found = _Reading()
    try:
        body = environment.parse(source).body
        for _ in range(PASSES):  # names are followed without order: a value may come round a loop
            found.changed = False
            found.kinds.clear()
            found.statements(body)
            if not found.changed:
                return "stripped" if found.strips else "whole"
    except _NotVerbatim:
        pass
    return None


class _Reading:
    """What a template does with its values. `names` has the kind of every name that it sets."""

    def __init__(self) -> None:
        self.names: dict[str, Kind] = {"messages": "messages"}
        self.kinds: dict[int, Kind] = {}  # of values that were looked at in this pass, by id
        self.assigned: set[str] = set()  # names that something else than a loop has set
        self.strips, self.changed = False, False

    def statements(self, body: list[nodes.Node]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                for written in node.nodes:
                    self._refuse(self.kind(written) in ("message", "messages"))
            case nodes.If():
                self._if(node)
            case nodes.For(recursive=False):
                over = self.kind(node.iter)
                self._refuse(over not in ("plain", "messages"))
                self._set(node.target, "message" if over == "messages" else "plain")
                if node.test:
                    self.truth(node.test)
                self.statements([*node.body, *node.else_])
            case nodes.Assign():
                targets = [node.target] if isinstance(node.target, nodes.Name) else node.target.find_all(nodes.Name)
                names = {name.name for name in targets}
                self.changed |= not names <= self.assigned
                self.assigned |= names
                self._set(node.target, self.kind(node.node))
            case nodes.Scope():
                self.statements(node.body)
            case nodes.Break() | nodes.Continue():
                pass
            case _:
                raise _NotVerbatim

    def _if(self, node: nodes.If) -> None:
        """The branches that may be taken: contents are known to be texts."""
        for branch in (node, *node.elif_):
            self.truth(branch.test)
            known = self._is_text(branch.test)
            if known is not False:
                self.statements(branch.body)
            if known:
                return
        self.statements(node.else_)

    def _is_text(self, test: nodes.Node) -> bool | None:
        match test:
            case nodes.Test(
                name="string",
                node=nodes.Getattr(node=owner, attr="content")
                | nodes.Getitem(node=owner, arg=nodes.Const(value="content")),
            ) if self._is_there(owner):
                return True
            case nodes.Not():
                known = self._is_text(test.node)
                return None if known is None else not known
        return None

    def _is_there(self, owner: nodes.Node) -> bool:
        """Whether a value is a message wherever its content can be asked for: names may be of something else."""
        match owner:
            case nodes.Name():
                return owner.name not in self.assigned and self._is(owner, "message")
            case nodes.Getitem(arg=nodes.Const(value=int())):
                return self._is(owner, "message")
        return False

    def _set(self, target: nodes.Node, kind: Kind) -> None:
        match target:
            case nodes.Name():
                before = self.names.get(target.name, kind)
                self._refuse({before, kind} & {"message", "messages"} != set() and before != kind)
                joined = _joined(before, kind)
                self.changed |= self.names.get(target.name) != joined
                self.names[target.name] = joined
            case nodes.NSRef() | nodes.Tuple():
                self._refuse(kind != "plain")
                if isinstance(target, nodes.Tuple):
                    for item in target.items:
                        self._set(item, kind)
            case _:
                raise _NotVerbatim

    def truth(self, node: nodes.Node) -> None:
        """A value that is only asked whether it is empty may be of any kind."""
        match node:
            case nodes.And() | nodes.Or():
                self.truth(node.left)
                self.truth(node.right)
            case nodes.Not():
                self.truth(node.node)
            case _:
                self.kind(node)

    def kind(self, node: nodes.Node) -> Kind:
        if id(node) not in self.kinds:
            self.kinds[id(node)] = self._kind(node)
        return self.kinds[id(node)]

    def _kind(self, node: nodes.Node) -> Kind:
        match node:
            case nodes.Const() | nodes.TemplateData():
                return "plain"
            case nodes.Name():
                self._refuse(node.name == "loop")  # it knows its neighbours
                return self.names.get(node.name, "plain")
            case nodes.Getattr():
                return self._part(node.node, node.attr)
            case nodes.Getitem():
                return self._item(node)
            case nodes.Add():
                return self._sum([node.left, node.right])
            case nodes.Concat():
                return self._sum(node.nodes)
            case nodes.CondExpr():
                self.truth(node.test)
                return _joined(self.kind(node.expr1), self.kind(node.expr2) if node.expr2 else "plain")
            case nodes.Not():
                self.truth(node.node)
                return "plain"
            case nodes.Filter(name="trim", node=nodes.Expr() as value) if self._is(value, "content"):
                return self._stripped(node)
            case nodes.Filter(name="length" | "count", node=nodes.Expr() as value) if self._is(value, "messages"):
                return "plain"
            case nodes.Call(node=nodes.Getattr(attr="strip", node=value)) if self._is(value, "content"):
                return self._stripped(node)
            case nodes.Test() if node.name in TYPE_TESTS:
                self.kind(node.node)
                return "plain"
            case nodes.Or() if self._is_absent(node.left):
                return self.kind(node.right)
            case nodes.Compare(ops=[nodes.Operand(op="in" | "notin", expr=holder)]) if self._is(holder, "message"):
                return self._plain(node.expr)
            case nodes.Compare(ops=[nodes.Operand(op="eq" | "ne", expr=nodes.Const(value=True | False | None))]):
                self.kind(node.expr)
                return "plain"
        return self._plain(*_parts(node))

    def _part(self, owner: nodes.Node, name: object) -> Kind:
        if isinstance(owner, nodes.Name) and owner.name == "loop":
            self._refuse(name not in LOOP or "loop" in self.names)
            return "plain"
        kind = self.kind(owner)
        if kind == "message":  # beside its fields, a message has the methods of a dict
            self._refuse(not isinstance(name, str) or hasattr(dict, name))
            return "content" if name == "content" else "plain"
        self._refuse(kind != "plain")
        return "plain"

    def _item(self, node: nodes.Getitem) -> Kind:
        if self._is(node.node, "messages"):
            self._refuse(isinstance(node.arg, nodes.Const) and not isinstance(node.arg.value, int))
            self._plain(node.arg)
            return "messages" if isinstance(node.arg, nodes.Slice) else "message"
        if isinstance(node.arg, nodes.Const):
            return self._part(node.node, node.arg.value)
        return self._plain(node.node, node.arg)

    def _is(self, node: nodes.Node, kind: Kind) -> bool:
        return not (isinstance(node, nodes.Name) and node.name == "loop") and self.kind(node) == kind

    def _is_absent(self, node: nodes.Node) -> bool:
        """Whether a value is a field that these messages do not have."""
        match node:
            case nodes.Getattr(node=owner, attr=name) | nodes.Getitem(node=owner, arg=nodes.Const(value=name)):
                return self._is(owner, "message") and name not in ("role", "content") and not hasattr(dict, str(name))
        return False

    def _stripped(self, node: nodes.Filter | nodes.Call) -> Kind:
        self._refuse(bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs))
        self.strips = True
        return "content"

    def _sum(self, parts: list[nodes.Expr]) -> Kind:
        kinds = {self.kind(part) for part in parts}
        self._refuse(bool(kinds & {"message", "messages"}))
        return "plain" if kinds == {"plain"} else "text"

    def _plain(self, *parts: nodes.Node) -> Kind:
        """All of these are values that no content, message or loop's neighbour is in."""
        for part in parts:
            self._refuse(self.kind(part) != "plain")
        return "plain"

    def _refuse(self, harmful: bool) -> None:
        if harmful:
            raise _NotVerbatim


def _joined(one: Kind, other: Kind) -> Kind:
    """The kind of a value that is of one or the other."""
    if one == other:
        return one
    if {one, other} & {"message", "messages"}:
        raise _NotVerbatim
    return "text"


HARMLESS = (
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Slice),
    *(nodes.And, nodes.Or, nodes.Compare, nodes.Operand, nodes.Call, nodes.Filter, nodes.Test, nodes.Getattr),
    *(nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos),
)


def _parts(node: nodes.Node) -> list[nodes.Node]:
    """What a value is made of, where nothing else can come in."""
    if not isinstance(node, HARMLESS) or (isinstance(node, nodes.Filter) and node.name not in FILTERS):
        raise _NotVerbatim
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name not in CALLS:
        raise _NotVerbatim
    return list(node.iter_child_nodes())
