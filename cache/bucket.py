"""A bucket of an object store, through obstore: what can pass is tried again with patience, what is hopeless is said at once.

Settings come from the usual environment; docs/store.md lists it. Nothing here is pickled or sent anywhere: another process opens its own.
"""

import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError

from cache.errors import RemoteError

Result = TypeVar("Result")

WHOLE_PUT_BYTES = 32 << 20
"""Larger objects are sent in parts of this size, several at once: what is cut off costs one part."""
CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=120)}
"""Of one request, its body included."""
PATIENCE = timedelta(minutes=3)
"""With a store that fails, or tells to slow down."""
PATIENT = {"max_retries": 12, "retry_timeout": PATIENCE, "backoff": {"init_backoff": timedelta(milliseconds=100), "base": 2}}
IMPATIENT = {"max_retries": 0}
IMPATIENT_CLIENT = {"read_timeout": timedelta(seconds=10)}
"""Until the store has answered once: an address that was mistyped shall not be tried for minutes."""
TRIES_TO_REACH = 2
PAGE_KEYS = 1000
"""What stores list at once."""
METADATA_ADDRESS = "http://169.254.169.254"
METADATA_SECONDS = 1.0
"""A machine in the cloud answers within milliseconds; elsewhere this address swallows what is sent to it."""


