"""Templates render as in the sandbox of Jinja, except for operations that would make or compare huge values."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamchat.conversation.template.environment import BoundedEnvironment

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'ab' * 3 }}{{ 3 * 'ab' }}{{ [1, 2] * 2 }}{{ 'a' * -1 }}{{ 'a' * true }}{{ 2 * 1.5 }}{{ 6 * 7 }}",
        "{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 2.5 ** 2 }}{{ (-3) ** 3 }}{{ 10 ** 300 > 1 }}",
        "{{ 7 % 3 }}{{ '%s and %5.2f' % ('a', 1.5) }}{{ '%(a)s' % {'a': 1} }}{{ '100%% of %d' % 2026112800000 }}",
        "{{ '{:>8}|{a}|{!r}'.format('x', 2, a=1700000000) }}{{ '{a}'.format_map({'a': 1}) }}",
        "{{ '%s-%s'|format(1, 'b') }}",
        "{{ 'x'.center(9) }}{{ 'x'.ljust(3, '.') }}{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs() }}",
        "{{ 'a-a'.replace('a', 'b') }}{{ 'a-a'.replace('a', 'b', 1) }}{{ 'ab'.replace('', '.') }}",
        "{{ ', '.join(['a', 'b']) }}{{ ' '.join(messages|map(attribute='role')) }}{{ 'ab'.translate({97: 'x'}) }}",
        "{{ [1, 2]|join('-') }}{{ messages|join('+', attribute='role') }}",
        "{{ ['a', 'b']|join }}{{ ['<', '>'|safe]|join('&') }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ 'x'|center(5) }}",
        "{{ 'a\nb'|indent(2) }}{{ 'a\nb'|indent('> ', true) }}{{ 'a b'|replace(' ', '_') }}{{ 2.675|round(2) }}",
        "{{ 42|round }}{{ 1234|round(-2) }}{{ 2.5|round(0, 'ceil') }}{{ 'some more words'|wordwrap(6) }}",
        "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ (255).to_bytes(2, 'big') }}{{ dict(a=1) }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for i in [5, 6] %}{{ f(i) }}{{ loop.index0 % 2 }}{% endfor %}",
        "{{ 'ab'.encode() }}{{ 'a-b'.encode().replace('-'.encode(), '+'.encode()) }}{{ 'ab'.encode('utf-8') }}",
        "{{ messages }}{{ messages|string }}{{ 1 ~ 'a' ~ none ~ missing ~ messages }}{{ none }}{{ true }}{{ missing }}",
        "{{ messages|join(d=', ', attribute='content') }}{{ [1, none, 'a', [2]]|join(', ') }}{{ {'a': 1}|join }}",
        "{{ [1, 2]|sum }}{{ messages|map(attribute='content')|map('length')|sum(start=1) }}{{ [[1]]|sum(start=[]) }}",
        "{{ 'a</think>b'.split('</think>')[-1] }}{{ 'a-b'.rsplit('-', 1) }}{{ 'a-b'.rfind('-') }}{{ ' a '.split() }}",
        "{{ '12'|int }}{{ 'ff'|int(base=16) }}{{ 'x'|int(7) }}{{ none|int }}{{ 'abc'|list }}{{ 'b a'|sort }}",
        "{{ '%s %s' % (none, true) }}{{ '%s' % messages }}{{ '%(role)s' % messages[0] }}{{ '(a)20261128000 %s' % x }}",
        "{{ '<%s>'|safe % '<' }}{{ ('<{}>'|safe).format('<') }}{{ '{:{}}'.format('a', 4) }}",
        "{{ '{0[role]}: {0[content]}'.format(messages[0]) }}{{ '{role!r:>{w}}'.format(w=9, **messages[0]) }}",
        "{{ messages|tojson(indent=4) }}{{ namespace(a=1) }}{{ [1, 2] == [1, 2] }}{{ 'a'|upper|lower|title|trim }}",
        "{% autoescape true %}{% set x = '<' %}{{ x ~ '>'|safe }}{{ ['<', '>'|safe]|join('&') }}{% endautoescape %}",
        "{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f('a') %}b{{ 'c' ~ 1 }}{% endcall %}",
        "{{ 1 < 2 < 3 }}{{ 'a' in 'ab' }}{{ 'a' not in messages[0] }}{{ [1] == [1] != [2] }}",
        "{{ messages[0] in messages }}",
        "{{ {'a': 1, (1, 2): 3, messages[0].role: 4} }}{{ {} }}{{ {(1, 2): 3}[1, 2] }}",
        "{{ {'a': {'b': 1}}['a'].get('b') }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|list }}",
        "{{ messages|rejectattr('role', 'in', ['user'])|list }}",
        "{{ [3, 1]|sort }}{{ messages|sort(attribute='role') }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {}|dictsort }}",
        "{{ [3, 1]|map('abs')|sort }}{{ [1, 1]|unique|list }}{{ [3, 1]|min }}{{ 'abc'|max }}{{ []|max }}",
        "{{ messages|groupby('role') }}{{ messages.index(messages[1]) }}{{ (1, 2, 1).count(1) }}{{ {'a': 1}|xmlattr }}",
        "{{ ' a '.strip() }}{{ 'xax'.strip('x') }}{{ 'xa'|trim('x') }}{{ ' a '|trim }}{{ 'ab'.rstrip('b') }}",
        "{{ 1 is eq 1 }}{{ messages is ne [] }}{{ 'a' is lower }}{{ 5 is gt 4 }}{{ 5 - 4 }}",
        "{{ {'a': 1}.keys() - ['b'] }}",
        "{% for m in messages %}{{ loop.changed(m.role) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{{ cycler(1, 2).next() }}",
        "{{ 'the end'|title }}{{ 'see https://a.b/c now'|urlize }}{{ '<b>x</b>'|striptags }}",
        "{% set x = 'ab' * 2 %}{% filter upper %}{{ x }}{% endfilter %}{{ lipsum is defined }}",
    ],
)
def test_everything_else_is_as_in_the_sandbox(template: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = ImmutableSandboxedEnvironment().from_string(template).render(messages=messages)
    assert BoundedEnvironment().from_string(template).render(messages=messages) == expected


def test_long_messages_are_no_huge_values() -> None:
    text = "one, two\n" * 400_000
    template = (
        "{{ m.replace('\n', '\n    ') }}{{ m|indent }}{{ '%s' % m }}{{ [m, m]|join(' ') }}{{ m.split('\n')|join(' ') }}"
    )
    expected = ImmutableSandboxedEnvironment().from_string(template).render(m=text)
    assert BoundedEnvironment().from_string(template).render(m=text) == expected
