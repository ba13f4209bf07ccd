"""Values that a file made elsewhere may have: of any type, with odd characters and numbers."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ODD = '\0\x07\x1b[]\x7f\x85\x9b\u2028\u2029\ud800\udfff\ufeff\ufffd\r\n\t\\"é€😀'
TEXTS = st.text(max_size=30) | st.text(alphabet=ODD, max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([1e308, 10**400, -1, 2**63])
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
