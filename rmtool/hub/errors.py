"""What huggingface_hub's errors during a push mean for the user, and what to do next.

In: an exception of the library. Out: one `RmtoolError`. A row-3 neighbor of `hub`, its only user.
"""

from __future__ import annotations

from typing import Any

from rmtool.errors import Place, RmtoolError

LOGIN = "run `hf auth login` or set HF_TOKEN, with a token that may write"
AGAIN = "push again later"
ADVICE = {
    404: "check the repo id",
    409: "something else changes the repo; wait until it is done and push again",
    412: "something else changed the repo; push again",
    413: "save the model in smaller shards: the Hub does not take files of this size",
    429: "wait some minutes and push again: the Hub limits how much is asked of it",
}


def library_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a failing network or Hub; ValueError and KeyError stand for odd answers."""
    import httpx2
    from huggingface_hub.errors import DeviceCodeError, OIDCError

    return (httpx2.HTTPError, OSError, OIDCError, DeviceCodeError, RuntimeError, ValueError, KeyError)


def explain(error: BaseException, repo_id: str) -> RmtoolError:
    """What an error that huggingface_hub raised during a push to `repo_id` means for the user."""
    import httpx2
    from huggingface_hub.errors import BadRequestError, DeviceCodeError, HfHubHTTPError, OIDCError

    if isinstance(error, RuntimeError) and error.__cause__:  # how the library wraps what happened to one file
        return explain(error.__cause__, repo_id)
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id)
    if isinstance(error, OSError) and error.filename:
        return unreadable(error)
    if isinstance(error.__cause__, BadRequestError):  # how the library says what validate-yaml answered
        hint = "mend the YAML at the top of README.md"
        return RmtoolError(
            "E0277", f"push to {repo_id}: the Hub refuses the card's metadata", hint, found=one_line(error)
        )
    network = "check the network (and HF_ENDPOINT, if it is set) and push again"
    proxy = f"{AGAIN}; a proxy that answers with a page of its own has this effect, too"
    meanings: tuple[tuple[Any, str, str, str], ...] = (
        ((OIDCError, DeviceCodeError, UnicodeEncodeError), "E0273", "the token for the Hub cannot be used", LOGIN),
        (PermissionError, "E0275", f"this token may not write to {repo_id}", LOGIN),  # from the Xet storage
        (httpx2.TimeoutException, "E0772", "the Hub took too long to answer", AGAIN),
        ((httpx2.HTTPError, OSError), "E0771", "the connection to the Hub failed", network),
        (RuntimeError, "E0775", "the Hub's storage did not take a file", AGAIN),
        ((ValueError, KeyError), "E0774", "the Hub's answer was not understood", proxy),
    )
    id, what, hint = next(meaning[1:] for meaning in meanings if isinstance(error, meaning[0]))
    return RmtoolError(id, f"push to {repo_id}: {what}", hint, found=one_line(error))


def _explain_status(error: Any, repo_id: str) -> RmtoolError:
    status, said = error.response.status_code, one_line(error.server_message or "") or None
    if error.response.request.method != "PUT":  # an upload address that has run out answers 403, whatever the token
        if status == 401:
            return RmtoolError("E0274", f"the Hub does not accept the token for a push to {repo_id}", LOGIN, found=said)
        if status == 403:
            return RmtoolError("E0275", f"the token may not write to {repo_id}", LOGIN, found=said)
    hint = ADVICE.get(status, f"{AGAIN}; https://status.huggingface.co shows how the Hub is")
    return RmtoolError("E0773", f"the Hub answered {status} to the push to {repo_id}", hint, found=said)


def one_line(text: object) -> str:
    """Another program's words as one line of ours."""
    return " ".join(str(text).split())[:300]


def unreadable(error: OSError) -> RmtoolError:
    what = f"a file here cannot be read: {error.strerror or one_line(error)}"
    return RmtoolError("E0570", what, "check its permissions and the disk", Place(str(error.filename)))
