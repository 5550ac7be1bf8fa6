"""Uploading a value function to the hub of Hugging Face."""

import tempfile
from pathlib import Path

from recontrol.value import ValueFunction
from recontrol.value.card import model_card
from recontrol.version import __version__

CARD_NAME = "README.md"


def push(
    value: ValueFunction,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload value function",
    create_pr: bool = False,
) -> str:
    """Upload a value function and its model card in one commit; see `ValueFunction.push_to_hub`.

    Args:
        value: what to upload.
        repo_id: `owner/name`, or `name` for your own.
        private: whether a new repository is private.
        token: by default the one that is stored.
        revision: branch to upload to.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: `repo_id` is no name of a repository.
        OSError: the hub cannot be reached or refuses; nothing was committed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        # Written before the hub is asked for anything: what cannot be saved leaves no empty repository there.
        value.save_pretrained(folder)
        api = HfApi(token=token, library_name="recontrol", library_version=__version__)
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(name, branch=revision, exist_ok=True)
            (Path(folder) / CARD_NAME).write_text(model_card(value, name), encoding="utf-8")
            commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr)
        except OSError as error:
            raise OSError(f"could not push to {repo_id!r}: {error}") from error
    return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)
