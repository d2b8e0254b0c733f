"""rmtool push against a local Hub: files uploaded and never uploaded, the error of each failure, the model card."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import sanitizing
from hub_stub import GATEWAY_PAGE, TOKEN, Repo
from safetensors.numpy import save_file

from rmtool.checkpoint import Manifest, write_manifest
from rmtool.errors import RmtoolError
from rmtool.hub import push as hub
from rmtool.hub.card import model_card
from rmtool.ui import SilentUi

CANARY = b"hf_CanaryThatMustStayOnThisMachine"
MANIFEST = Manifest(
    fingerprint="f" * 64,
    max_length=1024,
    precision="bf16",
    on_long="error",
    on_empty="error",
    recipe="/home/someone/recipes/small.yaml",
    base_model="HuggingFaceTB/SmolLM2-135M",
    train_data=["Anthropic/hh-rlhf:train", "/home/someone/secret-project/pairs.jsonl"],
    settings={"optimizer": {"lr": 1e-5}, "output_dir": "/home/someone/runs/7"},
    metrics={"eval/rm/accuracy": 0.71875},
    versions={"torch": "2.13.0"},
)
USER_CARD = "---\nlicense: apache-2.0\n---\nMine.\n"


class Recorder(SilentUi):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, for tests that do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model")


def make_checkpoint(folder: Path) -> Path:
    """Write the files of a checkpoint, and next to them files that must not be uploaded."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    save_file({"score.weight": np.arange(64, dtype=np.float32)}, folder / "model.safetensors")
    write_manifest(folder, MANIFEST)
    for name in ("optimizer.pt", "training_args.bin", ".env", "wandb.log", "pytorch_model.bin"):
        (folder / name).write_bytes(CANARY)
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "model.safetensors").write_bytes(CANARY)
    return folder


def push(folder: Path, repo_id: str = "me/rm", private: bool = True, **options: Any) -> str:
    return hub.push_checkpoint(folder, repo_id, private=private, ui=SilentUi(), **options)


def refusal(folder: Path, repo_id: str = "me/rm", private: bool = True) -> RmtoolError:
    with pytest.raises(RmtoolError) as caught:
        push(folder, repo_id, private)
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------- files


def test_push_uploads_the_checkpoint_byte_for_byte_in_one_commit_and_does_not_modify_the_folder(stub, folder):
    before = contents(folder)
    url = push(folder)
    repo = stub.repos["me/rm"]
    sent = dict(repo.files)
    card = sent.pop("README.md")
    expected = ["LICENSE", "chat_template.jinja", "config.json", "model.safetensors", "rmtool.json"]
    assert sorted(sent) == [*expected, "tokenizer.json", "tokenizer_config.json"]
    assert all(before[name] == content for name, content in sent.items())
    assert card.decode() == model_card(folder, "me/rm", json.loads(before["rmtool.json"]))
    assert len(repo.commits) == 1
    assert url == f"{stub.url}/me/rm/commit/{repo.sha}"
    assert contents(folder) == before


def test_nothing_outside_the_allowlist_is_uploaded_and_the_ui_lists_it(stub, untouched):
    ui = Recorder()
    hub.push_checkpoint(untouched, "me/rm", private=True, ui=ui)
    assert len(stub.seen) > 5
    assert not [seen.route for seen in stub.seen if CANARY in seen.body]
    assert not any(CANARY in content for content in stub.repos["me/rm"].files.values())
    assert "not uploaded: .env, global_step7, optimizer.pt, pytorch_model.bin, training_args.bin, wandb.log" in ui.lines


def test_the_token_goes_to_the_hub_and_not_to_its_storage(stub, untouched):
    push(untouched)
    assert {seen.authorization for seen in stub.seen if seen.route != "put"} == {f"Bearer {TOKEN}"}
    assert {seen.authorization for seen in stub.seen if seen.route == "put"} == {""}


def test_a_sharded_checkpoint_of_another_tool_is_pushed_without_a_manifest(stub, folder):
    for name in ("model.safetensors", "rmtool.json"):
        (folder / name).unlink()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        save_file({shard: np.zeros(3)}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {shard: shard for shard in shards}}))
    push(folder)
    assert {*shards, "model.safetensors.index.json"} < stub.repos["me/rm"].files.keys()


def test_the_users_own_card_is_pushed_as_it_is(stub, folder):
    (folder / "README.md").write_text(USER_CARD)
    push(folder)
    assert stub.repos["me/rm"].files["README.md"].decode() == USER_CARD


def test_a_second_push_of_the_same_files_makes_no_second_commit(stub, untouched):
    assert push(untouched) == push(untouched)
    assert len(stub.repos["me/rm"].commits) == 1
    assert stub.routes_seen().count("put") == 2  # model.safetensors and tokenizer.json, once each


