"""One operation of a template cannot fill the memory or keep the interpreter busy."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime

import pytest

from streamchat.conversation.template import bounded, rendering, sizes
from streamchat.conversation.template.arguments import read_names
from streamchat.conversation.template.bounded import LimitError, run_bounded
from streamchat.conversation.template.environment import BoundedEnvironment
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.rendering import Renderer
from streamchat.conversation.template.sizes import HugeValueError
from tests.support import toy_tokenizer as toy

pytestmark = pytest.mark.smoke

HUGE = [
    "{{ 'a' * 10**10 }}",
    "{% set n = 10**10 %}{{ n * 'a' }}",
    "{% set x = [0] %}{{ (x * 10**10)|length }}",
    "{% set x = (1, 2) %}{{ (x * 10**10)|length }}",
    "{{ (9 ** 99999999) % 7 }}",
    "{% set a = 9 %}{{ (a ** 99999999) % 7 }}",
    "{% set x = 7 ** 300000 %}{{ (x * x) % 7 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%-9999999999s' % ('x',) }}",
    "{{ '%.9999999999f' % 1.5 }}",
    "{{ '%(a)9999999999d' % {'a': 1} }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.rjust(10**10) }}",
    "{{ 'x'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{% set n = 10**10 %}{{ n.to_bytes(n)|length }}",
    "{% set x = ['a' * 1000000] * 1000 %}{{ x|join }}",
    "{% set x = ['a'] * 1000 %}{{ ('b' * 1000000).join(x) }}",
    "{{ range(1000)|map('string')|join('b' * 1000000) }}",
    "{% set x = 'a' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
    "{{ 'x'|center(10**10) }}",
    "{{ ['x']|map('center', 10**10)|list|length }}",
    "{{ 'a\nb'|indent(10**10) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ [1]|batch(10**10, 0)|list|length }}",
    "{{ 5|round(-9999999999) }}",
    "{{ 5|round(9999999999, 'floor') }}",
    "{{ ('a ' * 100000)|wordwrap(1, wrapstring='b' * 100000) }}",
    "{{ 'a'.encode() * 10**10 }}",
    "{{ 'a'.encode().center(10**10) }}",
    "{{ '%9999999999d'.encode() % 1 }}",
    "{% set x = ('a' * 1000000).encode() %}{{ x.join([x] * 4000) }}",
    "{% set x = 'a' * 2000000 * 20 * 20 %}",
    "{% set x = 'a' * 2000000 * 20 %}{{ x ~ x ~ x ~ x }}",
    "{{ ([{'a': 'a' * 2000000}] * 10000)|join(attribute='a') }}",
    "{{ (['a'] * 10000)|join(d='b' * 1000000) }}",
    "{{ ['a' * 2000000] * 10000 }}",
    "{{ namespace(x=['a' * 2000000] * 10000) }}",
    "{{ {'a': ['a' * 2000000] * 10000}.values()|string }}",
    "{{ (['a' * 2000000] * 10000)|upper }}",
    "{{ (['a' * 2000000] * 10000)|tojson }}",
    "{{ '%s' % (['a' * 2000000] * 10000,) }}",
    "{{ '{}'.format(['a' * 2000000] * 10000) }}",
    "{{ ('a' * 2000000).rfind('a' * 500000 ~ 'b' ~ 'a' * 500000) }}",
    "{{ ('a' * 2000000).rsplit('a' * 500000 ~ 'b' ~ 'a' * 500000) }}",
    "{{ ('f' * 2000000)|int(base=16) > 1 }}",
    "{{ (0).from_bytes(('f' * 2000000).encode()) > 1 }}",
    "{{ '{:{}}'.format(1, '9999999999') }}",
    "{{ '{:0>9999999999}'.format(1) }}",
    "{{ '{0:{1[0]}}'.format(1, [9999999999]) }}",
    "{{ '{:{}}'.format('a'|safe, 9999999999.0) }}",
    "{{ '%(a(b))9999999999d' % {'a(b)': 1} }}",
    "{{ ([0] * 10000)|tojson(separators=('b' * 1000000, ':')) }}",
    "{{ ([0] * 10000)|tojson(indent='b' * 1000000) }}",
    "{{ ('\r' * 100000)|indent('b' * 100000, blank=true) }}",
    "{{ ('\n' * 100000)|wordwrap(100000, wrapstring='b' * 100000) }}",
    "{{ ('a' * 100000).translate(['b' * 100000] * 128) }}",
    "{{ ('a' * 2000000 * 20)|list|length }}",
    "{{ ('a ' * 1000000 * 20).split()|length }}",
    "{{ ('a' * 2000000).encode('ascii', 'namereplace') }}",
    "{{ [1]|tojson(indent=9999999999) }}",
    "{{ '%9999999999d' is divisibleby(1) }}",
    "{{ '%9999999999d' is odd }}",
    "{{ '%9999999999d' is even }}",
    "{{ 'a'|round(10, 'floor') }}",
    "{{ [0]|round(10, 'ceil') }}",
    "{% set x = 'a' * 2000000 * 20 %}{{ x + x }}",
    "{% set x = [0] * 2000000 * 20 %}{{ (x + x)|length }}",
    "{{ dict(*('a' * 2000000 * 20)) }}",
    "{{ (0).from_bytes([255] * 200000) > 1 }}",
    "{{ ('.' * 1000000 ~ 'a.')|urlize }}",
    "{{ ('ab ' * 2000000 * 5)|pprint }}",
    "{{ ('\xe9' * 2000000 * 2).translate([]) }}",
    "{{ ('\xe9' * 2000000).encode('ascii', 'backslashreplace') }}",
    "{{ ('\xe9' * 2000000).encode('shift_jis', 'replace') }}",
    "{{ ('\u0315\u0300' * 300000).encode('idna') }}",
    "{{ ('\xff' * 2000000).encode('latin-1').decode('utf-8', 'backslashreplace') }}",
    "{{ a" + "\u0315\u0300" * 20000 + " }}",  # Python normalizes names
]

REPEATED = (  # containers that have the same one twice, 60 times over
    "{% set n = namespace(a=[1], b=[1], c=[1], d=[1], t=(1,), u=(1,)) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% set n.c = {1: n.c, 2: n.c} %}"
    "{% set n.d = {1: n.d, 2: n.d} %}{% set n.t = (n.t, n.t) %}{% set n.u = (n.u, n.u) %}{% endfor %}"
)
HIDING = (  # the items around the current one are attributes of `loop`
    "{% set m = namespace(l=[]) %}{% for q in [n.a, n.b] %}{% for x in [q, 1] %}{% if loop.last %}"
    "{% set m.l = m.l + [loop] %}{% endif %}{% endfor %}{% endfor %}"
)
DEEP = "{% set n = namespace(t=(1,)) %}{% for i in range(1000) %}{% set n.t = (n.t,) %}{% endfor %}"
ON_REPEATED = [
    "{{ n.a == n.b }}",
    "{{ n.t != n.u }}",
    "{{ [] != n.a == n.b }}",
    "{{ n.c == n.d }}",
    "{{ n.a in [n.b] }}",
    "{{ n.a not in [n.b] }}",
    "{{ {n.t: 1} }}",
    "{{ {1: 1}[n.t] }}",
    "{{ {1: 1}.get(n.t) }}",
    "{{ dict([(n.t, 1)])|length }}",
    "{{ dict.fromkeys([n.t])|length }}",
    "{{ ({'a': n.t}.items() - [1])|length }}",
    "{{ [n.a].index(n.b) }}",
    "{{ (1, n.a).count(n.b) }}",
    "{{ n.a is eq n.b }}",
    "{{ n.a is in [n.b] }}",
    "{{ [n.a]|select('equalto', n.b)|list|length }}",
    "{{ [{'a': n.a}]|selectattr('a', 'in', [n.b])|list|length }}",
    "{{ [n.a, n.b]|sort|length }}",
    "{{ [n.a, n.b]|map('first')|sort|length }}",
    "{{ [n.t, n.u]|unique|list|length }}",
    "{{ [{'a': n.a}, {'a': n.b}]|groupby('a')|length }}",
    "{{ [n.a, n.b]|min|length }}",
    "{{ [n.a, n.b]|max|length }}",
    "{{ {'a': n.a, 'b': n.b}|dictsort(by='value')|length }}",
    "{{ {'a': n.a}|xmlattr|length }}",
    "{{ n.a is lower }}",
    "{{ raise_exception(n.a) }}",
    "{% for x in [n.a, n.b] %}{{ loop.changed(x) }}{% endfor %}",
    "{{ {'a': n.a}.keys().mapping }}",
    "{{ {'a': n.a}.keys().mapping == {'a': n.b}.keys().mapping }}",
    "{{ raise_exception({'a': n.a}.keys().mapping) }}",
    HIDING + "{{ m.l|sort(attribute='previtem')|length }}",
    "{{ n.t is filter }}",
    "{{ n.t is test }}",
    "{{ [1]|map(n.t)|list }}",
    "{{ [1]|select(n.t)|list }}",
    "{{ 1|round(0, n.t) }}",
    "{{ ([n.t] - {}.items())|length }}",
    "{% set x = 3 ** 300000 %}{% set y = x + 1 - 1 %}{{ [x] * 1000000 == [y] * 1000000 }}",
]
LONG = "{% set a = 'a' * 2000000 * 20 %}{% set b = 'b' * 1999999 ~ 'a' %}"
ON_LONG = [
    "{{ a.strip(b) }}",
    "{{ a.lstrip(b) }}",
    "{{ a.rstrip(b) }}",
    "{{ a|trim(b) }}",
    "{{ a.encode().strip(b.encode()) }}",
    "{{ ('a ' * 2000000 * 10)|title|length }}",
    "{{ ('a ' * 2000000 * 10)|striptags|length }}",
    "{{ ('a ' * 2000000 * 10)|wordwrap|length }}",
    "{{ ('a\n' * 2000000 * 10)|indent|length }}",
    "{{ a|sort|length }}",
    "{{ a|groupby('x')|length }}",
]


def rendered(template: str) -> str:
    """Render a template as for a conversation."""
    environment = BoundedEnvironment()
    environment.globals["raise_exception"] = lambda message: message
    return environment.from_string(template).render()


@pytest.mark.parametrize("rest", ON_REPEATED)
def test_huge_values_are_not_compared(rest: str) -> None:
    with pytest.raises((LimitError, HugeValueError)):
        run_bounded(lambda: rendered(REPEATED + rest), seconds=0.3)


@pytest.mark.parametrize(
    "rest", ["{{ {n.t: 1}|length }}", "{{ {1: 1}[n.t] }}", "{{ [n.t]|unique|list }}", "{{ {1: 1}.get(n.t) }}"]
)
def test_what_is_nested_too_deeply_is_not_hashed(rest: str) -> None:
    with pytest.raises(HugeValueError, match="nested more than 500 deep"):
        rendered(DEEP + rest)


@pytest.mark.parametrize("rest", ON_LONG)
def test_long_texts_are_not_searched_for_long_ones(rest: str) -> None:
    with pytest.raises(HugeValueError, match="one operation would make a huge value"):
        rendered(LONG + rest)


@pytest.mark.parametrize("template", HUGE)
def test_a_huge_value_is_not_made(template: str) -> None:
    with pytest.raises(HugeValueError, match="one operation would make a huge"):
        BoundedEnvironment().from_string(template).render()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ([[0] * 2000000] * 1000)|sum(start=[])|length }}",
        "{{ ([[0] * 2000000] * 1000)|join|length }}",
        "{% set n = namespace(x=[0]) %}{% for i in range(9) %}"
        "{% set n.x = [n.x, n.x, n.x, n.x, n.x, n.x, n.x, n.x, n.x, n.x] %}{% endfor %}{{ n.x|string|length }}",
        "{{ ([0] * 1000000)|tojson(indent=2000)|length }}",
    ],
)
def test_a_long_operation_can_be_stopped(template: str) -> None:
    with pytest.raises((LimitError, HugeValueError)):
        run_bounded(BoundedEnvironment().from_string(template).render, seconds=0.3)


def test_generators_are_not_chained() -> None:
    template = (
        "{% set n = namespace(x=[1]) %}{% for i in range(50) %}"
        "{% set n.x = n.x|map('int')|select|reject('none')|selectattr('real')|rejectattr('imag')|batch(1)|slice(1) %}"
        "{% set n.x = n.x|map('first')|map('first') %}{% endfor %}{{ n.x|list }}"
    )
    assert rendered(template) == "[1]"  # or: maximum recursion depth exceeded


@pytest.mark.parametrize("values", ["x[1:]", "x + 'a'", "a // b"])
def test_an_expression_can_be_stopped_between_its_operations(values: str) -> None:
    template = (
        "{% macro f(x, a, b) %}{% set z = [" + (values + ", ") * 2000 + "] %}{% endmacro %}"
        "{{ f('a' * 2000000, 3 ** 300000, 7 ** 80000) }}"
    )
    with pytest.raises(LimitError):
        run_bounded(BoundedEnvironment().from_string(template).render, seconds=0.2, growth_bytes=2_000_000_000)


def test_a_template_compiles_to_little_code() -> None:
    names = "".join(f"{{% set a{i} = 0 %}}" for i in range(500))
    with pytest.raises(HugeValueError, match="it compiles to 3,"):
        rendered(names + "{% if a %}" + "{% include 'x' %}" * 400 + "{% endif %}")


def test_a_template_is_not_huge() -> None:
    source = "{{ a }}" + "a" * 1_000_000
    assert read_names(source) == ()
    chosen = choose_format(toy.toy_tokenizer(source), "auto", "")
    assert "it has 1,000,007 characters, more than 1,000,000" in chosen.notes[0]


def test_all_renderings_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS_IN_ALL", 0.5)
    slow = "{% for i in range(100000) %}{% endfor %}" * 30
    chosen = choose_format(toy.toy_tokenizer(slow + toy.CHATML), "auto", "Be kind.")
    assert chosen.name == "plain"
    assert "it takes more than 0.5 s to write short conversations" in chosen.notes[0]


LEAVES = """
import weakref
from streamchat.conversation.template.bounded import run_bounded

