"""The exception tree: one base, one map from the engine's codes, messages with the cure, picklable."""

from __future__ import annotations

import pickle
import re

import pytest

from ratesync import errors

CODES = [
    "invalid",
    "cancelled",
    "timeout",
    "unavailable",
    "in_doubt",
    "exhausted",
    "protocol",
    "server",
    "closed",
]


def test_every_public_exception_is_a_rate_limiter_error() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.RateLimiterError), name


@pytest.mark.parametrize(
    ("code", "kind", "retryable", "in_doubt"),
    [
        ("invalid", errors.ConfigValidationError, False, False),
        ("cancelled", errors.OperationCancelledError, False, False),
        ("timeout", errors.StoreTimeoutError, True, False),
        ("unavailable", errors.StoreUnavailableError, True, False),
        ("in_doubt", errors.InDoubtError, False, True),
        ("exhausted", errors.StoreExhaustedError, True, False),
        ("protocol", errors.StoreProtocolError, False, False),
        ("server", errors.StoreServerError, False, False),
        ("closed", errors.StoreClosedError, False, False),
        ("internal", errors.InternalError, False, False),
        ("ok", errors.InternalError, False, False),
        ("from the future", errors.InternalError, False, False),
    ],
)
def test_each_status_code_has_one_class(
    code: str, kind: type[errors.RateLimiterError], retryable: bool, in_doubt: bool
) -> None:
    error = errors.from_status(code, "what happened", "", "db")
    assert type(error) is kind
    assert (error.retryable, error.in_doubt, error.sqlstate, error.store) == (retryable, in_doubt, None, "db")
    assert "what happened" in str(error)


@pytest.mark.parametrize(
    ("sqlstate", "retryable"),
    [("40001", True), ("40P01", True), ("53300", True), ("57P03", True), ("42P01", False), ("42501", False)],
)
def test_a_server_error_is_retryable_when_its_sqlstate_says_so(sqlstate: str, retryable: bool) -> None:
    error = errors.from_status("server", "refused", sqlstate, "db")
    assert error.retryable is retryable
    assert error.sqlstate == sqlstate


@pytest.mark.parametrize("reason", ["rate", "concurrency"])
def test_a_denial_is_an_acquisition_error_and_a_timeout(reason: str) -> None:
    error = errors.from_denial("api:tenant", reason, 1.5)
    assert isinstance(error, errors.RateLimiterAcquisitionError)
    assert isinstance(error, TimeoutError)
    assert (error.group_id, error.retry_after, error.attempts) == ("api:tenant", 1.5, None)
    assert "api:tenant" in str(error)
    assert "1.5 s" in str(error)


def test_an_outage_with_fail_closed_is_an_acquisition_error_that_says_why() -> None:
    error = errors.from_denial("api", "outage: cannot connect to db:5432", 0)
    assert isinstance(error, errors.RateLimiterAcquisitionError)
    assert not isinstance(error, TimeoutError)
    assert error.reason == "outage"
    assert "db:5432" in str(error)


def test_one_except_clause_covers_denials_and_store_failures() -> None:
    for code in CODES[1:]:
        assert isinstance(errors.from_status(code, "m"), errors.RateLimiterAcquisitionError)


def test_builtin_bases_that_existing_code_catches() -> None:
    assert issubclass(errors.ConfigValidationError, ValueError)
    assert issubclass(errors.ConfigFileNotFoundError, FileNotFoundError)
    assert issubclass(errors.RateLimiterAlreadyConfiguredError, ValueError)
    assert issubclass(errors.RateLimiterNotInitializedError, RuntimeError)
    assert issubclass(errors.StoreTimeoutError, TimeoutError)


def test_validation_error_carries_and_shows_its_three_parts() -> None:
    error = errors.ConfigValidationError("limiter 'api': burst is not valid", "burst", "an integer", "'x'")
    assert (error.field, error.expected, error.received) == ("burst", "an integer", "'x'")
    assert str(error) == "limiter 'api': burst is not valid: expected an integer, got 'x'"
    assert str(errors.ConfigValidationError("just this")) == "just this"


