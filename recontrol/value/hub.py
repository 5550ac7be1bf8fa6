"""Uploading a value function's folder to the hub of Hugging Face."""

from pathlib import Path

from recontrol.value.card import model_card
from recontrol.version import __version__

CARD_NAME = "README.md"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload value function",
    create_pr: bool = False,
) -> str:
    """Add the model card to a folder and upload it in one commit; arguments and result are those of `ValueFunction.push_to_hub`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    api = HfApi(token=token, library_name="recontrol", library_version=__version__)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        (Path(folder) / CARD_NAME).write_text(model_card(folder, name), encoding="utf-8")
        commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr)
    except OSError as error:
        raise OSError(f"could not push to {repo_id!r}: {error}") from error
    return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)
