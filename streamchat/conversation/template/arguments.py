"""The arguments of chat templates: which ones a template reads, and which one switches reasoning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamchat.config.template_args import is_reserved, listed, shown

Arguments = Mapping[str, Any]
"""Argument name -> JSON value."""
NO_ARGUMENTS: Arguments = {}
MOST_SOURCE = 1_000_000
"""Limit on the characters of a template."""
SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Names by which templates switch reasoning on and off: Qwen3, GLM and SmolLM3; DeepSeek and Granite; Cohere."""
EFFORT = "reasoning_effort"
"""The name by which templates take the amount of reasoning: gpt-oss."""


@dataclass(frozen=True)
class TemplateArguments:
    """What a template takes besides the messages."""

    names: tuple[str, ...] = ()
    """Arguments that it reads, in alphabetical order."""
    defaults: Arguments = field(default_factory=dict)
    """Values that the catalogue has for this model; each is one of `names`."""
    thinks: bool = False
    """Whether the generation prompt asks for reasoning if the switch is not given."""


def switch_of(names: Collection[str]) -> str:
    """Return the argument that switches reasoning on and off; '' if `names` has none."""
    return next((name for name in SWITCHES if name in names), "")


def read_names(source: str) -> tuple[str, ...]:
    """Return the arguments that the template `source` reads, in alphabetical order; empty if it cannot be parsed."""
    if len(source) > MOST_SOURCE:
        return ()
    import jinja2.meta

    from streamchat.conversation.template.bounded import run_bounded
    from streamchat.conversation.template.environment import parsed

    def analyzed() -> tuple[set[str], dict[str, str]]:
        tree = parsed(source)
        uses: dict[str, str] = {}
        for name in _names_in_order(tree):
            uses.setdefault(name.name, name.ctx)
        return jinja2.meta.find_undeclared_variables(tree), uses

    try:
        names, uses = run_bounded(analyzed)  # Jinja computes the condition of `autoescape` while it analyzes
    except Exception:  # a template may make Jinja and Python raise anything
        return ()
    # A variable that only some branches set counts as undeclared; one that is set before it is read is not an argument.
    return tuple(sorted(name for name in names if not is_reserved(name) and uses.get(name) != "store"))


def _names_in_order(node: Any) -> Iterator[Any]:
    """Yield the names below `node` in the order in which a template is run: values before what they are assigned to."""
    import jinja2.nodes

    if isinstance(node, jinja2.nodes.Name):
        yield node
    children = list(node.iter_child_nodes(exclude=("target",)))
    first, rest = (children[:1], children[1:]) if isinstance(node, jinja2.nodes.For) else (children, [])
    target = getattr(node, "target", None)
    for child in (*first, *([target] if isinstance(target, jinja2.nodes.Node) else []), *rest):
        yield from _names_in_order(child)


def unread_sentence(given: Arguments, names: tuple[str, ...]) -> str:
    """Return a sentence about the arguments of `given` that the template does not read; '' if it reads all."""
    unread = [name for name in given if name not in names]
    if not unread:
        return ""
    reads = f"it reads {listed(names)}" if names else "it reads no arguments"
    return f"This model's chat template does not read {listed(unread)}; {reads}."


def ignored_sentence(given: Arguments) -> str:
    """Return a sentence about arguments that have no effect, because there is no template; '' without any."""
    return f"Without a chat template, arguments have no effect: {shown(given)}." if given else ""
