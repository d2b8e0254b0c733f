"""Hub errors: one `RmtoolError` for each exception that huggingface_hub raises during a push.

In: the exception. Out: the error with its hint.
HTTP statuses are compared, not the library's subclasses: it also raises RepositoryNotFoundError for a rejected token.
"""

from __future__ import annotations

from typing import Any

from rmtool.errors import Place, RmtoolError
from rmtool.packages import hub_http

LOGIN = "run `hf auth login` or set HF_TOKEN, with a token that has write access"
AGAIN = "run rmtool push again later"
STATUS_HINTS = {
    404: "check the repo id",
    409: "wait until other changes to the repo are done, then run rmtool push again",
    412: "run rmtool push again: the repo changed during the push",
    413: "save the model in smaller shards: a file exceeds the Hub's size limit",
    429: "wait a few minutes, then run rmtool push again: the Hub's rate limit is reached",
}


def library_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises when network or Hub fail; ValueError and KeyError: an unexpected answer."""
    from huggingface_hub.errors import DeviceCodeError, OIDCError

    return (hub_http().HTTPError, OSError, OIDCError, DeviceCodeError, RuntimeError, ValueError, KeyError)


def explain(error: BaseException, repo_id: str) -> RmtoolError:
    """Return the error for an exception of a push to `repo_id`: E0273 to E0275, E0277, E0570, E0771 to E0775."""
    from huggingface_hub.errors import BadRequestError, DeviceCodeError, HfHubHTTPError, OIDCError

    if isinstance(error, RuntimeError) and error.__cause__:  # how the library wraps the failure of one file
        return explain(error.__cause__, repo_id)
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id)
    if isinstance(error, OSError) and error.filename:
        return unreadable(error)
    http, network = hub_http(), "check the network (and HF_ENDPOINT, if set), then run rmtool push again"
    proxy = f"{AGAIN}; check whether a proxy answers instead of the Hub"
    meanings: tuple[tuple[Any, str, str, str], ...] = (
        ((OIDCError, DeviceCodeError, UnicodeEncodeError), "E0273", "invalid Hub token", LOGIN),
        (PermissionError, "E0275", "the token has no write access", LOGIN),  # from the Xet storage
        (http.TimeoutException, "E0772", "the Hub did not answer in time", AGAIN),
        ((http.HTTPError, OSError), "E0771", "the connection to the Hub failed", network),
        (RuntimeError, "E0775", "the upload of a file failed", AGAIN),
        ((ValueError, KeyError), "E0774", "unexpected answer from the Hub", proxy),
    )
    id, what, hint = next(meaning[1:] for meaning in meanings if isinstance(error, meaning[0]))
    if isinstance(error.__cause__, BadRequestError):  # how the library reports invalid metadata
        id, what, hint = "E0277", "invalid card metadata", "fix the YAML metadata at the top of README.md"
    return RmtoolError(id, f"cannot push to {repo_id}: {what}", hint, found=one_line(error))


def _explain_status(error: Any, repo_id: str) -> RmtoolError:
    status, found = error.response.status_code, one_line(error.server_message or "") or None
    if error.response.request.method != "PUT":  # an expired upload address also answers 403, whatever the token
        if status == 401:
            return RmtoolError("E0274", f"cannot push to {repo_id}: the Hub rejected the token", LOGIN, found=found)
        if status == 403:
            return RmtoolError("E0275", f"cannot push to {repo_id}: the token has no write access", LOGIN, found=found)
    hint = STATUS_HINTS.get(status, f"{AGAIN}; check https://status.huggingface.co")
    return RmtoolError("E0773", f"cannot push to {repo_id}: the Hub answered {status}", hint, found=found)


def one_line(text: object) -> str:
    """Return another program's message as one line of at most 300 characters."""
    return " ".join(str(text).split())[:300]


def unreadable(error: OSError) -> RmtoolError:
    """Return the error for a local file that cannot be read."""
    what = f"cannot read {error.filename}: {error.strerror or one_line(error)}"
    return RmtoolError("E0570", what, "check its permissions and the disk", Place(str(error.filename)))
