"""The Jinja environment of chat templates: one operation cannot make a huge value.

`bounded` stops a template between two Python bytecodes, so it cannot stop a single operation that fills the memory or
keeps the interpreter busy for hours, such as `'a' * 10**10` or `9 ** 99999999`. Here, such operations raise. They are
found by the size of what they would make, compare, or hash. What is not checked makes at most a few times as much as it
is given, which `bounded` notices in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import update_wrapper
from typing import Any

from jinja2 import filters, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from streamchat.conversation.template import operations, sizes

Check = Callable[..., object]


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write the code of `a ~ b ~ c`."""
        name = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            name = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{name}(environment.operands((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Write the code of `a == b`, `a in b`, and the like."""
        first = node.ops[0]
        if len(node.ops) == 1 and first.op in ("eq", "ne") and nodes.Const in (type(node.expr), type(first.expr)):
            super().visit_Compare(node, frame)  # as in `role == 'user'`, which is fast with any value
            return
        self.write("(")
        self._compared(node.expr, frame)
        for each in node.ops:
            self.write(f" {operators[each.op]} ")
            self._compared(each.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Write the code of `{key: value}`."""
        self.write("{")
        for each in node.items:
            self._compared(each.key, frame)
            self.write(": ")
            self.visit(each.value, frame)
            self.write(", ")
        self.write("}")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Write the code of `a[b]` or `a[b:c]`."""
        is_slice = isinstance(node.arg, nodes.Slice)
        self.write("environment.sliced(" if is_slice else "environment.getitem(")
        self.visit(node.node, frame)
        self.write(")[" if is_slice else ", ")
        (self.visit if is_slice else self._compared)(node.arg, frame)
        self.write("]" if is_slice else ")")

    def signature(
        self, node: nodes.Call | nodes.Filter | nodes.Test, frame: Frame, extra_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Write the code of the arguments of a call."""
        given = node.dyn_args
        if given is not None:
            node.dyn_args = nodes.Call(nodes.EnvironmentAttribute("spread"), [given], [], None, None)
        super().signature(node, frame, extra_kwargs)
        node.dyn_args = given

    def _compared(self, node: nodes.Expr, frame: Frame) -> None:
        """Write the code of a value that is compared or hashed."""
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
        else:
            self.write("environment.compared(")
            self.visit(node, frame)
            self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit on what one operation makes. Beyond it, `sizes.HugeValueError` is raised."""

    # Python notices a stop only when it calls something: without a check, these are calls at least
    intercepted_binops = frozenset({*operations.OPERATORS, "/", "//"})
    code_generator_class = _Generator
    compared = staticmethod(sizes.compared)
    spread = staticmethod(sizes.spread)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # neither outputs nor operations are computed while a template is compiled: `_written` needs the context
        super().__init__(*args, **{"optimized": False, "finalize": _written, **kwargs})
        self.filters = _Filters(self.filters)
        self.filters["join"] = _join
        tests: Any = self.tests
        tests.update({name: _checked(tests[name], check) for name, check in operations.TESTS.items()})

    def _compile(self, source: str, filename: str) -> Any:
        sizes.require_code(source)
        return super()._compile(source, filename)

    @staticmethod
    def sliced(value: Any) -> Any:
        """Return a value that is sliced next."""
        return value

    @staticmethod
    def operands(values: Iterable[Any]) -> list[Any]:
        """Return the operands of `~`."""
        return sizes.joined("", values)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the parts of the rendered text."""
        return "".join(sizes.joined("", parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        check = operations.OPERATORS.get(operator)
        if check is not None:
            check(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what replaces the methods `format` and `format_map` of a text; None for any other value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def formatted(*args: Any, **kwargs: Any) -> str:
            sizes.require_fields(text, "{", (*args, *kwargs.values()))
            if value.__name__ == "format":
                return type(text)(formatter.vformat(text, args, kwargs))
            if kwargs or len(args) != 1:
                return wrapped(*args, **kwargs)  # raises
            return type(text)(formatter.vformat(text, (), args[0]))

        return update_wrapper(formatted, wrapped)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for a template."""
        value = getattr(called, "__self__", None)
        if not isinstance(called, Macro):  # anything else may compare, hash, or write them
            for each in (*args, *kwargs.values()):
                sizes.compared(each)
            if isinstance(value, list | tuple):
                sizes.compared(value)
        check = operations.METHODS.get(getattr(called, "__name__", ""))
        if check is not None and isinstance(value, str | bytes | int | type):
            args = check(value, *args, **kwargs) or args  # all arguments of the only method whose check replaces any
        return super().call(context, called, *args, **kwargs)


class _Limited(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one value."""
        sizes.require_specification(format_spec)
        return super().format_field(value, format_spec)


class _Formatter(_Limited):
    """The formatter of texts."""


class _EscapeFormatter(_Limited, SandboxedEscapeFormatter):
    """The formatter of HTML."""


@pass_eval_context
def _written(_: EvalContext, value: Any) -> Any:
    """Return a value that a template writes."""
    if type(value) is not str:
        sizes.written(value)
    return value


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    """Join the parts of `value`, or one attribute of each; the names are those of Jinja's filter."""
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    sizes.written(d)
    joined: str = filters.FILTERS["join"](context, sizes.joined(str(d), value), d)
    return joined


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name; those that can make a huge value are checked, also if one is replaced later."""

    def __init__(self, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(
            name, None if function is None else _checked(function, operations.FILTERS.get(name, _unchecked))
        )


def _unchecked(*_: Any, **__: Any) -> None:
    """Check nothing besides the arguments after the first one."""


def _checked(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Return the function with a check of its arguments, which may also replace the first ones.

    It may compare or hash those after the first one.
    """
    first = int(hasattr(function, "jinja_pass_arg"))  # the environment or a context comes before them

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for each in (*args[first + 1 :], *kwargs.values()):
            sizes.compared(each)
        given = check(*args[first:], **kwargs)
        if isinstance(given, tuple):
            args = (*args[:first], *given, *args[first + len(given) :])
        return function(*args, **kwargs)

    return update_wrapper(wrapper, function)


def parsed(source: str) -> nodes.Template:
    """Return the syntax tree of a template.

    Raises:
        Exception: Jinja cannot parse it, and raises anything.
    """
    environment = BoundedEnvironment(extensions=[_Generation, loopcontrols])
    environment.filters.setdefault("tojson", None)  # never called
    return environment.parse(source)


class _Generation(Extension):
    """The block that transformers adds: marks what the model generates."""

    tags = {"generation"}  # noqa: RUF012 - as in the class it overrides

    def parse(self, parser: Parser) -> Any:
        """Return the statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def use_for_chat_templates() -> None:
    """Have transformers compile the chat templates of tokenizers in this environment."""
    from transformers.utils import chat_template_utils

    theirs: Any = chat_template_utils
    if theirs.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        theirs.ImmutableSandboxedEnvironment = BoundedEnvironment
        for name in ("_compile_jinja_template", "_cached_compile_jinja_template"):
            forget = getattr(getattr(theirs, name, None), "cache_clear", None)
            if forget is not None:
                forget()  # templates that were compiled before