class Kept:
    def __init__(self):
        self.me = self

def leave():
    one = Kept()
    kept.add(one)
    one.text = "a" * 60_000_000

kept = weakref.WeakSet()
run_bounded(leave, growth_bytes=100_000_000)
print(len(kept))
"""


def test_what_a_template_leaves_is_freed() -> None:
    # in a process of its own: threads of other tests may free memory at the same time, so that this process shrinks
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ '\\ud800' }}", "it writes characters that are not valid Unicode"),
        ("{{ " + "9" * 5000 + " }}", "Exceeds the limit"),
        ("{{ 0x" + "f" * 5000 + " }}", "Exceeds the limit"),
        ("{{ raise_exception([7 ** 30000]) }}", "it raises: TemplateError"),
        ("{{ raise_exception('a\\u202eb\\u200b') }}", "it raises: ab"),
    ],
)
def test_whatever_a_template_raises_leaves_plain_lines(template: str, words: str) -> None:
    chosen = choose_format(toy.toy_tokenizer(template + toy.CHATML), "auto", "Be kind.")
    assert chosen.name == "plain"
    assert words in chosen.notes[0]
    assert chosen.notes[0].isprintable()


@pytest.mark.parametrize(
    ("start", "written"),
    [
        ("I'm here. {{ strftime_now('%Y') }}", "I'm here. 2026"),
        ("{{ strftime_now('%Y' '\\n') }}", "2026\n"),
        ("{% if a %}{{ strftime_now('%\ud800') }}{% endif %}", ""),
        ("{# strftime_now" + "\\'" * 20000 + " #}", ""),
    ],
)
def test_the_clock_is_found_in_any_template(start: str, written: str) -> None:
    render = Renderer(toy.toy_tokenizer(start + toy.CHATML), datetime(2026, 11, 28))
    assert render([{"role": "user", "content": "Hi"}]).startswith(written + "<|im_start|>")


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    template = "{{ 'a'|center(2000000)|center(40000000)|center(800000000) ~ 'b' }}"
    assert len(BoundedEnvironment().compile(template, raw=True)) < 5000
    assert read_names(template) == ()


@pytest.mark.parametrize("template", [HUGE[0], HUGE[4], HUGE[5], HUGE[12], HUGE[-2]])
def test_such_a_template_is_left_for_plain_lines(template: str) -> None:
    assert read_names(template) == ()
    chosen = choose_format(toy.toy_tokenizer(template + toy.CHATML), "auto", "Be kind.")
    assert chosen.name == "plain"
    assert "it raises: one operation would make a huge" in chosen.notes[0]


def test_what_a_template_raises_is_one_short_line() -> None:
    template = "{{ raise_exception('\x1b[31mno\x07 ' * 40000) }}" + toy.CHATML
    chosen = choose_format(toy.toy_tokenizer(template), "auto", "Be kind.")
    assert chosen.name == "plain"
    assert chosen.notes[0].isprintable()
    assert 200 < len(chosen.notes[0]) < 300


def test_the_limits_are_on_what_is_added() -> None:
    sizes.require(sizes.MOST_ITEMS)
    sizes.require(sizes.MOST_ITEMS + 20 * 5, 5)
    with pytest.raises(HugeValueError):
        sizes.require(sizes.MOST_ITEMS + 20 * 5 + 1, 5)


def test_the_arguments_are_read_within_the_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: object) -> None:
        raise LimitError("it did not finish within 5 s")

    assert read_names("{{ a }}") == ("a",)
    monkeypatch.setattr(bounded, "run_bounded", refuse)
    assert read_names("{{ a }}") == ()
