"""Push: publish a checkpoint folder on the Hugging Face Hub as one commit.

In: a folder with a complete checkpoint, and a repo id. Out: the commit's URL; the folder is not modified.
Only files that match `ALLOWED` are uploaded: never optimizer states, pickled arguments or `.env` files.
Cost: all safetensors headers are read before the first request; then the files are hashed and uploaded, one at a time.

Own code where huggingface_hub 2.4 was found unsafe: `upload_folder` follows symlinks to any file, can split one upload
into several commits, and commits twice when the answer to the first commit is lost (so: `create_commit` of listed
files); its requests have no timeout (`_limit`); `create_repo` repeats endlessly on a conflict (`_fail_on_conflict`);
`get_local_safetensors_metadata` accepts truncated files (`_check_weights`).
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
from rmtool.checkpoint.foreign import require_unquantized
from rmtool.errors import Place, RmtoolError
from rmtool.hub.card import model_card
from rmtool.hub.errors import LOGIN, explain, library_errors, one_line, unreadable
from rmtool.packages import hub_http
from rmtool.ui import Ui

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_S = 30.0  # without a byte sent or received
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
    """Files to upload, files to leave out, and the facts for the card."""

    folder: Path
    files: Mapping[str, Path]  # path in the repo -> local file
    left_out: tuple[str, ...]
    facts: Mapping[str, object]  # the manifest's fields; empty for a checkpoint without one


def push_checkpoint(folder: Path, repo_id: str, *, private: bool, ui: Ui, dry_run: bool = False) -> str:
    """Publish `folder` as one commit on `repo_id`'s main branch and return the commit's URL.

    A README.md in the folder is uploaded as it is; without one, a model card is generated.

    Args:
        private: create the repo private, and refuse an existing public one.
        dry_run: only list the files; needs no token and no network. The URL is then empty.

    Raises:
        RmtoolError: E0271 when the repo id is malformed, E0272 when a symlink leads out of the folder, E0273 without a
            usable token, E0274 when the Hub rejects the token, E0275 when it has no write access, E0276 when the repo
            is public, E0277 when the card's metadata is invalid, E0278 with HF_HUB_OFFLINE, E0408 when the manifest is
            corrupted, E0414 when the weights are quantized, E0471 when the checkpoint is incomplete, E0472 when it is
            corrupted, E0570 when a local file cannot be read, E0771 without a connection, E0772 after a timeout, E0773
            when the Hub answers with an error, E0774 when its answer is unexpected, E0775 when an upload fails.
    """
    check_repo_id(repo_id) if dry_run else check_ready(repo_id)
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


def check_repo_id(repo_id: str) -> None:
    """Check that `repo_id` is `name` or `owner/name`.

    Raises:
        RmtoolError: E0271 when it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        hint = "pass owner/name, or only a name for a repo of your own"
        raise RmtoolError("E0271", f"invalid repo id: {repo_id!r}", hint, found=one_line(error)) from error


def check_ready(repo_id: str) -> str:
    """Return the token to push with; `train` calls this before its first step.

    Raises:
        RmtoolError: E0271, E0273 or E0278, as `push_checkpoint`.
    """
    from huggingface_hub import get_token, is_offline_mode

    check_repo_id(repo_id)
    if is_offline_mode():
        raise RmtoolError("E0278", f"cannot push to {repo_id}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    token = get_token()
    if token is None:
        raise RmtoolError("E0273", "Hub token not found", LOGIN)
    return token


def plan_upload(folder: Path) -> Upload:
    """Select the files to upload, and check that they are a complete checkpoint.

    Raises:
        RmtoolError: E0272, E0408, E0414, E0471 or E0472, as `push_checkpoint`.
        OSError: when a file cannot be read.
    """
    files = _select(folder)
    require_unquantized(folder)
    _check_complete(folder, files)
    uploaded = {name.split("/")[0] for name in files}
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in uploaded))
    manifest = read_manifest(folder)
    return Upload(folder, files, left_out, asdict(manifest) if manifest else {})


def _select(folder: Path) -> dict[str, Path]:
    root = folder.resolve()
    found = {path.relative_to(folder).as_posix(): path for glob in ALLOWED for path in sorted(folder.glob(glob))}
    leading_out = [name for name, path in found.items() if not _stays_inside(path, root)]
    if leading_out:
        what = f"symlinks point to files that are not uploaded: {', '.join(leading_out)}"
        raise RmtoolError("E0272", what, "replace the symlink with a copy", Place(str(folder / leading_out[0])))
    return {name: path for name, path in found.items() if path.is_file()}