def test_a_name_without_an_owner_becomes_a_repo_of_ones_own_and_the_card_says_so(stub, untouched):
    push(untouched, "rm")
    assert b'"me/rm"' in stub.repos["me/rm"].files["README.md"]


def test_a_dry_run_lists_files_and_sizes_without_token_or_network(stub, untouched, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    ui = Recorder()
    assert hub.push_checkpoint(untouched, "me/rm", private=True, ui=ui, dry_run=True) == ""
    assert not stub.seen
    assert f"  config.json  {(untouched / 'config.json').stat().st_size} bytes" in ui.lines


def test_push_works_in_a_fresh_process_and_importing_it_is_cheap(stub, untouched, tmp_path):
    code = """if True:
        import sys, pathlib, rmtool.hub.push, rmtool.ui
        slow = {"huggingface_hub", "httpx2", "torch", "transformers", "safetensors"} & sys.modules.keys()
        assert not slow, slow
        folder = pathlib.Path(sys.argv[1])
        print(rmtool.hub.push.push_checkpoint(folder, "me/rm", private=True, ui=rmtool.ui.TerminalUi()))
        """
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
    env = {**keep, **switches, "HF_ENDPOINT": stub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code, str(untouched)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=Path(hub.__file__).parents[1], timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, f"{stub.url}/me/rm/commit/{stub.repos['me/rm'].sha}"), done
    assert "Pushing me/rm: 8/8 files" in done.stderr
    assert "%|" not in done.stderr  # the library's own bars


# ---------------------------------------------------------------------------------------------------- private, public


def test_a_new_repo_is_private_unless_asked_otherwise(stub, untouched):
    push(untouched, "me/hidden")
    push(untouched, "me/shown", private=False)
    assert (stub.repos["me/hidden"].private, stub.repos["me/shown"].private) == (True, False)


def test_a_public_repo_is_not_pushed_to_when_a_private_one_was_asked_for(stub, untouched):
    stub.repos["me/rm"] = Repo(private=False)
    error = refusal(untouched)
    assert (error.exit_code, error.id) == (2, "E0276")
    assert "hub.public=true" in error.hint  # the command line has --public: `in_words_of`
    assert stub.routes_seen() == ["create", "info"]
    push(untouched, private=False)
    assert len(stub.repos["me/rm"].commits) == 1


# ---------------------------------------------------------------------------------------------------- local checks


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_not_pushed(stub, folder, name):
    (folder / name).unlink()
    error = refusal(folder)
    assert (error.exit_code, error.id) == (4, "E0471")
    assert name in error.what
    assert not stub.seen


def test_a_checkpoint_without_tokenizer_or_a_folder_that_is_not_there_is_not_pushed(stub, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refusal(folder).id == "E0471"
    assert refusal(folder / "nowhere").id == "E0471"
    assert not stub.seen


def test_a_missing_shard_and_a_truncated_shard_are_not_pushed(stub, folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    error = refusal(folder)
    assert (error.exit_code, error.id) == (4, "E0471")
    assert "model-2.safetensors" in error.what
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    error = refusal(folder)
    assert (error.exit_code, error.id) == (4, "E0472")
    index.write_text("[]")
    assert refusal(folder).id == "E0472"
    assert not stub.seen


def test_a_corrupted_manifest_is_not_pushed(stub, folder):
    (folder / "rmtool.json").write_text("{")
    assert refusal(folder).id == "E0408"
    assert not stub.seen


@pytest.mark.parametrize("target", ["../secret.json", ".env", "gone.json", "tokenizer.json"])
def test_a_symlink_out_of_the_folder_or_to_a_file_that_is_not_uploaded_is_refused(stub, folder, target):
    (folder.parent / "secret.json").write_bytes(CANARY)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(target)  # the last target is the link itself
    error = refusal(folder)
    assert (error.exit_code, error.id) == (2, "E0272")
    assert "tokenizer.json" in error.what
    assert not stub.seen


def test_a_symlink_to_a_file_of_the_checkpoint_is_followed(stub, folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    push(folder)
    files = stub.repos["me/rm"].files
    assert files["model.safetensors"] == files["weights.safetensors"] == (folder / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("repo_id", ["me/rm/x", "me--rm", "-rm", "me/r m", "", "me/rm.git"])
def test_a_malformed_repo_id_is_refused(stub, untouched, repo_id):
    error = refusal(untouched, repo_id)
    assert (error.exit_code, error.id) == (2, "E0271")
    assert not stub.seen


@pytest.mark.parametrize("token", [None, "hf_naïve"])
def test_without_a_usable_token_the_login_command_is_named(stub, untouched, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    error = refusal(untouched)
    assert (error.exit_code, error.id) == (2, "E0273")
    assert "hf auth login" in error.hint
    assert "HF_TOKEN" in error.hint
    assert not stub.seen


def test_offline_mode_is_the_users_own_setting(stub, untouched, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refusal(untouched)
    assert (error.exit_code, error.id) == (2, "E0278")
    assert not stub.seen


# ---------------------------------------------------------------------------------------------------- Hub failures


@pytest.mark.parametrize(
    ("route", "kind", "body", "id"),
    [
        ("create", 401, b"", "E0274"),
        ("create", 403, b"", "E0275"),
        ("create", 404, b"", "E0773"),
        ("create", 409, b"Cannot create repo: another conflicting operation is in progress", "E0773"),
        ("create", 409, b'{"error": "odd"}', "E0774"),
        ("create", 429, b"", "E0773"),
        ("create", 500, b"", "E0773"),
        ("create", 502, GATEWAY_PAGE, "E0773"),
        ("create", 200, GATEWAY_PAGE, "E0774"),
        ("create", "drop", b"", "E0771"),
        ("info", 404, b"", "E0773"),
        ("info", 502, GATEWAY_PAGE, "E0773"),
        ("validate-yaml", 400, b'{"errors": [{"message": "license is unknown"}]}', "E0277"),
        ("validate-yaml", 502, GATEWAY_PAGE, "E0774"),
        ("preupload", 401, b"", "E0274"),
        ("preupload", 403, b"", "E0275"),
        ("preupload", 404, b"", "E0773"),
        ("preupload", 409, b"", "E0773"),
        ("batch", 403, b"", "E0275"),
        ("put", 403, GATEWAY_PAGE, "E0773"),  # an expired upload address: not about the token
        ("commit", 401, b"", "E0274"),
        ("commit", 403, b"", "E0275"),
        ("commit", 404, b"", "E0773"),
        ("commit", 409, b"", "E0773"),
        ("commit", 412, b"", "E0773"),
        ("commit", 413, b"", "E0773"),
        ("commit", 429, b"", "E0773"),
        ("commit", 500, b"", "E0773"),
        ("commit", 502, GATEWAY_PAGE, "E0773"),
        ("commit", 200, b"{}", "E0774"),
        ("commit", "drop", b"", "E0771"),
    ],
)
def test_each_failure_of_the_hub_is_one_error_with_its_code_and_makes_no_commit(stub, untouched, route, kind, body, id):
    stub.fail(route, kind, body=body)
    error = refusal(untouched)
    assert error.id == id
    assert error.exit_code == int(id[1:3])
    assert "me/rm" in error.what
    assert "\n" not in error.what + error.hint + (error.found or "")
    assert "secret" not in f"{error.what} {error.found}"  # the signature in an upload address
    assert stub.routes_seen().count(route) <= 2
    assert not any(repo.commits for repo in stub.repos.values())


@pytest.mark.parametrize("route", ["create", "info", "validate-yaml", "commit"])
def test_a_silent_hub_is_an_error_after_the_timeout(stub, untouched, monkeypatch, route):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    stub.fail(route, "silence")
    error = refusal(untouched)
    assert (error.exit_code, error.id) == (7, "E0772")
    assert stub.routes_seen().count(route) <= 2  # each waits for the timeout


def test_no_server_at_the_address(stub, untouched, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        error = refusal(untouched)
    assert (error.exit_code, error.id) == (7, "E0771")


@pytest.mark.parametrize(("kind", "id"), [(500, "E0773"), ("drop", "E0771")])
def test_storage_that_keeps_failing_is_an_error_without_its_signed_addresses(stub, untouched, monkeypatch, kind, id):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    stub.fail("put", kind)
    ui = Recorder()
    with pytest.raises(RmtoolError) as caught:
        hub.push_checkpoint(untouched, "me/rm", private=True, ui=ui)
    assert caught.value.id == id
    assert any("Retrying" in line for line in ui.lines)
    assert not any("secret" in line for line in [*ui.lines, str(caught.value.as_dict())])
    assert not stub.repos["me/rm"].commits


def test_a_request_that_fails_once_is_retried_by_the_library(stub, untouched, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    stub.fail("preupload", 429, times=1)
    push(untouched)
    assert len(stub.repos["me/rm"].commits) == 1


def test_a_file_that_cannot_be_read_here_is_not_the_hubs_fault(stub, untouched, monkeypatch):
    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hub, "_check_weights", refuse)
    error = refusal(untouched)
    assert (error.exit_code, error.id) == (5, "E0570")
    assert str(error.place) == str(untouched / "model.safetensors")


# ---------------------------------------------------------------------------------------------------- the card


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_contains_the_manifests_fields(untouched):
    card = model_card(untouched, "me/rm", json.loads((untouched / "rmtool.json").read_text()))
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "rmtool"],
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "datasets": ["Anthropic/hh-rlhf"],
    }
    assert "| eval/rm/accuracy | 0.7188 |" in card
    assert "| optimizer.lr | `1e-05` |" in card
    assert "rmtool score" in card


@pytest.mark.parametrize(("loss", "named"), [("hinge", "hinge"), ("bradley_terry", "Bradley-Terry")])
def test_the_card_names_the_loss(folder, loss, named):
    card = model_card(folder, "me/rm", {"base_model": "a/b", "settings": {"loss": loss}})
    assert f"({named} loss)" in card


def test_the_card_says_how_to_get_raw_rewards_elsewhere(folder):
    old = model_card(folder, "me/rm", {})
    assert 'function_to_apply="none"' in old
    (folder / "config.json").write_text('{"problem_type": "regression"}')
    assert 'function_to_apply="none"' not in model_card(folder, "me/rm", {})


def test_the_card_shows_no_local_path_and_no_token(tmp_path, untouched, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("private/base").mkdir(parents=True)  # reads like owner/name, and is a folder here
    facts = {
        "base_model": "private/base",
        "train_data": ["/home/private/a.jsonl:train", "C:\\private\\b.jsonl", "~/private/c.jsonl", "private/d.jsonl"],
        "recipe": "../private/small.yaml",
        "settings": {"data": {"eval": ["/home/private/e|x.jsonl"]}, "key": "hf_" + "a" * 34},
    }
    card = model_card(untouched, "me/rm", facts)
    assert "private" not in card
    assert not {"base_model", "datasets"} & front_matter(card).keys()
    assert all(
        name in card for name in ("`base`", "`b.jsonl`", "`c.jsonl`", "`d.jsonl`", "`small.yaml`", "`e x.jsonl`")
    )
    assert "a" * 34 not in card


def test_the_card_says_what_loading_in_bf16_does_to_rewards(untouched):
    measured = {"responses": 36, "std": 0.7, "rms": 0.41234, "max": 0.84, "pairs": 1630, "reordered": 59}
    facts = {"fidelity": {"loaded in bf16": measured}, "metrics": {"eval/rm/loss": 0.5}, "eval_precision": "fp16"}
    card = model_card(untouched, "me/rm", facts)
    assert "36 responses of the eval pairs differ by 0.41 standard deviations (root mean square; 0.84 at most)" in card
    assert "59 of 1,630 pairs" in card
    assert "## Evaluation (computed in fp16)" in card
    for odd in ({}, None, "x", {"loaded in bf16": None}, {"loaded in bf16": measured | {"rms": None}}):
        assert "In bfloat16, rewards near 4 are 0.03 apart." in model_card(untouched, "me/rm", {"fidelity": odd})


def test_a_card_without_facts_or_chat_template_claims_neither(folder):
    (folder / "chat_template.jinja").unlink()
    card = model_card(folder, "me/rm", {})
    assert "trained with" not in card
    assert "apply_chat_template" not in card
    assert "| " not in card
    assert front_matter(card)["library_name"] == "transformers"


@sanitizing
def test_the_cards_python_returns_the_models_own_logit(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pad_id = tokenizer.pad_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=pad_id, **sizes, initializer_range=0.5)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    snippet = re.search(r"```python\n(.*?)```", model_card(tmp_path, "me/rm", {}), re.DOTALL)[1]
    answer = "Paris<|end|><|user|>"  # control tokens in a message are text
    assert "The capital of France is Paris." in snippet
    snippet = snippet.replace("The capital of France is Paris.", answer).replace('"me/rm"', repr(str(tmp_path)))
    variables: dict[str, Any] = {}
    exec(snippet, variables)

    vocab = tokenizer.get_vocab()
    ids = [vocab["<bos>"]]
    for role, content in (("user", "What is the capital of France?"), ("assistant", answer)):
        ids += [vocab[f"<|{role}|>"], *(vocab[byte] for byte in content.replace(" ", "Ġ")), vocab["<|end|>"]]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert variables["inputs"]["input_ids"].tolist() == [ids]
    assert variables["reward"] == pytest.approx(expected, abs=1e-6)
    assert not 0 < expected < 1  # so that a sigmoid would show


def tiny_tokenizer() -> Any:
    """Bytes as tokens, and a post-processor that by default adds a second <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>"])
    bos = ("<bos>", backend.token_to_id("<bos>"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<|end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    )
    return tokenizer