class Bucket:
    """One bucket. Keys are text without a slash at either end.

    Every method raises FileNotFoundError for an object that is not there, and RemoteError, one line for people, for all else that fails:
    wrong credentials, no such bucket, a store that can't be reached, or that fails again and again for minutes.
    """

    def __init__(self, scheme: str, name: str, settings: dict[str, Any], client: dict[str, Any]) -> None:
        """Use `open_bucket`."""
        self.address = f"{scheme}://{name}"
        kind: Any = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore}[scheme]
        try:
            self._impatient, self._patient = (
                kind(name, config=settings, client_options=CLIENT | client | more, retry_config=retries)
                for retries, more in ((IMPATIENT, IMPATIENT_CLIENT), (PATIENT, {}))
            )
        except (BaseError, ValueError, OSError) as error:
            raise self.explain(error, "") from None
        self._has_answered = False

    def get(self, key: str) -> bytes:
        return self._ask(key, lambda store: bytes(obstore.get(store, key).bytes()))

    def get_start(self, key: str, length: int) -> tuple[bytes, int]:
        """The first bytes of an object, and the size of all of it."""

        def ask(store: Any) -> tuple[bytes, int]:
            try:
                found = obstore.get(store, key, options={"range": (0, length)})
                return bytes(found.bytes()), found.meta["size"]
            except BaseError as error:
                if "status code: 416" in str(error):  # an empty object has no range
                    return b"", 0
                raise

        return self._ask(key, ask)

    def get_end(self, key: str, length: int) -> bytes:
        return self._ask(key, lambda store: bytes(obstore.get(store, key, options={"range": {"suffix": length}}).bytes()))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which must be in the object; fewer if it ends before `stop`."""
        return self._ask(key, lambda store: bytes(obstore.get_range(store, key, start=start, end=stop)))

    def size(self, key: str) -> int:
        return self._ask(key, lambda store: obstore.head(store, key)["size"])

    def version(self, key: str) -> str:
        """Another one whenever the object was written anew."""
        return self._ask(key, lambda store: str({name: value for name, value in obstore.head(store, key).items() if name != "path"}))

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes a whole object: it appears when its last byte has arrived, in place of what was there."""
        octets = memoryview(data).cast("B")  # a buffer of any other type obstore would take for a list
        in_parts = len(octets) > WHOLE_PUT_BYTES
        self._ask(key, lambda store: obstore.put(store, key, octets, use_multipart=in_parts, chunk_size=WHOLE_PUT_BYTES, max_concurrency=4))

    def delete(self, key: str) -> None:
        """Silent where nothing is there."""
        with suppress(FileNotFoundError):
            self._ask(key, lambda store: obstore.delete(store, key))

    def children(self, prefix: str) -> list[str]:
        """The names right below a prefix, of objects and of further prefixes."""
        listing = self._ask(prefix, lambda store: obstore.list_with_delimiter(store, prefix or None))
        keys = [*listing["common_prefixes"], *(entry["path"] for entry in listing["objects"])]
        return sorted({key.rpartition("/")[2] for key in keys if key != prefix})

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below a prefix, in their order, page by page: a page that breaks off is asked for again, not all of them."""
        last: str | None = None
        page: Any = [None] * PAGE_KEYS
        while len(page) == PAGE_KEYS:
            page = self._ask(prefix, partial(_first_page, prefix, last))
            yield from (entry["path"] for entry in page if entry["path"] != prefix)
            last = page[-1]["path"] if page else None

    def holds_any(self, prefix: str) -> bool:
        return next(self.keys(prefix), None) is not None

    def _ask(self, key: str, request: Callable[[Any], Result]) -> Result:
        """Asks until there is an answer, or no hope of one. All that is asked for here can be done twice without harm."""
        began = time.monotonic()
        for attempt in count():
            try:
                result = request(self._patient if self._has_answered else self._impatient)
            except FileNotFoundError as error:
                if "NoSuchUpload" in str(error) and attempt < TRIES_TO_REACH:  # its parts were joined, and only the answer was lost
                    continue
                self._refuse_missing_bucket(error)
                self._has_answered = True
                raise FileNotFoundError(2, "there is no such object", f"{self.address}/{key}") from None
            except (BaseError, ValueError, OSError) as error:
                if "Could not parse path" in str(error):  # a name that no key can have, such as one with a line break
                    raise FileNotFoundError(2, "there is no such object", f"{self.address}/{key}") from None
                self._has_answered = self._has_answered or not _is_unreachable(error)  # somebody is there
                in_time = time.monotonic() - began < PATIENCE.total_seconds() if self._has_answered else attempt < TRIES_TO_REACH - 1
                if _is_final(error) or not in_time:
                    raise self.explain(error, key) from None
                time.sleep(min(0.1 * 2**attempt, 5.0) * random.uniform(0.5, 1.0))
            else:
                self._has_answered = True
                return result
        raise AssertionError

    def _refuse_missing_bucket(self, error: Exception) -> None:
        """Raises RemoteError if it was the bucket that is not there. Answers to HEAD do not say: then a listing does, once."""
        if "NoSuchBucket" in str(error):
            raise self.explain(error, "") from None
        if not self._has_answered:
            try:
                obstore.list(self._impatient, "hearsae-asks-for-the-bucket").collect()
            except BaseError as of_listing:
                if "NoSuchBucket" in str(of_listing):
                    raise self.explain(of_listing, "") from None

    def explain(self, error: BaseException, key: str) -> RemoteError:
        """What an error of obstore means, in one line."""
        text = str(error)
        status, code, message = (_find(pattern, text) for pattern in (r"status code: (\d{3})", r"<Code>(.*?)</Code>", r"<Message>(.*?)</Message>"))
        where = f"{self.address}/{key}" if key else self.address
        said = ": ".join(part for part in (code, message) if part) or _find(r"status code: (.*?):", text)
        if code == "NoSuchBucket" or (status == "404" and not key):
            return RemoteError(f"there is no bucket {self.address}")
        if status in ("401", "403"):
            return RemoteError(f"{where}: the object store refuses ({said}): check the credentials and what they are allowed to do")
        if _is_unreachable(error):
            endpoint = _find(r"(https?://[^/\s]+)", text)
            return RemoteError(f"{where}: the object store at {endpoint} can't be reached: check its address (AWS_ENDPOINT_URL) and the network")
        if "BadScheme" in text:
            return RemoteError(f"{where}: http:// is spoken only where AWS_ENDPOINT_URL says so")
        if status == "301" or "redirect" in text:
            return RemoteError(f"{where}: the bucket is in another region: set AWS_REGION")
        what = said or text.partition("\n")[0].removeprefix("Generic S3 error: ").removeprefix("Generic GCS error: ")
        return RemoteError(f"{where}: the object store failed ({what})")


def _first_page(prefix: str, after: str | None, store: Any) -> Any:
    return next(iter(obstore.list(store, prefix or None, offset=after, chunk_size=PAGE_KEYS)), [])


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return " ".join(found[1].split())[:200] if found else ""


def _is_final(error: Exception) -> bool:
    """Whether asking again is no use."""
    return bool(re.search(r"status code: 4(?!08|29)\d\d|status code: 3|BadScheme", str(error))) or not isinstance(error, BaseError)


def _is_unreachable(error: BaseException) -> bool:
    return bool(re.search(r"\bConnect,|kind: Timeout", str(error)))  # refused, no such host, silence: as obstore describes its client's errors


# Settings


def open_bucket(scheme: str, name: str) -> Bucket:
    """The bucket, as the environment says; the same one as long as the environment stays. Raises RemoteError without credentials."""
    relevant = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR", "NO_GCE"))))
    return _open_bucket(scheme, name, relevant)


@lru_cache(maxsize=16)
def _open_bucket(scheme: str, name: str, environment: tuple[tuple[str, str], ...]) -> Bucket:
    settings = {"s3": _s3_settings, "gs": _gcs_settings}[scheme](name, dict(environment))
    endpoint = str(settings.get("endpoint") or settings.get("base_url") or "")
    return Bucket(scheme, name, settings, {"allow_http": endpoint.startswith("http://")})


def _s3_settings(bucket: str, env: dict[str, str]) -> dict[str, Any]:
    """What obstore would not find by itself. Raises RemoteError where it would find no credentials, or wait for them."""
    profile = _aws_profile(env)
    settings: dict[str, Any] = {"disable_bulk_delete": True}  # one DELETE per object is understood by every store, and can be tried again
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    if endpoint:
        settings["endpoint"] = endpoint
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or profile.get("region")
    if region:
        settings["region"] = region
    if env.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return settings
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        return settings
    if profile.get("aws_access_key_id") and profile.get("aws_secret_access_key"):
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key", "session_token": "aws_session_token"}
        return settings | {ours: profile[theirs] for ours, theirs in names.items() if profile.get(theirs)}
    others = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(env.get(name) for name in others):
        return settings
    if env.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _answers(env.get("AWS_METADATA_ENDPOINT", METADATA_ADDRESS)):
        return settings
    raise RemoteError(
        f"there are no credentials for s3://{bucket}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile that has "
        "keys, or AWS_SKIP_SIGNATURE=true for a public bucket"
    )


def _aws_profile(env: dict[str, str]) -> dict[str, str]:
    """The profile of the AWS tools' files: keys, region, endpoint_url. Empty where there is none."""
    name = env.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, default, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = ConfigParser(interpolation=None)
        with suppress(OSError, UnicodeDecodeError, ConfigError):
            parser.read(Path(env.get(variable) or default).expanduser(), encoding="utf-8")
            found |= dict(parser[section]) if section in parser else {}
    return found


def _gcs_settings(bucket: str, env: dict[str, str]) -> dict[str, Any]:
    if env.get("STORAGE_EMULATOR_HOST"):
        host = env["STORAGE_EMULATOR_HOST"]
        url = host if "://" in host else f"http://{host}"
        key = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        return {"base_url": url, "service_account_key": json.dumps(key)}
    known = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY",
             "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE")  # fmt: skip
    own = Path("~/.config/gcloud/application_default_credentials.json").expanduser()
    if any(env.get(name) for name in known) or own.is_file():
        return {}
    if env.get("NO_GCE_CHECK", "").lower() != "true" and _answers(METADATA_ADDRESS):
        return {}
    raise RemoteError(
        f"there are no credentials for gs://{bucket}: set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or "
        "GOOGLE_SKIP_SIGNATURE=true for a public bucket"
    )


def _answers(url: str) -> bool:
    """Whether the machine that gives credentials to machines in the cloud is there."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=METADATA_SECONDS):
            return True
    except OSError:
        return False