def _stays_inside(path: Path, root: Path) -> bool:
    """Decide whether `path` is an allowed file of the folder, or a symlink to one: `tokenizer.json -> .env` is not."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a symlink loop or a dangling symlink
        return False
    return target.is_relative_to(root) and any(target.match(pattern) for pattern in ALLOWED)


def _check_complete(folder: Path, files: Mapping[str, Path]) -> None:
    shards = _shards(files[INDEX]) if INDEX in files else {"model.safetensors"}
    missing = sorted(({"config.json"} | shards) - files.keys())
    if not {"tokenizer.json", "tokenizer_config.json"} & files.keys():
        missing.append("tokenizer.json")
    if missing:
        what = f"incomplete checkpoint: {', '.join(missing)} not found"
        hint = "use a complete checkpoint from rmtool train or save_pretrained"
        raise RmtoolError("E0471", what, hint, Place(str(folder)))
    for path in files.values():
        if path.suffix == ".safetensors":
            _check_weights(path)


def _shards(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupted(index, error) from error


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # compares the header with the file's length, reads no weights
            pass
    except SafetensorError as error:
        raise _corrupted(path, error) from error


def _corrupted(path: Path, error: Exception) -> RmtoolError:
    hint = "save or copy the checkpoint again"
    return RmtoolError("E0472", f"{path.name} is truncated or corrupted", hint, Place(str(path)), one_line(error))


def _describe(upload: Upload, repo_id: str, private: bool, dry_run: bool, ui: Ui) -> None:
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    verb, kind = "would push" if dry_run else "pushing", "private" if private else "public"
    card = "" if CARD in sizes else f" and a generated {CARD}"
    ui.say(f"{verb} {len(sizes)} files ({sum(sizes.values()) / 1e6:,.1f} MB){card} to {repo_id} ({kind})")
    for name, size in sizes.items() if dry_run else ():
        ui.say(f"  {name}  {size:,} bytes")
    if upload.left_out:
        ui.say(f"not uploaded: {', '.join(upload.left_out)}")


def _push(upload: Upload, repo_id: str, private: bool, ui: Ui) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, set_client_factory

    token = check_ready(repo_id)
    set_client_factory(_client)  # for the rest of the process: the library cannot restore its own
    api = HfApi(token=token, library_name="rmtool")
    repo_id = _open_repo(api, repo_id, private, ui)
    additions = [CommitOperationAdd(name, path) for name, path in upload.files.items()]
    if CARD not in upload.files:
        additions.append(CommitOperationAdd(CARD, model_card(upload.folder, repo_id, upload.facts).encode()))
    with ui.progress(f"Pushing {repo_id}", len(additions), "files") as bar:
        for addition in additions:
            # Uploads contents only, to show progress. The repo does not change before the commit.
            api.preupload_lfs_files(repo_id, [addition], free_memory=False)
            bar.advance(note=addition.path_in_repo)
        return str(api.create_commit(repo_id, additions, commit_message="Upload checkpoint with rmtool").commit_url)


def _open_repo(api: HfApi, repo_id: str, private: bool, ui: Ui) -> str:
    """Create the repo if needed, and return its id with the owner."""
    full_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    is_private = api.model_info(full_id).private
    if private and not is_private:
        what = f"{full_id} already exists and is public, but the push is private; nothing was uploaded"
        raise RmtoolError("E0276", what, "set hub.public=true, or use a different repo id")
    if is_private and not private:
        ui.say(f"note: {full_id} already exists and is private, and stays so")
    return full_id


def _client() -> Any:
    """Return the library's HTTP client, with a timeout and without endless repeats."""
    from huggingface_hub.utils._http import hf_request_event_hook  # its own, which refuses requests in offline mode

    hooks: dict[str, list[Any]] = {"request": [hf_request_event_hook, _limit], "response": [_fail_on_conflict]}
    return hub_http().Client(follow_redirects=True, event_hooks=hooks)


def _limit(request: Any) -> None:
    # Not the client's timeout: repo_info passes timeout=None, which overrides it.
    request.extensions = {
        **request.extensions,
        "timeout": dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S),
    }


def _fail_on_conflict(response: Any) -> None:
    """Raise the conflict on which create_repo would repeat its request endlessly, without a pause."""
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code == 409 and b"another conflicting operation" in response.read():
        hf_raise_for_status(response)


@contextlib.contextmanager
def _route_hf_logs(ui: Ui) -> Iterator[None]:
    """Show the library's log and warnings on `ui`, without its progress bars and the signatures in upload URLs."""
    from huggingface_hub.utils import disable_progress_bars

    handler = logging.Handler()
    handler.emit = lambda record: ui.say(re.sub(r"\?\S+", "", record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: ui.say(str(message))
            with disable_progress_bars():
                yield
    finally:
        logger.handlers = handlers