@pytest.mark.parametrize(
    "error",
    [
        errors.RateLimiterNotConfiguredError("api"),
        errors.RateLimiterAlreadyConfiguredError("api"),
        errors.RateLimiterNotInitializedError("api"),
        errors.RateLimiterNotInitializedError(),
        errors.RateLimiterAcquisitionError("no", "api", 3, retry_after=1.0, reason="rate_limited"),
        errors.ConfigValidationError("bad", "burst", "an integer", "'x'"),
        errors.ConfigFileNotFoundError("configuration file 'x' does not exist"),
        errors.StoreNotFoundError("db", ["dbx"]),
        errors.LimiterNotFoundError("api", ["apis"]),
        errors.from_denial("api", "rate", 2.0),
        *(errors.from_status(code, "m", "40001", "db") for code in CODES),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_survive_pickling(error: errors.RateLimiterError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert (copy.retryable, copy.in_doubt) == (error.retryable, error.in_doubt)


def test_not_found_names_the_nearest_and_the_cure() -> None:
    text = str(errors.LimiterNotFoundError("paymets", ["payments", "search"]))
    assert "did you mean 'payments'?" in text
    assert "configure_limiter('paymets'" in text
    assert "[limiters.paymets]" in text
    assert "search" not in text
    assert "did you mean" not in str(errors.StoreNotFoundError("x", ["payments"]))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("api", "api"),
        ("a-b_1", "a-b_1"),
        ("a.b", '"a.b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("", '""'),
        ("ü", '"ü"'),
    ],
)
def test_table_headers_in_messages_are_valid_toml(name: str, key: str) -> None:
    import tomllib

    assert errors.toml_key(name) == key
    assert tomllib.loads(f"{key} = 1") == {name: 1}


STATE_ERRORS = [
    (errors.StaleVersionError(3, 5), "version 3 was expected and the key has version 5"),
    (errors.StaleVersionError(0, 5), "exists already, with version 5"),
    (errors.StaleVersionError(3, 0), "does not exist"),
    (errors.NotAnIntegerError("visits"), "'visits' is no integer"),
    (errors.CounterOverflowError("visits"), "64 bits"),
    (errors.RolledBackError([1, errors.StaleVersionError(3, 5)]), "operation 1: stale write"),
    (errors.LockTimeoutError("invoice-42", 10.0, "db1:77 worker", 4.5), "held by db1:77 worker.*4.5 s"),
    (errors.LockTimeoutError("invoice-42"), "within 0 s"),
    (errors.LockLostError("invoice-42", 7), "token 7.*fencing"),
    (errors.IdempotencyMismatchError("charge-42"), "another fingerprint.*new key"),
    (errors.OperationInProgressError("charge-42", 1.0), "try again in 1 s"),
    (errors.OperationFailedError("charge-42", "ValueError: no"), "ValueError: no"),
    (errors.LeaseLostError("charge-42", "taken over"), "taken over.*lease="),
]


@pytest.mark.parametrize(("error", "text"), STATE_ERRORS, ids=lambda value: type(value).__name__)
def test_errors_of_state_and_locks_say_the_cure_and_cross_processes(error: Exception, text: str) -> None:
    assert re.search(text, str(error), re.S)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert copy.__dict__.keys() == error.__dict__.keys()


def test_errors_of_state_are_of_the_builtin_kinds_that_callers_expect() -> None:
    assert issubclass(errors.LockTimeoutError, TimeoutError)
    assert issubclass(errors.NotAnIntegerError, TypeError)
    assert issubclass(errors.CounterOverflowError, OverflowError)
    assert isinstance(errors.from_counter("overflow", "k"), errors.CounterOverflowError)
    assert isinstance(errors.from_counter("not_integer", "k"), errors.NotAnIntegerError)
    assert errors.OperationInProgressError("k", 1.0).status_code == 409
