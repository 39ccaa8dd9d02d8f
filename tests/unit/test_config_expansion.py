"""Properties of `${VAR}` expansion and of secret masking."""

from __future__ import annotations

import os
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from ratesync._schemas import Expanded, mask_secrets
from ratesync.config import expand

plain = st.text(st.characters(exclude_characters="$\0", codec="utf-8"))
no_brace = st.text(st.characters(exclude_characters="${}\0", codec="utf-8"))
names = st.from_regex(r"RSX_[A-Za-z0-9_]{0,10}", fullmatch=True)
values = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


@given(text=st.text())
def test_text_without_a_reference_is_returned_unchanged(text: str) -> None:
    if "${" not in text:
        assert expand(text, "here") is text


@given(before=plain, name=names, value=values, after=plain)
def test_a_reference_becomes_the_value_and_nothing_else_changes(
    before: str, name: str, value: str, after: str
) -> None:
    with mock.patch.dict(os.environ, {name: value}):
        result = expand(f"{before}${{{name}}}{after}", "here")
    assert result == before + value + after  # also when the value itself looks like a reference
    assert isinstance(result, Expanded)


@given(name=names, default=no_brace)
def test_the_default_counts_only_for_undefined_variables(name: str, default: str) -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop(name, None)
        assert expand(f"${{{name}:-{default}}}", "here") == default
        os.environ[name] = ""
        assert expand(f"${{{name}:-{default}}}", "here") == ""


@given(parts=st.lists(st.tuples(plain, names), min_size=1))
def test_a_doubled_dollar_writes_the_reference_literally(parts: list[tuple[str, str]]) -> None:
    text = "".join(f"{before}$${{{name}}}" for before, name in parts)
    result = expand(text, "here")
    assert result == "".join(f"{before}${{{name}}}" for before, name in parts)
    assert not isinstance(result, Expanded)


@given(
    password=st.text(st.characters(codec="utf-8"), min_size=6).filter(lambda text: text not in "user:db"),
    host=st.sampled_from(["db.example", "10.0.0.1:5432", "[::1]:5432", "a,b"]),
)
def test_no_password_of_a_url_survives_masking(password: str, host: str) -> None:
    marked = f"<{password}>"
    assert marked not in mask_secrets(f"postgresql://user:{marked}@{host}/db?sslmode=require")


@given(password=st.from_regex(r"[^\s'\\]{3,20}", fullmatch=True))
def test_no_password_of_a_key_value_string_survives_masking(password: str) -> None:
    marked = f"<{password}>"
    for text in (f"host=h password={marked} user=u", f"host=h Password = '{marked}' user=u"):
        assert marked not in mask_secrets(text)


def test_masking_keeps_what_is_not_secret() -> None:
    assert mask_secrets("postgresql://app:pw@h:5432/db") == "postgresql://app:***@h:5432/db"
    assert mask_secrets("postgresql://app@h:5432/db") == "postgresql://app@h:5432/db"
    assert mask_secrets("host=h user=u dbname=d") == "host=h user=u dbname=d"
    assert mask_secrets("host=h password='a b\\' c' user=u") == "host=h password=*** user=u"
    assert mask_secrets("") == ""
