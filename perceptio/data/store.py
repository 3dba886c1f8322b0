"""Bytes from a local disk, S3 or the web, whole or not at all; what fails for a moment is tried again.

The address of another S3 than Amazon's and its keys come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION). Options of the `s3` section of fsspec's own configuration go before the ones
here, for example FSSPEC_S3='{"config_kwargs": {"read_timeout": 60}}'.

Three layers try again. botocore repeats a request that met a 5xx, a throttling, a time-out or a lost connection. s3fs
repeats one whose body was cut off. `retried` repeats the whole operation, for what passes through both: refused
connections, large objects read in pieces, bodies that fail their checksum, a lost answer to the end of an upload.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import fsspec
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

S3 = ("s3", "s3a")
CONNECT_SECONDS, READ_SECONDS = 5, 20  # without a sign of life, after which a request is repeated
CONNECTIONS = 32  # at once to one store
REQUEST_TRIES = 4  # botocore's
BODY_TRIES = 2  # s3fs's; each is REQUEST_TRIES requests
ATTEMPTS = 6  # ours; each is BODY_TRIES or more of the above
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0  # seconds between attempts, doubled each time, with jitter
GIVE_UP_SECONDS = 300  # no further attempt is begun after that

# answers below 500 that pass by themselves; NoSuchUpload follows a lost answer to the end of an upload in parts
PASSING_STATUSES = (408, 409, 425, 429)
PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload")
# answers that s3fs makes look as if just this file were missing or forbidden
SET_UP_CODES = (
    "NoSuchBucket",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
)

log = logging.getLogger(__name__)
Found = TypeVar("Found")


class StoreError(OSError):
    """A store that does not do what it is asked after every attempt; the message names the file and what to do."""


def filesystem(uri: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a local path, s3:// address or other URI that fsspec knows."""
    is_s3 = uri.partition("://")[0] in S3
    fs, path = fsspec.core.url_to_fs(uri, **(_s3_options() if is_s3 else {}))
    if is_s3:
        fs.retries = BODY_TRIES
    return fs, path


def read_bytes(fs: Any, path: str) -> bytes:
    """All bytes of a file. Raises FileNotFoundError, PermissionError, or StoreError where the store fails for long."""
    data: bytes = retried(lambda: fs.cat_file(path), f"reading {fs.unstrip_protocol(path)}")
    return data


def retried(call: Callable[[], Found], doing: str) -> Found:
    """What `call` returns, tried up to ATTEMPTS times where the error may pass. It must be safe to repeat.

    `doing` is for messages: "reading s3://bucket/file". Other errors are raised at once, as they are; StoreError
    where no attempt helped, or where keys, clock or bucket are wrong, so that no file could be had.
    """
    retrying = Retrying(
        retry=retry_if_exception(passes),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(GIVE_UP_SECONDS),
        wait=wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT) + wait_random(0, FIRST_WAIT),
        before_sleep=lambda state: log.info("%s: %s, attempt %d", doing, _failure(state), state.attempt_number),
    )
    try:
        return retrying(call)
    except RetryError as error:
        last = error.last_attempt
        raise StoreError(
            f"{doing}: the store failed {last.attempt_number} times in a row, last with {_named(last.exception())}:"
            " see that it is up and can be reached from here (for S3, AWS_ENDPOINT_URL), then run it again"
        ) from last.exception()
    except (BotoCoreError, OSError) as error:
        answer = answer_of(error)
        if isinstance(error, OSError) and (answer is None or _code(answer) not in SET_UP_CODES):
            raise
        raise StoreError(
            f"{doing}: {_named(answer or error)}: see that the bucket exists and that keys, region and clock are right"
            " where the workers run (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION)"
        ) from error


def passes(error: BaseException) -> bool:
    """True for an error that may pass by itself: a busy or broken store, a lost connection, a body cut short."""
    if isinstance(error, StoreError):
        return False  # what it stands for was tried for long enough
    answer = answer_of(error)
    if answer is not None:
        status = int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status in PASSING_STATUSES or _code(answer) in PASSING_CODES
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in PASSING_STATUSES
    lost = (aiohttp.ClientError, HTTPClientError, BotoConnectionError, ConnectionError, TimeoutError)
    spoilt = (IncompleteReadError, FlexibleChecksumError, ResponseParserError)
    return isinstance(error, (*lost, *spoilt, CredentialRetrievalError))


def stood_already(error: BaseException) -> bool:
    """True where a store refused to create a file because there is one, whether or not s3fs could tell."""
    answer = answer_of(error)
    return isinstance(error, FileExistsError) or (answer is not None and _code(answer) in ("PreconditionFailed", "412"))


def answer_of(error: BaseException) -> ClientError | None:
    """S3's own answer behind an error that s3fs made of it, None for an error of another kind."""
    return next((cause for cause in _causes(error) if isinstance(cause, ClientError)), None)


def _code(answer: ClientError) -> str:
    return str(answer.response.get("Error", {}).get("Code"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _s3_options() -> dict[str, Any]:
    """How s3fs is made: no listing cache, which hides files that others wrote; whole objects in one request."""
    wanted = {key: value for name in S3 for key, value in fsspec.config.conf.get(name, {}).items()}
    config = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": REQUEST_TRIES},
        **wanted.get("config_kwargs", {}),
    }
    return {"max_concurrency": 1, "use_listings_cache": False, **wanted, "config_kwargs": config}


def _failure(state: RetryCallState) -> str:
    return _named(state.outcome.exception() if state.outcome else None)


def _named(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
