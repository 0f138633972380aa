"""A folder as a repository of the Hugging Face hub, by the hub's own client."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_hub", "upload_folder"]


def check_hub(repository: str) -> None:
    """Whether `repository` could be written to: client installed, token there, name well formed.

    To be asked before long work. Raises `ValueError` where the user has something to mend,
    `OSError` when the hub cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "Uploading needs huggingface_hub, which is not installed; install it with `pip install "
            "'matilda-train[hub]'`."
        ) from None
    owner, _, name = repository.partition("/")
    if not (owner and name) or "/" in name:
        raise ValueError(f"`--push-to-hub` must be OWNER/NAME, not {repository!r}.")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:
        raise _explained(error, repository) from None


def upload_folder(folder: str | Path, repository: str, *, private: bool, message: str) -> str:
    """Put the files of `folder` into the model repository as one commit; returns its address.

    It is made if missing; files in it that the folder lacks stay. Raises as `check_hub` does.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=message
        )
    except Exception as error:
        raise _explained(error, repository) from None
    return str(commit.commit_url)


def _explained(error: Exception, repository: str) -> Exception:
    """The client's error as a sentence with the next step."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return ValueError(
            "The hub wants a token with write access: run `hf auth login`, or set HF_TOKEN."
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return ValueError("The hub knows no such token: run `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return ValueError(f"The token may not write to {repository!r}; make one that may.")
    if isinstance(error, ValueError):
        return error
    what = (str(error) or type(error).__name__).splitlines()[0]
    return OSError(f"The hub did not take {repository!r} ({what}); run the same command again.")
