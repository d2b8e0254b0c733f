"""A checkpoint folder, published on the Hugging Face Hub as one commit.

In: a folder with a whole checkpoint and a repo id. Out: the commit's URL; the folder itself is not written to.
Only files of `ALLOWED` leave this machine, so optimizer states, pickled arguments and `.env` files stay here.
Cost: every safetensors header is read before the network is touched; then the files are hashed and sent, one at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtool.checkpoint import MANIFEST, read_manifest
from rmtool.errors import Place, RmtoolError
from rmtool.hub.card import model_card
from rmtool.hub.errors import LOGIN, explain, library_errors, one_line, unreadable
from rmtool.ui import Ui

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_S = 30.0  # a request fails when the Hub neither takes nor sends a byte for this long
CARD = "README.md"
INDEX = "model.safetensors.index.json"
ALLOWED = (
    *("*.safetensors", INDEX, "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *(CARD, MANIFEST, "LICENSE*"),
)


@dataclass(frozen=True)
class Upload:
    """What a push sends, and what it leaves here."""

    folder: Path
    files: Mapping[str, Path]  # path in the repo -> local file
    left_out: tuple[str, ...]
    facts: Mapping[str, object]  # of the manifest; empty for somebody else's checkpoint


def push_checkpoint(folder: Path, repo_id: str, *, private: bool, ui: Ui, dry_run: bool = False) -> str:
    """Publish `folder` as one commit on `repo_id`'s main branch and return the commit's URL.

    A README.md in the folder is the user's and goes as it is; without one, a generated card goes in its place.

    Args:
        private: create the repo private, and refuse one that is there and public.
        dry_run: only say what would be sent; needs no token and no network. The URL is then empty.

    Raises:
        RmtoolError: E0271 malformed repo id, E0272 a link leads out of the folder, E0273 no usable token, E0274 token
            refused, E0275 token may not write there, E0276 the repo is public, E0277 the Hub refuses the card's
            metadata, E0278 HF_HUB_OFFLINE is set, E0408 unreadable manifest, E0471 the checkpoint is incomplete,
            E0472 it is damaged, E0570 a file here cannot be read, E0771 no connection, E0772 the Hub is silent,
            E0773 the Hub answers with an error, E0774 its answer is not understood, E0775 an upload failed.
    """
    check_repo_id(repo_id)
    try:
        upload = plan_upload(folder)
        _describe(upload, repo_id, private, dry_run, ui)
    except OSError as error:
        raise unreadable(error) from error
    if dry_run:
        return ""
    with _route_hf_logs(ui):
        try:
            return _push(upload, repo_id, private, ui)
        except library_errors() as error:
            raise explain(error, repo_id) from error


# ---------------------------------------------------------------------------------------------------- this machine


def check_repo_id(repo_id: str) -> None:
    """Raises: RmtoolError: E0271 it is neither `name` nor `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        hint = "give owner/name, or only a name for a repo of your own"
        raise RmtoolError("E0271", f"{repo_id!r} is not a repo id", hint, found=one_line(error)) from error


def check_ready(repo_id: str) -> str:
    """The token to push with. `train` asks before its first step: days later is late to miss it.

    Raises:
        RmtoolError: E0271, E0273 and E0278 of `push_checkpoint`.
    """
    from huggingface_hub import get_token, is_offline_mode

    check_repo_id(repo_id)
    if is_offline_mode():
        raise RmtoolError("E0278", f"{repo_id} cannot be pushed while HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    token = get_token()
    if token is None:
        raise RmtoolError("E0273", "there is no token for the Hub", LOGIN)
    return token


def plan_upload(folder: Path) -> Upload:
    """Choose what is sent, and check that it is a whole checkpoint.

    Raises:
        RmtoolError: E0272, E0408, E0471 and E0472 of `push_checkpoint`.
        OSError: a file cannot be read.
    """
    files = _select(folder)
    _check_whole(folder, files)
    sent = {name.split("/")[0] for name in files}
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in sent))
    manifest = read_manifest(folder)
    return Upload(folder, files, left_out, asdict(manifest) if manifest else {})


def _select(folder: Path) -> dict[str, Path]:
    root = folder.resolve()
    found = {path.relative_to(folder).as_posix(): path for glob in ALLOWED for path in sorted(folder.glob(glob))}
    leading_out = [name for name, path in found.items() if not _stays_inside(path, root)]
    if leading_out:
        what = f"links lead to files that a push does not send: {', '.join(leading_out)}"
        raise RmtoolError(
            "E0272", what, "put a copy of the file in the link's place", Place(str(folder / leading_out[0]))
        )
    return {name: path for name, path in found.items() if path.is_file()}


def _stays_inside(path: Path, root: Path) -> bool:
    """A link may lead only to another allowed file of the folder: `tokenizer.json -> .env` would send the secret."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # links that lead to each other (Python 3.13 says so only when strict), or nowhere
        return False
    return target.is_relative_to(root) and any(target.match(pattern) for pattern in ALLOWED)


def _check_whole(folder: Path, files: Mapping[str, Path]) -> None:
    shards = _shards(files[INDEX]) if INDEX in files else {"model.safetensors"}
    missing = sorted(({"config.json"} | shards) - files.keys())
    if not {"tokenizer.json", "tokenizer_config.json"} & files.keys():
        missing.append("tokenizer.json")
    if missing:
        what = f"the checkpoint is incomplete: it has no {', no '.join(missing)}"
        hint = "name a folder that `rmtool train` or save_pretrained wrote to its end"
        raise RmtoolError("E0471", what, hint, Place(str(folder)))
    for path in files.values():
        if path.suffix == ".safetensors":
            _check_weights(path)


def _shards(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # compares the header with the file's length; reads no weights
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RmtoolError:
    hint = "save or copy the checkpoint again"
    return RmtoolError("E0472", f"{path.name} is cut off or damaged", hint, Place(str(path)), one_line(error))


def _describe(upload: Upload, repo_id: str, private: bool, dry_run: bool, ui: Ui) -> None:
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    verb, kind = "would push" if dry_run else "pushing", "private" if private else "public"
    card = "" if CARD in sizes else f" and a generated {CARD}"
    ui.say(f"{verb} {len(sizes)} files ({sum(sizes.values()) / 1e6:,.1f} MB){card} to {repo_id}, {kind}")
    for name, size in sizes.items() if dry_run else ():
        ui.say(f"  {name}  {size:,} bytes")
    if upload.left_out:
        ui.say(f"not sent: {', '.join(upload.left_out)}")


# ---------------------------------------------------------------------------------------------------- the Hub


def _push(upload: Upload, repo_id: str, private: bool, ui: Ui) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, set_client_factory

    token = check_ready(repo_id)
    set_client_factory(_client)  # for the rest of the process: the library has no way back, and none is needed
    api = HfApi(token=token, library_name="rmtool")
    repo_id = _open_repo(api, repo_id, private, ui)
    additions = [CommitOperationAdd(name, path) for name, path in upload.files.items()]
    if CARD not in upload.files:
        additions.append(CommitOperationAdd(CARD, model_card(upload.folder, repo_id, upload.facts).encode()))
    with ui.progress(f"Pushing {repo_id}", len(additions), "files") as bar:
        for addition in additions:
            # Sends contents only, so that the bar can move. Nothing shows in the repo before the one commit.
            api.preupload_lfs_files(repo_id, [addition], free_memory=False)
            bar.advance(note=addition.path_in_repo)
        return str(api.create_commit(repo_id, additions, commit_message="Upload checkpoint with rmtool").commit_url)


def _open_repo(api: HfApi, repo_id: str, private: bool, ui: Ui) -> str:
    """Create the repo unless it is there; returns its id, with the owner's name."""
    full_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    is_private = api.model_info(full_id).private
    if private and not is_private:
        hint = "give --public if everybody may read the checkpoint, or another repo id"
        raise RmtoolError("E0276", f"{full_id} is public and a private repo was asked for; nothing was sent", hint)
    if is_private and not private:
        ui.say(f"{full_id} is private and stays so")
    return full_id


def _client() -> Any:
    """The library's HTTP client, made unable to wait for ever."""
    import httpx2

    return httpx2.Client(follow_redirects=True, event_hooks={"request": [_limit], "response": [_fail_on_conflict]})


def _limit(request: Any) -> None:
    # Not the client's own timeout: some of the library's calls ask for none by name (repo_info), which outdoes it.
    request.extensions = {
        **request.extensions,
        "timeout": dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S),
    }


def _fail_on_conflict(response: Any) -> None:
    """create_repo would ask again at once, and for ever, while the Hub is busy with another request of this owner."""
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code == 409 and b"another conflicting operation" in response.read():
        hf_raise_for_status(response)


@contextlib.contextmanager
def _route_hf_logs(ui: Ui) -> Iterator[None]:
    """The library's bars off, its log and warnings shown by `ui`, without the signatures in its upload URLs."""
    from huggingface_hub.utils import disable_progress_bars

    handler = logging.Handler()
    handler.emit = lambda record: ui.say(re.sub(r"\?\S+", "", record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    kept, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: ui.say(str(message))
            with disable_progress_bars():
                yield
    finally:
        logger.handlers = kept
