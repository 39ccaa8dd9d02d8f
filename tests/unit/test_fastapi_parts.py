"""The parts of contrib.fastapi without an application: addresses, headers, responses, a missing extra."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

import ratesync
from ratesync.contrib import fastapi
from ratesync.contrib.fastapi import (
    RateLimitExceededError,
    RateLimitResult,
    create_rate_limit_response,
    get_client_ip,
    get_rate_limit_headers,
    is_private_ip,
    rate_limit_exception_handler,
    set_rate_limit_headers,
    validate_ip,
)
from ratesync.contrib.fastapi.headers import Policy, merge_rate_limit_headers, policies_of
from ratesync.contrib.fastapi.identity import safe_key

pytestmark = pytest.mark.usefixtures("clean")


def request(peer: str | None, *headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return Request({"type": "http", "headers": raw, "client": (peer, 1) if peer is not None else None})


def xff(*values: str) -> list[tuple[str, str]]:
    return [("x-forwarded-for", value) for value in values]


# Client addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "headers", "expected"),
    [
        (None, [], "unknown"),
        ("testclient", [], "unknown"),
        ("", xff("9.9.9.9"), "unknown"),
        ("203.0.113.5", [], "203.0.113.5"),
        # A stranger says what he likes.
        ("203.0.113.5", xff("9.9.9.9"), "203.0.113.5"),
        ("203.0.113.5", [("x-real-ip", "9.9.9.9")], "203.0.113.5"),
        # One proxy, two proxies; the left end is the attacker's.
        ("10.0.0.1", xff("9.9.9.9"), "9.9.9.9"),
        ("10.0.0.1", xff("1.1.1.1, 9.9.9.9"), "9.9.9.9"),
        ("10.0.0.1", xff("1.1.1.1, 9.9.9.9, 10.0.0.2"), "9.9.9.9"),
        ("10.0.0.1", xff("1.1.1.1", "9.9.9.9", "10.0.0.2"), "9.9.9.9"),
        ("10.0.0.1", xff("10.0.0.9,1.1.1.1"), "1.1.1.1"),
        # Only proxies: the farthest one known.
        ("10.0.0.1", xff("10.0.0.3, 10.0.0.2"), "10.0.0.3"),
        # Garbage: whoever wrote it is the last one known.
        ("10.0.0.1", xff("9.9.9.9, garbage"), "10.0.0.1"),
        ("10.0.0.1", xff("9.9.9.9, garbage, 10.0.0.2"), "10.0.0.2"),
        ("10.0.0.1", xff(""), "10.0.0.1"),
        ("10.0.0.1", xff("9.9.9.9, ,"), "9.9.9.9"),
        ("10.0.0.1", xff("unknown"), "10.0.0.1"),
        # X-Real-IP only where there is no X-Forwarded-For.
        ("10.0.0.1", [("x-real-ip", "9.9.9.9")], "9.9.9.9"),
        ("10.0.0.1", [("x-real-ip", "garbage")], "10.0.0.1"),
        ("10.0.0.1", [("x-real-ip", "9.9.9.9"), *xff("10.0.0.7")], "10.0.0.7"),
        # Forwarded is not read.
        ("10.0.0.1", [("forwarded", "for=9.9.9.9")], "10.0.0.1"),
        # IPv6, ports, zones, mapped addresses.
        ("::1", xff("2001:DB8::0001"), "2001:db8::1"),
        ("fd00::1", xff("[2001:db8::1]:443"), "2001:db8::1"),
        ("10.0.0.1", xff('"[2001:db8::1]"'), "2001:db8::1"),
        ("10.0.0.1", xff("9.9.9.9:8080"), "9.9.9.9"),
        ("10.0.0.1", xff("9.9.9.9:x"), "10.0.0.1"),
        ("10.0.0.1", xff("[2001:db8::1]:99999999"), "10.0.0.1"),
        ("::ffff:10.0.0.1", xff("::ffff:9.9.9.9"), "9.9.9.9"),
        ("fe80::1%eth0", [], "fe80::1"),
    ],
)
def test_the_client_is_found_from_the_right(
    peer: str | None, headers: list[tuple[str, str]], expected: str
) -> None:
    assert get_client_ip(request(peer, *headers)) == expected


def test_trusted_proxies_come_from_the_argument_the_call_and_the_default() -> None:
    incoming = request("198.51.100.7", *xff("9.9.9.9"))
    assert get_client_ip(incoming) == "198.51.100.7"
    assert get_client_ip(incoming, ["198.51.100.0/24"]) == "9.9.9.9"
    assert get_client_ip(incoming, ["198.51.100.7"]) == "9.9.9.9"
    ratesync.configure_fastapi(["198.51.100.0/24"])
    assert get_client_ip(incoming) == "9.9.9.9"
    assert get_client_ip(incoming, []) == "198.51.100.7"
    ratesync.configure_fastapi([])
    assert get_client_ip(request("10.0.0.1", *xff("9.9.9.9"))) == "10.0.0.1"
    with pytest.raises(ratesync.ConfigValidationError, match=r"10\.0\.0\.0/99"):
        get_client_ip(incoming, ["10.0.0.0/99"])


def test_a_very_long_list_is_walked_for_a_bounded_number_of_hops() -> None:
    incoming = request("10.0.0.1", *xff("9.9.9.9," + ",".join(["10.0.0.2"] * 5000)))
    assert get_client_ip(incoming) == "10.0.0.2"


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=60), max_size=4), st.sampled_from("rx"))
def test_no_header_raises(values: list[str], kind: str) -> None:
    name = "x-real-ip" if kind == "r" else "x-forwarded-for"
    found = get_client_ip(request("10.0.0.1", *((name, value) for value in values)))
    assert validate_ip(found) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3.4", "1.2.3.4"),
        (" 1.2.3.4 ", "1.2.3.4"),
        ("01.2.3.4", None),
        ("1.2.3", None),
        ("1.2.3.4%eth0", None),
        ("", None),
        ("[::1", None),
        ("::1", "::1"),
        (None, None),
        (5, None),
    ],
)
def test_validate_ip(text: Any, expected: str | None) -> None:
    assert validate_ip(text) == expected


def test_is_private_ip() -> None:
    assert [is_private_ip(ip) for ip in ("10.0.0.1", "127.0.0.1", "::1", "240.0.0.1", "fd00::1")] == [
        True
    ] * 5
    assert [is_private_ip(ip) for ip in ("9.9.9.9", "2606:4700::1", "x")] == [False] * 3


@given(st.text(), st.integers(1, 200))
def test_every_identifier_becomes_a_key_that_the_limiter_takes(identifier: str, name_length: int) -> None:
    limiter_id = "n" * name_length
    ratesync.configure_limiter(limiter_id, rate_per_second=1.0)
    with ratesync.acquire(limiter_id, timeout=0, key=safe_key(limiter_id, identifier)) as permit:
        assert permit.limiter_id.startswith(f"{limiter_id}:")
    ratesync.get_limiter(limiter_id).reset(safe_key(limiter_id, identifier)).wait()


def test_different_identifiers_stay_different() -> None:
    names = ["a" * 300, "A" * 300, "a" * 301, "a\0", "a\0b", "\ud800", "\ud801"]
    assert len({safe_key("api", name) for name in names}) == len(names)


# Headers ------------------------------------------------------------------------------------------


def result(**fields: Any) -> RateLimitResult:
    fields = {"allowed": True, "limit": 10, "remaining": 4, "reset_in": 2.1, "limiter_id": "api", **fields}
    return RateLimitResult(**fields)


def test_the_result_counts_time_in_whole_seconds_rounded_up() -> None:
    plain = RateLimitResult(False, 10, 0, 2.1)
    assert plain.retry_after == 3
    assert time.time() + 2 <= plain.reset_at <= time.time() + 3.1
    assert RateLimitResult(False, 10, 0, 0.0).retry_after == 1


def test_the_legacy_form() -> None:
    headers = get_rate_limit_headers(result())
    assert list(headers) == ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"]
    assert abs(int(headers["X-RateLimit-Reset"]) - time.time()) < 5
    assert get_rate_limit_headers(result(allowed=False))["Retry-After"] == "3"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("api", '"api"'),
        ('a"b\\c', r'"a\"b\\c"'),
        ("é\n", '"%C3%A9%0A"'),
        ("a\r\nSet-Cookie: x", '"a%0D%0ASet-Cookie: x"'),
    ],
)
def test_names_are_structured_field_strings(name: str, written: str) -> None:
    told = get_rate_limit_headers(result(limiter_id=name), headers="ietf")
    assert told == {"RateLimit-Policy": f"{written};q=10", "RateLimit": f"{written};r=4;t=3"}


@pytest.mark.parametrize(
    ("options", "policies"),
    [
        ({"rate_per_second": 100.0}, (Policy("p", 100, 1),)),
        ({"rate_per_second": 100.0, "burst": 100}, (Policy("p", 100, 1),)),
        ({"rate_per_second": 10.0, "burst": 600}, (Policy("p", 600, 60),)),
        ({"rate_per_second": 0.5}, (Policy("p", 1, 2),)),
        ({"rate_per_second": 0.3, "burst": 1}, (Policy("p", 1, 4),)),
        ({"rate_per_second": 1.5}, (Policy("p", 1, 1),)),
        ({"max_concurrent": 7}, (Policy("p", 7),)),
        ({"rate_per_second": 2.0, "limit": 50, "window_seconds": 5.0}, (Policy("p", 2, 1),)),
        (
            {"rate_per_second": 2.0, "max_concurrent": 7},
            (Policy("p", 2, 1), Policy("p:concurrent", 7)),
        ),
    ],
)
def test_a_policy_never_promises_more_than_the_limiter_grants(
    options: dict[str, Any], policies: tuple[Policy, ...]
) -> None:
    ratesync.configure_limiter("p", **options)
    assert policies_of(ratesync.get_limiter("p").get_config()) == policies


def test_merging_keeps_the_tightest_and_lists_all() -> None:
    headers = MutableHeaders()
    merge_rate_limit_headers(headers, [result(remaining=4), result(remaining=2, limiter_id="b")], "both")
    merge_rate_limit_headers(headers, [result(remaining=3, limiter_id="c")], "both")
    assert headers["x-ratelimit-remaining"] == "2"
    assert headers["ratelimit"] == '"api";r=4;t=3, "b";r=2;t=3, "c";r=3;t=3'
    headers["x-ratelimit-remaining"] = "nonsense"
    merge_rate_limit_headers(headers, [result(remaining=9)], "legacy")
    assert headers["x-ratelimit-remaining"] == "9"


def test_set_rate_limit_headers_replaces() -> None:
    response = Response(headers={"X-RateLimit-Remaining": "99"})
    set_rate_limit_headers(response, result())
    assert response.headers["x-ratelimit-remaining"] == "4"


def test_headers_can_be_made_of_any_result_with_the_documented_fields() -> None:
    class Other:
        allowed, limit, remaining, reset_in, reset_at, retry_after = False, 5, 0, 9.0, 1234, 9

    assert get_rate_limit_headers(Other(), headers="both") == {
        "X-RateLimit-Limit": "5",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "1234",
        "RateLimit-Policy": '"default";q=5',
        "RateLimit": '"default";r=0;t=9',
        "Retry-After": "9",
    }


# Responses ----------------------------------------------------------------------------------------


async def test_the_error_its_result_and_the_handlers_response_agree() -> None:
    error = RateLimitExceededError("203.0.113.5", 10, 0, 1234, 30, limiter_id="api")
    assert error.to_result().retry_after == 30
    assert "203.0.113.5" in str(error)
    response = await rate_limit_exception_handler(request(None), error)
    body = {
        "detail": [
            {
                "type": "rate_limit_exceeded",
                "msg": "Rate limit exceeded. Try again in 30 seconds.",
                "context": {"retry_after_seconds": 30, "limit": 10, "limiter": "api"},
            }
        ]
    }
    assert response.status_code == 429
    assert json.loads(bytes(response.body)) == body
    assert response.headers["retry-after"] == "30"
    with pytest.raises(KeyError):
        await rate_limit_exception_handler(request(None), KeyError("x"))


def test_a_response_can_be_made_by_hand() -> None:
    response = create_rate_limit_response(
        RateLimitResult(False, 10, 0, 1.5), "Slow down", identifier="secret"
    )
    assert json.loads(bytes(response.body)) == {
        "detail": [
            {
                "type": "rate_limit_exceeded",
                "msg": "Slow down",
                "context": {"retry_after_seconds": 2, "limit": 10},
            }
        ]
    }


# The package --------------------------------------------------------------------------------------


def test_all_names_of_the_package_exist() -> None:
    for name in fastapi.__all__:
        assert getattr(fastapi, name) is not None
    assert fastapi.FASTAPI_AVAILABLE is True
    assert fastapi.COMPOSITE_AVAILABLE is True
    with pytest.raises(AttributeError):
        _ = fastapi.nonsense


def test_without_starlette_the_package_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("starlette", "fastapi"):
            raise ModuleNotFoundError(name)
import importlib.util as util
real = util.find_spec
util.find_spec = lambda name, package=None: None if name == "starlette" else real(name, package)
sys.meta_path.insert(0, Hide())
from ratesync.contrib import fastapi
assert not fastapi.FASTAPI_AVAILABLE and not fastapi.COMPOSITE_AVAILABLE
assert fastapi.validate_ip("::1") == "::1"
try:
    from ratesync.contrib.fastapi import RateLimitDependency
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "pip install ratesync[fastapi]" in done.stdout
